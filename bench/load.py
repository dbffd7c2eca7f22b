"""Workers and clients that cost little, so that one core can load a router: raw HTTP/1.1 and
`satherd/1` frames made by hand.

Every token is TOKEN, or TOKEN and a time stamp, and TOKEN occurs nowhere else in an answer: counting
tokens is counting a byte, however the router has joined them.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import orjson
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

MODEL = "bench-model"
TOKEN = "~"
_PLAIN = f"{TOKEN}token"
_STAMP_DIGITS = 12
_WORDS = "What a router does with a prompt should cost next to nothing, so we ask it many times. "


@dataclass(slots=True)
class Seen:
    """What clients have seen. Times in seconds; `first_s` from a request to its first token, `delays_s`
    from a worker's frame to the client."""

    answers: int = 0
    tokens: int = 0
    failures: dict[int, int] = field(default_factory=dict)
    last_failure: str = ""
    answer_s: list[float] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    delays_s: list[float] = field(default_factory=list)

    def forget(self) -> None:
        """Begin to count, after the warm-up."""
        self.answers = self.tokens = 0
        self.failures.clear()
        self.answer_s.clear()
        self.first_s.clear()
        self.delays_s.clear()


def stamp() -> str:
    """Now, in microseconds, always of the same width."""
    return f"{int(time.perf_counter() * 1e6) % 10**_STAMP_DIGITS:0{_STAMP_DIGITS}d}"


def chat_body(*, max_tokens: int, stream: bool) -> dict[str, Any]:
    """A chat of ten messages, 2 KB of text, as an agent sends it."""
    said = [
        {"role": ("user", "assistant")[i % 2], "content": _WORDS + _WORDS[: 20 * i]}
        for i in range(9)
    ]
    return {
        "model": MODEL,
        "messages": [{"role": "system", "content": "You are a helpful assistant."}, *said],
        "max_tokens": max_tokens,
        "temperature": 0.7,
        "stream": stream,
    }


