"""What the stand-ins share: the node behind them, dropped connections, and how they are served."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute
from starlette.types import Receive, Scope, Send

from billing.guest_server import GuestServer
from billing.lightning.simulated.invoices import InvoiceRecord
from billing.lightning.simulated.network import ConnectionDropped, Network
from billing.lightning.simulated.payments import PaymentRecord
from billing.lightning.simulated.wallets import ROUTER, Wallet

FOR_EVER_S = 3600.0


@dataclass
class Disk:
    """What a node of this kind keeps beyond the network's own records: payments that it gave up
    before anything left, with its word for why, and the invoices it was asked to pay, by hash."""

    given_up: dict[str, str] = field(default_factory=dict)
    asked_to_pay: dict[str, str] = field(default_factory=dict)


class NodeCore:
    """The node of a stand-in. Settlement indexes are 1, 2, 3, …; no call of it hides a fault."""

    def __init__(self, network: Network, disk: Disk) -> None:
        self.network = network
        self.disk = disk
        self.wallet = ROUTER
        self.stopping = asyncio.Event()
        # How many more settlements a stream delivers before its connection breaks.
        self.settlements_until_drop: int | None = None
        self.requests: list[tuple[str, str, Any]] = []

    async def node(self, operation: str) -> Wallet:
        return await self.network.node(self.wallet, operation=operation)

    async def preimage(self, payment_hash: str) -> str:
        row = await self.network._store.run(
            lambda tx: tx.row("SELECT preimage FROM invoice WHERE payment_hash = ?", payment_hash)
        )
        assert row is not None
        return row["preimage"].hex()

    async def by_key(self, key: str) -> str | None:
        """The payment hash of the invoice that was made with this label, or external id."""
        row = await self.network._store.run(
            lambda tx: tx.row("SELECT payment_hash FROM invoice WHERE idempotency_key = ?", key)
        )
        return None if row is None else row["payment_hash"]

    async def key_of(self, payment_hash: str) -> str:
        row = await self.network._store.run(
            lambda tx: tx.row(
                "SELECT idempotency_key AS k FROM invoice WHERE payment_hash = ?", payment_hash
            )
        )
        assert row is not None
        return row["k"] or payment_hash

    async def attempts(self, payment_hash: str) -> list[PaymentRecord]:
        """All that this node remembers of paying that hash, newest first."""
        known = await self.network.lookup_payment(self.wallet, payment_hash)
        if known is None:
            return []
        paid = await self.network.paid_out(self.wallet)
        return [one for one in paid if one.payment_hash == payment_hash and not one.forgotten]

    async def remembered(self) -> list[PaymentRecord]:
        """All attempts to pay that this node lists, oldest first."""
        paid = await self.network.paid_out(self.wallet)
        return [one for one in reversed(paid) if not one.forgotten]

    async def pay(self, bolt11: str, *, max_fee_msat: int, max_cltv: int | None) -> PaymentRecord:
        """Raises Refused; waits for the end, however long that is."""
        return await self.network.pay_invoice(
            self.wallet,
            bolt11,
            max_fee_msat=max_fee_msat,
            timeout_s=FOR_EVER_S,
            max_cltv_blocks=max_cltv,
        )

    async def settled(self, after: int) -> AsyncIterator[tuple[int, InvoiceRecord]]:
        """Settlements after an index, for ever. Raises ConnectionDropped where that is scripted."""
        prefix = (await self.network.node(self.wallet, operation="none")).pubkey[:16]
        async for record in self.network.settlements(self.wallet, f"{prefix}-{after}"):
            if self.settlements_until_drop == 0:
                self.settlements_until_drop = None
                raise ConnectionDropped
            if self.settlements_until_drop is not None:
                self.settlements_until_drop -= 1
            yield index_of(record), record

    async def last_index(self) -> int:
        received = await self.network.received(self.wallet)
        return index_of(received[-1]) if received else 0


def index_of(record: InvoiceRecord) -> int:
    assert record.cursor is not None
    return int(record.cursor.rpartition("-")[2])


class Dropped(Response):
    """Promises a byte and sends none: the server then cuts the connection."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [(b"content-length", b"1")],
            }
        )


class Lines(Response):
    """A stream of JSON lines that is cut where its source raises ConnectionDropped."""

    def __init__(self, lines: AsyncIterator[dict[str, Any]]) -> None:
        self._lines = lines

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            async for line in self._lines:
                body = json.dumps(line).encode() + b"\n"
                await send({"type": "http.response.body", "body": body, "more_body": True})
        except ConnectionDropped:
            return
        await send({"type": "http.response.body", "body": b""})


async def drop(request: Request, error: Exception) -> Response:
    return Dropped()


class Served:
    """A stand-in at `url` between `start` and `stop`. Whoever still waits at the stop is cut off."""

    def __init__(self, core: NodeCore, routes: list[BaseRoute], *, port: int = 0) -> None:
        self._core = core
        self._app = Starlette(routes=routes, exception_handlers={ConnectionDropped: drop})
        self._socket = socket.create_server(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.port: int = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._server = GuestServer(
            uvicorn.Config(
                self._until_stopped,
                interface="asgi3",
                lifespan="off",
                ws="websockets-sansio",
                access_log=False,
                log_config=None,
                log_level="error",
                timeout_graceful_shutdown=2,
            )
        )
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        await asyncio.wait_for(self._server.listening.wait(), 5)

    async def stop(self) -> None:
        assert self._task is not None
        self._core.stopping.set()
        self._server.stop()
        await self._task

    async def _until_stopped(self, scope: Scope, receive: Receive, send: Send) -> None:
        answering = asyncio.ensure_future(self._app(scope, receive, send))
        stopping = asyncio.ensure_future(self._core.stopping.wait())
        await asyncio.wait({answering, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not answering.done():
            answering.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await answering
