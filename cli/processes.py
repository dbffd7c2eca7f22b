"""The child processes of a one-machine Satherd: started, kept alive, logged, stopped in order.

    start ──> running ──> ended ── should live ──> back-off ──> running
                 │           └──── for good ────> `Ended`, told by `next_end`
                 └── stop: SIGTERM, and after the grace time SIGKILL to its whole group

A child leads a session of its own, so that Ctrl-C in a terminal reaches us alone and we decide the
order. On Linux it gets SIGTERM when we die without a word. What it prints goes to a file of its
own, `NAME.log` in the log folder, and line by line to whoever asked for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

log = logging.getLogger(__name__)

BACK_OFF_FIRST_S, BACK_OFF_MOST_S, GOOD_RUN_S = 0.5, 30.0, 60.0
LOG_LIMIT_BYTES, OLD_LOGS = 5_000_000, 2
LINE_LIMIT_BYTES = 16_384
TAIL_LINES = 20

# A wrong command line, and sysexits.h's EX_CONFIG: starting again would end the same way.
FINAL_STATUSES = (2, 78)

Show = Callable[[str, str], None]


@dataclass(frozen=True)
class Child:
    """What to run. `env` is added to our own environment; `keep` means it should always live."""

    name: str
    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    keep: bool = True
    grace_s: float = 10.0


@dataclass(frozen=True)
class Ended:
    """A child that will not be started again. `status` is negative for a signal's number."""

    name: str
    status: int
    tail: tuple[str, ...]


class Processes:
    """A set of children. Start and stop them in one event loop, from a thread that lives on."""

    def __init__(self, log_dir: Path, *, show: Show | None = None) -> None:
        self._log_dir = log_dir
        self._show = show
        self._keepers: list[_Keeper] = []
        self._ended: asyncio.Queue[Ended] = asyncio.Queue()
        self._stopping = False

    async def start(self, child: Child) -> None:
        """Start one more child. Raises OSError when there is no such program."""
        assert not self._stopping, "already stopped"
        assert all(keeper.child.name != child.name for keeper in self._keepers), child.name
        keeper = _Keeper(child, self._log_dir, self._show, self._ended)
        await keeper.start()
        self._keepers.append(keeper)

    async def next_end(self) -> Ended:
        """Wait until a child ends for good by itself.

        That is one that was not to be kept, or one that is set up wrongly (FINAL_STATUSES). What
        `stop` stops is not told.
        """
        return await self._ended.get()

    def pid(self, name: str) -> int | None:
        """The child's process; None between two tries, and when it has ended."""
        return next(keeper.pid for keeper in self._keepers if keeper.child.name == name)

    def restarts(self, name: str) -> int:
        """How often the child was started again."""
        return next(keeper.restarts for keeper in self._keepers if keeper.child.name == name)

    async def stop(self) -> None:
        """Stop all, the last started first, each wholly gone before the next. Twice is harmless."""
        self._stopping = True
        while self._keepers:
            await self._keepers[-1].stop()
            self._keepers.pop()

    async def __aenter__(self) -> Processes:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()


