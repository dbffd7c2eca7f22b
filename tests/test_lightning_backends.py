"""The conformance suite of Lightning back ends: what billing relies on, the same for every node.

A back end joins by a rig: its node, somebody who pays it, somebody whom it pays, and the means to
make things go wrong. The rules are those of `billing.lightning`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from coincurve import PrivateKey

from billing import bolt11_codec
from billing.lightning import (
    BackendRejected,
    BackendUnavailable,
    Invoice,
    InvoiceState,
    OutcomeUnknown,
    PaymentState,
    SentPayment,
    Settlement,
    cln_lists,
    lnbits_feed,
    lnd_lists,
    nwc,
    phoenixd,
)
from billing.lightning.simulated import backend as simulated_backend
from billing.lightning.simulated import network as simulated_network
from billing.lightning.simulated.faults import FaultKind
from tests.lightning_rig import (
    ENOUGH_FEE_MSAT,
    SOON_S,
    Rig,
    SimulatedRig,
    answers,
    ask,
    beginning,
    hash_of,
    pay,
    take,
    until,
)
from tests.stand_ins.rig import StandInRig

_PAGES = [
    (lnd_lists, "_PAGE"),
    (cln_lists, "_PAGE"),
    (phoenixd, "_PAGE"),
    (nwc, "_PAGE"),
    (lnbits_feed, "_PAGE"),
    (simulated_backend, "PAGE"),
    (simulated_network, "PAGE"),
]
SIMULATED = ["simulated in process", "simulated over HTTP"]
STAND_INS = ["lnd (stand-in)", "cln (stand-in)", "phoenixd (stand-in)"]


@pytest.fixture(params=[*SIMULATED, *STAND_INS])
async def rig(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Rig]:
    if request.param in SIMULATED:
        rig = SimulatedRig(tmp_path, over_http=request.param == "simulated over HTTP")
    else:
        rig = StandInRig(tmp_path, request.param.partition(" ")[0])
    await rig.start()
    yield rig
    # Whatever a test has done to the nodes, no money may have come from nowhere or gone there.
    assert (await rig.network.audit()).balances
    await rig.stop()


# The node


async def test_it_says_what_it_is(rig: Rig) -> None:
    info = await rig.backend.node_info()
    assert info.network == "regtest"
    # Of the others it is not the node's answer that says so, but that no real one was asked.
    assert info.simulated is (rig.backend.name == "simulated")
    assert info.synced
    assert len(bytes.fromhex(info.pubkey)) == 33


# Receiving


async def test_an_invoice_says_what_was_asked_for(rig: Rig) -> None:
    before = datetime.now(UTC) - timedelta(seconds=2)
    # Where the node can, an amount that is no whole number of satoshis.
    asked_msat = 12_345 if rig.backend.capabilities.granularity_msat == 1 else 12_000
    invoice = await ask(rig, asked_msat, expiry_s=90)
    decoded = bolt11_codec.decode(invoice.bolt11)
    assert decoded.network == "regtest"
    assert decoded.amount_msat == invoice.amount_msat == asked_msat
    assert decoded.payment_hash == invoice.payment_hash
    assert decoded.expires_at == invoice.expires_at
    assert decoded.expiry_s == 90
    assert decoded.description == "a prompt"
    assert decoded.has_payment_secret
    assert decoded.payee_pubkey == (await rig.backend.node_info()).pubkey
    assert before <= invoice.created_at <= datetime.now(UTC)


async def test_every_invoice_has_a_hash_of_its_own(rig: Rig) -> None:
    invoices = await asyncio.gather(*(ask(rig) for _ in range(30)))
    assert len({invoice.payment_hash for invoice in invoices}) == 30


async def test_the_same_key_gives_the_same_invoice(rig: Rig) -> None:
    async def create(amount_msat: int) -> Invoice:
        return await rig.backend.create_invoice(
            amount_msat=amount_msat, description="x", expiry_s=60, idempotency_key="quote-same"
        )

    assert await create(1_000) == await create(1_000)
    with pytest.raises(BackendRejected) as refusal:
        await create(2_000)
    assert refusal.value.reason == "conflict"


@pytest.mark.parametrize(
    "amount_msat, description, expiry_s",
    [(0, "x", 60), (-1, "x", 60), (10**20, "x", 60), (1_000, "x" * 640, 60), (1_000, "x", 0)],
)
async def test_impossible_terms_are_rejected(
    rig: Rig, amount_msat: int, description: str, expiry_s: int
) -> None:
    with pytest.raises(BackendRejected):
        await rig.backend.create_invoice(
            amount_msat=amount_msat,
            description=description,
            expiry_s=expiry_s,
            idempotency_key="quote-impossible",
        )


async def test_a_paid_invoice_is_settled(rig: Rig) -> None:
    invoice = await ask(rig)
    before = await rig.backend.lookup_invoice(invoice.payment_hash)
    assert (before.state, before.amount_received_msat) == (InvoiceState.OPEN, 0)
    balance_before = await rig.backend.balance()

    preimage = await rig.pay_us(invoice.bolt11)

    assert answers(preimage, invoice.payment_hash)
    after = await rig.backend.lookup_invoice(invoice.payment_hash)
    assert after.state is InvoiceState.SETTLED
    assert after.amount_received_msat == 21_000
    assert after.settled_at is not None and after.settled_at.tzinfo is not None
    balance_after = await rig.backend.balance()
    assert balance_after.spendable_msat == balance_before.spendable_msat + 21_000


async def test_an_unknown_invoice_is_not_found(rig: Rig) -> None:
    assert (await rig.backend.lookup_invoice("00" * 32)).state is InvoiceState.NOT_FOUND


async def test_an_invoice_is_paid_once(rig: Rig) -> None:
    invoice = await ask(rig)
    first = await rig.pay_us(invoice.bolt11)
    balance = await rig.backend.balance()
    assert await rig.pay_us(invoice.bolt11) == first
    assert await rig.backend.balance() == balance


async def test_an_invoice_expires_unpaid(rig: Rig) -> None:
    invoice = await ask(rig, expiry_s=60)
    await rig.pass_time(61)
    # LND cancels it by itself, which is more.
    state = (await rig.backend.lookup_invoice(invoice.payment_hash)).state
    assert state in (InvoiceState.EXPIRED, InvoiceState.CANCELED)
    with pytest.raises(BackendRejected):
        await rig.pay_us(invoice.bolt11)


async def test_a_canceled_invoice_can_never_settle(rig: Rig) -> None:
    invoice = await ask(rig)
    if not rig.backend.capabilities.cancel_invoice:
        assert not await rig.backend.cancel_invoice(invoice.payment_hash)
        await rig.pay_us(invoice.bolt11)
        return
    assert await rig.backend.cancel_invoice(invoice.payment_hash)
    # CLN deletes it, and then knows nothing of it; twice is harmless all the same.
    forgets = rig.backend.name == "cln"
    assert await rig.backend.cancel_invoice(invoice.payment_hash) is not forgets
    state = (await rig.backend.lookup_invoice(invoice.payment_hash)).state
    assert state is (InvoiceState.NOT_FOUND if forgets else InvoiceState.CANCELED)
    with pytest.raises(BackendRejected):
        await rig.pay_us(invoice.bolt11)


async def test_a_settled_invoice_cannot_be_canceled(rig: Rig) -> None:
    invoice = await ask(rig)
    await rig.pay_us(invoice.bolt11)
    assert not await rig.backend.cancel_invoice(invoice.payment_hash)
    assert (await rig.backend.lookup_invoice(invoice.payment_hash)).state is InvoiceState.SETTLED


async def test_nobody_can_promise_for_an_unknown_invoice(rig: Rig) -> None:
    assert not await rig.backend.cancel_invoice("00" * 32)


async def test_an_invoice_lost_on_its_way_is_found_again_by_its_key(rig: Rig) -> None:
    await rig.go_wrong(FaultKind.DROP_AFTER, "create_invoice")

    async def create() -> Invoice:
        return await rig.backend.create_invoice(
            amount_msat=5_000, description="x", expiry_s=60, idempotency_key="quote-lost"
        )

    with pytest.raises(OutcomeUnknown):
        await create()
    found = await create()
    assert await create() == found


# The stream of settlements


async def test_settlements_come_in_order_and_resume_after_a_cursor(rig: Rig) -> None:
    start = await beginning(rig)
    invoices = [await ask(rig, 1_000 * n) for n in (1, 2, 3, 4)]
    for invoice in invoices:
        await rig.pay_us(invoice.bolt11)

    settlements = await take(rig, start, 4)

    assert [s.payment_hash for s in settlements] == [i.payment_hash for i in invoices]
    assert [s.amount_received_msat for s in settlements] == [1_000, 2_000, 3_000, 4_000]
    assert all(settlement.settled_at.tzinfo is not None for settlement in settlements)
    if rig.backend.capabilities.push == "cursor":
        assert await take(rig, settlements[1].cursor, 2) == settlements[2:]
    else:
        # With some overlap, which is recorded once, and without a gap.
        assert (await take(rig, settlements[1].cursor, 4))[2:] == settlements[2:]
    looked_up = await rig.backend.lookup_invoice(invoices[2].payment_hash)
    assert looked_up.cursor == settlements[2].cursor


async def test_a_settlement_comes_while_one_listens(rig: Rig) -> None:
    start = await beginning(rig)
    listening = asyncio.create_task(take(rig, start, 2))
    invoices = [await ask(rig), await ask(rig)]
    for invoice in invoices:
        await rig.pay_us(invoice.bolt11)
    settlements = await listening
    assert [s.payment_hash for s in settlements] == [i.payment_hash for i in invoices]


async def test_a_broken_stream_says_so_and_loses_nothing(rig: Rig) -> None:
    start = await beginning(rig)
    invoices = [await ask(rig) for _ in range(3)]
    replayed = rig.backend.capabilities.push == "cursor"
    await rig.go_wrong(FaultKind.DROP_AFTER, "settlements")
    if replayed:
        for invoice in invoices:
            await rig.pay_us(invoice.bolt11)
    seen: list[Settlement] = []

    async def listen() -> None:
        async for settlement in rig.backend.settlements(start):
            seen.append(settlement)

    async def pay_them_all() -> None:
        # One after another, so that there is a live one to break at.
        while not replayed and len(seen) < 1:
            await rig.pay_us(invoices[0].bolt11)
            await asyncio.sleep(0.02)
        for invoice in invoices[1:]:
            await rig.pay_us(invoice.bolt11)

    with pytest.raises((OutcomeUnknown, BackendUnavailable)):
        async with asyncio.timeout(SOON_S):
            await asyncio.gather(listen(), pay_them_all())
    # Of phoenixd's the first may have come before its stream, in the history.
    assert 1 <= len(seen) <= (1 if replayed else 2)
    hashes = [invoice.payment_hash for invoice in invoices]
    assert [settlement.payment_hash for settlement in seen] == hashes[: len(seen)]
    await pay_them_all()
    if replayed:
        seen += await take(rig, seen[-1].cursor, 2)
    else:
        seen = await take(rig, seen[-1].cursor, 3)
    assert [settlement.payment_hash for settlement in seen] == hashes


async def test_an_unpaid_invoice_is_in_no_stream(rig: Rig) -> None:
    start = await beginning(rig)
    await ask(rig)
    paid = await ask(rig)
    await rig.pay_us(paid.bolt11)
    assert [s.payment_hash for s in await take(rig, start, 1)] == [paid.payment_hash]


# Its own history


async def told_by(rig: Rig, since: datetime) -> tuple[dict[str, int], dict[str, SentPayment]]:
    received = [one async for one in rig.backend.received_since(since)]
    sent = [one async for one in rig.backend.sent_since(since)]
    assert len({one.payment_hash for one in sent}) == len(sent)
    return (
        {one.payment_hash: one.amount_received_msat for one in received},
        {one.payment_hash: one for one in sent},
    )


async def test_its_lists_tell_what_came_in_and_what_left(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Page after page, the last of them not full."""
    for module, name in _PAGES:
        monkeypatch.setattr(module, name, 2)
    since = rig.now() - timedelta(seconds=5)
    await ask(rig)
    invoices = [await ask(rig, 1_000 * n) for n in (1, 2, 3, 4, 5)]
    for invoice in invoices:
        await rig.pay_us(invoice.bolt11)
    paid = {hash_of(bolt11 := await rig.their_invoice(50_000)): await pay(rig, bolt11)}
    for _ in range(2):
        bolt11 = await rig.their_invoice(70_000)
        paid[hash_of(bolt11)] = await pay(rig, bolt11)
    await rig.go_wrong(FaultKind.FAIL, "pay_invoice")
    await pay(rig, await rig.their_invoice(60_000))
    held = await rig.their_invoice(80_000)
    await rig.go_wrong(FaultKind.HANG, "pay_invoice")
    assert (await pay(rig, held, timeout_s=0.05)).state is PaymentState.IN_FLIGHT

    received, sent = await told_by(rig, since)

    assert received == {one.payment_hash: one.amount_msat for one in invoices}
    # Electrum lists nothing that is on its way.
    on_its_way = sent.pop(hash_of(held), None)
    assert (on_its_way is None) is (rig.backend.name == "electrum")
    if on_its_way is not None:
        assert (on_its_way.state, on_its_way.amount_msat) == (PaymentState.IN_FLIGHT, 80_000)
    assert sent.keys() == paid.keys()
    for payment_hash, one in sent.items():
        status = paid[payment_hash]
        assert one.state is PaymentState.SUCCEEDED
        assert (one.amount_msat, one.fee_msat) == (status.amount_msat, status.fee_msat)
        assert since <= one.sent_at <= rig.now()

    await rig.pass_time(600)
    later, _ = await told_by(rig, rig.now() - timedelta(seconds=60))
    assert later == {}