def http_request(path: str, body: bytes, headers: dict[str, str]) -> bytes:
    """A POST as it goes over the wire."""
    lines = [f"POST {path} HTTP/1.1", "Host: bench", "Content-Type: application/json"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    lines += [f"Content-Length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode() + body


class Client(asyncio.Protocol):
    """One kept-alive connection. `on_answer(status, body)` is called when an answer is complete.

    With `keep_body` False the body of a stream is only counted, and `body` is empty.
    """

    def __init__(
        self, seen: Seen, on_answer: Callable[[int, bytes], None], *, keep_body: bool = False
    ) -> None:
        self._seen = seen
        self._on_answer = on_answer
        self._keep = keep_body
        self._transport: asyncio.Transport | None = None
        self.closed = asyncio.get_running_loop().create_future()
        self._begin()

    def _begin(self) -> None:
        self._head = b""
        self._body = bytearray()
        self._status = 0
        self._left: int | None = None  # None: chunked
        self._tail = b""
        self._spoke = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not asserted: uvloop's transports are none of asyncio's classes.
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(exc)

    def send(self, request: bytes) -> None:
        assert self._transport is not None
        self._began = time.perf_counter()
        self._transport.write(request)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        if not self._status:
            self._head += data
            head, gap, data = self._head.partition(b"\r\n\r\n")
            if not gap:
                return
            self._status = int(head[9:12])
            lower = head.lower()
            at = lower.find(b"content-length:")
            self._left = int(lower[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else None
        self._read(data)

    def _read(self, data: bytes) -> None:
        self._count(data)
        if self._keep or self._status != 200:
            self._body += data
        if self._left is None:
            self._tail = (self._tail + data)[-7:]
            ended = self._tail.endswith(b"\r\n0\r\n\r\n")
        else:
            self._left -= len(data)
            ended = self._left <= 0
        if ended:
            self._end()

    def _count(self, data: bytes) -> None:
        tokens = data.count(b"~")
        if tokens and not self._spoke:
            self._spoke = True
            self._seen.first_s.append(time.perf_counter() - self._began)
        self._seen.tokens += tokens
        # A stamp that the end of a packet has cut in two is left out.
        at = data.find(b"~") + 1
        digits = data[at : at + _STAMP_DIGITS] if at else b""
        if len(digits) == _STAMP_DIGITS and digits.isdigit():
            now = int(time.perf_counter() * 1e6) % 10**_STAMP_DIGITS
            self._seen.delays_s.append((now - int(digits)) / 1e6)

    def _end(self) -> None:
        status, body = self._status, bytes(self._body)
        self._seen.answer_s.append(time.perf_counter() - self._began)
        if status == 200:
            self._seen.answers += 1
        elif status != 402:
            self._seen.failures[status] = self._seen.failures.get(status, 0) + 1
            self._seen.last_failure = body.decode(errors="replace")[:500]
        self._begin()
        self._on_answer(status, body)


async def open_client(
    port: int, seen: Seen, on_answer: Callable[[int, bytes], None], *, keep_body: bool = False
) -> Client:
    """A connection to the router."""
    loop = asyncio.get_running_loop()
    _, client = await loop.create_connection(
        lambda: Client(seen, on_answer, keep_body=keep_body), "127.0.0.1", port
    )
    return client


@asynccontextmanager
async def closed_loop(
    port: int, requests: Sequence[bytes], *, in_flight: int, over_s: float = 0.0
) -> AsyncIterator[Seen]:
    """Clients that each ask again as soon as they are answered; counts run in what is yielded.

    They begin one after the other in `over_s`: where all answers take the same time, clients that began
    together would all ask at the same moment again and again.
    """
    seen = Seen()
    clients: list[Client] = []
    going = True

    async def begin(number: int) -> None:
        request = requests[number % len(requests)]

        def again(status: int, body: bytes) -> None:
            if going:
                client.send(request)

        client = await open_client(port, seen, again)
        clients.append(client)
        client.send(request)

    for number in range(in_flight):
        await begin(number)
        if over_s:
            await asyncio.sleep(over_s / in_flight)
    try:
        yield seen
    finally:
        going = False
        for client in clients:
            client.close()
        await asyncio.gather(*(client.closed for client in clients))


@dataclass(frozen=True, slots=True)
class Pace:
    """How workers answer: `tokens` each, one step for all their jobs every `step_s`.

    `step_s` 0: as fast as they are let. `stamped`: every token carries the time of its step.
    """

    tokens: int
    step_s: float = 0.0
    stamped: bool = False


class Worker:
    """A worker whose model takes no time. All its jobs advance by one token a step, in one frame."""

    def __init__(self, socket: ClientConnection, pace: Pace) -> None:
        self._socket = socket
        self._pace = pace
        self._active: dict[tuple[str, int], int] = {}
        self._some = asyncio.Event()

    async def run(self) -> None:
        """Serve until the connection ends."""
        stepping = asyncio.create_task(self._step_for_ever())
        try:
            async for message in self._socket:
                frame = orjson.loads(message)
                if frame["type"] == "assign":
                    self._active[frame["job_id"], frame["attempt"]] = 0
                    self._some.set()
                elif frame["type"] == "cancel":
                    await self._finish(frame["job_id"], frame["attempt"], "cancelled")
        except ConnectionClosed:
            pass
        finally:
            stepping.cancel()
            await asyncio.gather(stepping, return_exceptions=True)

    async def _step_for_ever(self) -> None:
        next_at = time.perf_counter()
        while True:
            await self._some.wait()
            await self._step()
            # A step that came too late is not made up for: a model would not either.
            next_at = max(next_at + self._pace.step_s, time.perf_counter())
            await asyncio.sleep(max(0.0, next_at - time.perf_counter()))

    async def _step(self) -> None:
        text = TOKEN + stamp() if self._pace.stamped else _PLAIN
        items = [[job, attempt, seq, text, 1] for (job, attempt), seq in self._active.items()]
        if not items:
            self._some.clear()
            return
        await self._socket.send(orjson.dumps({"type": "chunks", "items": items}).decode())
        for job, attempt, seq, *_ in items:
            if seq + 1 >= self._pace.tokens:
                await self._finish(job, attempt, "stop")
            elif (job, attempt) in self._active:
                self._active[job, attempt] = seq + 1

    async def _finish(self, job: str, attempt: int, reason: str) -> None:
        said = self._active.pop((job, attempt), None)
        if said is None:
            return
        usage = {"prompt_tokens": 500, "completion_tokens": said + (reason == "stop")}
        frame = {
            "type": "finished",
            "job_id": job,
            "attempt": attempt,
            "finish_reason": reason,
            "usage": usage,
        }
        await self._socket.send(orjson.dumps(frame).decode())


def registration(
    *, slots: int, ln_url: str | None = None, model: str = MODEL, key: str | None = None
) -> str:
    """The first frame of a worker, a new one unless it has a key."""
    frame = {
        "protocol": "satherd/1",
        "worker_key": key or secrets.token_hex(32),
        "slots": slots,
        "models": [{"id": model, "kind": "text", "context_length": 1 << 20, "max_tokens": 1 << 19}],
    }
    return orjson.dumps(frame | ({"ln_url": ln_url} if ln_url else {})).decode()


@asynccontextmanager
async def workers(
    worker_url: str, pace: Pace, *, count: int, slots: int, ln_host: str
) -> AsyncIterator[None]:
    """`count` connected workers with `slots` each, who are paid at the simulated network."""
    sockets: list[ClientConnection] = []
    tasks: list[asyncio.Task] = []
    try:
        for number in range(count):
            socket = await connect(worker_url, max_size=None, max_queue=None, compression=None)
            sockets.append(socket)
            await socket.send(registration(slots=slots, ln_url=f"worker{number}@{ln_host}"))
            answer = orjson.loads(await socket.recv())
            if answer["type"] != "registered":
                raise RuntimeError(f"a worker was refused: {answer}")
            tasks.append(asyncio.create_task(Worker(socket, pace).run()))
        yield
    finally:
        for socket in sockets:
            await socket.close()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def silent_worker(worker_url: str, *, slots: int) -> AsyncIterator[None]:
    """A worker that takes what it is given and never says a word of it."""
    async with connect(worker_url, max_size=None, compression=None) as socket:
        await socket.send(registration(slots=slots))
        answer = orjson.loads(await socket.recv())
        if answer["type"] != "registered":
            raise RuntimeError(f"a worker was refused: {answer}")
        yield
