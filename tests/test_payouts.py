"""Who is paid, when and how much, and what becomes of it that cannot be paid."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from billing import ledger, payees, payout_control
from billing.ledger import LIGHTNING, ROUTING_FEES, Transfer
from billing.lightning import (
    BackendUnavailable,
    PaymentState,
    PaymentStatus,
)
from billing.lightning.simulated.faults import Fault, FaultKind
from billing.lightning.simulated.payments import routing_fee_msat
from billing.lightning.simulated.wallets import ROUTER
from billing.payout_states import Alert, AttemptState, PayoutState
from router.database import Database
from tests.payout_payees import INVOICE_EXPIRY_S
from tests.payout_world import SETTINGS, World


@pytest.fixture
async def world(database: Database) -> AsyncIterator[World]:
    async with World.open(database) as opened:
        yield opened
        await opened.check_books()
        await opened.check_payments()


async def test_a_worker_that_is_owed_enough_is_paid_at_its_address(world: World):
    await world.worker("w1", 2_000_999)
    await world.process().runner.run_once()
    payout = await world.payout_of("w1")
    assert payout.state is PayoutState.PAID
    assert payout.attempt_state is AttemptState.SUCCEEDED
    assert payout.preimage is not None
    assert payout.amount_msat == 2_000_000, "whole satoshis; the rest stays owed"
    assert await world.received_msat("w1") == 2_000_000
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
    assert await world.received_msat("w1") == 1_000_000
    assert await world.received_msat("new") == 1_000_000


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
    assert await world.received_msat("w1") == 0
    assert await world.received_msat("new") == 1_000_000
    assert {(p.state, p.error_code) for p in await world.payouts()} == {
        (PayoutState.PAID, None),
        (PayoutState.FAILED, "address_changed"),
    }


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
    assert await world.received_msat("w1") == 2_000_000
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
    assert await world.received_msat("w1") == 3_000_000, "and then it goes on"


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
    assert await world.received_msat("purse") == 900_000
    assert await world.balance_msat(ledger.client("alice")) == 0
    assert await world.balance_msat(ledger.GOODWILL) == 600_000
    await world.check_node()