async def test_what_it_holds_is_neither_more_nor_less_while_a_payment_is_held(rig: Rig) -> None:
    before = (await rig.backend.balance()).held_msat
    await rig.go_wrong(FaultKind.HANG, "pay_invoice")
    bolt11 = await rig.their_invoice(50_000)
    assert (await pay(rig, bolt11, timeout_s=0.05)).state is PaymentState.IN_FLIGHT
    held_msat = (await rig.backend.balance()).held_msat
    # phoenixd's pending amount is without the routing fee, and in whole satoshis.
    short_msat = 2_000 if rig.backend.name == "phoenixd" else 0
    assert before - short_msat <= held_msat <= before


# Paying


async def test_a_payment_succeeds_with_a_preimage_that_proves_it(rig: Rig) -> None:
    bolt11 = await rig.their_invoice(50_000)
    before = await rig.backend.balance()
    status = await pay(rig, bolt11)
    assert status.state is PaymentState.SUCCEEDED
    assert answers(status.preimage, hash_of(bolt11))
    assert status.amount_msat == 50_000
    assert status.fee_msat is not None and 0 <= status.fee_msat <= ENOUGH_FEE_MSAT
    after = await rig.backend.balance()
    rounding_msat = rig.backend.capabilities.granularity_msat
    spent_msat = before.spendable_msat - after.spendable_msat
    assert abs(spent_msat - 50_000 - status.fee_msat) < rounding_msat
    assert after.pending_msat == 0
    assert await rig.backend.lookup_payment(hash_of(bolt11)) == status


