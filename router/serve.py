"""Serving a router over HTTP with uvicorn, tuned for streams and for blocked workers."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket

import uvicorn
from fastapi import FastAPI

from billing.guest_server import GuestServer
from router.connections import PatientHttp, StraightFrames

# A worker may be deaf for minutes while it loads a model (QB-P21).
PING_INTERVAL_S = 30.0
PING_TIMEOUT_S = 300.0
MAX_FRAME_BYTES = 64 << 20
STREAMS_END_S = 30


log = logging.getLogger(__name__)


class RouterServer:
    """One router's HTTP server. Port 0 takes a free one; `url` says which."""

    def __init__(self, app: FastAPI, *, host: str, port: int) -> None:
        self.app = app
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, port), family=family, backlog=2048)
        # Inherited by connections: without it a small answer waits 40 ms for an acknowledgement.
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        shown = "127.0.0.1" if host in ("0.0.0.0", "") else f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._socket.getsockname()[1]}"
        self._server = GuestServer(
            uvicorn.Config(
                app,
                # Entered by ourselves: uvicorn logs what goes wrong in it, and ends the process.
                lifespan="off",
                http=PatientHttp,
                ws=StraightFrames,
                ws_per_message_deflate=False,
                ws_max_size=MAX_FRAME_BYTES,
                ws_ping_interval=PING_INTERVAL_S,
                ws_ping_timeout=PING_TIMEOUT_S,
                timeout_graceful_shutdown=STREAMS_END_S,
                access_log=False,
                # Whom to believe about addresses is a setting of ours (router.rate_limits).
                proxy_headers=False,
                log_config=None,
                log_level="warning",
                server_header=False,
            )
        )
        self._lifespan = app.router.lifespan_context(app)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Return once requests are answered. Raises what the application's start raises."""
        try:
            await self._lifespan.__aenter__()
        except BaseException:
            self._socket.close()
            raise
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        started = asyncio.create_task(self._server.listening.wait())
        await asyncio.wait({self._task, started}, return_when=asyncio.FIRST_COMPLETED)
        started.cancel()
        if self._task.done():
            await self.stop()
            raise RuntimeError("the router did not start; its log says why")

    async def stop(self) -> None:
        """Answer what is under way, then stop the application. Twice is harmless."""
        if self._task is None:
            return
        task, self._task = self._task, None
        try:
            others = getattr(self.app.state, "others", None)
            if others is not None and others():
                # Whoever comes is served there, and would only be refused here.
                self._server.stop_listening()
            # Before uvicorn closes sockets, of which the workers' are some.
            drain = getattr(self.app.state, "drain", None)
            if drain is not None:
                await drain()
            self._server.stop()
            await task
        finally:
            await self._lifespan.__aexit__(None, None, None)


def spare_collector() -> None:
    """Keep Python's collector from walking all that a started router holds, again and again.

    Modules and routes stay for good, so they are frozen; what a request leaves in cycles waits for
    a larger batch. Call it once the router has started; twice is harmless.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
