"""A PostgreSQL of our own: made, started, watched over and stopped, from the binaries of a wheel.

    start ── initdb, if there is no database ── server ── it answers ──> stop
                                                  ^            │
                                                  └─ back-off ─┘ it died

The server listens on a socket file only, and knows its users by the kernel's word ("peer"), so
there is no password. It dies with us on Linux; what is left over elsewhere is stopped by the next
start. The folder is described in `router.embedded_postgres_folder`, the user that the server runs
as in `router.embedded_postgres_user`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TypedDict
from urllib.parse import urlencode

import asyncpg

from router.embedded_postgres_folder import (
    PORT,
    ROLE,
    DataFolderInUse,
    ServerFolder,
    WrongMajorVersion,
)
from router.embedded_postgres_user import (
    EmbeddedPostgresError,
    ServerUser,
    bin_dir,
    choose_user,
    server_environment,
    socket_dir,
)

__all__ = [
    "CannotStart",
    "ConnectArgs",
    "DataFolderInUse",
    "EmbeddedPostgres",
    "EmbeddedPostgresError",
    "WrongMajorVersion",
    "reach",
    "throw_away_server",
]

log = logging.getLogger(__name__)

DATABASE = "satherd"

BACK_OFF_FIRST_S, BACK_OFF_MOST_S, GOOD_RUN_S = 0.1, 30.0, 60.0

# Fast shutdown, immediate shutdown (the next start recovers), and the end.
STOP_STEPS = ((signal.SIGINT, 60.0), (signal.SIGQUIT, 10.0), (signal.SIGKILL, 10.0))

_NOT_YET = (
    OSError,
    asyncpg.CannotConnectNowError,
    asyncpg.ConnectionDoesNotExistError,
    asyncpg.InternalClientError,  # what asyncpg makes of a server that dies in mid-sentence
    asyncpg.TooManyConnectionsError,
)


class CannotStart(EmbeddedPostgresError):
    """The server ended before it took connections. `log_path` is its log."""

    def __init__(self, what: str, log_path: Path, tail: str) -> None:
        super().__init__(f"{what}; its log is {log_path} and ends with:\n{tail or '(nothing)'}")
        self.log_path = log_path


class ConnectArgs(TypedDict):
    """Keyword arguments of `asyncpg.connect`."""

    host: str
    port: int
    user: str
    database: str


class EmbeddedPostgres:
    """One server on one folder. Start and stop it in the same event loop, from a lasting thread.

    `throw_away` makes a server for tests: fast, and its data is lost when the machine fails.
    """

    def __init__(self, folder: Path, *, throw_away: bool = False) -> None:
        self.folder = ServerFolder(folder)
        self.restarts = 0
        self._throw_away = throw_away
        self._supervisor_lock: int | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._supervision: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()
        self._user: ServerUser | None = None
        self._socket_dir: Path | None = None

    @property
    def pid(self) -> int | None:
        """The server's process, while it runs."""
        process = self._process
        return process.pid if process and process.returncode is None else None

    @property
    def connect_args(self) -> ConnectArgs:
        """For `asyncpg.connect(**…)`; known once `start` has returned."""
        assert self._socket_dir is not None, "not started"
        return {"host": str(self._socket_dir), "port": PORT, "user": ROLE, "database": DATABASE}

    @property
    def url(self) -> str:
        """The same as a URL, in the form of SATHERD_DATABASE_URL; it holds no secret."""
        return _url(self.connect_args["host"])

    async def start(self) -> ConnectArgs:
        """Make the database if there is none, start the server, and return when it answers.

        Waits as long as the server lives: recovery after a crash may take minutes. From then on a
        server that dies is started again, with back-off, until `stop`. Raises
        EmbeddedPostgresError; then nothing is left running.
        """
        if self._supervisor_lock is not None:
            raise DataFolderInUse(f"PostgreSQL in {self.folder.path} is already started")
        try:
            await asyncio.to_thread(self._prepare)
            await self._launch(first=True)
        except BaseException:
            await self.stop()
            raise
        self._supervision = asyncio.create_task(self._supervise(), name="embedded-postgres")
        return self.connect_args

    async def stop(self) -> None:
        """Shut the server down in order (at most a minute, then by force). Twice is harmless."""
        if self._supervision:
            self._supervision.cancel()
            await asyncio.gather(self._supervision, return_exceptions=True)
            self._supervision = None
        self._ready.clear()
        await self._end_process()
        if self._socket_dir and self._socket_dir.parent != self.folder.path:
            with contextlib.suppress(OSError):
                self._socket_dir.rmdir()
        if self._supervisor_lock is not None:
            os.close(self._supervisor_lock)
            self._supervisor_lock = None

    async def wait_ready(self) -> None:
        """Return when the server takes connections; at once if it does so now."""
        await self._ready.wait()

    async def __aenter__(self) -> EmbeddedPostgres:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def _prepare(self) -> None:
        """Take the folder for us, decide who runs the server, write its configuration."""
        folder = self.folder
        try:
            made = folder.make()
            self._supervisor_lock = folder.lock_supervisor()
            owner_uid = folder.owner_of_data()
            as_root = os.geteuid() == 0
            if made and as_root:
                # Another user may enter, so that root can lend the server to one.
                folder.path.chmod(0o711)
            self._user = choose_user(folder.path, owner_uid)
            if made and as_root and self._user.uid == 0:
                folder.path.chmod(0o700)
            self._socket_dir = socket_dir(folder.path, self._user)
            folder.write_configuration(self._user, throw_away=self._throw_away)
        except OSError as error:
            raise EmbeddedPostgresError(
                f"cannot use the folder {folder.path} for PostgreSQL: {error}"
            ) from error

    async def _supervise(self) -> None:
        """Start the server again whenever it ends, until we are cancelled."""
        delay_s = BACK_OFF_FIRST_S
        while True:
            since = time.monotonic()
            assert self._process is not None
            status = await self._process.wait()
            self._ready.clear()
            if time.monotonic() - since > GOOD_RUN_S:
                delay_s = BACK_OFF_FIRST_S
            log.error(
                "PostgreSQL ended by itself (%s), starting it again in %.1f s; its log: %s",
                f"signal {-status}" if status < 0 else f"exit status {status}",
                delay_s,
                self.folder.log_path,
            )
            await asyncio.sleep(delay_s)
            delay_s = min(delay_s * 2, BACK_OFF_MOST_S)
            self.restarts += 1
            try:
                await self._launch()
            except (EmbeddedPostgresError, asyncpg.PostgresError, *_NOT_YET) as error:
                log.error("PostgreSQL did not start: %s", error)
                await self._end_process()

    async def _launch(self, *, first: bool = False) -> None:
        """Start the server and wait until it answers. Raises EmbeddedPostgresError."""
        assert self._socket_dir is not None, "not prepared"
        lock = await self.folder.lock_server()
        try:
            if not self.folder.data.exists():
                if not first:
                    # A new and empty database under a running router would be worse than none.
                    raise EmbeddedPostgresError(f"the database {self.folder.data} has vanished")
                await self._make_database(lock)
            self.folder.clear_what_a_crash_left(self._socket_dir)
            argv: list[str | Path] = [bin_dir() / "postgres", "-D", self.folder.data]
            for name, value in self.folder.fixed_settings(self._socket_dir).items():
                argv += ["-c", f"{name}={value}"]
            self._process, log_begins_at = await self._spawn(argv, death_signal="INT", lock=lock)
        finally:
            os.close(lock)
        await self._until_it_answers(self._process, log_begins_at)
        self._ready.set()
        log.info("PostgreSQL is ready in %s (pid %d)", self.folder.path, self._process.pid)

    async def _make_database(self, lock: int) -> None:
        assert self._user is not None, "not prepared"
        await asyncio.to_thread(self.folder.begin_draft, self._user)
        argv = [bin_dir() / "initdb", "-D", self.folder.draft, "-U", ROLE, "-E", "UTF8"]
        argv += ["--auth=peer", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        argv += ["--locale=C", "--no-instructions", *(["--no-sync"] if self._throw_away else [])]
        process, log_begins_at = await self._spawn(argv, death_signal="KILL", lock=lock)
        try:
            status = await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if status:
            tail = self.folder.tail_of_log(log_begins_at)
            raise CannotStart("PostgreSQL's initdb failed", self.folder.log_path, tail)
        self.folder.finish_draft(sync=not self._throw_away)

    async def _spawn(
        self, argv: list[str | Path], *, death_signal: str, lock: int
    ) -> tuple[asyncio.subprocess.Process, int]:
        """Start a program as the server's user; with it, the length of the log before it began."""
        assert self._user is not None, "not prepared"
        out = self.folder.open_log()
        try:
            log_begins_at = os.fstat(out).st_size
            process = await asyncio.create_subprocess_exec(
                *self._user.command(*argv, death_signal=death_signal),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=server_environment(),
                cwd="/",
                # A session of its own, so that Ctrl-C reaches us alone, and we stop it last.
                start_new_session=True,
                pass_fds=(lock,),
            )
            return process, log_begins_at
        finally:
            os.close(out)

    async def _until_it_answers(self, process: asyncio.subprocess.Process, begins_at: int) -> None:
        began = told = time.monotonic()
        while True:
            if process.returncode is not None:
                raise CannotStart(
                    f"PostgreSQL ended with status {process.returncode} while starting",
                    self.folder.log_path,
                    self.folder.tail_of_log(begins_at),
                )
            try:
                await self._make_sure_of_database()
                return
            except _NOT_YET:
                await asyncio.sleep(0.02)
            if time.monotonic() - told > 5:
                told = time.monotonic()
                log.info("PostgreSQL is still starting or recovering (%.0f s)", told - began)

    async def _make_sure_of_database(self) -> None:
        """Connect, and create our database if a first start did not get so far."""
        host = self.connect_args["host"]
        connection = await asyncpg.connect(
            host=host, port=PORT, user=ROLE, database="postgres", timeout=5, ssl=False
        )
        try:
            known = "select 1 from pg_database where datname = $1"
            if not await connection.fetchval(known, DATABASE):
                await connection.execute(f"create database {DATABASE}")
        finally:
            await connection.close(timeout=5)

    async def _end_process(self) -> None:
        process = self._process
        for step, patience_s in STOP_STEPS:
            if process is None or process.returncode is not None:
                return
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(step)
            try:
                await asyncio.wait_for(process.wait(), patience_s)
            except TimeoutError:
                log.warning("PostgreSQL did not stop %.0f s after %s", patience_s, step.name)


@contextlib.asynccontextmanager
async def reach(folder: Path) -> AsyncIterator[str]:
    """The URL of an existing database, whether or not a Satherd runs on it, for a short look.

    Where none runs, the server is started for as long as the context lasts. Raises
    EmbeddedPostgresError; a database is not made here.
    """
    server = EmbeddedPostgres(folder)
    if server.folder.owner_of_data() is None:
        raise EmbeddedPostgresError(f"there is no database in {server.folder.path}")
    try:
        await server.start()
    except DataFolderInUse:
        host = server.folder.socket_dir_of_running()
        if host is None:
            raise
        yield _url(host)
        return
    try:
        yield server.url
    finally:
        await server.stop()


@contextlib.contextmanager
def throw_away_server(folder: Path) -> Iterator[str]:
    """A fast server for a test session, without an event loop around it: yields its URL.

    Call it from the main thread while no loop runs there. The URL works from any loop.
    """
    with asyncio.Runner() as runner:
        server = EmbeddedPostgres(folder, throw_away=True)
        runner.run(server.start())
        try:
            yield server.url
        finally:
            runner.run(server.stop())


def _url(host: str) -> str:
    return f"postgresql://{ROLE}@/{DATABASE}?{urlencode({'host': host, 'port': PORT})}"
