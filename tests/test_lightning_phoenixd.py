"""What is phoenixd's own, against the stand-in and against answers written out."""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest

from billing.lightning import (
    BackendAuthError,
    BackendRejected,
    BackendUnavailable,
    InvoiceState,
    OutcomeUnknown,
    PaymentState,
)
from billing.lightning.node_http import NodeHttp
from billing.lightning.phoenixd import PhoenixdBackend, basic, from_settings
from billing.lightning.phoenixd_feed import Feed
from billing.lightning.simulated.faults import FaultKind
from tests.lightning_rig import SOON_S, ask, hash_of, pay, take
from tests.loopback_http import Loopback, Request, http, http_json
from tests.stand_ins import phoenixd
from tests.stand_ins.rig import StandInRig

HASH = "ab" * 32
PREIMAGE = "cd" * 32
NOW_MS = 1_790_000_000_000


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[StandInRig]:
    rig = StandInRig(tmp_path, "phoenixd")
    await rig.start()
    yield rig
    await rig.stop()


def backend_at(server: Loopback) -> PhoenixdBackend:
    url = server.url("").rstrip("/")
    client = NodeHttp("phoenixd", url, headers={"Authorization": basic("secret")})
    feed = Feed("ws" + url.removeprefix("http") + "/websocket", basic("secret"))
    return PhoenixdBackend(client, client, feed=feed)


def payment(**more: Any) -> dict[str, Any]:
    return {
        "subType": "lightning",
        "paymentHash": HASH,
        "sent": 50,
        "fees": 0,
        "createdAt": NOW_MS,
        **more,
    }


@pytest.mark.parametrize(
    "answer, state",
    [
        # Nulls are left out, and there is no field for the state.
        (http_json(payment(isPaid=False)), PaymentState.IN_FLIGHT),
        (http_json(payment(isPaid=False, completedAt=NOW_MS)), PaymentState.FAILED),
        (http_json(payment()), PaymentState.UNKNOWN),
        # Paid, with a preimage of another hash, or with none.
        (http_json(payment(isPaid=True, preimage=PREIMAGE)), PaymentState.UNKNOWN),
        (http_json(payment(isPaid=True)), PaymentState.UNKNOWN),
        (http(204), PaymentState.NOT_FOUND),
    ],
)
async def test_every_answer_to_a_look_up(answer: bytes, state: PaymentState) -> None:
    async with Loopback(lambda request: answer) as server:
        backend = backend_at(server)
        assert (await backend.lookup_payment(HASH)).state is state
        await backend.aclose()


@pytest.mark.parametrize(
    "answer, error",
    [
        (http(500, "Internal error"), OutcomeUnknown),
        (http(200, "not json"), OutcomeUnknown),
        # Of a proxy in front, perhaps; phoenixd's own is a text.
        (http_json({"error": "no such page"}, 404), OutcomeUnknown),
        (http(401, "Invalid authentication"), BackendAuthError),
    ],
)
async def test_what_is_no_answer_is_no_not_found(answer: bytes, error: type) -> None:
    async with Loopback(lambda request: answer) as server:
        backend = backend_at(server)
        with pytest.raises(error):
            await backend.lookup_payment(HASH)
        await backend.aclose()


@pytest.mark.parametrize("other, found", [(400, True), (404, False), (502, False)])
async def test_404_is_not_found_only_of_a_node_that_knows_the_address(
    other: int, found: bool
) -> None:
    """An old version, or a proxy, says 404 to every address: that is no word about a payment."""

    def answer(request: Request) -> bytes:
        known = request.path.endswith(HASH)
        return http(404 if known else other, "Unknown endpoint (check api doc)")

    async with Loopback(answer) as server:
        backend = backend_at(server)
        if found:
            assert (await backend.lookup_payment(HASH)).state is PaymentState.NOT_FOUND
        else:
            with pytest.raises(OutcomeUnknown):
                await backend.lookup_payment(HASH)
        await backend.aclose()


async def test_bodies_are_forms_and_the_user_has_no_name(rig: StandInRig) -> None:
    def answer(request: Request) -> bytes:
        return http_json([] if request.method == "GET" else {"serialized": "lnbcrt1"})

    async with Loopback(answer) as server:
        backend = backend_at(server)
        with pytest.raises(OutcomeUnknown):  # which is no invoice
            await backend.create_invoice(
                amount_msat=21_000, description="a & b", expiry_s=60, idempotency_key="k 1"
            )
        await backend.aclose()
    looked, made = server.requests
    assert looked.query == {"all": "true", "externalId": "k 1"}
    assert made.headers["content-type"] == "application/x-www-form-urlencoded"
    assert parse_qs(made.body.decode()) == {
        "amountSat": ["21"],
        "description": ["a & b"],
        "expirySeconds": ["60"],
        "externalId": ["k 1"],
    }
    kind, _, credential = made.headers["authorization"].partition(" ")
    assert (kind, base64.b64decode(credential)) == ("Basic", b":secret")


