"""A submission in one statement: the same rows as step by step, and nothing at all where it may not."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from billing import ledger
from billing.trial_balance import trial_balance
from router import job_submits
from router.database import BatchingWriter, Database
from router.errors import NotEnoughBalance
from router.job_records import Submission, Submitted
from tests.job_tools import OFFER_MSAT, new_job, new_quote, payer

PATIENCE_S = 10.0
Submit = Callable[[Any, list[Submission]], Awaitable[list[Any]]]

# What a row has of its own, and of the moment.
_OWN = {"id", "quote_id", "job_id", "account_id", "account", "debit", "credit", "reference", "seq"}
_TIMES = {"created_at", "queued_at", "wait_ends_at", "expires_at", "request_hash", "xact"}


async def _rows(connection: Any, table: str) -> list[dict[str, Any]]:
    found = await connection.fetch(f"select * from {table}")
    rows = [{k: v for k, v in row.items() if k not in _OWN | _TIMES} for row in found]
    return sorted(rows, key=repr)


async def _after(database: Database, submit: Submit) -> dict[str, list[dict[str, Any]]]:
    """All that two submissions have made, which are rolled back afterwards."""
    connection = await database.pool.acquire()
    transaction = connection.transaction()
    await transaction.start()
    try:
        rich, other = await payer(connection, 100_000), await payer(connection, 50_000)
        two = new_quote(new_job(), new_job(index=1, offer_msat=1_000, lane="a", more_lanes=("b",)))
        rows = [
            Submission(two, rich, attached_to="router_a"),
            Submission(new_quote(new_job(offer_msat=0, base_fee_msat=0)), other),
            Submission(new_quote(), other),
        ]
        assert all(isinstance(done, Submitted) for done in await submit(connection, rows))
        tables = ("quotes", "jobs", "queue", "ledger_transfers", "ledger_balances")
        return {table: await _rows(connection, table) for table in tables}
    finally:
        await transaction.rollback()
        await database.pool.release(connection)


async def test_one_statement_makes_the_rows_of_the_steps(database: Database):
    at_once = await _after(database, job_submits.submit_plain)
    steps = await _after(database, job_submits.submit_bound)
    assert len(at_once["jobs"]) == 4 and len(at_once["queue"]) == 5
    assert at_once == steps


async def test_jobs_get_their_places_in_the_order_in_which_they_came(database: Database):
    async with database.transaction() as connection:
        account_id = await payer(connection)
        quotes = [new_quote() for _ in range(20)]
        await job_submits.submit_plain(connection, [Submission(q, account_id) for q in quotes])
        rows = await connection.fetch("select quote_id, seq from jobs order by seq")
    assert [row["quote_id"] for row in rows] == [quote.id for quote in quotes]
    assert len({row["seq"] for row in rows}) == len(quotes)


async def test_where_one_payer_is_short_the_others_are_served_nevertheless(database: Database):
    async with database.transaction() as connection:
        poor, rich = await payer(connection, OFFER_MSAT), await payer(connection)
        rows = [Submission(new_quote(), account) for account in (poor, rich, poor)]
        done = await job_submits.submit_plain(connection, rows)
        assert [type(result) for result in done] == [Submitted, Submitted, NotEnoughBalance]
        assert await ledger.balance_msat(connection, ledger.client(poor)) == 0
        assert (await trial_balance(connection)).in_order


async def test_two_that_draw_on_one_balance_at_the_same_moment_get_it_once(database: Database):
    """The second waits for the row, and then sees what the first has left, not what it saw before."""
    async with database.transaction() as connection:
        account_id = await payer(connection, OFFER_MSAT)
    async with database.connection() as first, database.connection() as second:
        async with first.transaction():
            (won,) = await job_submits.submit_plain(first, [Submission(new_quote(), account_id)])
            late = asyncio.create_task(
                job_submits.submit_plain(second, [Submission(new_quote(), account_id)])
            )
            done, _ = await asyncio.wait({late}, timeout=0.3)
            assert not done
        (lost,) = await asyncio.wait_for(late, PATIENCE_S)
    assert isinstance(won, Submitted) and isinstance(lost, NotEnoughBalance)
    async with database.transaction("repeatable_read") as connection:
        assert await ledger.balance_msat(connection, ledger.client(account_id)) == 0
        assert await connection.fetchval("select count(*) from jobs") == 1
        assert (await trial_balance(connection)).in_order


async def test_one_that_waited_draws_on_what_is_there_then(database: Database):
    """Both are covered: neither change of the balance is lost."""
    async with database.transaction() as connection:
        account_id = await payer(connection, 5 * OFFER_MSAT)
    async with database.connection() as first, database.connection() as second:
        async with first.transaction():
            await job_submits.submit_plain(first, [Submission(new_quote(), account_id)])
            late = asyncio.create_task(
                job_submits.submit_plain(second, [Submission(new_quote(), account_id)])
            )
            done, _ = await asyncio.wait({late}, timeout=0.3)
            assert not done
        await asyncio.wait_for(late, PATIENCE_S)
    async with database.transaction("repeatable_read") as connection:
        left = await ledger.balance_msat(connection, ledger.client(account_id))
        assert left == 3 * OFFER_MSAT
        assert (await trial_balance(connection)).in_order


@pytest.mark.parametrize("routers", [1, 3])
async def test_a_crowd_of_submissions_never_draws_more_than_there_is(
    database: Database, routers: int
):
    async with database.transaction() as connection:
        accounts = [await payer(connection, 7 * OFFER_MSAT) for _ in range(3)]
    writers = [
        BatchingWriter(database, {"submit": job_submits.submit_plain}, single=["submit"])
        for _ in range(routers)
    ]
    for writer in writers:
        writer.start()
    results = await asyncio.gather(
        *(
            writers[number % routers].write("submit", Submission(new_quote(), accounts[number % 3]))
            for number in range(45)
        ),
        return_exceptions=True,
    )
    for writer in writers:
        await writer.stop()
    assert sum(isinstance(result, Submitted) for result in results) == 3 * 7
    assert sum(isinstance(result, NotEnoughBalance) for result in results) == 45 - 3 * 7
    async with database.transaction("repeatable_read") as connection:
        for account_id in accounts:
            assert await ledger.balance_msat(connection, ledger.client(account_id)) == 0
        assert (await trial_balance(connection)).in_order
