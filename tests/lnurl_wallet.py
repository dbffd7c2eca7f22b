"""An LNURL-pay server that answers as a test tells it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from coincurve import PrivateKey

from billing.bolt11_codec import sign
from billing.errors import BadLightningAddress
from billing.lightning_address import (
    LightningAddresses,
    Payee,
    PayTerms,
    parse_ln_url,
)
from billing.outside_http import OutsideHttp
from billing.outside_url import OutsideRules
from tests.loopback_http import Loopback, Request, http_json

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
KEY = PrivateKey(bytes([1]) * 32)
METADATA = json.dumps([["text/plain", "a worker"], ["text/identifier", "worker@localhost"]])
METADATA_HASH = hashlib.sha256(METADATA.encode()).digest()
DEVELOPMENT = OutsideRules(allow_private=True)


def invoice(amount_msat: int | None, **changed: Any) -> str:
    options: dict[str, Any] = {
        "prefix": "bcrt",
        "payment_hash": secrets.token_bytes(32),
        "payment_secret": bytes(32),
        "created_at_s": int(NOW.timestamp()),
        "expiry_s": 600,
        "description_hash": METADATA_HASH,
    } | changed
    if "description" in changed:
        del options["description_hash"]
    return sign(options.pop("key", KEY), amount_msat=amount_msat, **options)


class Wallet:
    """An LNURL-pay server; a test changes what it answers."""

    def __init__(self) -> None:
        self.terms: dict[str, Any] = {
            "tag": "payRequest",
            "minSendable": 1000,
            "maxSendable": 100_000_000,
            "metadata": METADATA,
        }
        self.make: Callable[[int], object] = lambda amount_msat: {"pr": invoice(amount_msat)}
        self.server = Loopback(self.answer)
        self.first: Callable[[Request], bytes | AsyncIterator[bytes]] | None = None

    def answer(self, request: Request) -> bytes | AsyncIterator[bytes]:
        if request.path == "/callback":
            made = self.make(int(request.query["amount"]))
            return made if isinstance(made, bytes) else http_json(made)
        if self.first is not None:
            return self.first(request)
        return http_json({"callback": self.server.url("/callback?id=7")} | self.terms)

    @property
    def address(self) -> str:
        return f"worker@localhost:{self.server.port}"


@contextlib.asynccontextmanager
async def serving() -> AsyncIterator[Wallet]:
    wallet = Wallet()
    async with wallet.server:
        yield wallet


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def addresses(**options) -> LightningAddresses:
    options.setdefault("network", "regtest")
    options.setdefault("now", lambda: NOW)
    limits = options.pop("limits", None)
    return LightningAddresses(OutsideHttp(DEVELOPMENT, limits=limits), **options)


def payee_of(text: str) -> Payee:
    payee = parse_ln_url(text, allow_private=True)
    assert payee is not None
    return payee


@contextlib.contextmanager
def refused(code: str):
    with pytest.raises(BadLightningAddress) as caught:
        yield caught
    assert caught.value.code == code


async def terms_of(wallet: Wallet, **options) -> PayTerms:
    return await addresses(**options).resolve(payee_of(wallet.address))
