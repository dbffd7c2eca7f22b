"""Several routers that are one market, as processes: one database, one NATS server, one network."""

from __future__ import annotations

import asyncio
import os
import string
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import asyncpg
import httpx
from websockets.asyncio.client import connect

from billing.trial_balance import trial_balance
from tests.conftest import url_of
from tests.crash_rig import Part, network_part, router_part, worker_part
from tests.memory_folder import memory_folder
from tests.nats_tools import NatsServer
from tests.ports import free_port
from tests.reading import PATIENCE_S
from tests.router_rig import ScriptedWorker

ASK: dict[str, Any] = {
    "model": "echo",
    "messages": [{"role": "user", "content": "Say it word by word, and do not lose any of them."}],
    "max_tokens": 100,
}
JOB = ASK | {"kind": "chat"}
# Slow enough for a router to die in the middle.
TOKEN_S = 0.02
SEEN_FIRST = 40
MODELS = [{"id": "echo", "kind": "text", "context_length": 2048, "max_tokens": 1024}]


class Market:
    """Routers A, B, ... by their numbers from 0 on; what a test kills is started for the next one."""

    def __init__(self, folder: Path, database_url: str, routers: int) -> None:
        network_port = free_port()
        self.folder = folder
        self.database_url = database_url
        self.network_url = f"http://127.0.0.1:{network_port}"
        self.network = network_part(folder, network_port)
        self.nats = NatsServer(folder)
        names = string.ascii_lowercase[:routers]
        self.urls = [f"http://127.0.0.1:{free_port()}" for _ in names]
        self.routers = [
            self._router(name, int(url.rpartition(":")[2]))
            for name, url in zip(names, self.urls, strict=True)
        ]

    def _router(self, name: str, port: int, **settings: Any) -> Part:
        return router_part(
            self.folder,
            name=name,
            port=port,
            network_url=self.network_url,
            database_url=self.database_url,
            nats_url=self.nats.url,
            secret="7" * 64,
            **settings,
        )

    def another_in_the_folder_of(self, router: int) -> Part:
        """A router too many: with the data folder of one that is there."""
        folder = self.folder / self.routers[router].name
        return self._router("stray", free_port(), data_dir=folder)

    async def start(self) -> None:
        """Whatever does not run."""
        if not self.nats.running:
            await self.nats.start()
        for part in (self.network, *self.routers):
            if not part.running:
                await part.start()
        for part in (self.network, *self.routers):
            await part.until_healthy()

    async def stop(self) -> None:
        for part in (*self.routers, self.network):
            await part.kill()
        await self.nats.kill()

    async def kill(self, *routers: int) -> None:
        """These at the same time."""
        await asyncio.gather(*(self.routers[router].kill() for router in routers))

    def client(self, router: int) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.urls[router], timeout=PATIENCE_S, trust_env=False)

    def network_client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.network_url, timeout=PATIENCE_S, trust_env=False)

    @asynccontextmanager
    async def worker(self, *order: int) -> AsyncIterator[Part]:
        """A real worker that tries routers in this order, known at all."""
        part = worker_part(
            self.folder,
            router_url=",".join(self.urls[router] for router in order),
            network_url=self.network_url,
            token_s=TOKEN_S,
        )
        await part.start()
        try:
            await self._until_served()
            yield part
        finally:
            await part.kill()

    @asynccontextmanager
    async def scripted(self, router: int) -> AsyncIterator[ScriptedWorker]:
        """A worker of one router of which the test decides every frame, known at all."""
        lnurl_host = self.network_url.removeprefix("http://")
        async with connect(self.urls[router].replace("http", "ws") + "/worker") as socket:
            worker = ScriptedWorker(socket, lnurl_host, models=MODELS)
            await worker.register()
            await self._until_served()
            yield worker

    async def _until_served(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            for url in self.urls:
                while not await _serves(url):
                    await asyncio.sleep(0.05)

    async def pay(self, invoice: str) -> str:
        async with self.network_client() as network:
            paid = await network.post("/v1/pay", json={"invoice": invoice})
            assert paid.status_code == 200, paid.text
            return paid.json()["preimage"]

    async def buy(self, router: int) -> tuple[dict[str, str], dict[str, Any]]:
        """A job bought with an invoice: its credential, and where it is followed."""
        async with self.client(router) as http:
            due = (await http.post("/jobs", json=JOB)).json()
            preimage = await self.pay(due["invoice"])
            paid = {"Authorization": f"L402 {due['l402_token']}:{preimage}"}
            made = await http.post("/jobs", json=JOB, headers=paid)
            assert made.status_code == 202, made.text
            return paid, made.json()["jobs"][0]

    async def owner(self, amount_msat: int = 1_000_000) -> tuple[dict[str, str], dict[str, str]]:
        """A new account: the headers of its key, and of its top-up, which may withdraw."""
        async with self.client(0) as http:
            made = (await http.post("/balance/topups", json={"amount_msat": amount_msat})).json()
            preimage = await self.pay(made["invoice"])
            owner = {"Authorization": f"L402 {made['l402_token']}:{preimage}"}
            shown = await http.get(f"/balance/topups/{made['payment_hash']}", headers=owner)
            assert shown.status_code == 200, shown.text
            return {"Authorization": f"Bearer {shown.json()['key']}"}, owner

    async def queue(self, router: int, key: dict[str, str], **changes: Any) -> dict[str, Any]:
        """A job bought from a balance: where it is followed."""
        async with self.client(router) as http:
            made = await http.post("/jobs", json=JOB | changes, headers=key)
            assert made.status_code == 202, made.text
            return made.json()["jobs"][0]

    @asynccontextmanager
    async def database(self) -> AsyncIterator[Any]:
        connection = await asyncpg.connect(self.database_url)
        try:
            yield connection
        finally:
            await connection.close()

    async def query(self, sql: str, *values: Any) -> list[Any]:
        async with self.database() as connection:
            return await connection.fetch(sql, *values)

    async def check_books(self, *, jobs: int) -> None:
        """The trial balance is zero, nothing is held, and so many jobs were ever made."""
        async with self.database() as connection:
            async with connection.transaction(isolation="repeatable_read"):
                trial = await trial_balance(connection)
            assert trial.in_order, trial
            assert not trial.lines.get("liabilities:escrow")
            assert await connection.fetchval("select count(*) from jobs") == jobs
            await connection.execute("delete from jobs")


async def _serves(url: str) -> bool:
    try:
        async with httpx.AsyncClient(timeout=2, trust_env=False) as http:
            models = (await http.get(f"{url}/info")).json().get("models", [])
    except (httpx.HTTPError, ValueError):
        return False
    return any(model["workers"] for model in models)


@contextmanager
def market_of_processes(
    postgres_url: str, routers: int, template: str = "template1"
) -> Iterator[Market]:
    """A market with a database of its own, which is empty unless a template is named; not started."""

    async def run(statement: str) -> None:
        connection = await asyncpg.connect(postgres_url)
        await connection.execute(statement)
        await connection.close()

    name = f"satherd_market_{routers}_{os.getpid()}"
    with memory_folder() as folder:
        market = Market(folder, url_of(postgres_url, name), routers)
        asyncio.run(run(f"create database {name} template {template} strategy file_copy"))
        yield market
        asyncio.run(market.stop())
    asyncio.run(run(f"drop database {name} with (force)"))
