"""Never twice, never lost: payouts under kill -9 everywhere, faults, clock jumps, lost histories.

The simulated network is the oracle: it knows what has left the router's node, whatever the node
says (lightning.md 5.2; the numbers in brackets are its families).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest

from billing import ledger
from billing.lightning.simulated.faults import Fault, FaultKind
from billing.lightning.simulated.wallets import ROUTER
from billing.payout_states import Alert, PayoutState
from router.database import Database
from tests.payout_chaos import OWED_MSAT, Chaos, end_what_hangs
from tests.payout_payees import INVOICE_EXPIRY_S, CrashNow
from tests.payout_world import SETTINGS, Process, World


@pytest.fixture
async def world(database: Database) -> AsyncIterator[World]:
    async with World.open(database) as opened:
        yield opened
        await opened.check_books()
        await opened.check_payments()


@dataclass(frozen=True)
class Trouble:
    """Faults of one payout, and how what hangs is ended later."""

    faults: tuple[Fault, ...] = ()
    settle_later: bool = True
    # Where the process dies: in each of its places, or in some of them, for the sake of time.
    every: int = 4
    first_place: int = 0


# Long enough for the lease of a dead process to end, and for certainty about what it had sent.
AFTER_S = SETTINGS.lease_s + 41
TROUBLES = {
    "none": Trouble(every=1),
    "fail": Trouble((Fault(FaultKind.FAIL),)),
    "fail_late": Trouble((Fault(FaultKind.FAIL_LATE, delay_s=200),), first_place=1),
    "arrives_late": Trouble((Fault(FaultKind.DELAY, delay_s=200),), first_place=2),
    "arrives_after_expiry": Trouble((Fault(FaultKind.DELAY, delay_s=INVOICE_EXPIRY_S + 300),)),
    "held_then_taken": Trouble((Fault(FaultKind.HANG),), every=2),
    "held_then_refused": Trouble((Fault(FaultKind.HANG),), settle_later=False),
    "connection_lost_before": Trouble((Fault(FaultKind.DROP_BEFORE),)),
    "connection_lost_after": Trouble((Fault(FaultKind.DROP_AFTER),), every=1),
    "connection_lost_after_and_failed": Trouble(
        (Fault(FaultKind.DROP_AFTER), Fault(FaultKind.FAIL))
    ),
    "look_ups_lost": Trouble(
        (
            Fault(FaultKind.DROP_AFTER),
            Fault(FaultKind.DROP_BEFORE, operation="lookup_payment", times=3),
        )
    ),
}


async def run_until_paid(world: World, process: Process, worker_id: str) -> None:
    """Turn after turn, until nothing is owed to the worker nor on its way to it."""
    for _ in range(40):
        await process.turn()
        open_payouts = [
            p
            for p in await world.payouts(ledger.worker(worker_id))
            if p.state in (PayoutState.PLANNED, PayoutState.SENDING)
        ]
        if not open_payouts and await world.balance_msat(ledger.worker(worker_id)) == 0:
            return
        await world.decide_by_truth()
        await world.pass_time(70)
    raise AssertionError(f"not paid: {await world.payouts(ledger.worker(worker_id))}")


@pytest.mark.parametrize("name", TROUBLES)
async def test_killed_at_every_place_a_worker_is_paid_once(world: World, name: str):
    """[1, 2, 3, 4, 6] At the n-th place of its life the process dies; another one takes over."""
    trouble = TROUBLES[name]
    lives, n = False, trouble.first_place
    while not lives:
        worker_id = f"w{n}"
        await world.worker(worker_id, OWED_MSAT)
        for fault in trouble.faults:
            await world.network.script(fault)
        first = world.process(sparks_left=n)
        lives = await first.turn()
        if lives:
            await world.pass_time(6)
            lives = await first.turn()
        await world.check_payments()
        await world.pass_time(AFTER_S)
        successor = world.process()
        await successor.turn()
        await successor.turn()
        await world.network.clear_faults()
        await world.check_payments()
        if FaultKind.HANG in {fault.kind for fault in trouble.faults}:
            await end_what_hangs(world, settle=trouble.settle_later)
        await run_until_paid(world, successor, worker_id)
        assert await world.received_msat(worker_id) == OWED_MSAT
        await successor.runner.stop()
        n += trouble.every
    assert n > 20, "the process passed too few places for this to mean anything"
    await world.check_payments()
    await world.check_node()


@pytest.mark.parametrize("name", ["none", "fail", "connection_lost_after"])
async def test_killed_at_every_place_a_client_gets_its_withdrawal_or_its_money(
    world: World, name: str
):
    """[1, 3, 4] The client orders again what it got no answer for: the same invoice."""
    lives, n = False, 0
    while not lives:
        client, wallet = f"c{n}", f"purse{n}"
        await world.deposit(client, 1_000_000)
        bolt11 = await world.invoice(wallet, 700_000)
        for fault in TROUBLES[name].faults:
            await world.network.script(fault)
        first = world.process(sparks_left=n)
        lives = await orders(first, client, bolt11) and await first.turn()
        await world.pass_time(AFTER_S)
        second = world.process()
        ordered = await second.withdrawals.by_invoice(client, bolt11)
        await second.turn()
        await world.pass_time(30)
        await second.turn()
        ended = await second.withdrawals.get(client, ordered.id)
        assert ended is not None
        left_msat = await world.balance_msat(ledger.client(client))
        got_msat = await world.received_msat(wallet)
        if ended.state is PayoutState.PAID:
            assert ended.fee_msat is not None
            assert (got_msat, left_msat) == (700_000, 300_000 - ended.fee_msat)
        else:
            assert (ended.state, got_msat, left_msat) == (PayoutState.FAILED, 0, 1_000_000)
        await world.network.clear_faults()
        await second.runner.stop()
        n += 1
    assert n > 15
    await world.check_node()


async def orders(process: Process, client: str, bolt11: str) -> bool:
    """Whether the order was answered before the process died."""
    task = asyncio.create_task(process.withdrawals.by_invoice(client, bolt11))
    await asyncio.wait([task])
    return task.exception() is None


async def test_killed_again_and_again_it_still_pays_once(world: World):
    """[1, 4] Each successor lives only a little longer than the one before."""
    for n in range(4):
        await world.worker(f"w{n}", OWED_MSAT)
    await world.network.script(Fault(FaultKind.DROP_AFTER, times=2))
    for life in range(4, 40, 2):
        await world.process(sparks_left=life).turn()
        await world.pass_time(AFTER_S)
        await world.check_payments()
    survivor = world.process()
    for n in range(4):
        await run_until_paid(world, survivor, f"w{n}")
        assert await world.received_msat(f"w{n}") == OWED_MSAT


async def test_an_htlc_that_is_held_for_days_stays_unresolved_and_is_shown(world: World):
    """[1, 4] Long past the invoice's expiry, across restarts; nothing else is sent meanwhile."""
    await world.network.script(Fault(FaultKind.HANG))
    await world.worker("w1", OWED_MSAT)
    process = world.process()
    await process.turn()
    payout = await world.payout_of("w1")
    for _ in range(5):
        await world.pass_time(86_400)
        process = world.process()
        await process.turn()
        payout = await world.payout_of("w1")
        assert payout.state is PayoutState.SENDING
        assert payout.alert is Alert.IN_FLIGHT_LONG
    assert len(await world.payouts()) == 1
    assert await world.network.resolve(await world.live_hash(payout.id), settle=True) == 1
    await world.pass_time(601)
    await process.turn()
    assert (await world.payout_of("w1")).state is PayoutState.PAID


