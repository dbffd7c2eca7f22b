"""The bus between router processes: NATS core, one subject for each router and one for all.

NATS being away stops nobody: what is sent then is dropped, `up` is False, and the client tries to
connect until it can (`router.relay` goes by the database meanwhile).

A server that hangs closes nothing. It is asked for a sign of life a few times a second, and is away
once nothing at all has come from it for SILENT_S; whatever comes is one, so that one which has much to
say is not.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from urllib.parse import urlsplit

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg

from router.bus import Parcels

log = logging.getLogger(__name__)

CONNECT_S = 2
AGAIN_S = 0.5
# How often a connection is looked at, and the silence after which it is dead though nobody closed it.
LOOK_S, SILENT_S = 0.25, 1.25
# The client's own pings, which count no messages as signs of life, only find out that it broke itself.
CLIENT_PING_S, CLIENT_PINGS = 10, 2
# The server's own limit is a megabyte a message; while it does not read, no more than this waits.
MOST_WAITING_BYTES = 16 << 20
CLOSE_S = 1


class NatsBus(Parcels):
    """`market` keeps apart the routers of several markets on one server."""

    name = "nats"

    def __init__(self, router_id: str, url: str, *, market: str) -> None:
        super().__init__(router_id)
        self._servers = [server.strip() for server in url.split(",") if server.strip()]
        self._own = f"satherd.{market}.router.{router_id}"
        self._prefix = f"satherd.{market}.router."
        self._all = f"satherd.{market}.all"
        self._client: Client | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._lost = asyncio.Event()
        self._said_away = False
        self._ping: asyncio.Task[None] | None = None

    @property
    def up(self) -> bool:
        return self._client is not None and self._client.is_connected

    @property
    def alone(self) -> bool:
        return False

    def start(self) -> None:
        self._tasks = [
            asyncio.create_task(self._stay_connected(), name="nats"),
            asyncio.create_task(self._carry(), name="bus"),
        ]

    async def stop(self) -> None:
        if self.up:
            await self.flushed()
        client = self._client
        if client is not None and client.is_connected:
            with suppress(Exception):
                await client.flush(CLOSE_S)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._close()

    async def _stay_connected(self) -> None:
        """Connect, and when the connection is lost connect anew: each is a client of its own."""
        while True:
            self._lost.clear()
            client = Client()
            try:
                await self._connect(client)
            except Exception as error:
                self._say_away(type(error).__name__)
                await _drop(client)
                await asyncio.sleep(AGAIN_S)
                continue
            self._client = client
            self._said_away = False
            log.info("bus connected server=%s", _shown(client))
            self.on_up()
            why = await self._until_lost(client)
            self._say_away(why)
            await self._close()

    async def _until_lost(self, client: Client) -> str:
        """Wait until a connection is closed, or silent; which of them."""
        silent, heard = 0.0, 0
        while silent < SILENT_S:
            if self._ping is None or self._ping.done():
                silent = 0.0
                self._ping = asyncio.create_task(_ping(client), name="nats-ping")
            with suppress(TimeoutError):
                await asyncio.wait_for(self._lost.wait(), LOOK_S)
            if self._lost.is_set() or client.is_closed:
                return "lost"
            # By turns of ours rather than by the clock: what came while we were busy is read first.
            silent += LOOK_S
            if heard != (heard := client.stats["in_msgs"]):
                silent = 0.0
        return "silent"

    async def _connect(self, client: Client) -> None:
        async with asyncio.timeout(CONNECT_S + 1):
            await client.connect(
                self._servers,
                name=f"satherd {self.router_id[:8]}",
                # The numbers of parcels are ours to keep: a client that heals by itself would send
                # what it kept long after it was news.
                allow_reconnect=False,
                connect_timeout=CONNECT_S,
                ping_interval=CLIENT_PING_S,
                max_outstanding_pings=CLIENT_PINGS,
                # Beyond its own limit a client waits for the server, and all others behind it.
                pending_size=2 * MOST_WAITING_BYTES,
                no_echo=True,
                error_cb=self._on_error,
                closed_cb=self._on_lost,
                disconnected_cb=self._on_lost,
            )
            await client.subscribe(self._own, cb=self._on_parcel)
            await client.subscribe(self._all, cb=self._on_parcel)
            await client.flush(CONNECT_S)

    async def _close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await _drop(client)
        if self._ping is not None:
            self._ping.cancel()
            self._ping = None

    async def _on_parcel(self, message: Msg) -> None:
        self.take(message.data)

    async def _on_lost(self) -> None:
        self._lost.set()

    async def _on_error(self, error: Exception) -> None:
        if isinstance(error, nats.errors.SlowConsumerError):
            # What was dropped is missed by its number.
            log.warning("bus: messages came faster than they could be handled")

    async def _carry(self) -> None:
        while True:
            for to, parcel in await self.parcels():
                client = self._client
                if client is None or not client.is_connected:
                    continue  # It has its number, so that receivers miss it.
                if client.pending_data_size > MOST_WAITING_BYTES:
                    continue  # The server does not read: as if it were away.
                subject = self._all if to is None else self._prefix + to
                try:
                    await client.publish(subject, parcel)
                except (nats.errors.Error, OSError) as error:
                    log.warning("bus: not sent: %r", error)

    def _say_away(self, why: str) -> None:
        """`why` is no more than the name of an error, which may hold the URL, and that a password."""
        if not self._said_away:
            self._said_away = True
            log.warning("bus away, going on alone: %s", why)


async def _ping(client: Client) -> None:
    """Wait for the answer to a ping, for as long as there is this connection."""
    with suppress(nats.errors.Error, OSError):
        await client.flush(3600)


async def _drop(client: Client) -> None:
    """Close a connection. What is unsent would be waited for until the server reads: it is dropped."""
    writer = getattr(client._transport, "_io_writer", None)
    if writer is not None:
        writer.transport.abort()
    with suppress(Exception):
        await asyncio.wait_for(client.close(), CLOSE_S)


def _shown(client: Client) -> str:
    """The server without the password that may stand in its URL."""
    url = client.connected_url
    parts = urlsplit(url.geturl()) if url is not None else None
    return f"{parts.hostname}:{parts.port}" if parts else "unknown"
