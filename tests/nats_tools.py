"""A NATS server for tests, and a way to cut the line to it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.crash_rig import dying_with_us
from tests.ports import free_port

START_S = 20.0


def found_command() -> str | None:
    """The server's program; Debian's package installs it where only root looks."""
    return shutil.which("nats-server") or shutil.which("nats-server", path="/usr/sbin")


def nats_command() -> str:
    """The server's program. Skips without it, but not in CI."""
    found = found_command()
    if found is not None:
        return found
    if os.environ.get("CI") == "true":
        pytest.fail("nats-server is missing: apt-get install nats-server")
    pytest.skip("nats-server is not installed (apt-get install nats-server)")


class NatsServer:
    """One NATS server at a port that stays the same when it is killed and started again."""

    def __init__(self, folder: Path, *, address: str = "127.0.0.1") -> None:
        self._address = address
        self.port = free_port()
        self.url = f"nats://127.0.0.1:{self.port}"
        self.kills = 0
        self._command = nats_command()
        self._log = folder / "nats.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    async def start(self) -> None:
        """Return once it takes connections."""
        self._process = self._spawn()
        async with asyncio.timeout(START_S):
            while not _listens(self.port):
                assert self.running, self._log.read_text(errors="replace")
                await asyncio.sleep(0.02)

    def _spawn(self) -> subprocess.Popen[bytes]:
        argv = [self._command, "--addr", self._address, "--port", str(self.port)]
        with self._log.open("ab") as log:
            return subprocess.Popen([*dying_with_us(), *argv], stdout=log, stderr=log)

    async def kill(self) -> None:
        """SIGKILL; killing what is dead does nothing."""
        if self._process is not None and self.running:
            self.kills += 1
            self._process.kill()
            await asyncio.to_thread(self._process.wait)

    @contextlib.contextmanager
    def hanging(self) -> Iterator[None]:
        """SIGSTOP, and SIGCONT in the end: it closes nothing, refuses nothing and answers nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)


@asynccontextmanager
async def nats_if_any(folder: Path) -> AsyncIterator[str | None]:
    """The URL of a NATS server of this test's own; None where it is not installed, but for CI."""
    if found_command() is None and os.environ.get("CI") != "true":
        yield None
        return
    server = NatsServer(folder)
    await server.start()
    try:
        yield server.url
    finally:
        await server.kill()


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


class CutProxy:
    """A line to a TCP server that a test can cut and mend."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._pairs: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.port = free_port()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._join, "127.0.0.1", self.port)

    async def cut(self) -> None:
        """End all connections and take no new ones."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in list(self._pairs):
            writer.transport.abort()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        for source, sink in ((reader, far_writer), (far_reader, writer)):
            self._pairs.add(sink)
            task = asyncio.create_task(self._pass_on(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass_on(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65536):
                sink.write(data)
                await sink.drain()
        self._pairs.discard(sink)
        sink.transport.abort()
