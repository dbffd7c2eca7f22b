"""Runs the network's HTTP server inside an event loop that somebody else owns."""

from __future__ import annotations

import asyncio
import socket

import uvicorn

from billing.guest_server import GuestServer
from billing.lightning.simulated.network import Network
from billing.lightning.simulated.server import NetworkApp

DEFAULT_PORT = 9740
# Longer than a client keeps an idle connection: whoever closes first must not be us, or a request
# already on its way would be lost, with its outcome unknown.
_KEEP_ALIVE_S = 75
_SHUTDOWN_S = 2


class NetworkServer:
    """Serves `network` at `url` between `start` and `stop`. Port 0 takes a free one.

    Stopping does not close the network. `OSError` from the constructor: the port is taken.
    """

    def __init__(
        self, network: Network, *, host: str = "127.0.0.1", port: int = DEFAULT_PORT
    ) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, port), family=family, backlog=1024)
        # Inherited by every connection. asyncio does this itself only for sockets that name their
        # protocol, which this one does not; without it each answer waits 40 ms for an ACK.
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        bound_port = self._socket.getsockname()[1]
        self.url = f"http://[{host}]:{bound_port}" if ":" in host else f"http://{host}:{bound_port}"
        self._app = NetworkApp(network)
        self._server = GuestServer(
            uvicorn.Config(
                self._app,
                lifespan="off",
                ws="none",
                access_log=False,
                date_header=False,
                server_header=False,
                log_config=None,
                log_level=None,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=_SHUTDOWN_S,
            )
        )
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Return once requests are answered."""
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        started = asyncio.create_task(self._server.listening.wait())
        await asyncio.wait({self._serving, started}, return_when=asyncio.FIRST_COMPLETED)
        started.cancel()
        if self._serving.done():
            self._serving.result()

    async def stop(self) -> None:
        """End streams, answer what is under way, close. Twice is harmless."""
        if self._serving is None:
            self._socket.close()
            return
        self._app.stop()
        self._server.stop()
        await self._serving
