"""The node's own history against the books: what is missing here, and what nobody here has sent."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any, cast

import pytest

from billing import (
    foreign_payments,
    invoices,
    ledger,
    payout_control,
    payout_rows,
    payout_transfers,
)
from billing.foreign_payments import NoSuchForeignPayment
from billing.invoice_watcher import InvoiceWatcher
from billing.invoices import Credit
from billing.lightning import BackendRejected, BackendUnavailable, Settlement
from billing.lightning.simulated.backend import SimulatedBackend
from billing.lightning.simulated.faults import Fault, FaultKind
from billing.lightning.simulated.wallets import PAYER, ROUTER
from billing.payout_states import Alert, PayoutState
from billing.payouts import PayoutRunner
from billing.reconciliation import Reconciler
from router.database import Database
from tests.payout_chaos import OWED_MSAT, Chaos, end_what_hangs
from tests.payout_world import World


@pytest.fixture
async def world(database: Database) -> AsyncIterator[World]:
    async with World.open(database) as opened:
        yield opened


async def nothing(connection: Any, credit: Credit) -> None:
    return None


def reconciler(world: World) -> Reconciler:
    backend = SimulatedBackend.in_process(world.network)
    watcher = InvoiceWatcher(world.database.transaction, backend, nothing, clock=world.tick)
    return Reconciler(world.database.transaction, backend, watcher, clock=world.tick)


async def receive(world: World, amount_msat: int) -> str:
    """Somebody pays an invoice of our node that these books never made."""
    made = await world.network.create_invoice(
        ROUTER, amount_msat=amount_msat, description="elsewhere", expiry_s=600
    )
    paid = await world.network.pay_invoice(PAYER, made.bolt11, max_fee_msat=10**9, timeout_s=5)
    assert paid.state == "succeeded"
    return made.payment_hash


async def spend(world: World, user: str, amount_msat: int, *, hang: bool = False) -> str:
    """Our node pays, and not for these books."""
    bolt11 = await world.invoice(user, amount_msat)
    if hang:
        await world.network.script(Fault(FaultKind.HANG))
    sent = await world.network.pay_invoice(ROUTER, bolt11, max_fee_msat=10**9, timeout_s=0.01)
    return sent.payment_hash


async def control(world: World) -> payout_control.ControlState:
    async with world.database.connection() as connection:
        return await payout_control.control_state(connection)


async def confirm(world: World, payment_hash: str, account: str) -> bool:
    async with world.database.transaction() as connection:
        found = await foreign_payments.confirm(connection, payment_hash, account, now=world.tick())
    return found.booked


async def test_a_receipt_without_an_invoice_is_kept_for_its_owner_once(world: World):
    comparing = reconciler(world)
    assert (await comparing.run_once()).receipts == 0
    await world.pass_time(5)
    await receive(world, 21_000)
    payment_hash = await receive(world, 4_000)
    found = await comparing.run_once()
    assert (found.receipts, found.booked_msat) == (2, 25_000)
    # Told again by the stream, and compared again by a process that knows nothing of the first.
    async with world.database.transaction() as connection:
        again = await invoices.record_settlement(
            connection, payment_hash=payment_hash, received_msat=4_000, settled_at=world.now
        )
    assert again is None
    assert (await reconciler(world).run_once()).receipts == 0
    assert await world.balance_msat(ledger.UNASSIGNED) == 25_000


async def test_what_a_node_did_before_it_was_used_here_is_nobodys_business(world: World):
    await receive(world, 21_000)
    await spend(world, "baker", 30_000)
    await world.pass_time(5)
    comparing = reconciler(world)
    for _ in range(2):
        found = await comparing.run_once()
        assert (found.receipts, found.foreign) == (0, 0)
    assert await world.balance_msat(ledger.UNASSIGNED) == 0
    # Nor when a stream replays all that the node has ever been paid.
    async with world.database.transaction() as connection:
        old = await invoices.record_settlement(
            connection,
            payment_hash="ab" * 32,
            received_msat=5,
            settled_at=datetime(2020, 1, 1, tzinfo=world.now.tzinfo),
            joined_at=world.now,
        )
    assert old is None


async def test_a_payment_that_nobody_here_has_sent_holds_payouts_until_it_is_confirmed(
    world: World,
):
    comparing = reconciler(world)
    before = await comparing.run_once()
    await world.pass_time(5)
    payment_hash = await spend(world, "baker", 30_000)
    assert (await comparing.run_once()).foreign == 1
    assert (await reconciler(world).run_once()).foreign == 0, "it is known by now"
    await world.worker("w1", OWED_MSAT)
    process = world.process()
    await process.turn()
    assert await world.payouts() == []
    shown = await control(world)
    assert shown.unknown_payments == 1 and shown.paused_why is not None
    async with world.database.transaction() as connection:
        # Resuming is not confirming.
        await payout_control.resume(connection)
        assert await payout_control.is_paused(connection)

    assert await confirm(world, payment_hash, ledger.OPERATOR)

    with pytest.raises(NoSuchForeignPayment):
        await confirm(world, payment_hash, ledger.OPERATOR)
    await process.turn()
    assert (await world.payout_of("w1")).state is PayoutState.PAID
    after = await comparing.run_once()
    # What was earned by w1 never came in here; all else that has left the node is booked.
    assert after.difference_msat == before.difference_msat - OWED_MSAT
    assert await world.balance_msat(ledger.OPERATOR) == 30_000 + 1_030


async def test_a_clock_that_was_ahead_hides_nothing(world: World):
    """It was set back after a comparison: what was paid since then is not older than that."""
    comparing = reconciler(world)
    await comparing.run_once()
    async with world.database.transaction() as connection:
        await connection.execute(
            "update billing_state set set_at = set_at + interval '30 days'"
            " where starts_with(key, 'node_reconciled:')"
        )
    await world.pass_time(5)
    await spend(world, "baker", 30_000)
    assert (await comparing.run_once()).foreign == 1


async def test_an_old_database_gives_itself_away_and_pays_nobody_twice(world: World):
    """Restored from a backup of before the payout: the worker is owed the same money again."""
    await reconciler(world).run_once()
    await world.worker("w1", OWED_MSAT)
    await world.pass_time(5)
    await world.process().turn()
    paid = await world.payout_of("w1")
    assert paid.state is PayoutState.PAID and paid.payment_hash is not None
    async with world.database.transaction() as connection:
        for table in ("payout_attempts", "payouts"):
            await connection.execute(f"delete from {table}")
        await connection.execute("delete from ledger_transfers where reference = $1", paid.id)
        await connection.execute(
            "update ledger_balances set balance_msat = case account when $1 then $2 else 0 end",
            ledger.worker("w1"),
            OWED_MSAT,
        )
    await world.pass_time(120)

    assert (await reconciler(world).run_once()).foreign == 1
    successor = world.process()
    for _ in range(3):
        await successor.turn()
        await world.pass_time(120)
    assert await world.payouts() == []

    world.earned_msat["w1"] = 0  # It was paid, by payouts that these books have lost.
    assert await confirm(world, paid.payment_hash, ledger.worker("w1"))
    assert await world.balance_msat(ledger.worker("w1")) == 0
    await successor.turn()
    assert await world.received_msat("w1") == OWED_MSAT
    await world.check_node()


async def test_a_backup_that_is_restored_under_a_running_router_pays_nobody_twice(world: World):
    """The process goes on as the one that pays; that the lease is an older one gives it away."""
    comparing = reconciler(world)
    process = world.process()
    runner = PayoutRunner(
        process.transaction,
        cast(Any, process.backend),
        process.addresses,
        clock=world.tick,
        reconciled=lambda: comparing.ready,
        on_older=comparing.doubt,
    )
    await comparing.run_once()
    await runner.run_once()
    async with world.database.connection() as connection:
        lease = await connection.fetchval(
            "select expires_at from billing_state where key = 'payout_lease'"
        )
    await world.worker("w1", OWED_MSAT)
    await world.pass_time(5)
    await runner.run_once()
    paid = await world.payout_of("w1")
    assert paid.state is PayoutState.PAID and paid.payment_hash is not None
    async with world.database.transaction() as connection:
        for table in ("payout_attempts", "payouts"):
            await connection.execute(f"delete from {table}")
        await connection.execute("delete from ledger_transfers where reference = $1", paid.id)
        await connection.execute(
            "update ledger_balances set balance_msat = case account when $1 then $2 else 0 end",
            ledger.worker("w1"),
            OWED_MSAT,
        )
        await connection.execute(
            "update billing_state set expires_at = $1 where key = 'payout_lease'", lease
        )
        await connection.execute("update payees set owed_since = null, next_try_at = null")
    for _ in range(3):
        await runner.run_once()
        await world.pass_time(120)
    assert await world.payouts() == []
    assert (await control(world)).blocked is payout_control.Blocked.NOT_RECONCILED

    assert (await comparing.run_once()).foreign == 1
    await runner.run_once()
    assert await world.payouts() == []
    assert (await control(world)).unknown_payments == 1

    world.earned_msat["w1"] = 0  # It was paid, by a payout that these books have lost.
    assert await confirm(world, paid.payment_hash, ledger.worker("w1"))
    await runner.run_once()
    assert await world.received_msat("w1") == OWED_MSAT
    await runner.stop()


async def test_an_old_database_looks_up_what_it_does_not_know_to_have_sent(world: World):
    """Restored from a backup of between invoice and payment: the invoice is not thrown away."""
    await reconciler(world).run_once()
    await world.worker("w1", OWED_MSAT)
    await world.pass_time(5)
    await world.process().turn()
    paid = await world.payout_of("w1")
    async with world.database.transaction() as connection:
        await connection.execute(
            "update payout_attempts set state = 'invoiced', submitted_at = null, submissions = 0,"
            " preimage = null, fee_msat = null, node_pubkey = null, ended_at = null"
        )
        await connection.execute(
            "update payouts set state = 'planned', fee_msat = null, ended_at = null"
        )
        await connection.execute(
            "delete from ledger_transfers where reference = $1 and code <> 'payout'", paid.id
        )
        await connection.execute(
            "update ledger_balances set balance_msat = $2 where account = $1",
            ledger.SENDING,
            OWED_MSAT,
        )
    assert (await reconciler(world).run_once()).foreign == 0
    await world.pass_time(3600)
    successor = world.process()
    for _ in range(3):
        await successor.turn()
        await world.pass_time(120)
    assert [p.state for p in await world.payouts()] == [PayoutState.PAID]
    assert await world.received_msat("w1") == OWED_MSAT
    await world.check_node()


async def test_a_payout_that_failed_here_and_was_paid_there_is_put_right_and_sounds_the_alarm(
    world: World,
):
    """[6] It must not happen; if it does, nothing more is sent until somebody has looked."""
    await reconciler(world).run_once()
    await world.worker("w1", OWED_MSAT)
    await world.pass_time(5)
    await world.process().turn()
    paid = await world.payout_of("w1")
    async with world.database.transaction() as connection:
        await connection.execute("update payout_attempts set state = 'failed', preimage = null")
        await connection.execute("update payouts set state = 'failed', fee_msat = null")
        await connection.execute(
            "delete from ledger_transfers where reference = $1 and code <> 'payout'", paid.id
        )
        await connection.execute(
            "update ledger_balances set balance_msat = $2 where account = $1",
            ledger.SENDING,
            OWED_MSAT,
        )
        payout, _ = await payout_rows.load(connection, paid.id)
        await ledger.post(connection, payout_transfers.when_failed(payout))
    assert await world.balance_msat(ledger.worker("w1")) == OWED_MSAT
    await reconciler(world).run_once()
    right = await world.payout_of("w1")
    assert (right.state, right.alert) == (PayoutState.PAID, Alert.PAID_AFTER_ALL)
    assert await world.balance_msat(ledger.worker("w1")) == 0
    why = (await control(world)).paused_why
    assert why is not None and "contradicts itself" in why
    await world.check_node()


_STATE = [
    "payouts",
    "payout_attempts",
    "payees",
    "billing_state",
    "ledger_transfers",
    "ledger_balances",
    "foreign_payments",
]


async def back_up(world: World) -> None:
    async with world.database.transaction() as connection:
        for table in _STATE:
            await connection.execute(f"drop table if exists old_{table}")
            await connection.execute(f"create table old_{table} as table {table}")


async def restore(world: World) -> None:
    async with world.database.transaction() as connection:
        for table in _STATE:
            await connection.execute(f"truncate {table}")
            await connection.execute(f"insert into {table} select * from old_{table}")
            await connection.execute(f"drop table old_{table}")


async def earned_msat(world: World) -> dict[str, int]:
    """By these books: payable, on its way and paid."""
    async with world.database.connection() as connection:
        rows = await connection.fetch(
            "select account, sum(msat)::bigint as msat from ("
            " select account, balance_msat as msat from ledger_balances"
            " where starts_with(account, 'liabilities:worker:') union all"
            " select account, amount_msat from payouts where state <> 'failed') t group by account"
        )
    return {row["account"].rpartition(":")[2]: row["msat"] for row in rows}


SEEDS = int(os.environ.get("SATHERD_CHAOS_SEEDS", "4"))


@pytest.mark.parametrize("seed", range(SEEDS))
async def test_from_whatever_moment_a_backup_is_nobody_is_paid_twice(world: World, seed: int):
    """[1] Work, a backup, more work, the backup restored: an operator says whose the unknown
    payments were, and nobody has then been paid more than he has ever earned."""
    chaos = Chaos(world, seed)
    await reconciler(world).run_once()
    await world.pass_time(5)
    await chaos.begin()
    acts = [chaos.turn, chaos.turn, chaos.turn_and_die, chaos.wait, chaos.earn, chaos.trouble]
    for _ in range(chaos.random.randrange(5, 20)):
        await chaos.random.choice(acts)()
    await back_up(world)
    earned_then = dict(world.earned_msat)
    for _ in range(chaos.random.randrange(5, 25)):
        await chaos.random.choice(acts)()
    ever_earned = dict(world.earned_msat)

    await restore(world)
    world.earned_msat.clear()
    world.earned_msat.update(earned_then)
    await world.network.clear_faults()
    await end_what_hangs(world, settle=True)
    await world.pass_time(60)
    found = await reconciler(world).run_once()
    successor = world.process()
    if found.foreign:
        sent = len(await world.network.paid_out(ROUTER))
        for _ in range(3):
            await successor.turn()
            await world.pass_time(700)
        assert len(await world.network.paid_out(ROUTER)) == sent
    async with world.database.connection() as connection:
        unknown = await foreign_payments.listed(connection)
    truth = await world.truth()
    for payment in unknown:
        payee = truth[payment.payment_hash].payee
        assert payee is not None
        assert await confirm(world, payment.payment_hash, ledger.worker(payee))
    world.earned_msat.clear()
    world.earned_msat.update(await earned_msat(world))
    await successor.runner.stop()
    chaos.processes = [world.process(), world.process()]
    await chaos.end()
    for worker_id, msat in ever_earned.items():
        assert await world.received_msat(worker_id) <= msat, worker_id
    await world.check_payments()
    await world.check_node()


async def test_what_its_owner_is_not_owed_any_more_is_the_routers_loss(world: World):
    comparing = reconciler(world)
    await comparing.run_once()
    await world.pass_time(5)
    payment_hash = await spend(world, "w1", 30_000)
    await comparing.run_once()
    await world.earn("w1", 10_000)
    assert await confirm(world, payment_hash, ledger.worker("w1"))
    assert await world.balance_msat(ledger.worker("w1")) == 0
    assert await world.balance_msat(ledger.GOODWILL) == 20_000
    assert await world.balance_msat(ledger.ROUTING_FEES) == 1_030


@pytest.mark.parametrize("settle", [True, False])
async def test_an_unknown_payment_in_flight_is_booked_when_it_has_arrived_and_only_then(
    world: World, settle: bool
):
    comparing = reconciler(world)
    await comparing.run_once()
    await world.pass_time(5)
    payment_hash = await spend(world, "baker", 30_000, hang=True)
    assert (await comparing.run_once()).foreign == 1
    assert not await confirm(world, payment_hash, ledger.OPERATOR)
    assert (await control(world)).unknown_payments == 0
    # Held for days, so that the list of the last days does not show it any more.
    await world.pass_time(5 * 86_400)
    await comparing.run_once()
    assert await world.network.resolve(payment_hash, settle=settle) == 1
    await comparing.run_once()
    assert await world.balance_msat(ledger.OPERATOR) == (31_030 if settle else 0)


async def test_an_unknown_payment_that_failed_holds_nothing_any_more(world: World):
    comparing = reconciler(world)
    await comparing.run_once()
    await world.pass_time(5)
    payment_hash = await spend(world, "baker", 30_000, hang=True)
    await comparing.run_once()
    assert (await control(world)).unknown_payments == 1
    await world.network.resolve(payment_hash, settle=False)
    await comparing.run_once()
    assert (await control(world)).unknown_payments == 0


async def test_nothing_is_paid_out_before_the_first_comparison(world: World):
    process = world.process()
    comparing = reconciler(world)
    runner = PayoutRunner(
        process.transaction,
        cast(Any, process.backend),
        process.addresses,
        clock=world.tick,
        reconciled=lambda: comparing.ready,
    )
    await world.worker("w1", OWED_MSAT)
    await runner.run_once()
    assert await world.payouts() == []
    assert (await control(world)).blocked is payout_control.Blocked.NOT_RECONCILED
    await comparing.run_once()
    await runner.run_once()
    assert (await world.payout_of("w1")).state is PayoutState.PAID
    await runner.stop()


async def test_a_node_that_is_away_is_asked_again_and_one_that_has_no_list_is_not(world: World):
    """Without a list a restored database cannot be noticed, which the log says; payouts go on."""
    comparing = reconciler(world)
    errors: list[Exception] = [
        BackendUnavailable("simulated", "received_since", "no connection"),
        BackendRejected("simulated", "received_since", "no list", reason="unsupported"),
    ]

    class Without(SimulatedBackend):
        async def received_since(self, since: datetime) -> AsyncIterator[Settlement]:
            raise errors[0]
            yield  # pragma: no cover

    comparing._backend = Without.in_process(world.network)
    comparing.start()
    try:
        with pytest.raises(BackendUnavailable):
            await comparing.run_once()
        assert not comparing.ready
    finally:
        await comparing.stop()
    del errors[0]
    comparing._on_done = (done := asyncio.Event()).set
    comparing.start()
    try:
        async with asyncio.timeout(20):
            await done.wait()
        assert comparing.ready and comparing.last is None
    finally:
        await comparing.stop()
