"""PostgreSQL: connections, transactions, migrations, and the batching writer of the hot statements.

Whoever opens a transaction commits it; functions that are given a connection do not. SQLModel
describes the tables and migrations follow it; statements are written in SQL and run by asyncpg,
which costs a small part of an ORM session's CPU (docs/performance.md).
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qs, urlencode, urlsplit, urlunsplit

import asyncpg
from alembic import command
from alembic.config import Config
from sqlalchemy.exc import DBAPIError

from router.hung_server import HungServer
from router.kept_connections import KeptConnections

log = logging.getLogger(__name__)

Connection = asyncpg.Connection | asyncpg.pool.PoolConnectionProxy
Handler = Callable[[Any, list[Any]], Awaitable[Sequence[Any]]]

T = TypeVar("T")

# PostgreSQL has no U+0000 in its texts; a client's id or name that holds one names nothing.
UnstorableText = asyncpg.CharacterNotInRepertoireError

TRANSIENT = (asyncpg.DeadlockDetectedError, asyncpg.SerializationError)
TRIES = 5
# A server that hangs takes a connection at once, and says nothing.
CONNECT_S = 10.0


class DatabaseUnavailable(Exception):
    """PostgreSQL cannot be reached; nothing was changed, or it is not known to have been."""


class ConnectionBroke(DatabaseUnavailable):
    """PostgreSQL went away in the middle: what was asked of it may have been done."""


class PartlyDone(Exception):
    """Raised by a handler of the batching writer: some of its rows are written for good, and something,
    the cause of this, went wrong with the rest, of which nothing is."""

    def __init__(self, results: dict[int, Any]) -> None:
        """`results`: those of the rows that are written, by their places."""
        super().__init__(f"{len(results)} writes are done, the others are not")
        self.results = results


_GONE = (
    OSError,
    asyncpg.InterfaceError,
    # Raised for statements under way when the server is killed.
    asyncpg.InternalClientError,
    asyncpg.PostgresConnectionError,
    asyncpg.CannotConnectNowError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.TooManyConnectionsError,
    TimeoutError,
)


def is_away(error: BaseException | None) -> bool:
    """Whether an error, of ours, of asyncpg or of SQLAlchemy, says that PostgreSQL is not there."""
    if isinstance(error, DBAPIError):
        error = error.orig and error.orig.__cause__
    return isinstance(error, (DatabaseUnavailable, *_GONE))


async def patiently(work: Callable[[], Awaitable[T]], *, patience_s: float) -> T:
    """Do something at the start, again and again while PostgreSQL is not there yet.

    It may die, and be started again by its supervisor, in the moment in which we come. Raises what
    `work` raises, and the last error when patience is over.
    """
    until = time.monotonic() + patience_s
    while True:
        try:
            return await work()
        except Exception as error:
            if not is_away(error) or time.monotonic() > until:
                raise
            log.warning("waiting for the database: %r", error)
        await asyncio.sleep(0.5)


def sqlalchemy_url(url: str) -> str:
    """The same database for SQLAlchemy's asyncpg dialect."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(scheme="postgresql+asyncpg"))


def with_parameters(url: str, **parameters: str) -> str:
    """The URL with query parameters added."""
    parts = urlsplit(url)
    query = {k: v[0] for k, v in parse_qs(parts.query).items()} | parameters
    return urlunsplit(parts._replace(query=urlencode(query)))


