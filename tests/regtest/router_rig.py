"""A router with a real Lightning node: clients pay it, and it pays, over channels."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from router.app import create_app
from router.core import Core
from router.serve import RouterServer
from router.settings import Settings
from tests.regtest.lnurl_payee import lnurl_server
from tests.regtest.network import LightningNetwork, Node
from tests.router_rig import ADMIN_TOKEN, PATIENCE_S, AnyRig

# Electrum may take 10 sat for a route, and a batch must be worth 50 times that.
JOB_FEE_MSAT = 1_000_000
PAYOUT_MSAT = 500_000


class Clock:
    """The router's; the nodes keep their own time."""

    def __init__(self) -> None:
        self.ahead = timedelta()

    def __call__(self) -> datetime:
        return datetime.now(UTC) + self.ahead


class RealRig(AnyRig):
    """`lightning` is the network around the router's node."""

    def __init__(
        self, core: Core, url: str, lnurl_host: str, lightning: LightningNetwork, clock: Clock
    ) -> None:
        super().__init__(core, url, lnurl_host)
        self.lightning = lightning
        self.clock = clock
        self._moved_before_msat = 0

    async def pay(self, invoice: str) -> str:
        return await self.lightning.client.pay(invoice)

    async def begin(self) -> None:
        self._moved_before_msat = await moved_msat(self.lightning.router)
        rates = {
            "prompt_fee_msat": JOB_FEE_MSAT,
            "input_msat_per_mtok": 0,
            "output_msat_per_mtok": 0,
        }
        headers = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
        set_fees = await self.http.put("/admin/fees", json=rates, headers=headers)
        assert set_fees.status_code == 200, set_fees.text

    async def until(self, sql: str, *values: Any, patience_s: float = 3 * PATIENCE_S) -> list[Any]:
        """Wait until the database has rows for it."""
        try:
            async with asyncio.timeout(patience_s):
                while not (rows := await self.query(sql, *values)):
                    await asyncio.sleep(0.05)
                return rows
        except TimeoutError:
            payouts = await self.query("select state, failure_code from payouts")
            raise AssertionError(f"not in time: {sql} {values}; payouts: {payouts}") from None

    async def paid_out(self, number: int) -> None:
        """Wait for that many payouts that are paid, and none under way."""
        self.core.payouts.wake()
        await self.until(
            "select from payouts having count(*) filter (where state = 'paid') >= $1"
            " and count(*) filter (where state in ('planned', 'sending')) = 0",
            number,
        )

    async def check_books(self) -> dict[str, int]:
        """They sum to zero, and say of the node what it says of itself, to the msat."""
        books = await self.books()
        assert books.in_order, books
        moved = await moved_msat(self.lightning.router) - self._moved_before_msat
        assert books.lines.get("assets:lightning", 0) == moved, books.lines
        return books.lines


async def moved_msat(node: Node) -> int:
    """What came in less what left, fees included, by the node's own history."""
    return sum(one["amount_msat"] for one in await node.history())


def electrum_settings(node: Node) -> dict[str, str]:
    return {
        "lightning": "electrum",
        "electrum_url": node.url,
        "electrum_user": node.rpc.user,
        "electrum_password": node.rpc.password,
    }


@asynccontextmanager
async def running_real_rig(
    folder: Path,
    database_url: str,
    lightning: LightningNetwork,
    *,
    names: tuple[str, ...] = ("worker",),
    invoice_expiry_s: int = 3600,
    **settings: Any,
) -> AsyncIterator[RealRig]:
    """A router at the network's node of that name; workers are paid at a foreign LNURL server."""
    await lightning.ready()
    given = {
        "data_dir": folder / "router",
        "database_url": database_url,
        "lnurl_allow_private": True,
        "admin_token": ADMIN_TOKEN,
        "rate_limits": "off",
        "drain_s": 0.5,
        "payout_threshold_msat": PAYOUT_MSAT,
        **electrum_settings(lightning.router),
    } | settings
    async with AsyncExitStack() as stack:
        lnurl_host = await stack.enter_async_context(
            lnurl_server(
                lightning, lightning.worker, folder, names=names, expiry_s=invoice_expiry_s
            )
        )
        clock = Clock()
        app = create_app(Settings(_env_file=None, **given), clock=clock)  # pyright: ignore[reportCallIssue]
        server = RouterServer(app, host="127.0.0.1", port=0)
        stack.push_async_callback(server.stop)
        await server.start()
        rig = RealRig(app.state.core, server.url, lnurl_host, lightning, clock)
        stack.push_async_callback(rig.http.aclose)
        await rig.begin()
        yield rig
