"""HTTP servers on loopback addresses that answer as a test tells them, well or badly."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from urllib.parse import parse_qsl


@dataclass(frozen=True)
class Request:
    method: str
    target: str
    headers: dict[str, str]
    body: bytes

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    @property
    def query(self) -> dict[str, str]:
        return dict(parse_qsl(self.target.partition("?")[2], keep_blank_values=True))


# A whole answer, or one that comes in parts as the test lets it.
Answer = Callable[[Request], bytes | AsyncIterator[bytes]]


def http(status: int = 200, body: bytes | str = b"", **headers: str) -> bytes:
    """A whole HTTP answer; header names are written with underscores."""
    content = body.encode() if isinstance(body, str) else body
    lines = [f"HTTP/1.1 {status} Whatever", f"Content-Length: {len(content)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + content


def http_json(value: object, status: int = 200) -> bytes:
    return http(status, json.dumps(value), Content_Type="application/json")


async def silence(request: Request) -> AsyncIterator[bytes]:
    """The answer of a server that takes a request and never says a word."""
    await asyncio.Event().wait()
    yield b""


@dataclass
class Loopback:
    """`async with Loopback(answer) as server:`; what it was asked is in `requests`."""

    answer: Answer
    address: str = "127.0.0.1"
    tls: ssl.SSLContext | None = None
    port: int = 0
    requests: list[Request] = field(default_factory=list)
    connections: int = 0
    _server: asyncio.Server | None = None
    _tasks: set[asyncio.Task] = field(default_factory=set)

    def url(self, target: str = "/") -> str:
        return f"http://{self.address}:{self.port}{target}"

    async def __aenter__(self) -> Loopback:
        self._server = await asyncio.start_server(
            self._serve, self.address, self.port, ssl=self.tls, ssl_handshake_timeout=None
        )
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        # The other side gives up in the middle of many of these tests.
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            try:
                await self._one(reader, writer)
            finally:
                writer.close()
                self._tasks.discard(task)
                await writer.wait_closed()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, target, _ = head[0].split(" ")
        headers = {
            name.lower(): value.strip()
            for name, _, value in (line.partition(":") for line in head[1:] if line)
        }
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        request = Request(method, target, headers, body)
        self.requests.append(request)
        answer = self.answer(request)
        if isinstance(answer, bytes):
            writer.write(answer)
            await writer.drain()
            return
        async for part in answer:
            writer.write(part)
            await writer.drain()
