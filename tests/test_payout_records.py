"""What doors read of payouts, and what people may do to them."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from billing import ledger, payout_control
from billing.lightning.simulated.faults import Fault, FaultKind
from billing.payout_control import NotForAPerson
from billing.payout_records import BadCursor, list_payouts, unresolved, worker_sums
from billing.payout_states import PayoutKind, PayoutState
from router.database import Database
from tests.payout_world import World


@pytest.fixture
async def world(database: Database) -> AsyncIterator[World]:
    async with World.open(database) as opened:
        yield opened
        await opened.check_books()
        await opened.check_payments()


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