async def test_a_payment_never_asked_for_is_not_found(rig: Rig) -> None:
    assert (await rig.backend.lookup_payment("11" * 32)).state is PaymentState.NOT_FOUND


async def test_the_same_invoice_is_paid_once(rig: Rig) -> None:
    bolt11 = await rig.their_invoice(50_000)
    first = await pay(rig, bolt11)
    assert await pay(rig, bolt11) == first
    assert await rig.left_msat(hash_of(bolt11)) == 50_000


async def test_twenty_at_once_pay_the_same_invoice_once(rig: Rig) -> None:
    bolt11 = await rig.their_invoice(50_000)
    statuses = await asyncio.gather(*(pay(rig, bolt11) for _ in range(20)))
    assert {status.state for status in statuses} <= {PaymentState.SUCCEEDED, PaymentState.IN_FLIGHT}
    assert await rig.left_msat(hash_of(bolt11)) == 50_000


async def test_a_failed_payment_costs_nothing_and_may_be_tried_again(rig: Rig) -> None:
    bolt11 = await rig.their_invoice(50_000)
    before = await rig.backend.balance()
    await rig.go_wrong(FaultKind.FAIL, "pay_invoice")
    status = await pay(rig, bolt11)
    expected = (
        PaymentState.FAILED
        if rig.backend.capabilities.failed_is_definitive
        else PaymentState.UNKNOWN
    )
    assert status.state is expected
    assert status.failure_code
    assert await rig.backend.balance() == before
    assert (await pay(rig, bolt11)).state is PaymentState.SUCCEEDED
    looked_up = await rig.backend.lookup_payment(hash_of(bolt11))
    assert looked_up.state is PaymentState.SUCCEEDED


