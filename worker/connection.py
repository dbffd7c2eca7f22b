"""The worker's end of its line to the router: a WebSocket, or anything that behaves like one."""

from __future__ import annotations

from typing import Protocol

from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as websocket_connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidURI

from worker.errors import WorkerError

MAX_FRAME_BYTES = 64 * 2**20
OPEN_TIMEOUT_S = 20
PING_INTERVAL_S = 20
PING_TIMEOUT_S = 60


class ConnectionLost(WorkerError):
    """There is no line to the router, or there is none any more. Trying again may help."""


class Connection(Protocol):
    """Frames in order, each a JSON text in UTF-8."""

    async def send(self, frame: bytes) -> None:
        """Raises ConnectionLost."""
        ...

    async def receive(self) -> str | bytes:
        """The next frame. Raises ConnectionLost."""
        ...

    async def close(self) -> None:
        """Say goodbye. Twice is harmless."""
        ...


class WebSocket:
    """A Connection over `websockets`."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket

    async def send(self, frame: bytes) -> None:
        try:
            await self._socket.send(frame.decode())
        except ConnectionClosed as error:
            raise ConnectionLost(_closing_words(error)) from error

    async def receive(self) -> str | bytes:
        try:
            return await self._socket.recv()
        except ConnectionClosed as error:
            raise ConnectionLost(_closing_words(error)) from error

    async def close(self) -> None:
        await self._socket.close()


async def connect(url: str) -> Connection:
    """Open a WebSocket. Raises ConnectionLost when nobody answers, or answers something else."""
    try:
        # Deflate costs the router 34 KiB a connection, and frames of one step are small.
        socket = await websocket_connect(
            url,
            compression=None,
            max_size=MAX_FRAME_BYTES,
            open_timeout=OPEN_TIMEOUT_S,
            ping_interval=PING_INTERVAL_S,
            ping_timeout=PING_TIMEOUT_S,
        )
    except (OSError, TimeoutError, InvalidHandshake, InvalidURI) as error:
        raise ConnectionLost(str(error) or type(error).__name__) from error
    return WebSocket(socket)


def _closing_words(error: ConnectionClosed) -> str:
    close = error.rcvd
    return f"closed by the router: {close.code} {close.reason}".strip() if close else "line broken"
