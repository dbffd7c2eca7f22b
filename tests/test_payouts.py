"""The payout runner: who is paid, when, how much, by which process, and what keeps it from paying."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from billing import ledger, payees, payout_control
from billing.ledger import LIGHTNING, ROUTING_FEES, Transfer
from billing.lightning import (
    BackendAuthError,
    BackendUnavailable,
    NodeInfo,
    PaymentState,
    PaymentStatus,
)
from billing.lightning.simulated.faults import Fault, FaultKind
from billing.lightning.simulated.payments import routing_fee_msat
from billing.lightning.simulated.wallets import ROUTER
from billing.payout_control import Blocked, NotForAPerson
from billing.payout_records import BadCursor, list_payouts, unresolved, worker_sums
from billing.payout_states import Alert, AttemptState, PayoutKind, PayoutState
from router.database import Database
from tests.payout_world import INVOICE_EXPIRY_S, SETTINGS, World


@pytest.fixture
async def world(database: Database) -> AsyncIterator[World]:
    async with World.open(database) as opened:
        yield opened
        await opened.check_books()
        await opened.check_payments()


async def received_msat(world: World, wallet: str) -> int:
    await world.network.ensure_wallet(wallet)
    return sum(record.amount_received_msat for record in await world.network.received(wallet))


async def test_a_worker_that_is_owed_enough_is_paid_at_its_address(world: World):
    await world.worker("w1", 2_000_999)
    await world.process().runner.run_once()
    payout = await world.payout_of("w1")
    assert payout.state is PayoutState.PAID
    assert payout.attempt_state is AttemptState.SUCCEEDED
    assert payout.preimage is not None
    assert payout.amount_msat == 2_000_000, "whole satoshis; the rest stays owed"
    assert await received_msat(world, "w1") == 2_000_000
    fee_msat = routing_fee_msat(2_000_000)
    assert payout.fee_msat == fee_msat
    assert await world.balance_msat(ledger.worker("w1")) == 999
    assert await world.balance_msat(ledger.SENDING) == 0
    assert await world.balance_msat(ROUTING_FEES) == fee_msat, "routing is the router's cost"
    assert await world.balance_msat(LIGHTNING) == 2_000_999 - 2_000_000 - fee_msat
    assert world.servers.comments == [payout.id]
    await world.check_node()


async def test_a_worker_that_is_owed_too_little_is_not_paid_until_it_is_old(world: World):
    await world.worker("w1", 999_999)
    await world.worker("w2", 99_999)
    process = world.process()
    assert await process.runner.run_once() == 0
    await world.pass_time(86_399)
    assert await process.runner.run_once() == 0
    await world.pass_time(1)
    await process.runner.run_once()
    assert (await world.payout_of("w1")).amount_msat == 999_000
    assert await world.payouts(ledger.worker("w2")) == [], "under 100 sat even age does not help"


async def test_threshold_and_interval_can_be_changed_while_it_runs(world: World):
    await world.worker("w1", 50_000)
    process = world.process()
    assert await process.runner.run_once() == 0
    process.runner.settings = replace(SETTINGS, threshold_msat=50_000)
    await process.runner.run_once()
    assert (await world.payout_of("w1")).state is PayoutState.PAID


async def test_what_is_earned_after_a_payout_waits_for_its_own_interval(world: World):
    await world.worker("w1", 500_000)
    process = world.process()
    await process.runner.run_once()
    await world.pass_time(86_400)
    await process.runner.run_once()
    await world.earn("w1", 300_000)
    await process.runner.run_once()
    await world.pass_time(80_000)
    await process.runner.run_once()
    assert len(await world.payouts()) == 1
    await world.pass_time(6_400)
    await process.runner.run_once()
    assert [p.amount_msat for p in await world.payouts()] == [300_000, 500_000]


async def test_a_worker_without_an_address_is_not_paid_and_stays_owed(world: World):
    await world.earn("w1", 5_000_000)
    async with world.database.transaction() as connection:
        await payees.set_address(connection, "w2", None, now=world.now)
    await world.earn("w2", 5_000_000)
    assert await world.process().runner.run_once() == 0
    assert await world.balance_msat(ledger.worker("w2")) == 5_000_000


async def test_a_batch_above_the_payees_maximum_is_paid_in_parts(world: World):
    world.servers.max_msat = 1_500_500
    await world.worker("w1", 4_000_000)
    process = world.process()
    for _ in range(3):
        await process.runner.run_once()
    assert world.servers.amounts_msat == [1_500_000, 1_500_000, 1_000_000]


async def test_a_batch_below_the_payees_minimum_is_carried_over(world: World):
    world.servers.min_msat = 3_000_000
    await world.worker("w1", 2_000_000)
    process = world.process()
    await process.runner.run_once()
    assert await world.payouts() == []
    await world.earn("w1", 1_000_000)
    assert await process.runner.run_once() == 0, "it is not asked again at once"
    await world.pass_time(601)
    await process.runner.run_once()
    assert (await world.payout_of("w1")).amount_msat == 3_000_000


async def test_a_node_that_sets_its_own_fees_gets_batches_that_are_worth_them(world: World):
    """lightning.md 5.1: the worst case may be at most 2 % of the amount."""
    await world.worker("w1", 2_000_000)
    process = world.process()
    process.backend.worst_case_msat = 40_001
    await process.runner.run_once()
    assert await world.payouts() == []
    await world.pass_time(601)
    process.backend.worst_case_msat = 40_000
    await process.runner.run_once()
    assert (await world.payout_of("w1")).fee_cap_msat == 40_000


async def test_one_worker_has_one_payout_at_a_time(world: World):
    await world.network.script(Fault(FaultKind.HANG))
    await world.worker("w1")
    process = world.process()
    await process.runner.run_once()
    await world.earn("w1", 5_000_000)
    await world.pass_time(60)
    await process.runner.run_once()
    payout = await world.payout_of("w1")
    assert payout.state is PayoutState.SENDING
    await world.network.resolve(await world.live_hash(payout.id), settle=True)
    await world.pass_time(60)
    for _ in range(2):
        await process.runner.run_once()
    assert [p.state for p in await world.payouts()] == [PayoutState.PAID, PayoutState.PAID]


async def test_at_most_a_quarter_of_what_the_node_can_send_is_under_way(world: World):
    start_msat = (await world.network.node(ROUTER)).balance_msat
    await world.network.fund(ROUTER, 8_000_000 - start_msat)
    await world.network.script(Fault(FaultKind.HANG, times=10))
    for n in range(4):
        await world.worker(f"w{n}", 1_000_000)
    process = world.process()
    for _ in range(3):
        await process.runner.run_once()
        await world.pass_time(10)
    under_way = [p for p in await world.payouts() if p.state is PayoutState.SENDING]
    assert sum(p.amount_msat + p.fee_cap_msat for p in under_way) <= 2_000_000
    assert under_way, "and yet something is sent"


async def test_a_node_that_is_too_poor_pauses_payouts_and_burns_no_attempt(world: World):
    start_msat = (await world.network.node(ROUTER)).balance_msat
    await world.network.fund(ROUTER, 10_000 - start_msat)
    await world.worker("w1")
    process = world.process()
    for _ in range(3):
        await process.runner.run_once()
    assert await world.payouts() == []
    async with world.database.connection() as connection:
        state = await payout_control.control_state(connection)
        address = await payees.get_address(connection, "w1", now=world.now)
    assert state.blocked is Blocked.INSUFFICIENT_BALANCE
    assert address is not None and address.failure_code is None
    await world.network.fund(ROUTER, 100_000_000)
    await process.runner.run_once()
    await process.runner.run_once()
    assert (await world.payout_of("w1")).state is PayoutState.PAID
    async with world.database.connection() as connection:
        assert (await payout_control.control_state(connection)).blocked is None


async def test_a_node_that_is_poor_only_when_asked_gets_the_same_invoice_later(world: World):
    await world.worker("w1")
    process = world.process()

    async def poor(operation: str, call):
        balance_msat = (await world.network.node(ROUTER)).balance_msat
        if operation == "pay_invoice":
            await world.network.fund(ROUTER, -balance_msat)
        try:
            return await call()
        finally:
            if operation == "pay_invoice":
                await world.network.fund(ROUTER, balance_msat)

    process.backend.answer = poor
    await process.runner.run_once()
    payout = await world.payout_of("w1")
    assert (payout.state, payout.attempt_state) == (PayoutState.PLANNED, AttemptState.INVOICED)
    process.backend.answer = None
    await world.pass_time(10)
    await process.runner.run_once()
    again = await world.payout_of("w1")
    assert again.state is PayoutState.PAID
    assert again.payment_hash == payout.payment_hash
    assert len(world.servers.amounts_msat) == 1


@pytest.mark.parametrize(
    ("error", "blocked"),
    [
        (BackendUnavailable("test", "any", "refused"), Blocked.NODE_UNREACHABLE),
        (BackendAuthError("test", "any", "wrong key"), Blocked.NODE_REFUSES_KEY),
    ],
)
async def test_a_node_that_cannot_be_used_pauses_payouts(world: World, error, blocked: Blocked):
    await world.worker("w1")
    process = world.process()
    process.backend.error = error
    assert await process.runner.run_once() == 0
    async with world.database.connection() as connection:
        assert (await payout_control.control_state(connection)).blocked is blocked
    process.backend.error = None
    await process.runner.run_once()
    assert (await world.payout_of("w1")).state is PayoutState.PAID


async def test_a_request_that_did_not_reach_the_node_is_repeated_with_the_same_invoice(
    world: World,
):
    await world.worker("w1")
    process = world.process()

    async def refused(operation: str, call):
        if operation == "pay_invoice":
            raise BackendUnavailable("test", operation, "refused")
        return await call()

    process.backend.answer = refused
    await process.runner.run_once()
    payout = await world.payout_of("w1")
    assert (payout.state, payout.attempt_state) == (PayoutState.PLANNED, AttemptState.INVOICED)
    process.backend.answer = None
    await world.pass_time(10)
    await process.runner.run_once()
    assert (await world.payout_of("w1")).payment_hash == payout.payment_hash
    assert (await world.payout_of("w1")).state is PayoutState.PAID


async def test_an_invoice_that_expired_unsent_is_given_up_for_another(world: World):
    await world.worker("w1")
    process = world.process()

    async def refused(operation: str, call):
        if operation == "pay_invoice":
            raise BackendUnavailable("test", operation, "refused")
        return await call()

    process.backend.answer = refused
    await process.runner.run_once()
    await world.pass_time(INVOICE_EXPIRY_S - 59)
    process.backend.answer = None
    await process.runner.run_once()
    payout = await world.payout_of("w1")
    assert payout.state is PayoutState.PAID
    assert len(await world.hashes(payout.id)) == 2


async def test_nothing_new_is_sent_by_a_node_that_is_not_synced(world: World):
    await world.worker("w1")
    process = world.process()
    process.backend.info = NodeInfo(world.pubkey, "router", "1", "regtest", synced=False)
    await process.runner.run_once()
    assert await world.payouts() == []
    process.backend.info = None
    await process.runner.run_once()
    assert (await world.payout_of("w1")).state is PayoutState.PAID


async def test_another_node_pays_nothing_while_a_payout_is_unresolved_at_the_first(world: World):
    await world.network.script(Fault(FaultKind.HANG))
    await world.worker("w1")
    process = world.process()
    await process.runner.run_once()
    await world.worker("w2")
    other = NodeInfo("02" + "ab" * 32, "other", "1", "regtest", synced=True)
    process.backend.info = other
    await world.pass_time(30)
    await process.runner.run_once()
    assert len(await world.payouts()) == 1
    assert (await world.payout_of("w1")).alert is Alert.NODE_CHANGED
    async with world.database.connection() as connection:
        assert (await payout_control.control_state(connection)).blocked is Blocked.NODE_CHANGED
    process.backend.info = None
    await world.network.resolve(
        await world.live_hash((await world.payout_of("w1")).id), settle=True
    )
    await world.pass_time(60)
    for _ in range(2):
        await process.runner.run_once()
    assert {p.state for p in await world.payouts()} == {PayoutState.PAID}


async def test_a_paused_runner_sends_nothing_and_still_finds_out(world: World):
    await world.network.script(Fault(FaultKind.HANG))
    await world.worker("w1")
    process = world.process()
    await process.runner.run_once()
    async with world.database.transaction() as connection:
        await payout_control.pause(connection, "the operator said so", now=world.now)
        await payout_control.pause(connection, "and again", now=world.now)
    await world.worker("w2")
    await world.network.resolve(
        await world.live_hash((await world.payout_of("w1")).id), settle=True
    )
    await world.pass_time(60)
    for _ in range(2):
        await process.runner.run_once()
    assert (await world.payout_of("w1")).state is PayoutState.PAID
    assert await world.payouts(ledger.worker("w2")) == []
    async with world.database.transaction() as connection:
        assert (await payout_control.control_state(connection)).paused_why == "the operator said so"
        await payout_control.resume(connection)
    await process.runner.run_once()
    assert (await world.payout_of("w2")).state is PayoutState.PAID


async def test_a_failed_payout_returns_and_is_tried_again_after_its_back_off(world: World):
    await world.network.script(Fault(FaultKind.FAIL, times=2))
    await world.worker("w1")
    process = world.process()
    await process.runner.run_once()
    first = await world.payout_of("w1")
    assert (first.state, first.error_code) == (PayoutState.FAILED, "no_route")
    assert await world.balance_msat(ledger.worker("w1")) == 2_000_000
    await world.pass_time(59)
    assert await process.runner.run_once() == 0
    await world.pass_time(1)
    await process.runner.run_once()
    await world.pass_time(299)
    assert await process.runner.run_once() == 0
    await world.pass_time(1)
    await process.runner.run_once()
    assert [p.state for p in await world.payouts()] == [
        PayoutState.PAID,
        PayoutState.FAILED,
        PayoutState.FAILED,
    ]


async def test_an_address_that_keeps_failing_is_shown_after_a_week_and_stays_owed(world: World):
    await world.worker("w1")
    world.servers.broken["w1"] = "error"
    process = world.process()
    for _ in range(15):
        await process.runner.run_once()
        await world.pass_time(86_401)
    async with world.database.connection() as connection:
        address = await payees.get_address(connection, "w1", now=world.now)
    assert address is not None
    assert address.status is payees.PayeeStatus.ADDRESS_FAILING
    assert address.failure_code == "payee_error"
    assert await world.payouts() == [], "an address that does not resolve moves no money"
    assert await world.balance_msat(ledger.worker("w1")) == 2_000_000
    world.servers.broken.clear()
    await process.runner.run_once()
    assert (await world.payout_of("w1")).state is PayoutState.PAID
    async with world.database.connection() as connection:
        address = await payees.get_address(connection, "w1", now=world.now)
    assert address is not None and address.status is payees.PayeeStatus.PAYABLE


async def test_an_address_that_gives_no_invoice_gets_its_money_back(world: World):
    await world.worker("w1")
    world.servers.broken["w1"] = "no_invoice"
    await world.process().runner.run_once()
    payout = await world.payout_of("w1")
    assert (payout.state, payout.error_code) == (PayoutState.FAILED, "payee_error")
    assert payout.submitted_at is None
    assert await world.balance_msat(ledger.worker("w1")) == 2_000_000


async def test_an_invoice_that_was_used_before_is_not_paid_again(world: World):
    await world.worker("w1", 1_000_000)
    await world.worker("w2", 1_000_000)
    world.servers.broken["w2"] = "same_invoice"
    process = world.process(replace(SETTINGS, at_once=1))
    for _ in range(2):
        await process.runner.run_once()
    states = {p.owner_id: (p.state, p.error_code) for p in await world.payouts()}
    assert states == {
        "w1": (PayoutState.PAID, None),
        "w2": (PayoutState.FAILED, "payment_hash_used"),
    }


async def test_a_domain_that_is_down_is_not_asked_for_each_of_its_payees(world: World):
    for n in range(12):
        await world.worker(f"w{n}", host="down.example")
    await world.worker("fine", host="up.example")
    world.servers.broken["down.example"] = "unreachable"
    process = world.process(replace(SETTINGS, at_once=3))
    for _ in range(6):
        await process.runner.run_once()
    asked = [url for url in world.servers.asked if "down.example" in url]
    assert 5 <= len(asked) <= 7
    assert (await world.payout_of("fine")).state is PayoutState.PAID
    world.servers.broken.clear()
    await world.pass_time(601)
    for _ in range(8):
        await process.runner.run_once()
        await world.pass_time(1)
    paid = [p for p in await world.payouts() if p.state is PayoutState.PAID]
    assert len(paid) == 13


async def test_a_changed_address_gets_the_next_payout_and_not_the_one_that_was_sent(world: World):
    await world.network.script(Fault(FaultKind.HANG))
    await world.worker("w1", 1_000_000)
    process = world.process()
    await process.runner.run_once()
    async with world.database.transaction() as connection:
        await payees.set_address(connection, "w1", "new@pay.example", now=world.now)
    await world.pass_time(3_700)
    await world.network.resolve(
        await world.live_hash((await world.payout_of("w1")).id), settle=True
    )
    await process.runner.run_once()
    await world.earn("w1", 1_000_000)
    await process.runner.run_once()
    assert await received_msat(world, "w1") == 1_000_000
    assert await received_msat(world, "new") == 1_000_000


async def test_an_unsent_invoice_of_an_address_that_was_changed_is_dropped(world: World):
    await world.worker("w1", 1_000_000)
    process = world.process()

    async def refused(operation: str, call):
        if operation == "pay_invoice":
            raise BackendUnavailable("test", operation, "refused")
        return await call()

    process.backend.answer = refused
    world.servers.expiry_s = 86_400
    await process.runner.run_once()
    async with world.database.transaction() as connection:
        await payees.set_address(connection, "w1", "new@pay.example", now=world.now)
    await world.pass_time(3_601)
    process.backend.answer = None
    for _ in range(2):
        await process.runner.run_once()
    assert await received_msat(world, "w1") == 0
    assert await received_msat(world, "new") == 1_000_000
    assert {(p.state, p.error_code) for p in await world.payouts()} == {
        (PayoutState.PAID, None),
        (PayoutState.FAILED, "address_changed"),
    }


async def test_two_runners_on_one_database_pay_once(world: World):
    """Issue 3: two routers, one payout: one payment."""
    for n in range(6):
        await world.worker(f"w{n}")
    one, two = world.process(), world.process()
    await asyncio.gather(*(p.runner.run_once() for p in (one, two, one, two)))
    assert one.runner.is_the_one != two.runner.is_the_one
    assert one.backend.pays + two.backend.pays == 6
    assert len(await world.network.paid_out(ROUTER)) == 6


async def test_a_runner_that_lost_its_lease_writes_nothing_and_the_next_finds_out(world: World):
    await world.worker("w1")
    settings = replace(SETTINGS, lease_s=30)
    old, new = world.process(settings), world.process(settings)
    gate, asked = asyncio.Event(), asyncio.Event()

    async def slow(operation: str, call):
        if operation == "pay_invoice":
            asked.set()
            await gate.wait()
        return await call()

    old.backend.answer = slow
    turn = asyncio.create_task(old.runner.run_once())
    await asyncio.wait_for(asked.wait(), 5)
    await world.pass_time(31)
    await new.runner.run_once()
    assert new.runner.is_the_one
    assert new.backend.pays == 0, "the first one's request may still be on its way"
    gate.set()
    await asyncio.wait_for(turn, 5)
    assert (await world.payout_of("w1")).state is PayoutState.SENDING, "the loser wrote nothing"
    await world.pass_time(30)
    await new.runner.run_once()
    assert (await world.payout_of("w1")).state is PayoutState.PAID
    assert len(await world.network.paid_out(ROUTER)) == 1
    await old.runner.run_once()
    assert not old.runner.is_the_one


async def test_the_loop_pays_by_itself_and_hands_the_lease_on_when_it_stops(world: World):
    await world.worker("w1")
    one, two = world.process(), world.process()
    one.runner.start()
    async with asyncio.timeout(10):
        while not (found := await world.payouts()) or found[0].state is not PayoutState.PAID:
            await asyncio.sleep(0.01)
    await one.runner.stop()
    await world.worker("w2")
    await two.runner.run_once()
    assert (await world.payout_of("w2")).state is PayoutState.PAID, "no lease to wait for"


async def test_waking_the_loop_makes_it_look_at_once(world: World):
    process = world.process(replace(SETTINGS, idle_s=3600))
    process.runner.start()
    async with asyncio.timeout(10):
        while not process.runner.is_the_one:
            await asyncio.sleep(0.01)
        await world.worker("w1")
        process.runner.wake()
        while not (found := await world.payouts()) or found[0].state is not PayoutState.PAID:
            await asyncio.sleep(0.01)
    await process.runner.stop()


async def test_retry_clears_the_back_off_of_the_payee(world: World):
    await world.network.script(Fault(FaultKind.FAIL))
    await world.worker("w1")
    process = world.process()
    await process.runner.run_once()
    payout = await world.payout_of("w1")
    assert await process.runner.run_once() == 0
    async with world.database.transaction() as connection:
        assert await payout_control.retry(connection, payout.id, now=world.now)
        assert not await payout_control.retry(connection, "nothing", now=world.now)
    await process.runner.run_once()
    assert (await world.payout_of("w1")).state is PayoutState.PAID
    assert (await world.payouts())[1].state is PayoutState.FAILED


async def test_nobody_may_decide_a_payout_that_resolves_by_itself(world: World):
    await world.network.script(Fault(FaultKind.HANG))
    await world.worker("w1")
    process = world.process()
    await process.runner.run_once()
    payout = await world.payout_of("w1")
    for payout_id in (payout.id, "nothing"):
        with pytest.raises(NotForAPerson):
            async with world.database.transaction() as connection:
                await payout_control.decide(connection, payout_id, preimage=None, now=world.now)
    assert (await world.payout_of("w1")).state is PayoutState.SENDING


async def test_lists_page_by_cursor_and_filter_by_account_kind_and_state(world: World):
    for n in range(7):
        await world.worker(f"w{n}")
    process = world.process()
    await process.runner.run_once()
    await world.network.script(Fault(FaultKind.HANG))
    await world.earn("w0", 1_000_000)
    await process.runner.run_once()
    async with world.database.connection() as connection:
        seen, cursor = [], None
        for _ in range(10):
            page = await list_payouts(connection, cursor=cursor, limit=3)
            seen += [p.id for p in page.payouts]
            if (cursor := page.cursor) is None:
                break
        assert len(seen) == len(set(seen)) == 8
        of_w0 = await list_payouts(connection, account=ledger.worker("w0"))
        assert [p.state for p in of_w0.payouts] == [PayoutState.SENDING, PayoutState.PAID]
        sending = await list_payouts(connection, state=PayoutState.SENDING)
        assert [p.owner_id for p in sending.payouts] == ["w0"]
        none = await list_payouts(connection, kind=PayoutKind.WITHDRAWAL)
        assert none.payouts == []
        for bad in ("!", "bm8", "MjAyNi0wMS0wMSB4"):
            with pytest.raises(BadCursor):
                await list_payouts(connection, cursor=bad)


async def test_sums_and_metrics_say_what_is_paid_on_its_way_and_pending(world: World):
    await world.worker("w1", 1_000_000)
    process = world.process()
    await process.runner.run_once()
    await world.network.script(Fault(FaultKind.HANG))
    await world.earn("w1", 2_000_000)
    await process.runner.run_once()
    await world.earn("w1", 300)
    await world.pass_time(90)
    async with world.database.connection() as connection:
        sums = await worker_sums(connection, "w1")
        waiting = await unresolved(connection, now=world.now)
        nobody = await worker_sums(connection, "nobody")
    assert (sums.paid_msat, sums.sending_msat, sums.pending_msat) == (1_000_000, 2_000_000, 300)
    assert sums.earned_msat == 3_000_300
    assert nobody.earned_msat == 0
    assert (waiting.count, waiting.amount_msat, waiting.alerts) == (1, 2_000_000, {})
    assert waiting.oldest_age_s == pytest.approx(90, abs=0.01)


async def test_a_node_that_takes_a_failure_back_pays_nobody_twice(world: World):
    """Family 6: FAILED, then SUCCEEDED for the same hash. It says so before the next one is sent."""
    await world.worker("w1")
    process = world.process()

    async def lies(operation: str, call):
        answer = await call()
        if operation == "pay_invoice":
            return PaymentStatus(answer.payment_hash, PaymentState.FAILED, failure_code="no_route")
        return answer

    process.backend.answer = lies
    await process.runner.run_once()
    assert (await world.payout_of("w1")).state is PayoutState.FAILED
    assert await world.balance_msat(ledger.worker("w1")) == 2_000_000
    process.backend.answer = None
    await world.earn("w1", 500_000)
    await world.pass_time(61)
    await process.runner.run_once()
    assert process.backend.pays == 1
    assert await received_msat(world, "w1") == 2_000_000
    assert await world.balance_msat(ledger.worker("w1")) == 500_000
    again, first = await world.payouts()
    assert (again.state, again.error_code) == (PayoutState.FAILED, "paid_before")
    assert (first.state, first.alert) == (PayoutState.PAID, Alert.PAID_AFTER_ALL)
    assert first.preimage is not None
    async with world.database.transaction() as connection:
        assert (await payout_control.control_state(connection)).paused_why is not None
        await payout_control.resume(connection)
    await world.check_node()
    await world.earn("w1", 500_000)
    await world.pass_time(61)
    await process.runner.run_once()
    assert await received_msat(world, "w1") == 3_000_000, "and then it goes on"


async def test_what_an_owner_has_spent_of_a_payment_that_failed_and_was_made_is_the_routers_loss(
    world: World,
):
    await world.deposit("alice", 1_000_000)
    process = world.process()

    async def lies(operation: str, call):
        answer = await call()
        if operation == "pay_invoice":
            return PaymentStatus(answer.payment_hash, PaymentState.FAILED, failure_code="no_route")
        return answer

    process.backend.answer = lies
    bolt11 = await world.invoice("purse", 900_000)
    await process.withdrawals.by_invoice("alice", bolt11)
    await process.runner.run_once()
    async with world.database.transaction() as connection:
        await ledger.post(
            connection,
            [Transfer(ledger.client("alice"), ledger.ROUTER_FEES, 700_000, "spent", "job")],
        )
    process.backend.answer = None
    await process.withdrawals.by_invoice("alice", await world.invoice("purse", 200_000))
    await process.runner.run_once()
    assert await received_msat(world, "purse") == 900_000
    assert await world.balance_msat(ledger.client("alice")) == 0
    assert await world.balance_msat(ledger.GOODWILL) == 600_000
    await world.check_node()
