"""PostgreSQL that hangs: stopped, or behind a line that was cut without a word. Nothing is refused by
it and nothing answered, so that whoever waits for it waits for a minute."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import psutil
import pytest

from router import hung_server, kept_connections
from router.app import CannotStart, _open_database
from router.database import ConnectionBroke, Database, DatabaseUnavailable, with_parameters
from router.embedded_postgres import PORT, EmbeddedPostgres
from tests.reading import CHAT, until
from tests.router_rig import Rig, running_rig

SILENT_S = 0.5
# A look at the database, and a moment until it is given up, with room for a slow machine.
SOON_S = 15.0


@asynccontextmanager
async def hanging(postgres: EmbeddedPostgres) -> AsyncIterator[None]:
    """All processes of a server stopped, and let go on in the end."""
    server = psutil.Process(postgres.pid)
    processes = [server, *server.children(recursive=True)]
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.suspend()
    try:
        yield
    finally:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that hangs is given up after a second."""
    monkeypatch.setattr(kept_connections, "SILENT_S", SILENT_S)
    monkeypatch.setattr(hung_server, "SILENT_S", SILENT_S)
    monkeypatch.setattr(hung_server, "PROBE_S", 1.0)
    monkeypatch.setattr(hung_server, "LOOK_EVERY_S", 0.1)


async def seconds(router: Rig, path: str, status: int) -> float:
    began = time.monotonic()
    reply = await router.http.get(path)
    assert reply.status_code == status, reply.text
    return time.monotonic() - began


async def test_a_database_that_hangs_is_said_to_be_away_and_keeps_nobody_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(kept_connections, "SILENT_S", SILENT_S)
    async with (
        EmbeddedPostgres(tmp_path / "postgres", throw_away=True) as postgres,
        running_rig(tmp_path, postgres.url) as router,
        router.worker() as worker,
    ):
        key = await router.bearer()
        async with hanging(postgres):
            assert await seconds(router, "/health/ready", 503) < SOON_S
            assert await seconds(router, "/metrics", 200) < SOON_S
            await asyncio.sleep(SILENT_S)
            # One a second tries, and waits; the others hear at once that it is in vain.
            tries = [
                asyncio.create_task(
                    router.http.post("/jobs", json=CHAT | {"kind": "chat"}, headers=key, timeout=90)
                )
                for _ in range(6)
            ]
            done, waiting = await asyncio.wait(tries, timeout=SOON_S)
            refused = [task.result() for task in done]
            assert len(refused) >= 5, len(refused)
            for reply in refused:
                assert reply.status_code == 503
                assert reply.json()["error"]["code"] == "database_unavailable"
                assert int(reply.headers["Retry-After"]) > 0

        async def is_ready() -> bool:
            return (await router.http.get("/health/ready")).status_code == 200

        await until(is_ready, timeout_s=2 * SOON_S)
        served = asyncio.create_task(worker.serve("Here again."))
        for task in waiting:
            await task
        made = await router.http.post("/jobs", json=CHAT | {"kind": "chat"}, headers=key)
        assert made.status_code == 202
        await served


async def test_a_router_whose_database_hangs_at_the_start_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("router.database.CONNECT_S", 0.2)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        url = f"postgresql://satherd@127.0.0.1:{listening.getsockname()[1]}/satherd"
        with pytest.raises(CannotStart, match="does not answer"):
            await asyncio.wait_for(_open_database(url, 0.1), SOON_S)


async def test_a_slow_statement_is_waited_for(database: Database, hasty: None):
    async with database.connection() as connection:
        await connection.execute("select pg_sleep($1)", 6 * SILENT_S)


