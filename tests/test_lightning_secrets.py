"""Nothing secret leaves a back end: not in an error, not in a log line at any level, not in a result.

What is secret: the credentials, and the preimage of an invoice that nobody has paid, which phoenixd,
LNbits and NWC wallets put into ordinary answers. All nodes here are stand-ins.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from billing.lightning import BackendError
from billing.lightning.simulated.faults import FaultKind
from tests.lightning_rig import ask, pay
from tests.stand_ins import cln, electrum, lnbits, lnd, nwc, phoenixd
from tests.stand_ins.rig import StandInRig
from tests.stand_ins.wallet_rig import NwcRig, WalletRig

Rig = StandInRig | NwcRig | WalletRig
KINDS = ["lnd", "cln", "phoenixd", "nwc", "lnbits", "electrum"]


@pytest.fixture(params=KINDS)
async def rig(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Rig]:
    kind = request.param
    made: Rig
    if kind == "nwc":
        made = NwcRig(tmp_path)
    elif kind in ("lnbits", "electrum"):
        made = WalletRig(tmp_path, kind)
    else:
        made = StandInRig(tmp_path, kind)
    await made.start()
    yield made
    await made.stop()


def credentials(rig: Rig) -> list[str]:
    match rig.backend.name:
        case "lnd":
            return [lnd.MACAROON]
        case "cln":
            return [cln.RUNE]
        case "phoenixd":
            return [phoenixd.PASSWORD, basic("", phoenixd.PASSWORD)]
        case "lnbits":
            return [lnbits.INVOICE_KEY, lnbits.ADMIN_KEY]
        case "electrum":
            return [electrum.PASSWORD, basic(electrum.USER, electrum.PASSWORD)]
        case _:
            assert isinstance(rig, NwcRig)
            return [rig.wallet.client_key.secret.hex()]


def basic(user: str, password: str) -> str:
    return base64.b64encode(f"{user}:{password}".encode()).decode()


async def preimages(rig: Rig) -> list[str]:
    rows = await rig.network._store.run(
        lambda tx: tx.rows(
            "SELECT preimage FROM invoice WHERE state = 'open' AND wallet = 'router'"
        )
    )
    found = [row["preimage"] for row in rows]
    assert found
    return [
        *(one.hex() for one in found),
        *(base64.b64encode(one).decode() for one in found),
        nwc.UNPAID_PREIMAGE,
    ]


async def everything(rig: Rig) -> list[Any]:
    """Each call once as it should be, and once for each way in which its connection is lost."""
    said: list[Any] = []
    invoice = await ask(rig)

    async def look(call: Callable[[], Awaitable[Any]]) -> None:
        try:
            async with asyncio.timeout(3):
                said.append(await call())
        except BackendError as error:
            said.append((str(error), repr(error), error.detail, error.safe_message))
        except TimeoutError:
            pass

    async def listed() -> list[Any]:
        since = datetime.fromtimestamp(0, UTC)
        received = [one async for one in rig.backend.received_since(since)]
        return [received, [one async for one in rig.backend.sent_since(since)]]

    async def streamed() -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.3):
                async for one in rig.backend.settlements(None):
                    said.append(one)

    calls: list[tuple[str, Callable[[], Awaitable[Any]]]] = [
        ("node_info", rig.backend.node_info),
        ("balance", rig.backend.balance),
        ("create_invoice", lambda: ask(rig)),
        ("lookup_invoice", lambda: rig.backend.lookup_invoice(invoice.payment_hash)),
        ("cancel_invoice", lambda: rig.backend.cancel_invoice("00" * 32)),
        ("lookup_payment", lambda: rig.backend.lookup_payment("00" * 32)),
        ("pay_invoice", lambda: _pay(rig)),
        ("settlements", streamed),
    ]
    await look(listed)
    for operation, call in calls:
        await look(call)
        for fault in (FaultKind.DROP_BEFORE, FaultKind.DROP_AFTER):
            await rig.go_wrong(fault, operation)
            await look(call)
            await rig.network.clear_faults()
    return said


async def _pay(rig: Rig) -> Any:
    # Of what was paid the preimage is the proof, which whoever asked to pay must have.
    status = await pay(rig, await rig.their_invoice(50_000), timeout_s=1)
    return (status.state, status.failure_code)


def found_in(text: str, secrets: list[str]) -> list[str]:
    return [secret for secret in secrets if secret in text]


async def test_no_answer_error_or_log_line_holds_a_secret(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    for name in (None, "httpx", "httpcore", "websockets", "billing"):
        caplog.set_level(logging.DEBUG, name)
    said = await everything(rig)
    secrets = [*credentials(rig), *await preimages(rig)]
    assert found_in(repr(said), secrets) == []
    # A stand-in's own server logs what it is sent; a real one is not in this process.
    ours = [record.getMessage() for record in caplog.records if "server" not in record.name.lower()]
    assert len(ours) > 10
    assert found_in("\n".join(ours), secrets) == []
    assert found_in(repr(vars(rig.backend)), credentials(rig)) == []


async def test_a_refused_credential_is_not_repeated(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = "deadbeefdeadbeef"
    match rig:
        case StandInRig():
            other = rig.backend_with(receive=wrong)
        case WalletRig() if rig.backend.name == "lnbits":
            other = rig.lnbits_backend(key=wrong, pay_key=wrong)
        case WalletRig():
            other = rig.electrum_backend(password=wrong)
        case _:
            pytest.skip("a wallet does not answer a key that it does not know")
    caplog.set_level(logging.DEBUG)
    with pytest.raises(BackendError) as refused:
        await other.balance()
    await other.aclose()
    told = f"{refused.value!r} {refused.value} {refused.value.detail}"
    ours = "\n".join(r.getMessage() for r in caplog.records if "server" not in r.name.lower())
    assert found_in(told + ours, [wrong, basic("", wrong), basic(electrum.USER, wrong)]) == []
