"""Plans that are kept follow the tables when they grow."""

from __future__ import annotations

import json
from typing import Any

import pytest

from router import growing_tables
from router.database import Database

_FIND = "select worker_id from attempts where job_id = any((select $1::text[])::text[]) and n = 1"


@pytest.fixture(name="database")
async def without_autovacuum(database: Database) -> Database:
    """Which looks at each database once a minute, and may find the table just before we do."""
    async with database.connection() as connection:
        await connection.execute("alter table attempts set (autovacuum_enabled = off)")
    return database


async def _add(connection: Any, jobs: range) -> None:
    await connection.execute(
        "insert into attempts (job_id, n, worker_id, router_id)"
        " select 'job-' || g, 1, 'w', 'r' from generate_series($1::int, $2::int) g",
        jobs.start,
        jobs.stop - 1,
    )


async def _rows_read(connection: Any) -> int:
    """Rows of attempts that are gone through to find one of them, by the plan that is kept."""
    explain = "explain (analyze, format json) execute find(array['job-7'])"
    (explained,) = json.loads(await connection.fetchval(explain))
    return _read_from(explained["Plan"])


def _read_from(plan: dict[str, Any]) -> int:
    here = plan.get("Relation Name") == "attempts"
    own = plan["Actual Rows"] + plan.get("Rows Removed by Filter", 0) if here else 0
    return int(own) + sum(_read_from(part) for part in plan.get("Plans", ()))


async def test_a_table_that_has_grown_is_not_read_from_end_to_end(database: Database):
    async with database.connection() as connection:
        await connection.execute("set plan_cache_mode = force_generic_plan")
        await _add(connection, range(1, 20))
        await connection.execute("analyze attempts")
        await connection.execute(f"prepare find (text[]) as {_FIND}")
        assert await _rows_read(connection) == 19
        await _add(connection, range(20, 20_000))
        assert await _rows_read(connection) == 19_999
        assert await growing_tables.analyze(connection) == ["attempts"]
        assert await _rows_read(connection) == 1
        # Nothing to do before it has doubled.
        assert await growing_tables.analyze(connection) == []
        await connection.execute("deallocate find")
        await connection.execute("reset plan_cache_mode")


async def test_what_somebody_else_looks_after_is_left_to_him(database: Database):
    async with database.connection() as one, database.connection() as other:
        await _add(one, range(1, 2_000))
        async with other.transaction():
            await other.execute("lock table attempts in share update exclusive mode")
            assert await growing_tables.analyze(one) == ["attempts"]
        assert await growing_tables.analyze(one) == ["attempts"]
        assert await growing_tables.analyze(one) == []


async def test_large_tables_are_left_to_autovacuum(database: Database):
    async with database.connection() as connection:
        await _add(connection, range(1, 2_000))
        before, growing_tables.MOST_PAGES = growing_tables.MOST_PAGES, 0
        try:
            assert await growing_tables.analyze(connection) == []
        finally:
            growing_tables.MOST_PAGES = before


# What every purchase is looked up in: by its invoice, its key, or the Idempotency-Key of its client.
_LOOKED_UP = {
    "invoices": (
        "payment_hash, account_id, purpose, reference, amount_msat, bolt11, state, token_id,"
        " claim_hash, created_at, expires_at",
        "'k' || g, 'a', 'quote', 'q' || g, 1, 'lnbc', 'open', '', sha256(g::text::bytea), now(), now()",
        "payment_hash = $1",
    ),
    "account_keys": (
        "key_hash, id, account_id, can_withdraw, is_primary",
        "sha256(g::text::bytea), 'k' || g, 'a' || g, false, true",
        "key_hash = any(array[sha256($1::bytea)])",
    ),
    "idempotency": (
        "scope, key, request_hash, quote_id",
        "'k' || g, 'once', '', 'q' || g",
        "scope = $1 and key = 'once'",
    ),
}


@pytest.mark.parametrize("table", _LOOKED_UP)
async def test_whoever_buys_is_found_at_once_in_a_market_that_has_just_opened(
    database: Database, table: str
):
    columns, values, where = _LOOKED_UP[table]

    async def add(jobs: range) -> None:
        await connection.execute(
            f"insert into {table} ({columns}) select {values}"
            f" from generate_series({jobs.start}, {jobs.stop - 1}) g"
        )

    async def reads_it_all() -> bool:
        explained = await connection.fetchval("explain (format json) execute find('k7')")
        return "Seq Scan" in explained

    async with database.transaction() as connection:
        await connection.execute("set local plan_cache_mode = force_generic_plan")
        await add(range(1, 5))
        await connection.execute(f"analyze {table}")
        await connection.execute(f"prepare find (text) as select 1 from {table} where {where}")
        assert await reads_it_all()
        await add(range(5, 5_000))
        assert await reads_it_all()
        assert await growing_tables.analyze(connection) == [table]
        assert not await reads_it_all()
        await connection.execute("deallocate find")
