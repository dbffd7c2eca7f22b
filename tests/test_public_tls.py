"""One reading of the public authorities for all clients of a router."""

from __future__ import annotations

import ssl
from typing import Any

import pytest

from billing.lightning.kept_http import KeptHttp
from billing.outside_http import OutsideHttp
from billing.outside_url import OutsideRules
from billing.public_tls import public_tls


def test_whoever_connects_to_strangers_shares_one_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    read, readings = ssl.create_default_context, []

    def counting(*args: Any, **kwargs: Any) -> ssl.SSLContext:
        readings.append(args)
        return read(*args, **kwargs)

    public_tls.cache_clear()
    monkeypatch.setattr(ssl, "create_default_context", counting)
    for _ in range(3):
        OutsideHttp(OutsideRules())
        KeptHttp("https://node.example", connect_timeout_s=1, most=1)
    assert len(readings) == 1


def test_names_and_certificates_are_checked() -> None:
    assert public_tls().check_hostname
    assert public_tls().verify_mode == ssl.CERT_REQUIRED
    assert public_tls().cert_store_stats()["x509_ca"] > 0
