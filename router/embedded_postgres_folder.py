"""The folder of an embedded PostgreSQL: what lies in it, who holds it, what a crash left there.

    folder/                     0700 (0711 when root lends the server to another user)
      supervisor.lock           held by us while we run: a second start is refused
      server.lock               held by the server and each of its processes, as they inherit it
      server.log  server.log.1  what the server says; no statements, no values
      server.conf hba.conf ident.conf     written at each start
      local.conf                the operator's own settings, if there are any; they win
      data/                     the database; data.new while it is being made
      socket/                   0700; elsewhere when its path would be too long

Whether an earlier server is gone is told by server.lock and by nothing else: a pid in a file may be
somebody else's by now, or cut short by a crash, and no process is signalled because of it.
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
from pathlib import Path

import psutil

from router.embedded_postgres_user import MAJOR, EmbeddedPostgresError, ServerUser, make_private_dir

log = logging.getLogger(__name__)

ROLE = "satherd"
PORT = 5432  # only a part of the socket's file name

SETTINGS: dict[str, str] = {
    "shared_buffers": "128MB",
    "max_connections": "100",
    "max_wal_size": "1GB",
    "wal_compression": "on",
    "fsync": "on",
    "synchronous_commit": "on",
    # While a transaction stays open, rows deleted since cannot go, and claims slow down with them.
    "idle_in_transaction_session_timeout": "60s",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_checkpoints": "off",
    # Statements, and the values in the details of errors, may be prompts.
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

# After how many seconds of waiting the left-overs of an earlier server get which signal: fast
# shutdown, immediate shutdown (the next start recovers), and the end.
LEFT_OVER_STEPS = ((3.0, signal.SIGINT), (30.0, signal.SIGQUIT), (60.0, signal.SIGKILL))
LEFT_OVER_LIMIT_S = 75.0


class DataFolderInUse(EmbeddedPostgresError):
    """Another Satherd, or a PostgreSQL that somebody else started, works on the same folder."""


class WrongMajorVersion(EmbeddedPostgresError):
    """The data was written by another major version of PostgreSQL, and was not touched."""


class ServerFolder:
    """One such folder."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.data = self.path / "data"
        self.draft = self.path / "data.new"
        self.log_path = self.path / "server.log"

    def make(self) -> bool:
        """Make the folder; whether it was missing."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.path.mkdir(mode=0o700)
        except FileExistsError:
            return False
        return True

    def owner_of_data(self) -> int | None:
        """The uid that the database belongs to; None when there is none yet.

        Raises WrongMajorVersion, or EmbeddedPostgresError for a folder that is no database.
        """
        if not self.data.exists():
            return None
        try:
            version = (self.data / "PG_VERSION").read_text().strip()
        except FileNotFoundError as error:
            raise EmbeddedPostgresError(
                f"{self.data} holds no PostgreSQL database and was not touched: move it away"
            ) from error
        if version != str(MAJOR):
            raise WrongMajorVersion(
                f"the data in {self.data} is of PostgreSQL {version} and was not touched; this is"
                f" PostgreSQL {MAJOR}. Dump it with version {version} and load it into a new folder"
            )
        return self.data.stat().st_uid

    def write_configuration(self, user: ServerUser, *, throw_away: bool) -> None:
        settings = SETTINGS | (THROW_AWAY_SETTINGS if throw_away else {})
        lines = ["# Written at each start. Your own settings: local.conf, beside this file."]
        lines += [f"{name} = '{value}'" for name, value in settings.items()]
        if (self.path / "local.conf").exists():
            lines.append("include = 'local.conf'")
        _write(self.path / "server.conf", lines)
        _write(self.path / "hba.conf", ["local all all peer map=satherd"])
        names = dict.fromkeys([user.client_name, user.server_name])
        _write(self.path / "ident.conf", [f'satherd "{name}" {ROLE}' for name in names])

    def fixed_settings(self, socket_dir: Path) -> dict[str, str]:
        """What local.conf must not change: where the files lie, and that no port is open."""
        return {
            "config_file": str(self.path / "server.conf"),
            "hba_file": str(self.path / "hba.conf"),
            "ident_file": str(self.path / "ident.conf"),
            "listen_addresses": "",
            "port": str(PORT),
            # A list, split at commas where it is not quoted.
            "unix_socket_directories": f'"{socket_dir}"',
            "unix_socket_permissions": "0700",
            "logging_collector": "off",
        }

    # A database in the making

    def begin_draft(self, user: ServerUser) -> None:
        """An empty data.new; one that an interrupted start left is thrown away."""
        if self.draft.exists():
            shutil.rmtree(self.draft)
        make_private_dir(self.draft, user)

    def finish_draft(self, *, sync: bool) -> None:
        """Put the finished database into its place, so that there never is half of one."""
        self.draft.rename(self.data)
        if sync:
            fd = os.open(self.path, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    # The log

    def open_log(self) -> int:
        """A file descriptor to append to; a long log is put aside first. The caller closes it."""
        fd = _open(self.log_path, os.O_APPEND)
        if os.fstat(fd).st_size <= LOG_LIMIT_BYTES:
            return fd
        os.close(fd)
        self.log_path.replace(self.log_path.with_name("server.log.1"))
        return _open(self.log_path, os.O_APPEND)

    def tail_of_log(self, begins_at: int) -> str:
        """The last lines that were written after an offset in bytes."""
        text = self.log_path.read_bytes()[begins_at:].decode(errors="replace")
        return "\n".join(text.splitlines()[-12:])

    # Who holds it

    def lock_supervisor(self) -> int:
        """The lock of the one supervisor; the caller keeps it open. Raises DataFolderInUse."""
        lock = _open(self.path / "supervisor.lock")
        if not _try_lock(lock):
            holder = os.pread(lock, 20, 0).decode(errors="replace").strip() or "unknown"
            os.close(lock)
            raise DataFolderInUse(
                f"another Satherd (pid {holder}) runs its PostgreSQL in {self.path}: stop it, or"
                " choose another data folder"
            )
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        return lock

    async def lock_server(self) -> int:
        """The lock that says that no process of an earlier server is left; the caller closes it.

        A server that outlived its supervisor is stopped, and so are the orphans of one that was
        killed: the supervisor's lock is ours, so nobody else has a use for them. Raises
        DataFolderInUse when they do not end.
        """
        lock = _open(self.path / "server.lock")
        steps = list(LEFT_OVER_STEPS)
        began = time.monotonic()
        try:
            while not _try_lock(lock):
                waited_s = time.monotonic() - began
                if waited_s > LEFT_OVER_LIMIT_S:
                    raise DataFolderInUse(f"an earlier PostgreSQL in {self.path} does not end")
                if steps and waited_s > steps[0][0]:
                    _, step = steps.pop(0)
                    log.warning("an earlier PostgreSQL still runs in %s: %s", self.path, step.name)
                    await asyncio.to_thread(self._signal_left_overs, step)
                await asyncio.sleep(0.05)
        except BaseException:
            os.close(lock)
            raise
        return lock

    def _signal_left_overs(self, step: signal.Signals) -> None:
        for process in psutil.process_iter():
            if self.is_server(process):
                with contextlib.suppress(psutil.Error):
                    process.send_signal(step)

    def is_server(self, process: psutil.Process) -> bool:
        """Whether this is certainly a PostgreSQL at work here, by its program and its folder."""
        places = (self.data.resolve(), self.draft.resolve())
        try:
            return Path(process.exe()).name == "postgres" and Path(process.cwd()) in places
        except (psutil.Error, OSError):
            return False  # gone, a zombie, or a stranger's: none of them can work here

    def clear_what_a_crash_left(self, socket_dir: Path) -> None:
        """Remove the pid files of a dead server, whatever they say; needs the server's lock.

        A server that somebody started here by hand does not hold our lock; it is recognised by
        its program and folder, left alone, and raised as DataFolderInUse.
        """
        pid_file = self.data / "postmaster.pid"
        with contextlib.suppress(FileNotFoundError):
            first = pid_file.read_text(errors="replace").split("\n", 1)[0].strip().lstrip("-")
            if first.isascii() and first.isdigit() and self._is_server_pid(int(first)):
                raise DataFolderInUse(
                    f"a PostgreSQL that Satherd did not start (pid {first}) uses {self.data}:"
                    " stop it first"
                )
            pid_file.unlink()
        for name in (f".s.PGSQL.{PORT}", f".s.PGSQL.{PORT}.lock"):
            (socket_dir / name).unlink(missing_ok=True)

    def socket_dir_of_running(self) -> str | None:
        """Where the running server's socket lies, by its own word; None when it is not up."""
        try:
            lines = (self.data / "postmaster.pid").read_text(errors="replace").splitlines()
        except OSError:
            return None
        # postmaster.pid: pid, data folder, start time, port, first socket folder, ...
        place = lines[4] if len(lines) > 4 else ""
        return place if place and (Path(place) / f".s.PGSQL.{PORT}").is_socket() else None

    def _is_server_pid(self, pid: int) -> bool:
        try:
            return self.is_server(psutil.Process(pid))
        except (psutil.Error, OverflowError):
            return False


def _open(path: Path, flags: int = 0) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | flags, 0o600)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _write(path: Path, lines: list[str]) -> None:
    """Write a file that the server's user may read; it appears whole or not at all."""
    draft = path.with_name(f".{path.name}.new")
    draft.unlink(missing_ok=True)
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    with os.fdopen(fd, "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
        os.fchmod(fd, 0o644)
    draft.replace(path)
