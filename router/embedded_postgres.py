"""A PostgreSQL of our own: made, started, watched over and stopped, from the binaries of a wheel.

    folder/                     0700 (0711 when root lends the server to another user)
      supervisor.lock           held by us while we run: a second start is refused
      server.lock               held by the server and each of its processes, as they inherit it
      server.log  server.log.1  what the server says; no statements, no values
      server.conf hba.conf ident.conf     written at each start
      local.conf                the operator's own settings, if there are any; they win
      data/                     the database; data.new while it is being made
      socket/                   0700; elsewhere when its path would be too long

The server listens on a socket file only, and knows its users by the kernel's word ("peer"), so
there is no password. It dies with us on Linux; what is left over elsewhere is stopped by the next
start. Whether an earlier server is gone is told by server.lock and by nothing else: a pid in a file
may be somebody else's by now, or cut short by a crash, and no process is signalled for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict
from urllib.parse import urlencode

import asyncpg
import psutil

from router.postgres_launcher import (
    MAJOR,
    EmbeddedPostgresError,
    ServerUser,
    bin_dir,
    choose_user,
    make_private_dir,
    server_environment,
    socket_dir,
)

log = logging.getLogger(__name__)

ROLE = "satherd"
DATABASE = "satherd"
PORT = 5432  # only a part of the socket's file name

SETTINGS: dict[str, str] = {
    "shared_buffers": "128MB",
    "max_connections": "100",
    "max_wal_size": "1GB",
    "wal_compression": "on",
    "fsync": "on",
    "synchronous_commit": "on",
    # A transaction left open hides every claimed row's death from the queue's index (it grows).
    "idle_in_transaction_session_timeout": "60s",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_checkpoints": "off",
    # Statements and the values in error details may be prompts.
    "log_error_verbosity": "terse",
    "log_min_error_statement": "panic",
}
THROW_AWAY_SETTINGS: dict[str, str] = {
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "wal_level": "minimal",
    "max_wal_senders": "0",
    "shared_buffers": "32MB",
}

LOG_LIMIT_BYTES = 10_000_000
BACK_OFF_FIRST_S, BACK_OFF_MOST_S, GOOD_RUN_S = 0.1, 30.0, 60.0

# Fast shutdown, immediate shutdown (the next start recovers from the log), and the end.
STOP_STEPS = ((signal.SIGINT, 60.0), (signal.SIGQUIT, 10.0), (signal.SIGKILL, 10.0))
# After how many seconds of waiting the left-overs of an earlier server get which signal.
LEFT_OVER_STEPS = ((3.0, signal.SIGINT), (30.0, signal.SIGQUIT), (60.0, signal.SIGKILL))
LEFT_OVER_LIMIT_S = 75.0

_NOT_YET = (
    OSError,
    asyncpg.CannotConnectNowError,
    asyncpg.ConnectionDoesNotExistError,
    asyncpg.TooManyConnectionsError,
)


class DataFolderInUse(EmbeddedPostgresError):
    """Another Satherd, or a PostgreSQL that somebody else started, works on the same folder."""


class WrongMajorVersion(EmbeddedPostgresError):
    """The data was written by another major version of PostgreSQL, and was not touched."""


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
        self.folder = folder.absolute()
        self.restarts = 0
        self._throw_away = throw_away
        self._supervisor_lock: int | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._supervision: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()
        self._user: ServerUser | None = None
        self._socket_dir: Path | None = None

    @property
    def log_path(self) -> Path:
        return self.folder / "server.log"

    @property
    def data(self) -> Path:
        return self.folder / "data"

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
        args = self.connect_args
        query = urlencode({"host": args["host"], "port": PORT})
        return f"postgresql://{ROLE}@/{DATABASE}?{query}"

    async def start(self) -> ConnectArgs:
        """Make the database if there is none, start the server, and return when it answers.

        Waits as long as the server lives: recovery after a crash may take minutes. From then on a
        server that dies is started again, with back-off, until `stop`. Raises EmbeddedPostgresError;
        then nothing is left running.
        """
        if self._supervisor_lock is not None:
            raise DataFolderInUse(f"PostgreSQL in {self.folder} is already started")
        try:
            await asyncio.to_thread(self._prepare)
            if not self.data.exists():
                await self._make_database()
            await self._launch()
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
        await self._end_process()
        self._ready.clear()
        if self._socket_dir and self._socket_dir.parent != self.folder:
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

    # Making ready

    def _prepare(self) -> None:
        """Take the folder for us, decide who runs the server, write its configuration."""
        try:
            made = _make_folder(self.folder)
            self._supervisor_lock = _lock_supervisor(self.folder / "supervisor.lock")
            version = _version_of(self.data)
            if version not in (None, str(MAJOR)):
                raise WrongMajorVersion(
                    f"the data in {self.data} is of PostgreSQL {version}, this is PostgreSQL {MAJOR}:"
                    f" dump it with version {version} and load it into a new folder (docs/operating.md)"
                )
            owner_uid = self.data.stat().st_uid if version else None
            if made:
                # So that a user that root lends the server to can reach its part of the folder.
                self.folder.chmod(0o711)
            user = choose_user(self.folder, owner_uid)
            if made and user.uid == os.geteuid():
                self.folder.chmod(0o700)
            self._user = user
            self._socket_dir = socket_dir(self.folder, user)
            self._write_configuration(user)
        except OSError as error:
            raise EmbeddedPostgresError(
                f"cannot use the folder {self.folder} for PostgreSQL: {error}"
            ) from error

    def _write_configuration(self, user: ServerUser) -> None:
        settings = SETTINGS | (THROW_AWAY_SETTINGS if self._throw_away else {})
        lines = ["# Written at each start. Put your own settings into local.conf beside this file."]
        lines += [f"{name} = '{value}'" for name, value in settings.items()]
        _write(self.folder / "server.conf", [*lines, "include_if_exists = 'local.conf'"])
        _write(self.folder / "hba.conf", ["local all all peer map=satherd"])
        names = dict.fromkeys([user.client_name, user.server_name])
        _write(self.folder / "ident.conf", [f'satherd "{name}" {ROLE}' for name in names])

    async def _make_database(self) -> None:
        """Run initdb beside the final place and move it there, so that a crash leaves no half."""
        draft = self.folder / "data.new"
        lock = await self._lock_server()
        try:
            if draft.exists():
                await asyncio.to_thread(shutil.rmtree, draft)
            make_private_dir(draft, self._who())
            argv = [bin_dir() / "initdb", "-D", draft, "-U", ROLE, "-E", "UTF8", "--auth=peer"]
            argv += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C"]
            argv += ["--no-instructions", *(["--no-sync"] if self._throw_away else [])]
            begins_at = self._open_log()
            process = await self._spawn(argv, death_signal="KILL", lock=lock)
            try:
                await process.wait()
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
            if process.returncode:
                raise CannotStart("initdb failed", self.log_path, self._tail(begins_at))
            draft.rename(self.data)
            if not self._throw_away:
                _sync_dir(self.folder)
        finally:
            os.close(lock)

    # Running

    async def _supervise(self) -> None:
        """Start the server again whenever it ends, until we are cancelled."""
        assert self._process is not None
        delay_s = BACK_OFF_FIRST_S
        since = time.monotonic()
        while True:
            status = await self._process.wait()
            self._ready.clear()
            if time.monotonic() - since > GOOD_RUN_S:
                delay_s = BACK_OFF_FIRST_S
            log.error(
                "PostgreSQL ended by itself (%s), starting it again in %.1f s; its log: %s",
                f"signal {-status}" if status < 0 else f"exit status {status}",
                delay_s,
                self.log_path,
            )
            await asyncio.sleep(delay_s)
            delay_s = min(delay_s * 2, BACK_OFF_MOST_S)
            since = time.monotonic()
            self.restarts += 1
            try:
                await self._launch()
            except (EmbeddedPostgresError, OSError, asyncpg.PostgresError) as error:
                log.error("PostgreSQL did not start: %s", error)
                await self._end_process()

    async def _launch(self) -> None:
        lock = await self._lock_server()
        try:
            self._clear_what_a_crash_left()
            begins_at = self._open_log()
            argv: list[str | Path] = [bin_dir() / "postgres", "-D", self.data]
            for name, value in self._fixed_settings().items():
                argv += ["-c", f"{name}={value}"]
            self._process = await self._spawn(argv, death_signal="INT", lock=lock)
        finally:
            os.close(lock)
        await self._until_it_answers(self._process, begins_at)
        self._ready.set()
        log.info("PostgreSQL is ready in %s (pid %d)", self.folder, self._process.pid)

    def _fixed_settings(self) -> dict[str, str]:
        """What local.conf must not change: where the files lie, and that no port is open."""
        return {
            "config_file": str(self.folder / "server.conf"),
            "hba_file": str(self.folder / "hba.conf"),
            "ident_file": str(self.folder / "ident.conf"),
            "listen_addresses": "",
            "port": str(PORT),
            # The list is split at commas unless it is quoted.
            "unix_socket_directories": f'"{self.connect_args["host"]}"',
            "unix_socket_permissions": "0700",
            "logging_collector": "off",
        }

    async def _spawn(
        self, argv: list[str | Path], *, death_signal: str, lock: int
    ) -> asyncio.subprocess.Process:
        out = os.open(self.log_path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW)
        try:
            # A session of its own, so that Ctrl-C in a terminal stops us first and then, in order, it.
            return await asyncio.create_subprocess_exec(
                *self._who().command(*argv, death_signal=death_signal),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=server_environment(),
                cwd="/",
                start_new_session=True,
                pass_fds=(lock,),
            )
        finally:
            os.close(out)

    async def _until_it_answers(self, process: asyncio.subprocess.Process, begins_at: int) -> None:
        began = told = time.monotonic()
        while True:
            if process.returncode is not None:
                raise CannotStart(
                    f"PostgreSQL ended with status {process.returncode} while starting",
                    self.log_path,
                    self._tail(begins_at),
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
        args = self.connect_args
        connection = await asyncpg.connect(
            host=args["host"], port=PORT, user=ROLE, database="postgres", timeout=5, ssl=False
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

    # Earlier servers on the same folder

    async def _lock_server(self) -> int:
        """The lock that says no process of an earlier server is left. The caller closes it.

        A server that outlived its supervisor is stopped; so are its orphans when it was killed.
        """
        lock = _open(self.folder / "server.lock")
        steps = list(LEFT_OVER_STEPS)
        began = time.monotonic()
        try:
            while not _try_lock(lock):
                waited_s = time.monotonic() - began
                if waited_s > LEFT_OVER_LIMIT_S:
                    raise DataFolderInUse(f"an earlier PostgreSQL in {self.folder} does not end")
                if steps and waited_s > steps[0][0]:
                    _, step = steps.pop(0)
                    log.warning("an earlier PostgreSQL still runs in %s: %s", self.folder, step.name)
                    for process in await asyncio.to_thread(self._left_over):
                        with contextlib.suppress(psutil.Error):
                            process.send_signal(step)
                await asyncio.sleep(0.05)
        except BaseException:
            os.close(lock)
            raise
        return lock

    def _left_over(self) -> list[psutil.Process]:
        """Processes that are certainly servers on our folder, by program and working folder."""
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def _is_ours(self, process: psutil.Process) -> bool:
        places = (self.data.resolve(), self.data.with_name("data.new").resolve())
        try:
            return Path(process.exe()).name == "postgres" and Path(process.cwd()) in places
        except (psutil.Error, OSError):
            return False  # gone, a zombie, or another user's: none of them works on our folder

    def _clear_what_a_crash_left(self) -> None:
        """Remove the pid files of a dead server, whatever they say.

        We hold server.lock, so no server of ours is alive; one that somebody else started here by
        hand is recognised by its program and folder, and left alone.
        """
        pid_file = self.data / "postmaster.pid"
        with contextlib.suppress(FileNotFoundError):
            first = pid_file.read_text(errors="replace").split("\n", 1)[0].strip().lstrip("-")
            if first.isascii() and first.isdigit():
                with contextlib.suppress(psutil.Error, OverflowError):
                    if self._is_ours(psutil.Process(int(first))):
                        raise DataFolderInUse(
                            f"a PostgreSQL that we did not start (pid {first}) uses {self.data}:"
                            " stop it first"
                        )
            pid_file.unlink()
        for name in (f".s.PGSQL.{PORT}", f".s.PGSQL.{PORT}.lock"):
            (Path(self.connect_args["host"]) / name).unlink(missing_ok=True)

    # Small things

    def _who(self) -> ServerUser:
        assert self._user is not None, "not prepared"
        return self._user

    def _open_log(self) -> int:
        """Make sure there is a log, not too long; the offset in bytes where this run begins."""
        fd = _open(self.log_path)
        size = os.fstat(fd).st_size
        os.close(fd)
        if size <= LOG_LIMIT_BYTES:
            return size
        self.log_path.replace(self.log_path.with_name("server.log.1"))
        os.close(_open(self.log_path))
        return 0

    def _tail(self, begins_at: int) -> str:
        text = self.log_path.read_bytes()[begins_at:].decode(errors="replace")
        return "\n".join(text.splitlines()[-12:])


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


def _make_folder(folder: Path) -> bool:
    """Make the folder; whether it was missing."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        return False
    return True


def _lock_supervisor(path: Path) -> int:
    lock = _open(path)
    if not _try_lock(lock):
        holder = os.pread(lock, 20, 0).decode(errors="replace").strip() or "unknown"
        os.close(lock)
        raise DataFolderInUse(
            f"another Satherd (pid {holder}) runs its PostgreSQL in {path.parent}: stop it, or"
            " choose another data folder"
        )
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    return lock


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _version_of(data: Path) -> str | None:
    """The major version that wrote `data`; None when there is no such folder."""
    if not data.exists():
        return None
    try:
        return (data / "PG_VERSION").read_text().strip()
    except FileNotFoundError as error:
        raise EmbeddedPostgresError(
            f"{data} holds no PostgreSQL database; it was not touched. Move it away to begin anew"
        ) from error


def _write(path: Path, lines: list[str]) -> None:
    """Write a file that the server's user may read; it appears whole or not at all."""
    draft = path.with_name(f".{path.name}.new")
    draft.unlink(missing_ok=True)
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    with os.fdopen(fd, "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
        os.fchmod(fd, 0o644)
    draft.replace(path)


def _sync_dir(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
