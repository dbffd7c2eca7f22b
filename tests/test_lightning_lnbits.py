"""LNbits beyond the conformance suite, before a stand-in that answers as 1.6.2 does."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import JSONResponse, PlainTextResponse, Response

from billing.lightning import (
    BackendAuthError,
    BackendError,
    BackendRejected,
    InvoiceState,
    OutcomeUnknown,
    PaymentState,
)
from billing.lightning.lnbits import from_settings
from billing.lightning.simulated.faults import FaultKind
from tests.lightning_rig import ask, hash_of, pay, take
from tests.stand_ins.lnbits import ADMIN_KEY, INVOICE_KEY
from tests.stand_ins.wallet_rig import WalletRig


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[WalletRig]:
    rig = WalletRig(tmp_path, "lnbits")
    await rig.start()
    yield rig
    await rig.stop()


@pytest.mark.parametrize(
    "settings, word",
    [
        ({}, "SATHERD_LNBITS_URL"),
        ({"url": "ftp://x", "key": "k"}, "SATHERD_LNBITS_URL"),
        ({"url": "https://user:pw@x", "key": "k"}, "SATHERD_LNBITS_URL"),
        ({"url": "https://lnbits.example.com"}, "SATHERD_LNBITS_KEY"),
    ],
)
def test_settings_that_lack_something_say_what(settings: dict[str, str], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        from_settings(**settings)


async def test_a_wrong_key_is_the_operators_business(rig: WalletRig) -> None:
    stranger = rig.lnbits_backend(key="no such key", pay_key=None)
    invoice = await ask(rig)
    # LNbits tells strangers too whether an invoice is paid; we do not take that for an answer.
    for question in (
        stranger.node_info(),
        stranger.balance(),
        stranger.lookup_invoice(invoice.payment_hash),
    ):
        with pytest.raises(BackendAuthError):
            await question
    await stranger.aclose()


async def test_without_the_admin_key_nothing_is_paid(rig: WalletRig) -> None:
    receiver = rig.lnbits_backend(pay_key=None)
    assert (await receiver.node_info()).network == "regtest"
    with pytest.raises(BackendRejected) as refusal:
        await receiver.pay_invoice(
            await rig.their_invoice(50_000), max_fee_msat=10**6, timeout_s=5, max_cltv_blocks=None
        )
    assert refusal.value.reason == "unsupported"
    assert ADMIN_KEY not in str(refusal.value)
    await receiver.aclose()


async def test_an_invoice_key_in_place_of_the_admin_key_is_refused(rig: WalletRig) -> None:
    mistaken = rig.lnbits_backend(pay_key=INVOICE_KEY)
    with pytest.raises(BackendAuthError):
        await mistaken.pay_invoice(
            await rig.their_invoice(50_000), max_fee_msat=10**6, timeout_s=5, max_cltv_blocks=None
        )
    await mistaken.aclose()


async def test_the_network_is_read_from_an_invoice_once(rig: WalletRig) -> None:
    for _ in range(2):
        assert (await rig.backend.node_info()).network == "regtest"
    created = [body for _, _, body in rig.core.requests if not body["out"]]
    assert len(created) == 1
    assert created[0]["amount"] == 1


async def test_whole_satoshis_go_over_the_wire_and_nothing_else(rig: WalletRig) -> None:
    await ask(rig, 21_000)
    [(_, _, body)] = rig.core.requests
    assert body["amount"] == 21 and isinstance(body["amount"], int)
    with pytest.raises(BackendRejected):
        await ask(rig, 1_500)
    assert len(rig.core.requests) == 1


async def test_nothing_secret_is_logged_or_kept(
    rig: WalletRig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    invoice = await ask(rig)
    preimage = await rig.core.preimage(invoice.payment_hash)
    status = await rig.backend.lookup_invoice(invoice.payment_hash)
    assert status.state is InvoiceState.OPEN
    await rig.pay_us(invoice.bolt11)
    await take(rig, None, 1)
    logged = [
        one for one in caplog.records if one.name.startswith(("billing", "websockets.client"))
    ]
    said = "".join(one.getMessage() for one in logged)
    assert preimage not in repr(invoice) + repr(status) + said
    assert INVOICE_KEY not in said and ADMIN_KEY not in said


def error(words: str, status: str) -> Response:
    return JSONResponse({"detail": words, "status": status}, status_code=520)


@pytest.mark.parametrize(
    "answer, expected",
    [
        (error("Insufficient balance.", "failed"), "insufficient_funds"),
        (error("You must reserve at least (2  sat)", "failed"), "insufficient_funds"),
        (JSONResponse({"detail": "Wallet not found."}, 404), BackendAuthError),
        (JSONResponse({"detail": "no"}, 403), BackendAuthError),
        (PlainTextResponse("Bad Gateway", 502), OutcomeUnknown),
        (JSONResponse({"detail": "?"}, 500), OutcomeUnknown),
        (PlainTextResponse("<html>", 201), OutcomeUnknown),
        (JSONResponse({"amount": -1}, 201), OutcomeUnknown),
        (JSONResponse({"status": "failed"}, 201), PaymentState.UNKNOWN),
        (JSONResponse({"status": "something new"}, 201), PaymentState.UNKNOWN),
        (JSONResponse({"status": "pending"}, 201), PaymentState.IN_FLIGHT),
        (
            JSONResponse({"status": "success", "preimage": "ab" * 32, "amount": -1, "fee": 0}, 201),
            PaymentState.UNKNOWN,
        ),
        # Said of an invoice that another wallet of the server has paid, or this one.
        (error("Internal invoice already paid.", "failed"), PaymentState.UNKNOWN),
        (error("Payment already paid.", "success"), PaymentState.UNKNOWN),
    ],
)
async def test_every_answer_of_the_pay_call_proves_what_it_proves(
    rig: WalletRig, answer: Response, expected: Any
) -> None:
    """An answer in place of the payment: nothing has been paid, so no look-up finds anything."""
    rig.lnbits.pay_answers.append(answer)
    bolt11 = await rig.their_invoice(50_000)
    if isinstance(expected, PaymentState):
        assert (await pay(rig, bolt11)).state is expected
        return
    with pytest.raises(BackendError) as trouble:
        await pay(rig, bolt11)
    if isinstance(expected, str):
        assert isinstance(trouble.value, BackendRejected)
        assert trouble.value.reason == expected
    else:
        assert type(trouble.value) is expected


async def test_paid_already_is_looked_up_and_found(rig: WalletRig) -> None:
    bolt11 = await rig.their_invoice(50_000)
    first = await pay(rig, bolt11)
    assert first.state is PaymentState.SUCCEEDED
    asked = len(rig.core.requests)
    assert await pay(rig, bolt11) == first
    assert len(rig.core.requests) == asked


async def test_a_server_that_reserves_more_than_is_allowed_is_not_asked(rig: WalletRig) -> None:
    rig.lnbits.reserve_min_msat = 2_000_000
    bolt11 = await rig.their_invoice(50_000)
    with pytest.raises(BackendRejected) as refusal:
        await pay(rig, bolt11)
    assert refusal.value.reason == "fee_limit"
    assert (await rig.backend.lookup_payment(hash_of(bolt11))).state is PaymentState.NOT_FOUND


async def test_pending_after_its_own_wait_is_in_flight(rig: WalletRig) -> None:
    rig.lnbits.wait_s = 0.05
    bolt11 = await rig.their_invoice(50_000)
    await rig.go_wrong(FaultKind.HANG, "pay_invoice")
    assert (await pay(rig, bolt11)).state is PaymentState.IN_FLIGHT
    await rig.resolve(hash_of(bolt11), settle=True)
    assert (await rig.backend.lookup_payment(hash_of(bolt11))).state is PaymentState.SUCCEEDED