async def test_a_payment_that_fails_late_is_in_flight_until_then(rig: Rig) -> None:
    bolt11 = await rig.their_invoice(50_000)
    before = await rig.backend.balance()
    await rig.go_wrong(FaultKind.FAIL_LATE, "pay_invoice", delay_s=30)
    granularity_msat = rig.backend.capabilities.granularity_msat
    status = await pay(rig, bolt11, timeout_s=0.05)
    assert status.state is PaymentState.IN_FLIGHT
    held = await rig.backend.balance()
    # phoenixd's pending amount is without the fee.
    assert held.pending_msat > 50_000 or granularity_msat == 1000
    assert held.pending_msat >= 50_000
    taken_msat = before.spendable_msat - held.spendable_msat
    assert taken_msat == held.pending_msat or (granularity_msat == 1000 and taken_msat > 50_000)
    # Long enough for every node to have given up on new attempts too.
    await rig.pass_time(31 + 120)
    ended = await until(lambda: rig.backend.lookup_payment(hash_of(bolt11)), PaymentState.FAILED)
    assert ended.preimage is None
    assert await rig.backend.balance() == before


async def test_a_slow_payment_is_waited_for(rig: Rig) -> None:
    bolt11 = await rig.their_invoice(50_000)
    await rig.go_wrong(FaultKind.DELAY, "pay_invoice", delay_s=0.2)
    assert (await pay(rig, bolt11)).state is PaymentState.SUCCEEDED