class _Keeper:
    """Looks after one child."""

    def __init__(
        self, child: Child, log_dir: Path, show: Show | None, ended: asyncio.Queue[Ended]
    ) -> None:
        self.child = child
        self.restarts = 0
        self._file = RotatingFile(log_dir / f"{child.name}.log")
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._show = show
        self._ended = ended
        self._process: asyncio.subprocess.Process | None = None
        self._output: asyncio.Task[None] | None = None
        self._task: asyncio.Task[None] | None = None
        # Held while a process is being made, so that `stop` cannot miss one.
        self._starting = asyncio.Lock()
        self._stopping = asyncio.Event()

    @property
    def pid(self) -> int | None:
        process = self._process
        return process.pid if process and process.returncode is None else None

    async def start(self) -> None:
        try:
            await self._spawn()
        except BaseException:
            self._file.close()
            raise
        self._task = asyncio.create_task(self._keep(), name=f"keep-{self.child.name}")

    async def stop(self) -> None:
        self._stopping.set()
        async with self._starting:
            process = self._process
        assert process is not None and self._task is not None
        if process.returncode is None:
            _signal(process, signal.SIGTERM)
            try:
                await asyncio.wait_for(process.wait(), self.child.grace_s)
            except TimeoutError:
                self._note(f"did not stop in {self.child.grace_s:g} s and is killed")
                _kill_group(process)
                await process.wait()
        await self._task

    async def _keep(self) -> None:
        """Wait for the end, again and again, until it is for good or we are told to stop."""
        delay_s = BACK_OFF_FIRST_S
        since = time.monotonic()
        try:
            while True:
                assert self._process is not None
                status = await self._process.wait()
                await self._finish_output()
                if self._stopping.is_set():
                    self._note(f"stopped ({_words(status)})")
                    return
                if not self.child.keep or status in FINAL_STATUSES:
                    self._note(f"ended ({_words(status)})")
                    self._ended.put_nowait(Ended(self.child.name, status, tuple(self._tail)))
                    return
                if time.monotonic() - since > GOOD_RUN_S:
                    delay_s = BACK_OFF_FIRST_S
                self._note(f"ended ({_words(status)}), starting it again in {delay_s:g} s")
                if not await self._start_again_after(delay_s):
                    return
                delay_s = min(delay_s * 2, BACK_OFF_MOST_S)
                since = time.monotonic()
        finally:
            self._file.close()

    async def _start_again_after(self, delay_s: float) -> bool:
        """False when we were told to stop in the meantime."""
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), delay_s)
            async with self._starting:
                if self._stopping.is_set():
                    return False
                self.restarts += 1
                try:
                    await self._spawn()
                    return True
                except OSError as error:
                    self._note(f"cannot be started: {error}")
            delay_s = BACK_OFF_MOST_S

    async def _spawn(self) -> None:
        reading, writing = os.pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                *_with_death_signal(self.child.argv),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=writing,
                stderr=writing,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **self.child.env},
                start_new_session=True,
            )
        except BaseException:
            os.close(reading)
            raise
        finally:
            os.close(writing)
        self._process = process
        self._output = asyncio.create_task(self._copy(reading), name=f"log-{self.child.name}")
        self._note(f"started (pid {process.pid})")

    async def _copy(self, reading: int) -> None:
        """Write what comes out of the pipe to the log, line by line, until nobody holds it."""
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        pipe = os.fdopen(reading, "rb", 0)
        transport, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), pipe
        )
        rest = b""
        try:
            while data := await reader.read(LINE_LIMIT_BYTES):
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    self._write(line)
                if len(rest) >= LINE_LIMIT_BYTES:
                    self._write(rest)
                    rest = b""
        finally:
            if rest:
                self._write(rest)
            transport.close()

    async def _finish_output(self) -> None:
        """Take what is still in the pipe; not for ever, as a grandchild may keep it open."""
        assert self._output is not None
        done, _ = await asyncio.wait([self._output], timeout=1)
        if not done:
            self._output.cancel()
            await asyncio.gather(self._output, return_exceptions=True)

    def _write(self, line: bytes) -> None:
        self._file.write(line + b"\n")
        text = line.decode(errors="replace").rstrip("\r")
        self._tail.append(text)
        if self._show:
            # A closed terminal must not stop the child by a pipe that nobody empties.
            with contextlib.suppress(OSError):
                self._show(self.child.name, text)

    def _note(self, what: str) -> None:
        """A word of ours among the child's own."""
        log.info("%s %s", self.child.name, what)
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._file.write(f"{stamp} [satherd] {self.child.name} {what}\n".encode())


class RotatingFile:
    """A log file, readable by its owner only, put aside as `.1`, `.2` … when it grows too long.

    A full disk loses log lines, and nothing else.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._file = self._open()
        self._failed = False

    def write(self, data: bytes) -> None:
        """Append whole lines."""
        try:
            if self._file.closed:
                self._file = self._open()
            if self._file.tell() + len(data) > LOG_LIMIT_BYTES and self._file.tell():
                self._rotate()
            self._file.write(data)
            self._failed = False
        except OSError as error:
            if not self._failed:
                log.warning("cannot write %s: %s", self._path, error)
            self._failed = True

    def close(self) -> None:
        self._file.close()

    def _rotate(self) -> None:
        self._file.close()
        try:
            for number in range(OLD_LOGS, 0, -1):
                newer = self._path.with_name(f"{self._path.name}.{number - 1}")
                newer = newer if number > 1 else self._path
                if newer.exists():
                    newer.replace(self._path.with_name(f"{self._path.name}.{number}"))
        finally:
            self._file = self._open()

    def _open(self) -> BinaryIO:
        fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        file = os.fdopen(fd, "ab", buffering=0)
        file.seek(0, os.SEEK_END)
        return file


def _with_death_signal(argv: Sequence[str]) -> list[str]:
    """The same command, asking Linux for SIGTERM when the thread that starts it dies."""
    if sys.platform == "linux" and (setpriv := shutil.which("setpriv")):
        # A missing program would be setpriv's error, and ours to guess from a status.
        program = shutil.which(argv[0])
        if program is None:
            raise FileNotFoundError(f"no such program: {argv[0]}")
        return [setpriv, "--pdeathsig", "TERM", program, *argv[1:]]
    return list(argv)


def _signal(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(number)


def _kill_group(process: asyncio.subprocess.Process) -> None:
    """The child and all that it started and kept in its group; the child has not been reaped."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _words(status: int) -> str:
    return f"exit status {status}" if status >= 0 else f"signal {-status}"