@pytest.mark.parametrize("seconds", [-3600, 3600])
async def test_a_clock_that_jumps_brings_no_second_invoice_for_what_is_under_way(
    world: World, seconds: int
):
    """[8]"""
    await world.network.script(Fault(FaultKind.HANG))
    await world.worker("w1", OWED_MSAT)
    process = world.process()
    await process.turn()
    for skew in (seconds, 0, seconds):
        world.skew = timedelta(seconds=skew)
        for _ in range(4):
            await process.turn()
            await world.pass_time(61)
    assert len(world.servers.amounts_msat) == 1
    world.skew = timedelta()
    await end_what_hangs(world, settle=True)
    await run_until_paid(world, process, "w1")
    assert await world.received_msat("w1") == OWED_MSAT


async def test_a_request_that_was_never_made_is_given_up_only_after_the_margin(world: World):
    """[2, 8] The node that never had it says so twice, a minute apart, past expiry and margin."""
    await world.worker("w1", OWED_MSAT)
    process = world.process()

    async def die_before_paying(operation: str, call: Callable) -> Any:
        if operation == "pay_invoice":
            process.fuse.dead = True
            raise CrashNow
        return await call()

    process.backend.answer = die_before_paying
    assert not await process.turn()
    assert (await world.payout_of("w1")).state is PayoutState.SENDING
    assert await world.network.paid_out(ROUTER) == []
    await world.pass_time(INVOICE_EXPIRY_S)
    survivor = world.process()
    asked = len(world.servers.asked)
    await survivor.turn()
    assert (await world.payout_of("w1")).state is PayoutState.SENDING
    await world.pass_time(180)
    await survivor.turn()
    assert (await world.payout_of("w1")).state is PayoutState.SENDING, "one look-up is not two"
    assert len(world.servers.asked) == asked, "no second invoice so far"
    await world.pass_time(61)
    await survivor.turn()
    assert (await world.payouts())[-1].error_code == "not_sent"
    await run_until_paid(world, survivor, "w1")
    assert await world.received_msat("w1") == OWED_MSAT


