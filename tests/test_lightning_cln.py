"""What is Core Lightning's own, against the stand-in and against answers written out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from billing.lightning import (
    BackendAuthError,
    InvoiceState,
    OutcomeUnknown,
    PaymentState,
    PaymentStatus,
)
from billing.lightning.cln import ENDED_AFTER_S, ClnBackend, from_settings
from billing.lightning.node_http import NodeHttp
from billing.lightning.simulated.faults import FaultKind
from tests.lightning_rig import SOON_S, answers, ask, hash_of, pay, take
from tests.loopback_http import Loopback, Request, http_json
from tests.stand_ins import cln
from tests.stand_ins.rig import StandInRig

HASH = "ab" * 32
BEGUN_AT_S = 1_790_000_000


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[StandInRig]:
    rig = StandInRig(tmp_path, "cln")
    await rig.start()
    yield rig
    await rig.stop()


def part(status: str, **more: Any) -> dict[str, Any]:
    return {"status": status, "created_at": BEGUN_AT_S, **more}


async def look_up(
    pays: list[dict[str, Any]], parts: list[dict[str, Any]], *, after_s: float = ENDED_AFTER_S
) -> PaymentStatus:
    """A look-up so long after the payment was begun, of a node whose two lists say this."""

    def answer(request: Request) -> bytes:
        if request.path == "/v1/listpays":
            return http_json({"pays": pays}, 201)
        return http_json({"payments": parts}, 201)

    async with Loopback(answer) as server:
        http = NodeHttp("cln", server.url("").rstrip("/"), headers={})
        backend = ClnBackend(http, http, clock=lambda: BEGUN_AT_S + after_s)
        status = await backend.lookup_payment(HASH)
        await backend.aclose()
    return status


@pytest.mark.parametrize(
    "pays, parts, state",
    [
        ([], [], PaymentState.NOT_FOUND),
        ([part("pending")], [part("pending")], PaymentState.IN_FLIGHT),
        # xpay says "failed" while a part is still out, and the other way round.
        ([part("failed")], [part("failed"), part("pending")], PaymentState.IN_FLIGHT),
        ([part("pending")], [part("failed")], PaymentState.IN_FLIGHT),
        ([part("failed"), part("pending")], [], PaymentState.IN_FLIGHT),
        ([part("failed")], [part("failed")], PaymentState.FAILED),
        ([], [part("failed")], PaymentState.FAILED),
        # Words that contradict each other, or that nobody knows.
        ([part("failed")], [part("complete")], PaymentState.UNKNOWN),
        ([part("something-new")], [], PaymentState.UNKNOWN),
        # Complete without the preimage proves nothing.
        ([part("complete", amount_sent_msat=1_000)], [], PaymentState.UNKNOWN),
        (
            [part("failed"), part("complete", amount_sent_msat=1, preimage="00" * 32)],
            [],
            PaymentState.UNKNOWN,
        ),
    ],
)
async def test_every_pair_of_lists(
    pays: list[dict[str, Any]], parts: list[dict[str, Any]], state: PaymentState
) -> None:
    assert (await look_up(pays, parts)).state is state


async def test_failed_is_not_said_while_the_pay_call_may_go_on() -> None:
    """Between two attempts all parts can be failed for a moment while xpay is still running."""
    lists = [part("failed")], [part("failed")]
    assert (await look_up(*lists, after_s=ENDED_AFTER_S - 1)).state is PaymentState.UNKNOWN
    late = [part("failed")], [part("failed"), part("failed", created_at=BEGUN_AT_S + 50)]
    assert (await look_up(*late, after_s=ENDED_AFTER_S)).state is PaymentState.UNKNOWN
    assert (await look_up(*late, after_s=ENDED_AFTER_S + 50)).state is PaymentState.FAILED


async def test_amounts_are_read_with_and_without_their_unit(rig: StandInRig) -> None:
    """Versions before 23.x wrote "50000msat"; the stand-in's listpays does too."""
    bolt11 = await rig.their_invoice(50_000)
    status = await pay(rig, bolt11)
    assert await rig.backend.lookup_payment(hash_of(bolt11)) == status
    assert (status.amount_msat, status.fee_msat) == (50_000, 1_050)
    assert answers(status.preimage, hash_of(bolt11))