def migrate(url: str, revision: str = "head") -> None:
    """Bring the database at `url` to a revision. Blocks: call it in a thread from async code."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent.parent / "migrations"))
    config.set_main_option("sqlalchemy.url", url.replace("%", "%%"))
    command.upgrade(config, revision)


# A connection is made anew after this many statements; asyncpg's 50,000 would be every few seconds.
MAX_QUERIES = 10_000_000


async def _leave_as_it_is(connection: Any) -> None:
    """What asyncpg's pool does instead of resetting the session each time it comes back.

    Open transactions are rolled back before this. Nobody changes anything else of a session: locks
    and settings are for a transaction. So the round trip would be for nothing.
    """


async def _outlived_by_nobody(connection: Any) -> None:
    """Have the server end a session whose router has gone without a word (cut off, stopped): the rows
    that it has locked are wanted by other routers."""
    await connection.execute(
        "set idle_in_transaction_session_timeout = '30s'; set tcp_user_timeout = '30s';"
        "set tcp_keepalives_idle = '10s'; set tcp_keepalives_interval = '5s';"
        "set tcp_keepalives_count = 4"
    )


async def _connect_to_look(url: str) -> asyncpg.Connection:
    """A connection as the user that the sessions are of, whatever role he takes on."""
    about = {"application_name": "satherd look"}
    connection = await asyncpg.connect(url, server_settings=about)
    try:
        # No parameter of the start: a pooler in between refuses those that it does not know.
        await connection.execute("set role none")
    except BaseException:
        connection.terminate()
        raise
    return connection


class Database:
    """A pool of connections."""

    def __init__(
        self, pool: asyncpg.Pool, connect: Callable[[], Awaitable[asyncpg.Connection]]
    ) -> None:
        self.pool = pool
        self._connections = KeptConnections(pool)
        self._hung = HungServer(self._connections, connect)
        self._hung.start()

    @classmethod
    async def open(cls, url: str, *, size: int = 10) -> Database:
        pool = await asyncpg.create_pool(
            url,
            min_size=2,
            max_size=size,
            timeout=CONNECT_S,
            command_timeout=60,
            max_inactive_connection_lifetime=300,
            max_queries=MAX_QUERIES,
            reset=_leave_as_it_is,
            init=_outlived_by_nobody,
            server_settings={"application_name": "satherd"},
        )

        return cls(pool, partial(_connect_to_look, url))

    @property
    def idle(self) -> int:
        """How many connections are open and not used."""
        return self._connections.idle

    async def close(self) -> None:
        await self._hung.stop()
        try:
            await asyncio.wait_for(self._connections.close(), 10)
        except TimeoutError:
            self.pool.terminate()

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Any]:
        """A connection without a transaction, for reads. Raises DatabaseUnavailable.

        It is ConnectionBroke from the moment on at which there is a connection.
        """
        reached = well = False
        try:
            connection = await self._connections.take(timeout_s=10)
            reached = True
            try:
                yield connection
                well = True
            finally:
                await self._connections.give_back(connection, well=well)
        except _GONE as error:
            kind = ConnectionBroke if reached else DatabaseUnavailable
            raise kind(str(error)) from error

    @asynccontextmanager
    async def transaction(self, isolation: str = "read_committed") -> AsyncIterator[Any]:
        """A connection in a transaction that commits at the end. Raises DatabaseUnavailable."""
        async with self.connection() as connection, connection.transaction(isolation=isolation):
            yield connection

    async def run(self, work: Callable[[Any], Awaitable[T]]) -> T:
        """Run `work(connection)` in a transaction, and again when it lost to another transaction.

        Two that want the same rows in another order cannot both go on: PostgreSQL ends one of them.
        Raises DatabaseUnavailable, and what `work` raises.
        """
        for attempt in range(TRIES):
            try:
                async with self.transaction() as connection:
                    return await work(connection)
            except TRANSIENT:
                await asyncio.sleep(random.uniform(0, 0.02) * 2**attempt)
        raise DatabaseUnavailable("too many deadlocks in a row")


Batch = dict[str, list[tuple[Any, asyncio.Future]]]


class _Group:
    """Kinds of writes whose turns follow one another, and what waits for the next."""

    def __init__(self, handlers: dict[str, Handler]) -> None:
        self.handlers = handlers
        self.waiting: Batch = {kind: [] for kind in handlers}
        self.some = asyncio.Event()
        self.turning = False

    def put(self, kind: str, rows: list[tuple[Any, asyncio.Future]]) -> None:
        self.waiting[kind] += rows
        self.some.set()

    def take(self, most: int) -> Batch:
        """What has waited longest, at most so many rows of each kind."""
        batch = {kind: rows[:most] for kind, rows in self.waiting.items() if rows}
        self.waiting = {kind: rows[most:] for kind, rows in self.waiting.items()}
        if not any(self.waiting.values()):
            self.some.clear()
        return batch


class BatchingWriter:
    """Runs hot writes many at a time: what arrived during the last commit is the next batch.

    Each kind of write has a handler that takes a connection and a list of rows and returns one
    result for each row, in order; a result that is an exception is raised at the caller of that row
    alone, and the handler must not have changed anything for it. A turn is one transaction; callers
    go on after its commit. A turn that fails is run again row by row, so that one bad row does not
    fail its neighbours.

    Kinds of one group share their turns, one after the other. Groups take theirs at the same time: a
    turn is mostly waiting for PostgreSQL. Two that want the same rows are best in one group.

    `single`: kinds of one statement, which is a transaction without words around it. Where a handler
    needs a second one after all, the first must do no harm by itself; it may say what that has done
    when the second fails (PartlyDone).
    """

    def __init__(
        self,
        database: Database,
        *groups: dict[str, Handler],
        single: Sequence[str] = (),
        most: int = 512,
    ) -> None:
        self._database = database
        self._single = frozenset(single)
        self._most = most
        self._groups = [_Group(group) for group in groups]
        self._group_of = {kind: group for group in self._groups for kind in group.handlers}
        self._tasks: list[asyncio.Task] = []
        self.turns = 0
        self.rows = 0

    def start(self) -> None:
        self._tasks = [
            asyncio.create_task(self._run(group), name="batching-writer") for group in self._groups
        ]

    async def stop(self) -> None:
        """Finish what is waiting, then stop."""
        # A turn that is under way has taken its rows already: its commit is waited for as well.
        while any(group.turning or any(group.waiting.values()) for group in self._groups):
            await asyncio.sleep(0.01)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def write(self, kind: str, row: Any) -> Any:
        """Run one write and return its result after the commit.

        Raises what the handler gave for this row, or DatabaseUnavailable: then it is not known
        whether the write happened, and the caller must ask the database before it acts on it.
        """
        future = asyncio.get_running_loop().create_future()
        self._group_of[kind].put(kind, [(row, future)])
        # A caller that goes away cancels only this future: the row stays, and is written.
        return await future

    async def write_all(self, kind: str, rows: Sequence[Any]) -> list[Any]:
        """Run many writes of one kind, as `write` does each; an error stands in its row's place."""
        loop = asyncio.get_running_loop()
        futures = [loop.create_future() for _ in rows]
        self._group_of[kind].put(kind, list(zip(rows, futures, strict=True)))
        return await asyncio.gather(*futures, return_exceptions=True)

    async def _run(self, group: _Group) -> None:
        while True:
            await group.some.wait()
            batch = group.take(self._most)
            if batch:
                self.turns += 1
                group.turning = True
                try:
                    await self._turn(group, batch)
                finally:
                    group.turning = False

    async def _turn(self, group: _Group, batch: Batch) -> None:
        try:
            results = await self._together(
                group, {kind: [row for row, _ in rows] for kind, rows in batch.items()}
            )
        except DatabaseUnavailable as error:
            for rows in batch.values():
                for _, future in rows:
                    _fail(future, error)
            return
        except PartlyDone as partly:
            await self._rest(group, batch, partly)
            return
        except Exception as error:
            size = sum(len(rows) for rows in batch.values())
            if size > 1:
                log.warning("batch of %d writes failed, running them singly: %r", size, error)
            for kind, rows in batch.items():
                for row, future in rows:
                    await self._alone(group, kind, row, future)
            return
        for kind, rows in batch.items():
            self.rows += len(rows)
            for (_, future), result in zip(rows, results[kind], strict=True):
                _resolve(future, result)

    async def _together(
        self, group: _Group, batch: dict[str, list[Any]]
    ) -> dict[str, Sequence[Any]]:
        results = {}
        alone = len(batch) == 1 and self._single.issuperset(batch)
        opened = self._database.connection() if alone else self._database.transaction()
        async with opened as connection:
            for kind, rows in batch.items():
                results[kind] = await group.handlers[kind](connection, rows)
        return results

    async def _rest(self, group: _Group, batch: Batch, partly: PartlyDone) -> None:
        """Callers whose rows are done go on; the others' are run singly, or met a broken connection."""
        log.warning("some writes of a batch failed: %r", partly.__cause__)
        ((kind, rows),) = batch.items()
        for place, result in partly.results.items():
            self.rows += 1
            _resolve(rows[place][1], result)
        for place, (row, future) in enumerate(rows):
            if place in partly.results:
                continue
            if is_away(partly.__cause__):
                _fail(future, ConnectionBroke(str(partly.__cause__)))
            else:
                await self._alone(group, kind, row, future)

    async def _alone(self, group: _Group, kind: str, row: Any, future: asyncio.Future) -> None:
        for attempt in range(TRIES):
            try:
                result = (await self._together(group, {kind: [row]}))[kind][0]
            except TRANSIENT:
                await asyncio.sleep(random.uniform(0, 0.02) * 2**attempt)
                continue
            except Exception as error:
                _fail(future, error)
                return
            self.rows += 1
            _resolve(future, result)
            return
        _fail(future, DatabaseUnavailable("too many deadlocks in a row"))


def _resolve(future: asyncio.Future, result: Any) -> None:
    if isinstance(result, BaseException):
        _fail(future, result)
    elif not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future, error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
        future.exception()  # marks it as seen: the caller may have gone away