@pytest.mark.parametrize("settle", [True, False])
async def test_a_held_payment_is_in_flight_and_ends_either_way(rig: Rig, settle: bool) -> None:
    bolt11 = await rig.their_invoice(50_000, expiry_s=120)
    before = await rig.backend.balance()
    await rig.go_wrong(FaultKind.HANG, "pay_invoice")
    assert (await pay(rig, bolt11, timeout_s=0.05)).state is PaymentState.IN_FLIGHT
    # Again is no second payment, and long after the expiry it is still undecided.
    assert (await pay(rig, bolt11, timeout_s=0.05)).state is PaymentState.IN_FLIGHT
    await rig.pass_time(86_400)
    status = await rig.backend.lookup_payment(hash_of(bolt11))
    assert status.state is PaymentState.IN_FLIGHT

    await rig.resolve(hash_of(bolt11), settle=settle)

    status = await rig.backend.lookup_payment(hash_of(bolt11))
    after = await rig.backend.balance()
    assert after.pending_msat == 0
    if settle:
        assert status.state is PaymentState.SUCCEEDED
        assert answers(status.preimage, hash_of(bolt11))
        assert await rig.left_msat(hash_of(bolt11)) == 50_000
    else:
        assert status.state is PaymentState.FAILED
        assert after == before


async def test_whoever_waits_for_a_held_payment_learns_its_end(rig: Rig) -> None:
    bolt11 = await rig.their_invoice(50_000)
    await rig.go_wrong(FaultKind.HANG, "pay_invoice")
    waiting = asyncio.create_task(pay(rig, bolt11))
    await until(lambda: rig.backend.lookup_payment(hash_of(bolt11)), PaymentState.IN_FLIGHT)
    await rig.resolve(hash_of(bolt11), settle=True)
    assert (await waiting).state is PaymentState.SUCCEEDED


async def test_a_connection_lost_before_the_node_acts_leaves_it_unknown(rig: Rig) -> None:
    bolt11 = await rig.their_invoice(50_000)
    await rig.go_wrong(FaultKind.DROP_BEFORE, "pay_invoice")
    with pytest.raises(OutcomeUnknown):
        await pay(rig, bolt11)
    status = await rig.backend.lookup_payment(hash_of(bolt11))
    assert status.state is PaymentState.NOT_FOUND
    assert await rig.left_msat(hash_of(bolt11)) == 0


