"""Connections stay at hand between uses, and none that is broken, stale or in use is handed out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from router import kept_connections
from router.database import ConnectionBroke, Database, DatabaseUnavailable

SIZE = 3
PATIENCE_S = 10.0
_PID = "select pg_backend_pid()"


@pytest.fixture
async def small(database_url: str) -> AsyncIterator[Database]:
    opened = await Database.open(database_url, size=SIZE)
    yield opened
    await opened.close()


async def pid(database: Database) -> int:
    async with database.connection() as connection:
        return await connection.fetchval(_PID)


async def pids(database: Database, number: int) -> set[int]:
    """Those of so many connections that are used at the same time."""
    met = asyncio.Barrier(number)

    async def one() -> int:
        async with database.connection() as connection:
            await met.wait()
            return await connection.fetchval(_PID)

    async with asyncio.timeout(PATIENCE_S):
        return set(await asyncio.gather(*(one() for _ in range(number))))


async def test_the_last_used_is_the_next_to_be_used(small: Database):
    first = await pid(small)
    async with small.connection() as connection:
        assert await connection.fetchval(_PID) == first
        other = await pid(small)
        assert other != first
        assert await pid(small) == other
    assert await pid(small) == first


async def test_two_never_have_the_same(small: Database):
    for _ in range(5):
        assert len(await pids(small, SIZE)) == SIZE


async def test_who_waits_gets_what_comes_back(small: Database):
    taken = [small.connection() for _ in range(SIZE)]
    for one in taken:
        await one.__aenter__()
    waiting = asyncio.create_task(pids(small, SIZE))
    for _ in range(5):
        await asyncio.sleep(0)
    for one in taken:
        await one.__aexit__(None, None, None)
    # All of them, and not only what did not find a place among those that are kept.
    assert len(await waiting) == SIZE


async def test_one_is_always_left_to_the_pool(small: Database):
    await pids(small, SIZE)
    async with asyncio.timeout(PATIENCE_S):
        assert await small.pool.fetchval("select 1") == 1


async def test_idle_ones_are_counted_wherever_they_are(small: Database):
    await pids(small, SIZE)
    assert small.idle == SIZE
    async with small.connection():
        assert small.idle == SIZE - 1


async def test_what_was_closed_meanwhile_is_not_counted(small: Database):
    await pids(small, SIZE)
    for _, kept in small._connections._kept:
        kept.terminate()
    assert small.idle == small.pool.get_size() == 1
    assert len(await pids(small, SIZE)) == SIZE


async def test_one_that_was_closed_meanwhile_is_not_handed_out(small: Database):
    """By the other side, which is how a PostgreSQL goes."""
    before = await pid(small)
    async with small.connection() as connection:
        other = await pid(small)
        assert other != before
        # While it lies among those that are kept.
        assert await connection.fetchval("select pg_terminate_backend($1, 5000)", other)
    async with asyncio.timeout(PATIENCE_S):
        seen: set[int] = set()
        for _ in range(5):
            try:
                seen |= await pids(small, SIZE)
            except ConnectionBroke:
                # The word had not come yet.
                continue
    assert other not in seen and len(seen) == SIZE


async def test_what_somebody_broke_off_goes_back_to_the_pool_first(small: Database):
    """A statement that is cancelled is still under way for a moment."""

    async def slow() -> None:
        async with small.connection() as connection:
            await connection.execute("select pg_sleep(30)")

    async def begun() -> bool:
        async with small.connection() as connection:
            return await connection.fetchval(
                "select exists (select from pg_stat_activity where query = 'select pg_sleep(30)'"
                " and state = 'active' and datname = current_database())"
            )

    await pids(small, SIZE)
    for _ in range(SIZE):
        task = asyncio.create_task(slow())
        async with asyncio.timeout(PATIENCE_S):
            while not await begun():
                await asyncio.sleep(0.01)
        task.cancel()
        idle = small.pool.get_idle_size()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert small.pool.get_idle_size() == idle + 1
        assert len(await pids(small, SIZE)) == SIZE


async def test_no_transaction_is_left_to_the_next(small: Database):
    async with small.connection() as connection:
        left = await connection.fetchval(_PID)
        await connection.execute("create table written (n int)")
        await connection.transaction().start()
        await connection.execute("insert into written values (1)")
    for _ in range(SIZE):
        async with small.connection() as connection:
            assert not connection.is_in_transaction()
            assert await connection.fetchval("select count(*) from written") == 0
    assert left in await pids(small, SIZE)


async def test_one_that_nobody_has_used_for_long_is_not_used_any_more(
    small: Database, monkeypatch: pytest.MonkeyPatch
):
    old = await pids(small, SIZE)
    monkeypatch.setattr(kept_connections, "IDLE_S", -1.0)
    kept = {await _pid_of(one) for _, one in small._connections._kept}
    assert len(kept) == SIZE - 1 and kept < old
    assert await pid(small) not in kept
    monkeypatch.undo()
    assert not kept & await pids(small, SIZE)


async def _pid_of(connection: Any) -> int:
    return await connection.fetchval(_PID)


async def test_one_that_has_done_enough_is_made_anew(
    database_url: str, monkeypatch: pytest.MonkeyPatch
):
    """The pool knows how much it has done, and looks when it comes back."""
    monkeypatch.setattr("router.database.MAX_QUERIES", 4)
    opened = await Database.open(database_url, size=SIZE)
    tired = await pid(opened)
    for _ in range(9):
        assert await pid(opened) == tired
    monkeypatch.setattr(kept_connections, "OUT_S", 0.0)
    assert await pid(opened) == tired
    assert tired not in await pids(opened, SIZE)
    await opened.close()


async def test_after_the_end_nothing_is_kept(database_url: str):
    opened = await Database.open(database_url, size=SIZE)
    await pids(opened, SIZE)
    using = opened.connection()
    await using.__aenter__()
    closing = asyncio.create_task(opened.close())
    await asyncio.sleep(0)
    assert not closing.done()
    await using.__aexit__(None, None, None)
    async with asyncio.timeout(PATIENCE_S):
        await closing
    with pytest.raises(DatabaseUnavailable):
        await pid(opened)


async def test_one_that_asks_for_much_makes_nobody_else_wait_or_be_refused(
    small: Database, database_url: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(kept_connections, "SILENT_S", 0.2)

    async def much() -> None:
        async with small.connection() as connection:
            await connection.execute("select pg_advisory_lock(1)")

    held = await asyncpg.connect(database_url)
    await held.execute("select pg_advisory_lock(1)")
    asking = asyncio.create_task(much())
    for _ in range(3):
        await asyncio.sleep(0.4)
        assert len(await pids(small, SIZE - 1)) == SIZE - 1
    assert not asking.done()
    await held.close()
    await asyncio.wait_for(asking, PATIENCE_S)
