"""Stand-ins for what lies outside a worker: an engine's output, a router, a web server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.routing import Route
from websockets.asyncio.server import Server, ServerConnection, serve

from billing.guest_server import GuestServer
from worker.protocol import WORKER_FRAME, JobSpec, Registration

PATIENCE_S = 10


class RecordingSink:
    """A Sink that keeps all it is given, and can be waited at."""

    def __init__(self, *, cancel_after_tokens: int | None = None) -> None:
        self.pieces: list[tuple[str, int | None]] = []
        self.deltas: list[dict[str, Any]] = []
        self.cancelled = False
        self._cancel_after_tokens = cancel_after_tokens
        self._on_cancel: list[Callable[[], object]] = []
        self.wrote = asyncio.Event()

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.pieces)

    @property
    def tokens(self) -> int:
        return sum(tokens or 0 for _, tokens in self.pieces)

    def write(
        self, text: str, *, tokens: int | None = None, delta: dict[str, Any] | None = None
    ) -> None:
        self.pieces.append((text, tokens))
        if delta is not None:
            self.deltas.append(delta)
        self.wrote.set()
        if self._cancel_after_tokens is not None and self.tokens >= self._cancel_after_tokens:
            self.cancel()

    def on_cancel(self, call: Callable[[], object]) -> None:
        if self.cancelled:
            call()
        else:
            self._on_cancel.append(call)

    def cancel(self) -> None:
        if not self.cancelled:
            self.cancelled = True
            for call in self._on_cancel:
                call()


class RouterStandIn:
    """The router's end of worker sockets: real WebSockets, real frames, no queue and no money.

    Each connection that registered is put into `lines`, with the worker's registration.
    """

    def __init__(self) -> None:
        self.lines: asyncio.Queue[Line] = asyncio.Queue()
        self.answer: dict[str, Any] = {
            "type": "registered",
            "worker_id": "worker-1",
            "ln_url": None,
            "payable": False,
            "commission_ppm": 50_000,
        }
        self.registrations: list[Registration] = []
        self._server: Server | None = None

    @property
    def url(self) -> str:
        assert self._server is not None
        host, port = next(iter(self._server.sockets)).getsockname()[:2]
        return f"http://{host}:{port}"

    async def next_line(self) -> Line:
        return await asyncio.wait_for(self.lines.get(), PATIENCE_S)

    async def _handle(self, socket: ServerConnection) -> None:
        assert socket.request is not None and socket.request.path == "/worker"
        registration = Registration.model_validate_json(await socket.recv())
        self.registrations.append(registration)
        await socket.send(json.dumps(self.answer))
        if self.answer["type"] != "registered":
            return
        self.lines.put_nowait(Line(socket, registration))
        await socket.wait_closed()


class Line:
    """One registered worker, seen from the router."""

    def __init__(self, socket: ServerConnection, registration: Registration) -> None:
        self.socket = socket
        self.registration = registration

    async def send(self, **frame: Any) -> None:
        await self.socket.send(json.dumps(frame))

    async def assign(self, job_id: str, job: JobSpec, attempt: int = 1) -> None:
        await self.send(
            type="assign",
            job_id=job_id,
            attempt=attempt,
            lease_s=60,
            job=job.model_dump(mode="json"),
        )

    async def frame(self) -> Any:
        """The next frame, checked against the protocol."""
        text = await asyncio.wait_for(self.socket.recv(), PATIENCE_S)
        return WORKER_FRAME.validate_json(text)

    async def frames_until(self, kind: str, job_id: str | None = None) -> list[Any]:
        """Frames up to and with the first of `kind` (about `job_id`)."""
        frames: list[Any] = []
        while True:
            frame = await self.frame()
            frames.append(frame)
            if frame.type == kind and (job_id is None or frame.job_id == job_id):
                return frames


@asynccontextmanager
async def router_stand_in() -> AsyncIterator[RouterStandIn]:
    router = RouterStandIn()
    async with serve(router._handle, "127.0.0.1", 0, compression=None) as server:  # pyright: ignore[reportPrivateUsage]
        router._server = server  # pyright: ignore[reportPrivateUsage]
        yield router


def text_of(frames: list[Any], job_id: str) -> str:
    """The text that `chunks` frames carry for one job, in the order of their numbers."""
    items = [item for frame in frames if frame.type == "chunks" for item in frame.items]
    mine = [item for item in items if item[0] == job_id]
    assert [item[2] for item in mine] == list(range(len(mine)))
    return "".join(item[3] for item in mine)


@asynccontextmanager
async def http_server(*routes: Route) -> AsyncIterator[str]:
    """A real HTTP server with these routes; its URL."""
    config = uvicorn.Config(
        Starlette(routes=list(routes)),
        host="127.0.0.1",
        port=0,
        log_level="critical",
        lifespan="off",
        timeout_graceful_shutdown=1,
    )
    server = GuestServer(config)
    serving = asyncio.create_task(server.serve())
    try:
        await asyncio.wait_for(server.listening.wait(), PATIENCE_S)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.stop()
        await serving