async def test_a_connection_lost_after_the_node_acted_leaves_it_unknown(rig: Rig) -> None:
    bolt11 = await rig.their_invoice(50_000)
    await rig.go_wrong(FaultKind.DROP_AFTER, "pay_invoice")
    with pytest.raises(OutcomeUnknown):
        await pay(rig, bolt11)
    await until(lambda: rig.backend.lookup_payment(hash_of(bolt11)), PaymentState.SUCCEEDED)
    assert (await pay(rig, bolt11)).state is PaymentState.SUCCEEDED
    assert await rig.left_msat(hash_of(bolt11)) == 50_000


async def test_a_caller_who_goes_away_does_not_stop_the_payment(rig: Rig) -> None:
    bolt11 = await rig.their_invoice(50_000)
    await rig.go_wrong(FaultKind.DELAY, "pay_invoice", delay_s=0.3)
    paying = asyncio.create_task(pay(rig, bolt11))
    await until(lambda: rig.backend.lookup_payment(hash_of(bolt11)), PaymentState.IN_FLIGHT)
    paying.cancel()
    with pytest.raises(asyncio.CancelledError):
        await paying
    await until(lambda: rig.backend.lookup_payment(hash_of(bolt11)), PaymentState.SUCCEEDED)


async def test_an_expired_invoice_is_not_paid(rig: Rig) -> None:
    bolt11 = await rig.their_invoice(50_000, expiry_s=60)
    await rig.pass_time(61)
    # Where the node does not check expiry, its back end does before it asks.
    with pytest.raises(BackendRejected) as refusal:
        await pay(rig, bolt11)
    assert refusal.value.reason == "expired"
    assert await rig.left_msat(hash_of(bolt11)) == 0


@pytest.mark.parametrize("prefix", ["bc", "tb", "tbs"])
async def test_an_invoice_of_another_network_is_not_paid(rig: Rig, prefix: str) -> None:
    bolt11 = bolt11_codec.sign(
        PrivateKey(),
        prefix=prefix,
        amount_msat=1_000,
        payment_hash=b"\x01" * 32,
        payment_secret=b"\x02" * 32,
        created_at_s=int(datetime.now(UTC).timestamp()),
        expiry_s=600,
        description="real money",
    )
    with pytest.raises(BackendRejected) as refusal:
        await pay(rig, bolt11)
    assert refusal.value.reason == "wrong_network"


async def test_a_broken_invoice_is_not_paid(rig: Rig) -> None:
    bolt11 = await rig.their_invoice(50_000)
    with pytest.raises(BackendRejected) as refusal:
        await pay(rig, bolt11[:-1] + ("q" if bolt11[-1] != "q" else "p"))
    assert refusal.value.reason == "malformed"


async def test_a_payee_whom_nobody_knows_cannot_be_reached(rig: Rig) -> None:
    bolt11 = bolt11_codec.sign(
        PrivateKey(),
        prefix="bcrt",
        amount_msat=1_000,
        payment_hash=b"\x01" * 32,
        payment_secret=b"\x02" * 32,
        created_at_s=int(datetime.now(UTC).timestamp()),
        expiry_s=600,
        description="from elsewhere",
    )
    before = await rig.backend.balance()
    assert (await pay(rig, bolt11)).state in (PaymentState.FAILED, PaymentState.UNKNOWN)
    assert await rig.backend.balance() == before


async def test_an_empty_node_pays_nothing(rig: Rig) -> None:
    bolt11 = await rig.their_invoice(50_000)
    await rig.drain()
    with pytest.raises(BackendRejected) as refusal:
        await pay(rig, bolt11)
    assert refusal.value.reason == "insufficient_funds"


async def test_routing_above_the_limit_is_refused(rig: Rig) -> None:
    """Some nodes have no word for it but that there is no route."""
    bolt11 = await rig.their_invoice(50_000)
    try:
        status = await rig.backend.pay_invoice(
            bolt11, max_fee_msat=0, timeout_s=SOON_S, max_cltv_blocks=None
        )
    except BackendRejected as refusal:
        assert refusal.reason == "fee_limit"
    else:
        assert status.state in (PaymentState.FAILED, PaymentState.UNKNOWN)
        assert status.failure_code == "no_route"
    assert await rig.left_msat(hash_of(bolt11)) == 0