@pytest.mark.parametrize("amount_msat, fee_msat", [(1_000, 4_004), (250_000, 5_000), (1, 4_001)])
async def test_the_fee_schedule_is_rounded_up(
    rig: StandInRig, amount_msat: int, fee_msat: int
) -> None:
    """4 sat and 0.4 %, by its source."""
    assert await rig.backend.worst_case_fee_msat(amount_msat) == fee_msat


async def test_what_it_may_charge_is_refused_before_anything_is_sent(rig: StandInRig) -> None:
    """It takes no fee limit, so a limit below its schedule is ours to keep."""
    bolt11 = await rig.their_invoice(250_000)

    async def pay_with(max_fee_msat: int) -> PaymentState:
        status = await rig.backend.pay_invoice(
            bolt11, max_fee_msat=max_fee_msat, timeout_s=SOON_S, max_cltv_blocks=None
        )
        return status.state

    with pytest.raises(BackendRejected) as refusal:
        await pay_with(4_999)
    assert refusal.value.reason == "fee_limit"
    assert all(path != "/payinvoice" for _, path, _ in rig.core.requests)
    assert await pay_with(5_000) is PaymentState.SUCCEEDED


async def test_an_expired_invoice_is_refused_by_us_as_the_node_does_not_look(
    rig: StandInRig,
) -> None:
    bolt11 = await rig.their_invoice(50_000, expiry_s=60)
    await rig.pass_time(61)
    with pytest.raises(BackendRejected) as refusal:
        await pay(rig, bolt11)
    assert refusal.value.reason == "expired"
    assert all(path != "/payinvoice" for _, path, _ in rig.core.requests)


async def test_a_whole_number_of_satoshis_or_nothing(rig: StandInRig) -> None:
    with pytest.raises(BackendRejected):
        await ask(rig, 1_500)
    assert all(path != "/createinvoice" for _, path, _ in rig.core.requests)


async def test_200_is_also_the_status_of_a_failure(rig: StandInRig) -> None:
    bolt11 = await rig.their_invoice(50_000)
    await rig.go_wrong(FaultKind.FAIL, "pay_invoice")
    status = await pay(rig, bolt11)
    assert (status.state, status.failure_code) == (PaymentState.FAILED, "no_route")


@pytest.mark.parametrize(
    "reason",
    [
        "this invoice has already been paid",
        "another payment is in progress for that invoice",
        "not enough funds in wallet to afford payment",
        "something nobody has heard of",
    ],
)
async def test_a_reason_without_a_record_is_no_failure(rig: StandInRig, reason: str) -> None:
    """The look-up decides; where it knows nothing, nothing is known."""
    assert await paying(rig, reason, http(204)) is PaymentState.UNKNOWN


async def test_a_reason_that_speaks_of_another_payment_is_never_a_failure(
    rig: StandInRig,
) -> None:
    failed = http_json(payment(isPaid=False, completedAt=NOW_MS))
    assert await paying(rig, "no route", failed) is PaymentState.FAILED
    paid = "this invoice has already been paid"
    assert await paying(rig, paid, failed) is PaymentState.UNKNOWN


async def paying(rig: StandInRig, reason: str, looked_up: bytes) -> PaymentState:
    """What a pay call comes to that gives this reason, with that look-up after it."""
    bolt11 = await rig.their_invoice(50_000)
    info = await rig.backend.node_info()

    def answer(request: Request) -> bytes:
        match request.path:
            case "/getinfo":
                words = {"nodeId": info.pubkey, "chain": "regtest", "version": "v"}
                return http_json({**words, "blockHeight": 1, "channels": []})
            case "/getbalance":
                return http_json({"balanceSat": 10_000, "feeCreditSat": 0})
            case "/payments/outgoing":
                return http_json([])
            case "/payinvoice":
                return http_json({"paymentHash": hash_of(bolt11), "reason": reason})
            case _:
                return looked_up

    async with Loopback(answer) as server:
        backend = backend_at(server)
        status = await backend.pay_invoice(
            bolt11, max_fee_msat=9_999, timeout_s=SOON_S, max_cltv_blocks=None
        )
        await backend.aclose()
    return status.state


async def test_fee_credit_is_not_spendable(rig: StandInRig) -> None:
    await rig.drain()
    assert (await rig.backend.balance()).spendable_msat == 0
    assert isinstance(rig.backend, PhoenixdBackend)
    assert await rig.backend.fee_credit_msat() == phoenixd.FEE_CREDIT_SAT * 1000


