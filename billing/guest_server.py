"""uvicorn as a guest in an event loop that somebody else owns.

Its own server waits in steps of a tenth of a second: for the order to stop, after it, and for what is
under way. This one is woken.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import socket
import time
from collections.abc import Iterator

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_log = logging.getLogger(__name__)

# The Date of answers is made anew this often.
_TICK_S = 1.0
_LOOK_S = 0.01


class GuestServer(uvicorn.Server):
    """Leaves the signals to the process it runs in, and says when it listens. `stop` ends `serve`."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Let `serve` answer what is under way, close and return. Twice is harmless."""
        self._stopping.set()

    def stop_listening(self) -> None:
        """Take no new connections, and none that is idle for another request; WebSockets stay."""
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            if isinstance(connection, HttpToolsProtocol):
                connection.shutdown()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.listening.set()

    async def main_loop(self) -> None:
        while not self._stopping.is_set() and not await self.on_tick(0):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), _TICK_S)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        for listener in sockets or []:
            listener.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        until = time.monotonic() + (self.config.timeout_graceful_shutdown or math.inf)
        while self._under_way() and time.monotonic() < until:
            await asyncio.sleep(_LOOK_S)
        if self.server_state.tasks:
            _log.warning("%d answers are cut off", len(self.server_state.tasks))
        for task in self.server_state.tasks:
            task.cancel()
        await self.lifespan.shutdown()

    def _under_way(self) -> bool:
        return bool(self.server_state.connections or self.server_state.tasks)