async def test_a_route_with_too_many_blocks_is_refused(rig: Rig) -> None:
    bolt11 = await rig.their_invoice(50_000)
    with pytest.raises(BackendRejected):
        await rig.backend.pay_invoice(
            bolt11, max_fee_msat=ENOUGH_FEE_MSAT, timeout_s=SOON_S, max_cltv_blocks=5
        )
    assert await rig.left_msat(hash_of(bolt11)) == 0


async def test_a_node_does_not_pay_itself(rig: Rig) -> None:
    invoice = await ask(rig)
    with pytest.raises(BackendRejected) as refusal:
        await pay(rig, invoice.bolt11)
    assert refusal.value.reason == "self_payment"


async def test_a_node_that_lost_its_history_says_not_found_and_pays_no_second_time(
    rig: Rig,
) -> None:
    bolt11 = await rig.their_invoice(50_000)
    assert (await pay(rig, bolt11)).state is PaymentState.SUCCEEDED
    await rig.delete_history(hash_of(bolt11))
    assert (await rig.backend.lookup_payment(hash_of(bolt11))).state is PaymentState.NOT_FOUND
    # The payee does not take it twice. Its word for that is the same as for an unknown invoice.
    again = await pay(rig, bolt11)
    assert again.state in (PaymentState.FAILED, PaymentState.UNKNOWN)
    assert again.failure_code == "incorrect_payment_details"
    assert await rig.left_msat(hash_of(bolt11)) == 50_000


async def test_a_payment_may_be_forgotten_while_it_is_held(rig: Rig) -> None:
    bolt11 = await rig.their_invoice(50_000)
    await rig.go_wrong(FaultKind.FORGET, "pay_invoice")
    await rig.go_wrong(FaultKind.HANG, "pay_invoice")
    await rig.go_wrong(FaultKind.DROP_AFTER, "pay_invoice")
    with pytest.raises(OutcomeUnknown):
        await pay(rig, bolt11)
    assert (await rig.backend.lookup_payment(hash_of(bolt11))).state is PaymentState.NOT_FOUND
    await rig.resolve(hash_of(bolt11), settle=True)
    assert (await rig.backend.lookup_payment(hash_of(bolt11))).state is PaymentState.NOT_FOUND
    assert await rig.left_msat(hash_of(bolt11)) == 50_000


async def test_a_restarted_node_knows_what_it_knew(rig: Rig) -> None:
    received, open_still = await ask(rig), await ask(rig)
    await rig.pay_us(received.bolt11)
    paid, held = await rig.their_invoice(50_000), await rig.their_invoice(60_000)
    succeeded = await pay(rig, paid)
    await rig.go_wrong(FaultKind.HANG, "pay_invoice")
    assert (await pay(rig, held, timeout_s=0.05)).state is PaymentState.IN_FLIGHT
    before, info = await rig.backend.balance(), await rig.backend.node_info()

    await rig.restart()

    assert await rig.backend.node_info() == info
    assert await rig.backend.balance() == before
    state = (await rig.backend.lookup_invoice(received.payment_hash)).state
    assert state is InvoiceState.SETTLED
    assert (await rig.backend.lookup_invoice(open_still.payment_hash)).state is InvoiceState.OPEN
    assert await rig.backend.lookup_payment(hash_of(paid)) == succeeded
    assert (await rig.backend.lookup_payment(hash_of(held))).state is PaymentState.IN_FLIGHT
    await rig.resolve(hash_of(held), settle=True)
    assert (await rig.backend.lookup_payment(hash_of(held))).state is PaymentState.SUCCEEDED
    first = await rig.backend.lookup_invoice(received.payment_hash)
    await rig.pay_us(open_still.bolt11)
    replayed = rig.backend.capabilities.push == "cursor"
    *_, second = await take(rig, first.cursor, 1 if replayed else 2)
    assert second.payment_hash == open_still.payment_hash