@pytest.mark.parametrize("owner", [False, True])
async def test_who_waits_for_a_server_that_hangs_is_told_and_what_was_sent_is_not_done_later(
    tmp_path: Path, hasty: None, owner: bool
):
    """Whoever looks, once it answers again, sees what there is and will be. `owner`: of the tables is
    a role that the user takes on, as where users are made for a day."""
    async with EmbeddedPostgres(tmp_path, throw_away=True) as postgres:
        holder = await asyncpg.connect(postgres.url)
        if owner:
            await holder.execute(
                "create role owner; grant all on schema public to owner;"
                "alter role satherd set role owner"
            )
        database = await Database.open(postgres.url, size=4)
        async with database.connection() as connection:
            await connection.execute("create table said (word text)")
        await holder.execute("select pg_advisory_lock(1)")

        async def write() -> None:
            async with database.connection() as connection:
                await connection.execute(
                    "with waited as materialized (select pg_advisory_lock(1))"
                    " insert into said select 'late' from waited"
                )

        async def both_wait() -> bool:
            return await holder.fetchval("select count(*) = 2 from pg_locks where not granted")

        writing = [asyncio.create_task(write()) for _ in range(2)]
        await until(both_wait)
        async with hanging(postgres):
            for task in writing:
                with pytest.raises(ConnectionBroke):
                    await asyncio.wait_for(task, SOON_S)
            with pytest.raises(DatabaseUnavailable):
                await asyncio.wait_for(write(), SOON_S)
        assert await until(lambda: words(database)) == 1
        # Now they could write, if they were still there.
        await holder.close()
        await asyncio.sleep(1)
        assert await words(database) == 1
        await database.close()


async def words(database: Database) -> int | None:
    """One more than there are; None while that cannot be told."""
    with contextlib.suppress(DatabaseUnavailable):
        async with database.connection() as connection:
            return await connection.fetchval("select 1 + count(*) from said")


async def test_a_database_that_hides_its_sessions_is_used_again_after_it_has_hung(
    tmp_path: Path, hasty: None, caplog: pytest.LogCaptureFixture
):
    async with EmbeddedPostgres(tmp_path, throw_away=True) as postgres:
        admin = await asyncpg.connect(postgres.url)
        await admin.execute(
            "create role lowly; create table said (word text); grant select on said to lowly;"
            "revoke all on pg_stat_activity from public"
        )
        lowly = with_parameters(postgres.url, role="lowly")
        pool = await asyncpg.create_pool(lowly, min_size=1, max_size=2)
        database = Database(pool, lambda: asyncpg.connect(lowly))

        async def wait() -> None:
            async with database.connection() as connection:
                await connection.execute("select pg_sleep(60)")

        waiting = asyncio.create_task(wait())
        await asyncio.sleep(0.2)
        async with hanging(postgres):
            with pytest.raises(ConnectionBroke):
                await asyncio.wait_for(waiting, SOON_S)
        assert await until(lambda: words(database), timeout_s=SOON_S) == 1
        assert "may not end its own sessions" in caplog.text
        await admin.close()
        await database.close()


SYNC_BYTES = 5


class ForgetfulLine:
    """A way to a server that, once it is told to forget, swallows whatever either end says on the
    connections that there are; new ones are good. So does what watches over connections, and was
    started anew, or thought them too old."""

    def __init__(self, postgres: EmbeddedPostgres, folder: Path) -> None:
        name = f".s.PGSQL.{PORT}"
        self._real, self._own = Path(postgres.connect_args["host"]) / name, folder / name
        self.url = with_parameters(postgres.url, host=str(folder))
        self._forgotten = 0
        self._joined = 0

    async def start(self) -> asyncio.Server:
        return await asyncio.start_unix_server(self._join, str(self._own))

    def forget(self) -> None:
        self._forgotten = self._joined

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._joined += 1
        number = self._joined
        far_reader, far_writer = await asyncio.open_unix_connection(str(self._real))
        await asyncio.gather(
            self._carry(number, reader, far_writer), self._carry(number, far_reader, writer)
        )
        for end in (writer, far_writer):
            end.transport.abort()
            with contextlib.suppress(OSError):
                await end.wait_closed()

    async def _carry(
        self, number: int, source: asyncio.StreamReader, sink: asyncio.StreamWriter
    ) -> None:
        heard = True
        with contextlib.suppress(OSError):
            while data := await source.read(65_536):
                if number > self._forgotten:
                    sink.write(data)
                elif heard:
                    # The last word of a statement with values is missing: the server has begun it.
                    heard = False
                    sink.write(data[:-SYNC_BYTES])
        if number > self._forgotten:
            sink.write_eof()


