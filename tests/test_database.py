"""`router.database`: connections that break, transactions that lose, and the batching writer."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from router.database import (
    BatchingWriter,
    ConnectionBroke,
    Database,
    DatabaseUnavailable,
    migrate,
    patiently,
)
from router.embedded_postgres import EmbeddedPostgres
from tests.memory_folder import memory_folder

PATIENCE_S = 15.0


async def note(connection: Any, rows: list[tuple[int, str]]) -> list[Any]:
    """A handler like the real ones: some statements for all rows, and a result for each."""
    await connection.execute(
        "insert into noted (id, what) select * from unnest($1::int[], $2::text[])",
        [row[0] for row in rows],
        [row[1] for row in rows],
    )
    return [ValueError(what) if what == "refused" else number for number, what in rows]


@asynccontextmanager
async def writing(
    database: Database, *groups: dict[str, Any], single: Sequence[str] = (), **handlers: Any
) -> AsyncIterator[BatchingWriter]:
    async with database.connection() as connection:
        await connection.execute("create table noted (id int primary key, what text not null)")
    writer = BatchingWriter(database, *(groups or [handlers or {"note": note}]), single=single)
    writer.start()
    try:
        yield writer
    finally:
        await writer.stop()


async def noted(database: Database) -> list[int]:
    async with database.connection() as connection:
        return [row["id"] for row in await connection.fetch("select id from noted order by id")]


# --- the batching writer -----------------------------------------------------------------------


async def test_what_arrives_during_a_commit_is_the_next_batch(database: Database):
    sizes: list[int] = []

    async def counted(connection: Any, rows: list[Any]) -> Sequence[Any]:
        sizes.append(len(rows))
        return await note(connection, rows)

    async with writing(database, note=counted) as writer:
        results = await asyncio.gather(*(writer.write("note", (i, "x")) for i in range(100)))
    assert results == list(range(100)), "each caller gets the result of its own row"
    assert sum(sizes) == 100 and len(sizes) < 20
    assert await noted(database) == list(range(100))


async def test_rows_reach_the_handler_in_the_order_in_which_they_were_written(database: Database):
    seen: list[int] = []

    async def kept(connection: Any, rows: list[Any]) -> Sequence[Any]:
        seen.extend(number for number, _ in rows)
        return await note(connection, rows)

    async with writing(database, note=kept) as writer:
        await asyncio.gather(*(writer.write("note", (i, "x")) for i in range(50)))
    assert seen == list(range(50))


async def test_a_bad_row_fails_alone(database: Database):
    async with writing(database) as writer:
        await writer.write("note", (3, "first"))
        results = await asyncio.gather(
            *(writer.write("note", (i, "x")) for i in range(6)), return_exceptions=True
        )
    assert [r for r in results if not isinstance(r, Exception)] == [0, 1, 2, 4, 5]
    assert type(results[3]).__name__ == "UniqueViolationError"
    assert await noted(database) == [0, 1, 2, 3, 4, 5]


async def test_a_refusal_is_raised_at_its_caller_and_the_others_go_on(database: Database):
    async with writing(database) as writer:
        results = await asyncio.gather(
            writer.write("note", (1, "x")),
            writer.write("note", (2, "refused")),
            writer.write("note", (3, "x")),
            return_exceptions=True,
        )
    assert results[0] == 1 and results[2] == 3
    assert isinstance(results[1], ValueError)


async def test_several_kinds_share_one_transaction(database: Database):
    """What fails in one kind takes nothing of the other with it."""

    async def broken(connection: Any, rows: list[Any]) -> Sequence[Any]:
        await connection.execute("select 1 / 0")
        return rows

    async with writing(database, note=note, broken=broken) as writer:
        well, ill = await asyncio.gather(
            writer.write("note", (1, "x")), writer.write("broken", 1), return_exceptions=True
        )
    assert well == 1
    assert type(ill).__name__ == "DivisionByZeroError"
    assert await noted(database) == [1]


async def test_a_group_does_not_wait_for_the_turn_of_another(database: Database):
    met = asyncio.Barrier(2)

    async def meets(connection: Any, rows: list[Any]) -> Sequence[Any]:
        results = await note(connection, rows)
        await met.wait()
        return results

    async with writing(database, {"note": meets}, {"other": meets}) as writer:
        both = asyncio.gather(writer.write("note", (1, "x")), writer.write("other", (2, "x")))
        assert await asyncio.wait_for(both, PATIENCE_S) == [1, 2]
    assert await noted(database) == [1, 2]


async def test_a_kind_of_one_statement_has_a_transaction_only_in_company(database: Database):
    in_transaction: list[bool] = []

    async def watched(connection: Any, rows: list[Any]) -> Sequence[Any]:
        in_transaction.append(connection.is_in_transaction())
        return await note(connection, rows)

    async with writing(database, {"note": watched, "other": note}, single=["note"]) as writer:
        await writer.write("note", (1, "x"))
        await asyncio.gather(writer.write("note", (2, "x")), writer.write("other", (3, "x")))
        await writer.write_all("note", [(4, "x"), (5, "x")])
        # A failure is for its row alone here, too.
        again, well = await writer.write_all("note", [(5, "x"), (6, "x")])
    assert in_transaction[:3] == [False, True, False]
    assert type(again).__name__ == "UniqueViolationError" and well == 6
    assert await noted(database) == [1, 2, 3, 4, 5, 6]


async def test_stop_waits_for_the_turns_of_all_groups(database: Database):
    async with writing(database, {"note": note}, {"other": note}) as writer:
        waiting = [
            asyncio.create_task(writer.write(kind, (number, "x")))
            for number, kind in enumerate(["note", "other", "note", "other"])
        ]
        await asyncio.sleep(0)
    assert all(task.done() for task in waiting)
    assert await noted(database) == [0, 1, 2, 3]


async def test_a_caller_that_goes_away_leaves_its_row_to_be_written(database: Database):
    async with writing(database) as writer:
        going = asyncio.create_task(writer.write("note", (1, "x")))
        await asyncio.sleep(0)
        going.cancel()
        await writer.write("note", (2, "x"))
    assert await noted(database) == [1, 2]


async def test_stop_writes_what_is_waiting(database: Database):
    async with writing(database) as writer:
        waiting = [asyncio.create_task(writer.write("note", (i, "x"))) for i in range(5)]
        await asyncio.sleep(0)
    assert await asyncio.gather(*waiting) == [0, 1, 2, 3, 4]
    assert await noted(database) == [0, 1, 2, 3, 4]


# --- transactions that lose --------------------------------------------------------------------


async def test_of_two_transactions_that_wait_for_each_other_both_are_done(database: Database):
    async with writing(database) as writer:
        await asyncio.gather(writer.write("note", (1, "")), writer.write("note", (2, "")))
    both_began = asyncio.Barrier(2)
    tries: list[str] = []

    def work(name: str, first: int, then: int):
        async def run(connection: Any) -> str:
            await connection.execute(
                "update noted set what = what || $2 where id = $1", first, name
            )
            tries.append(name)
            if tries.count(name) == 1:
                await both_began.wait()
            await connection.execute("update noted set what = what || $2 where id = $1", then, name)
            return name

        return run

    done = await asyncio.gather(database.run(work("a", 1, 2)), database.run(work("b", 2, 1)))
    assert done == ["a", "b"]
    # And perhaps once more: one that tries again may take its first row before the other is awake.
    assert len(tries) >= 3, "one of them was ended by PostgreSQL, and tried again"
    async with database.connection() as connection:
        rows = await connection.fetch("select what from noted")
    assert [sorted(row["what"]) for row in rows] == [["a", "b"], ["a", "b"]]


# --- PostgreSQL away ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server_folder() -> Iterator[Path]:
    with memory_folder() as folder:
        yield folder


@pytest.fixture
async def mortal(server_folder: Path) -> AsyncIterator[tuple[EmbeddedPostgres, Database]]:
    """A PostgreSQL that may be killed, and a pool of connections to it."""
    # Not a throw-away one: what was committed must outlive the kill.
    async with EmbeddedPostgres(server_folder) as server:
        database = await Database.open(server.url, size=3)
        async with database.connection() as connection:
            await connection.execute("drop table if exists noted")
        yield server, database
        await database.close()


def kill(server: EmbeddedPostgres) -> None:
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)


async def test_a_statement_under_way_when_postgres_dies_may_have_been_done(mortal):
    server, database = mortal

    async def statement() -> None:
        async with database.connection() as connection:
            started.set()
            await connection.execute("select pg_sleep(30)")

    started = asyncio.Event()
    running = asyncio.create_task(statement())
    await started.wait()
    kill(server)
    with pytest.raises(ConnectionBroke):
        await asyncio.wait_for(running, PATIENCE_S)


async def test_without_postgres_nothing_was_done_and_that_is_known(mortal):
    server, database = mortal
    # Stopped rather than killed: the supervisor would have a killed one back within a moment.
    await server.stop()
    with pytest.raises(DatabaseUnavailable) as refused:
        async with database.connection():
            raise AssertionError("there is no database to connect to")
    assert not isinstance(refused.value, ConnectionBroke)


async def test_writes_fail_while_postgres_is_away_and_go_on_when_it_is_back(mortal):
    server, database = mortal
    async with writing(database) as writer:
        assert await writer.write("note", (1, "x")) == 1
        kill(server)
        number = 2
        with pytest.raises(DatabaseUnavailable):
            while True:
                await writer.write("note", (number, "x"))
                number += 1
        number += 1
        async with asyncio.timeout(PATIENCE_S):
            while True:
                try:
                    assert await writer.write("note", (number, "x")) == number
                    break
                except DatabaseUnavailable:
                    number += 1
                    await asyncio.sleep(0.05)
    assert {1, number} <= set(await noted(database))


async def test_a_start_waits_for_a_postgres_that_dies_as_it_comes(mortal):
    """Migrations, too: their driver says it in words of its own."""
    server, _ = mortal
    kill(server)
    opened = []

    async def work() -> Database:
        await asyncio.to_thread(migrate, server.url)
        opened.append(await Database.open(server.url, size=2))
        return opened[-1]

    database = await patiently(work, patience_s=PATIENCE_S)
    async with database.connection() as connection:
        assert await connection.fetchval("select count(*) from jobs") == 0
    await database.close()


async def test_a_start_does_not_wait_for_what_will_not_pass(mortal):
    async def work() -> None:
        raise ValueError("not the database's fault")

    with pytest.raises(ValueError):
        await patiently(work, patience_s=PATIENCE_S)