async def test_the_preimage_of_an_unpaid_invoice_stays_here(
    rig: StandInRig, caplog: pytest.LogCaptureFixture
) -> None:
    """phoenixd shows it in ordinary answers; whoever knows it can "prove" a payment."""
    caplog.set_level(logging.DEBUG)
    invoice = await ask(rig)
    again = await rig.backend.lookup_invoice(invoice.payment_hash)
    preimage = await rig.core.preimage(invoice.payment_hash)
    assert again.state is InvoiceState.OPEN
    assert preimage not in repr(invoice) + repr(again) + caplog.text

    def answer(request: Request) -> bytes:
        return http_json({"preimage": preimage, "isPaid": True, "oops": "no other field"})

    async with Loopback(answer) as server:
        backend = backend_at(server)
        with pytest.raises(OutcomeUnknown) as error:
            await backend.lookup_invoice(invoice.payment_hash)
        await backend.aclose()
    assert preimage not in str(error.value) + repr(error.value)


async def test_what_the_payer_sent_counts_though_part_of_it_bought_a_channel() -> None:
    answer = http_json(
        {
            "paymentHash": HASH,
            "isPaid": True,
            "receivedSat": 7_000,
            "fees": 3_000_500,
            "completedAt": NOW_MS,
        }
    )
    async with Loopback(lambda request: answer) as server:
        backend = backend_at(server)
        status = await backend.lookup_invoice(HASH)
        await backend.aclose()
    assert status.amount_received_msat == 10_000_500


async def test_a_reconnect_pages_the_history_with_a_minute_of_overlap(
    rig: StandInRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no resume: what came while nobody listened is in the history, over several pages."""
    monkeypatch.setattr("billing.lightning.phoenixd._PAGE", 2)
    invoices = [await ask(rig) for _ in range(5)]
    for invoice in invoices:
        await rig.pay_us(invoice.bolt11)
    last = await rig.backend.lookup_invoice(invoices[-1].payment_hash)
    taken = await take(rig, last.cursor, 5)
    assert {one.payment_hash for one in taken} == {one.payment_hash for one in invoices}
    pages = [body for _, path, body in rig.core.requests if path == "/payments/incoming"]
    asked = [body for body in pages if "from" in body]
    assert [body["offset"] for body in asked] == ["0", "2", "4"]
    assert {int(body["from"]) for body in asked} == {int(str(last.cursor)) - 60_000}


async def test_the_stream_is_open_before_the_history_is_read(rig: StandInRig) -> None:
    """Else a payment between the two would be missed."""
    old, new = await ask(rig), await ask(rig)
    await rig.pay_us(old.bolt11)
    stream = rig.backend.settlements(None)
    async with asyncio.timeout(SOON_S):
        first = await anext(stream)
        await rig.pay_us(new.bolt11)
        second = await anext(stream)
    await stream.aclose()  # type: ignore[attr-defined]
    assert [first.payment_hash, second.payment_hash] == [old.payment_hash, new.payment_hash]


async def test_a_stream_that_cannot_be_opened_says_why(rig: StandInRig) -> None:
    for backend, error in (
        (rig.backend_with(receive="wrong"), BackendAuthError),
        (rig.backend_with(url="http://127.0.0.1:1"), BackendUnavailable),
    ):
        with pytest.raises(error):
            await anext(backend.settlements(None))
        await backend.aclose()


async def test_the_limited_password_cannot_pay(rig: StandInRig) -> None:
    limited = phoenixd.LIMITED_PASSWORD
    split = rig.backend_with(receive=limited, pay=phoenixd.PASSWORD)
    only = rig.backend_with(receive=limited)
    bolt11 = await rig.their_invoice(50_000)
    with pytest.raises(BackendAuthError):
        await only.pay_invoice(bolt11, max_fee_msat=9_999, timeout_s=1.0, max_cltv_blocks=None)
    assert await rig.left_msat(hash_of(bolt11)) == 0
    status = await split.pay_invoice(
        bolt11, max_fee_msat=9_999, timeout_s=SOON_S, max_cltv_blocks=None
    )
    assert status.state is PaymentState.SUCCEEDED
    await split.aclose()
    await only.aclose()


@pytest.mark.parametrize(
    "settings, words",
    [
        ({}, "SATHERD_PHOENIXD_URL"),
        ({"url": "http://127.0.0.1:9740"}, "SATHERD_PHOENIXD_PASSWORD"),
        ({"url": "http://:secret@node", "password": "p"}, "without user and password"),
    ],
)
def test_what_is_wrong_with_settings_is_said(settings: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        from_settings(**settings)
    assert "secret" not in str(error.value)
