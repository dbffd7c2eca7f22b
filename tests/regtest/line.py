"""The line between a back end and its node, which a test can cut at the worst moment."""

from __future__ import annotations

import asyncio
import contextlib
import json

_HEADERS_END = b"\r\n\r\n"


class Line:
    """Passes HTTP requests on to the server at `port`, and its answers back."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._server: asyncio.Server | None = None
        self._serving: set[asyncio.Task[None]] = set()
        self._cut_before: str | None = None
        self._cut_after: str | None = None
        self.url = ""

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)

    def cut_before(self, method: str) -> None:
        """The next call of `method` does not arrive."""
        self._cut_before = method

    def cut_after(self, method: str) -> None:
        """The next call of `method` arrives, and its answer does not."""
        self._cut_after = method

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                while await self._pass_on(reader, writer):
                    pass
        finally:
            writer.close()
            self._serving.discard(task)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One call; whether the line still stands."""
        headers, body = await _message(reader)
        method = json.loads(body)["method"]
        if method == self._cut_before:
            self._cut_before = None
            return False
        node_reader, node_writer = await asyncio.open_connection("127.0.0.1", self._port)
        answer = asyncio.create_task(_message(node_reader))
        try:
            node_writer.write(headers + body)
            await node_writer.drain()
            if method == self._cut_after:
                self._cut_after = None
                # The node must have read it before its side of the line breaks.
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(answer, 0.5)
                return False
            writer.write(b"".join(await answer))
            await writer.drain()
            return True
        finally:
            answer.cancel()
            node_writer.close()


async def _message(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Headers and body. Raises asyncio.IncompleteReadError when the other side has hung up."""
    headers = await reader.readuntil(_HEADERS_END)
    length = 0
    for line in headers.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            length = int(value)
    return headers, await reader.readexactly(length)