async def test_a_payment_asks_for_its_limits(rig: StandInRig) -> None:
    bolt11 = await rig.their_invoice(50_000)
    await rig.backend.pay_invoice(bolt11, max_fee_msat=7_000, timeout_s=500, max_cltv_blocks=900)
    [body] = [body for _, method, body in rig.core.requests if method == "xpay"]
    assert body == {"invstring": bolt11, "maxfee": 7_000, "retry_for": 60, "maxdelay": 900}


@pytest.mark.parametrize("code", [-1, 200, 203, 205, 206, 207, 209, 210, 219, 12_345])
async def test_no_error_of_a_pay_call_is_a_failure(rig: StandInRig, code: int) -> None:
    """lightning.md 1.2: none proves that nothing is in flight; 209 came although it completed."""
    bolt11 = await rig.their_invoice(50_000)
    info = await rig.backend.node_info()

    def answer(request: Request) -> bytes:
        match request.path.rpartition("/")[2]:
            case "getinfo":
                return http_json({"id": info.pubkey, "version": "v", "network": "regtest"}, 201)
            case "listpeerchannels":
                channel = {
                    "state": "CHANNELD_NORMAL",
                    "peer_connected": True,
                    "spendable_msat": 10**9,
                }
                return http_json({"channels": [channel]}, 201)
            case "listpays":
                return http_json({"pays": [part("failed")]}, 201)
            case "listsendpays":
                return http_json({"payments": [part("failed")]}, 201)
            case _:
                return http_json({"code": code, "message": "no"}, 500)

    async with Loopback(answer) as server:
        http = NodeHttp("cln", server.url("").rstrip("/"), headers={})
        backend = ClnBackend(http, http, clock=lambda: BEGUN_AT_S - 10**9)
        status = await backend.pay_invoice(
            bolt11, max_fee_msat=9_999, timeout_s=SOON_S, max_cltv_blocks=None
        )
        await backend.aclose()
    assert status.state is PaymentState.UNKNOWN
    assert status.failure_code


async def test_a_held_payment_that_xpay_calls_failed_is_in_flight(rig: StandInRig) -> None:
    bolt11 = await rig.their_invoice(50_000)
    await rig.go_wrong(FaultKind.HANG, "pay_invoice")
    assert (await pay(rig, bolt11, timeout_s=0.2)).state is PaymentState.IN_FLIGHT
    # The second call is refused with code 200, "pending": that is the first payment's state.
    again = await pay(rig, bolt11)
    assert again.state is PaymentState.IN_FLIGHT
    await rig.resolve(hash_of(bolt11), settle=True)


async def test_the_label_is_the_key(rig: StandInRig) -> None:
    made = await rig.backend.create_invoice(
        amount_msat=1_000, description="x", expiry_s=60, idempotency_key="quote-7"
    )
    again = await rig.backend.create_invoice(
        amount_msat=1_000, description="x", expiry_s=60, idempotency_key="quote-7"
    )
    assert again == made
    bodies = [body for _, method, body in rig.core.requests if method == "invoice"]
    assert [body["label"] for body in bodies] == ["quote-7", "quote-7"]
    assert bodies[0] == {
        "amount_msat": 1_000,
        "label": "quote-7",
        "description": "x",
        "expiry": 60,
    }


async def test_an_invoice_that_is_paid_at_this_moment_is_not_deleted() -> None:
    """Error 906: the status changed between the look and the deletion."""

    def answer(request: Request) -> bytes:
        if request.path == "/v1/listinvoices":
            return http_json({"invoices": [{"label": "k", "status": "unpaid"}]}, 201)
        assert json.loads(request.body) == {"label": "k", "status": "unpaid"}
        return http_json({"code": 906, "message": "Invoice status is paid not unpaid"}, 500)

    async with Loopback(answer) as server:
        http = NodeHttp("cln", server.url("").rstrip("/"), headers={})
        backend = ClnBackend(http, http)
        assert not await backend.cancel_invoice(HASH)
        await backend.aclose()