async def test_who_waits_on_a_line_that_has_forgotten_him_is_told_while_others_are_served(
    tmp_path: Path, hasty: None
):
    """The server is well: one statement never came to it, and the answer to another never back."""
    async with EmbeddedPostgres(tmp_path / "postgres", throw_away=True) as postgres:
        line = ForgetfulLine(postgres, tmp_path)
        server = await line.start()
        database = await Database.open(line.url, size=6)
        async with database.connection() as connection:
            await connection.execute("create table said (word text)")
        sleeping, told = asyncio.Event(), asyncio.Event()

        async def done_unheard() -> None:
            async with database.transaction() as connection:
                await connection.execute("insert into said values ('undone')")
                sleeping.set()
                await connection.execute("select pg_sleep(0.3)")

        async def never_heard() -> None:
            async with database.connection() as connection:
                await told.wait()
                await connection.execute("insert into said values ('never said')")

        async def half_heard() -> None:
            async with database.connection() as connection:
                await told.wait()
                await connection.execute("insert into said values ($1)", "half said")

        async def slow() -> None:
            async with database.connection() as connection:
                await connection.execute("select pg_sleep($1)", 6 * SILENT_S)

        works = done_unheard, never_heard, half_heard
        waiting = [asyncio.create_task(work()) for work in works]
        await sleeping.wait()
        await asyncio.sleep(0.1)
        line.forget()
        told.set()
        well = asyncio.create_task(slow())

        async def served() -> None:
            while True:
                async with database.connection() as connection:
                    await connection.fetchval("select 1")
                await asyncio.sleep(0.05)

        serving = asyncio.create_task(served())
        done, _ = await asyncio.wait(waiting, timeout=SOON_S)
        assert len(done) == len(waiting)
        assert all(isinstance(task.exception(), ConnectionBroke) for task in done)
        assert not serving.done()
        serving.cancel()
        async with database.transaction() as connection:
            assert await connection.fetchval("select count(*) from said") == 0
            # And nothing of it holds a row, or waits to be done.
            await connection.execute("lock table said in access exclusive mode nowait")
        await well
        await database.close()
        server.close()


async def test_a_purchase_under_way_when_the_database_hangs_is_told_and_happens_once(
    tmp_path: Path, hasty: None
):
    async with (
        EmbeddedPostgres(tmp_path / "postgres", throw_away=True) as postgres,
        running_rig(tmp_path, postgres.url) as router,
        router.worker() as worker,
    ):
        key = await router.bearer()
        names = [{"Idempotency-Key": f"order-{number}"} for number in range(5)]

        async def buy(name: dict[str, str]) -> int:
            body = CHAT | {"kind": "chat"}
            reply = await router.http.post("/jobs", json=body, headers=key | name, timeout=90)
            assert reply.status_code in (202, 503), reply.text
            if reply.status_code == 503:
                assert int(reply.headers["Retry-After"]) > 0
            return reply.status_code

        async with hanging(postgres):
            statuses = await asyncio.wait_for(asyncio.gather(*map(buy, names)), 2 * SOON_S)
            assert statuses == [503] * 5

        async def all_bought() -> bool:
            return [await buy(name) for name in names] == [202] * 5

        async def serve_all() -> None:
            for _ in names:
                await worker.serve("Here.")

        serving = asyncio.create_task(serve_all())
        await until(all_bought)
        await serving

        async def all_done() -> bool:
            rows = await router.query("select state from jobs")
            return [row["state"] for row in rows] == ["succeeded"] * 5

        await until(all_done)
        assert (await router.books()).in_order


async def test_the_server_ends_sessions_of_a_router_that_has_gone_without_a_word(
    database: Database,
):
    """Otherwise the rows that it has locked would be kept from other routers for hours."""
    async with database.connection() as connection:
        kept = await connection.fetchval("show idle_in_transaction_session_timeout")
        assert kept == "30s"

    async def is_gone(pid: int) -> bool:
        async with database.connection() as other:
            return not await other.fetch("select from pg_stat_activity where pid = $1", pid)

    with pytest.raises(ConnectionBroke):
        async with database.transaction() as connection:
            pid = await connection.fetchval("select pg_backend_pid()")
            await connection.execute("set local idle_in_transaction_session_timeout = '50ms'")
            await until(lambda: is_gone(pid))
            await connection.execute("select 1")
    async with database.connection() as connection:
        assert await connection.fetchval("select 1") == 1
