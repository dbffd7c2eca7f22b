"""Every event in every state: the pure table, and the statements that are guarded by it."""

from __future__ import annotations

from typing import Any

import pytest

from billing import ledger
from billing.trial_balance import trial_balance
from router import job_endings, job_states, job_store, job_submits
from router.database import Database
from router.errors import QuoteExpired
from router.job_records import Ending, GiveBack
from router.job_states import FINAL, MOVES, Event, IllegalMove, State
from tests.job_tools import LANE, OFFER_MSAT, claim, end, job_in, payer, state_of

ALL_PAIRS = [(event, state) for event in Event for state in State]
ENDINGS = (Event.FINISH, Event.FAIL, Event.CANCEL, Event.EXPIRE)


@pytest.mark.parametrize("event, state", ALL_PAIRS)
def test_every_event_in_every_state_moves_as_the_table_says_or_not_at_all(
    event: Event, state: State
):
    froms, to = MOVES[event]
    if state in froms:
        assert job_states.may(event, state)
        assert job_states.after(event, state) is to
        assert state.value in job_states.before(event)
    else:
        assert not job_states.may(event, state)
        assert state.value not in job_states.before(event)
        with pytest.raises(IllegalMove):
            job_states.after(event, state)


def test_nothing_leaves_a_final_state_and_every_other_state_has_a_way_to_one():
    assert not [e for e, (froms, _) in MOVES.items() if froms & FINAL]
    for state in set(State) - FINAL:
        reached, grown = {state}, True
        while grown:
            after = {to for froms, to in MOVES.values() if froms & reached}
            grown = not after <= reached
            reached |= after
        assert reached & FINAL, state


def test_the_diagram_draws_every_move_and_no_other():
    drawn = job_states.as_mermaid()
    arrows = [line for line in drawn.splitlines() if "-->" in line and "[*]" not in line]
    assert len(arrows) == sum(len(froms) for froms, _ in MOVES.values())
    for event, (froms, to) in MOVES.items():
        for state in froms:
            assert f"    {state} --> {to}: {event}" in arrows


async def _happen(connection: Any, event: Event, job_id: str) -> bool:
    """Let an event happen by the statement that the router uses; whether it moved the job."""
    row = await connection.fetchrow("select * from jobs where id = $1", job_id)
    if event is Event.PAY:
        # The quote has a guard of its own; here it is opened so that only the job's is left.
        await connection.execute("update quotes set state = 'open' where id = $1", row["quote_id"])
        started = await job_submits.start_quote(connection, row["quote_id"], lanes={job_id: [LANE]})
        return job_id in started
    if event is Event.CLAIM:
        return await claim(connection, job_id) is not None
    if event is Event.GIVE_BACK:
        back = GiveBack(job_id, row["attempt"], LANE, "lost", "worker")
        return (await job_store.give_back_many(connection, [back]))[0]
    assert event in ENDINGS
    return await end(connection, Ending(job_id, event, "test", charge_msat=0)) is not None


@pytest.mark.parametrize("state", list(State))
async def test_the_tables_move_a_job_only_where_the_table_of_moves_does(
    database: Database, state: State
):
    async with database.transaction() as connection:
        account_id = await payer(connection)
    for event in Event:
        async with database.transaction() as connection:
            job = await job_in(connection, state, account_id)
            assert await state_of(connection, job.id) is state
            moved = await _happen(connection, event, job.id)
            expected = MOVES[event][1] if state in MOVES[event][0] else state
            assert moved is (state in MOVES[event][0]), event
            now = await state_of(connection, job.id)
            assert now is expected, event
            await _is_consistent(connection, job.id, now)
    async with database.transaction("repeatable_read") as connection:
        assert (await trial_balance(connection)).in_order


async def _is_consistent(connection: Any, job_id: str, state: State) -> None:
    """A job is in the queue while it waits, and its money in escrow while it is alive and paid."""
    waits = await connection.fetchval("select count(*) from queue where job_id = $1", job_id)
    assert waits == (1 if state is State.QUEUED else 0)
    held = await ledger.balance_msat(connection, ledger.escrow(job_id))
    assert held == (OFFER_MSAT if state in (State.QUEUED, State.RUNNING) else 0)


async def test_an_event_of_a_lost_attempt_moves_nothing(database: Database):
    """A late result of a lost attempt changes nothing (architecture.md, Seams)."""
    async with database.transaction() as connection:
        account_id = await payer(connection)
        job = await job_in(connection, State.RUNNING, account_id)
        back = GiveBack(job.id, 1, LANE, "lost", "worker")
        assert await job_store.give_back_many(connection, [back]) == [True]
        again = await claim(connection, job.id, "w2")
        assert again is not None and again.attempt == 2
        for event in (Event.FINISH, Event.FAIL, Event.CANCEL):
            late = Ending(job.id, event, "late", attempt=1, charge_msat=OFFER_MSAT, payee="w1")
            assert await end(connection, late) is None
        assert await job_store.give_back_many(connection, [back]) == [False]
        assert await state_of(connection, job.id) is State.RUNNING
        done = Ending(job.id, Event.FINISH, "stop", attempt=2, charge_msat=1000, payee="w2")
        assert await end(connection, done) is not None
        assert await ledger.balance_msat(connection, ledger.worker("w2")) == 950
        assert await ledger.balance_msat(connection, ledger.worker("w1")) == 0


async def test_an_ending_said_twice_is_settled_once(database: Database):
    async with database.transaction() as connection:
        account_id = await payer(connection, 10_000)
        job = await job_in(connection, State.RUNNING, account_id)
        done = Ending(job.id, Event.FINISH, "stop", attempt=1, charge_msat=1000, payee="w1")
        # Both in one batch, and once more after it.
        first, second = await job_endings.end_many(connection, [done, done], wipe_after_s=600)
        assert (first is None) != (second is None)
        assert await end(connection, done) is None
        assert await ledger.balance_msat(connection, ledger.worker("w1")) == 950
        assert await ledger.balance_msat(connection, ledger.client(account_id)) == 9000


async def test_a_quote_that_is_not_open_starts_nothing(database: Database):
    async with database.transaction() as connection:
        account_id = await payer(connection)
        job = await job_in(connection, State.AWAITING_PAYMENT, account_id)
        quote_id = await connection.fetchval("select quote_id from jobs where id = $1", job.id)
        for closed in ("expired", "late", "paid"):
            await connection.execute("update quotes set state = $2 where id = $1", quote_id, closed)
            with pytest.raises(QuoteExpired):
                await job_submits.start_quote(connection, quote_id, lanes={job.id: LANE})
        assert await state_of(connection, job.id) is State.AWAITING_PAYMENT