async def test_a_long_poll_that_ran_out_is_asked_again(
    rig: StandInRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Error 904 is only the end of one wait. An index is given each time, so nothing is missed."""
    monkeypatch.setattr("billing.lightning.cln.LONG_POLL_S", 0.05)
    first, second = await ask(rig), await ask(rig)
    await rig.pay_us(first.bolt11)
    listening = asyncio.create_task(take(rig, None, 2))
    async with asyncio.timeout(SOON_S):
        while sum(method == "waitanyinvoice" for _, method, _ in rig.core.requests) < 4:
            await asyncio.sleep(0.01)
    await rig.pay_us(second.bolt11)
    taken = await listening
    assert [one.payment_hash for one in taken] == [first.payment_hash, second.payment_hash]
    indexes = [b["lastpay_index"] for _, m, b in rig.core.requests if m == "waitanyinvoice"]
    assert indexes[0] == 0 and set(indexes[1:]) == {1}


async def test_success_is_201_and_nothing_else() -> None:
    async with Loopback(lambda request: http_json({"invoices": []}, 200)) as server:
        http = NodeHttp("cln", server.url("").rstrip("/"), headers={})
        backend = ClnBackend(http, http)
        with pytest.raises(OutcomeUnknown):
            await backend.lookup_invoice(HASH)
        await backend.aclose()


@pytest.mark.parametrize(
    "answer",
    [
        http_json({"code": 1501, "message": "Missing rune"}, 403),
        http_json({"code": 1502, "message": "Invalid rune"}, 401),
        http_json({"code": 1502, "message": "Invalid rune"}, 500),
        http_json({"error": {"code": 1502, "message": "Invalid rune"}}, 500),
    ],
)
async def test_a_refused_rune_is_told_from_other_errors(answer: bytes) -> None:
    async with Loopback(lambda request: answer) as server:
        http = NodeHttp("cln", server.url("").rstrip("/"), headers={})
        backend = ClnBackend(http, http)
        with pytest.raises(BackendAuthError):
            await backend.node_info()
        await backend.aclose()


async def test_the_rune_for_invoices_cannot_pay(rig: StandInRig) -> None:
    split = rig.backend_with(receive=cln.RECEIVE_RUNE, pay=cln.RUNE)
    only = rig.backend_with(receive=cln.RECEIVE_RUNE)
    made = await only.create_invoice(
        amount_msat=1_000, description="x", expiry_s=60, idempotency_key="k"
    )
    assert (await only.lookup_invoice(made.payment_hash)).state is InvoiceState.OPEN
    bolt11 = await rig.their_invoice(50_000)
    with pytest.raises(BackendAuthError):
        await only.pay_invoice(bolt11, max_fee_msat=9_999, timeout_s=1.0, max_cltv_blocks=None)
    status = await split.pay_invoice(
        bolt11, max_fee_msat=9_999, timeout_s=SOON_S, max_cltv_blocks=None
    )
    assert status.state is PaymentState.SUCCEEDED
    await split.aclose()
    await only.aclose()


async def test_a_peer_that_is_away_holds_nothing_spendable(rig: StandInRig) -> None:
    """The stand-in lists a second channel whose peer is not connected."""
    [wallet] = [one for one in await rig.network.wallets() if one.name == "router"]
    assert (await rig.backend.balance()).spendable_msat == wallet.balance_msat


@pytest.mark.parametrize(
    "settings, words",
    [
        ({}, "SATHERD_CLN_URL"),
        ({"url": "https://node"}, "SATHERD_CLN_RUNE"),
        ({"url": "ftp://node", "rune": "r"}, "must look like"),
    ],
)
def test_what_is_wrong_with_settings_is_said(settings: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        from_settings(**settings)