async def test_a_node_whose_history_was_deleted_concludes_nothing(world: World):
    """[1] It says "not found" of a payment that it has made, for ever and past every margin. The
    payment before it, which it has proved to us, gives it away."""
    await world.worker("w1", OWED_MSAT)
    process = world.process()
    await process.turn()
    await world.network.script(Fault(FaultKind.DROP_AFTER))
    await world.earn("w1", OWED_MSAT)
    await process.turn()
    assert (await world.payout_of("w1")).state is PayoutState.SENDING
    for payment in await world.network.paid_out(ROUTER):
        await world.network.forget(ROUTER, payment.payment_hash)
    for _ in range(30):
        await world.pass_time(600)
        await process.turn()
    payout = await world.payout_of("w1")
    assert (payout.state, payout.alert) == (PayoutState.SENDING, Alert.NODE_FORGOT)
    assert await world.received_msat("w1") == 2 * OWED_MSAT
    assert await world.decide_by_truth() == 1
    assert (await world.payout_of("w1")).state is PayoutState.PAID
    await world.check_node()


async def test_a_node_that_lost_one_record_pays_the_same_invoice_or_nothing(world: World):
    """[1] Within the invoice's life the same hash is sent again: the payee refuses it, and then
    nobody but a person can tell whether it was paid."""
    lives, n, undecided = False, 0, 0
    while not lives:
        worker_id = f"w{n}"
        await world.worker(worker_id, OWED_MSAT)
        await world.network.script(Fault(FaultKind.FORGET))
        lives = await world.process(sparks_left=n).turn()
        await world.pass_time(AFTER_S)
        await world.network.clear_faults()
        successor = world.process()
        for _ in range(3):
            await successor.turn()
            await world.pass_time(10)
        await world.check_payments()
        undecided += await world.decide_by_truth()
        await run_until_paid(world, successor, worker_id)
        assert await world.received_msat(worker_id) == OWED_MSAT
        await successor.runner.stop()
        n += 1
    assert undecided > 0
    await world.check_node()


async def test_what_the_node_once_knew_it_may_not_deny(world: World):
    """[1] In flight at one look-up, not found at the next: the node is not to be believed."""
    await world.network.script(Fault(FaultKind.HANG))
    await world.worker("w1", OWED_MSAT)
    process = world.process()
    await process.turn()
    await world.network.forget(ROUTER, await world.live_hash((await world.payout_of("w1")).id))
    for _ in range(12):
        await world.pass_time(120)
        await process.turn()
    payout = await world.payout_of("w1")
    assert (payout.state, payout.alert) == (PayoutState.SENDING, Alert.NODE_FORGOT)
    assert process.backend.pays == 1


# A soak: SATHERD_CHAOS_SEEDS=1000 pytest tests/test_payout_crashes.py -k whatever
SEEDS = int(os.environ.get("SATHERD_CHAOS_SEEDS", "8"))


@pytest.mark.parametrize("seed", range(SEEDS))
async def test_whatever_happens_in_whatever_order_nobody_is_paid_twice_and_nothing_is_lost(
    world: World, seed: int
):
    """[1, 2, 3, 4, 6, 7, 8] Two processes, kills, faults, held HTLCs, clock jumps, a node that
    loses its history, addresses that change and break, withdrawals, pauses, comparisons of node and
    books, and an operator who pays from the node by hand."""
    chaos = Chaos(world, seed)
    await chaos.begin()
    for _ in range(45):
        await chaos.step()
    await chaos.end()
    await world.check_payments()
    await world.check_node()
