"""A router as a process of its own at a real node, so that both can be killed."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from pathlib import Path
from typing import Any

import asyncpg
import httpx

from billing import ledger, payees
from billing.invoices import utc_now
from billing.ledger import Transfer
from tests.crash_rig import router_part
from tests.lightning_rig import hash_of
from tests.ports import free_port
from tests.regtest.network import LightningNetwork
from tests.regtest.passing_time import pass_time
from tests.regtest.router_rig import PAYOUT_MSAT, electrum_settings

PATIENCE_S = 60.0


class RouterProcess:
    """`connection` is the test's own, to the router's database."""

    def __init__(self, folder: Path, database_url: str, lightning: LightningNetwork) -> None:
        self.lightning = lightning
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        self._part = router_part(
            folder,
            port=port,
            database_url=database_url,
            payout_threshold_msat=PAYOUT_MSAT,
            drain_s=0,
            **electrum_settings(lightning.router),
        )
        self._database_url = database_url
        self._earned = 0
        self.account_id = ""
        self.connection: asyncpg.Connection

    async def start(self) -> None:
        self.connection = await asyncpg.connect(self._database_url)
        await self.revive()

    async def revive(self) -> None:
        await self._part.start()
        await self._part.until_healthy()

    async def revive_as_the_one(self) -> None:
        """Who paid before is dead, which no other router could know: its lease need not run out."""
        # Not the connection that somebody may be waiting on meanwhile.
        connection = await asyncpg.connect(self._database_url)
        await connection.execute(
            "update billing_state set expires_at = now() where key = 'payout_lease'"
        )
        await connection.close()
        await self.revive()

    @property
    def running(self) -> bool:
        return self._part.running

    async def kill(self) -> None:
        await self._part.kill()

    async def stop(self) -> None:
        await self._part.kill()
        await self.connection.close()

    def log_text(self) -> str:
        return self._part.log_text()

    async def until_passing_time(self, sql: str, *values: Any) -> list[Any]:
        """Wait until the database has rows for it, while minutes go by for the router."""
        async with asyncio.timeout(PATIENCE_S):
            while not (rows := await self.connection.fetch(sql, *values)):
                await pass_time(self.connection, timedelta(minutes=2))
                await asyncio.sleep(0.5)
            return rows

    async def fill(self, amount_msat: int) -> None:
        """A client buys a balance over its channel; jobs would spend it."""
        async with httpx.AsyncClient(base_url=self.url, trust_env=False, timeout=20) as http:
            made = await http.post("/balance/topups", json={"amount_msat": amount_msat})
            assert made.status_code == 201, made.text
        invoice = made.json()["invoice"]
        await self.lightning.client.pay(invoice)
        rows = await self.until(
            "select account_id from invoices where payment_hash = $1 and state = 'paid'",
            hash_of(invoice),
        )
        self.account_id = rows[0]["account_id"]

    async def earn(self, worker_id: str, amount_msat: int) -> None:
        """What a job would move, without a job: from the client's balance to a worker's."""
        self._earned += 1
        moved = Transfer(
            ledger.client(self.account_id),
            ledger.worker(worker_id),
            amount_msat,
            "earned",
            f"job-{self._earned}",
        )
        async with self.connection.transaction():
            await ledger.post(self.connection, [moved])

    async def worker(self, worker_id: str, address: str) -> None:
        async with self.connection.transaction():
            await payees.set_address(self.connection, worker_id, address, now=utc_now())

    async def until(self, sql: str, *values: Any, patience_s: float = PATIENCE_S) -> list[Any]:
        """Wait until the database has rows for it."""
        try:
            async with asyncio.timeout(patience_s):
                while not (rows := await self.connection.fetch(sql, *values)):
                    await asyncio.sleep(0.05)
                return rows
        except TimeoutError:
            raise AssertionError(f"not in time: {sql}; {self.log_text()[-2000:]}") from None
