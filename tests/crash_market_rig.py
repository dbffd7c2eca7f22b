"""Several routers, NATS and all that belongs to them as processes, each to be killed alone.

router-a, router-b, ...  routers over one database              python -m cli.main router
routers                  several of these at once
worker-a, worker-b       workers that know all routers, each another first; a third router has none
nats                     the bus between the routers            nats-server
postgres                 the postmaster, which a supervisor starts again
network                  the simulated Lightning network
"""

from __future__ import annotations

import os
import random
import signal
import string
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import asyncpg

from router.embedded_postgres import EmbeddedPostgres
from tests.crash_rig import Part, network_part, router_part, worker_part
from tests.nats_tools import NatsServer
from tests.ports import free_port

SECRET = "9" * 64


def router_names(routers: int) -> list[str]:
    """What the routers of a market of so many are called."""
    return [f"router-{letter}" for letter in string.ascii_lowercase[:routers]]


def victims(routers: int) -> tuple[str, ...]:
    """Who may be killed in a market of so many routers."""
    rest = ("routers", "postgres", "nats", "worker-a", "worker-b", "network")
    return (*router_names(routers), *rest)


class CrashMarketRig:
    """What `tests.crash_rig.CrashRig` is for one router."""

    def __init__(self, folder: Path, routers: int = 2) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.network_url = f"http://127.0.0.1:{(network_port := free_port())}"
        self.names = router_names(routers)
        self.victims = victims(routers)
        self.ports = [free_port() for _ in self.names]
        self.urls = [f"http://127.0.0.1:{port}" for port in self.ports]
        self.network = network_part(folder, network_port)
        self.nats = NatsServer(folder)
        self.postgres = EmbeddedPostgres(folder / "postgres")
        self.routers: list[Part] = []
        self.workers = [
            worker_part(
                folder,
                router_url=",".join(urls),
                network_url=self.network_url,
                name=name,
            )
            for name, urls in (
                ("worker-a", self.urls),
                ("worker-b", [*self.urls[1:], self.urls[0]]),
            )
        ]
        self.postgres_kills = 0

    @property
    def parts(self) -> dict[str, Part]:
        return {part.name: part for part in (self.network, *self.routers, *self.workers)}

    async def start(self) -> None:
        await self.postgres.start()
        await self.nats.start()
        self.routers = [
            router_part(
                self.folder,
                name=name,
                port=port,
                network_url=self.network_url,
                database_url=self.postgres.url,
                nats_url=self.nats.url,
                secret=SECRET,
            )
            for name, port in zip(self.names, self.ports, strict=True)
        ]
        for part in self.parts.values():
            await part.start()
            await part.until_healthy()

    def struck(self, victim: str, draw: random.Random) -> list[str]:
        """The parts that fall with a victim: `routers` are two of them, or more, or all."""
        if victim != "routers":
            return [victim]
        return draw.sample(self.names, draw.randint(2, len(self.names)))

    async def kill(self, victim: str) -> None:
        """SIGKILL to a part; killing what is dead already does nothing."""
        if victim == "nats":
            await self.nats.kill()
        elif victim != "postgres":
            await self.parts[victim].kill()
        elif self.postgres.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(self.postgres.pid, signal.SIGKILL)
                self.postgres_kills += 1

    async def revive(self, victim: str) -> None:
        """Start a killed part again; PostgreSQL is started again by its supervisor."""
        if victim == "nats":
            if not self.nats.running:
                await self.nats.start()
        elif victim != "postgres" and not self.parts[victim].running:
            await self.parts[victim].start()

    async def until_healthy(self) -> None:
        await self.revive("nats")
        for name, part in self.parts.items():
            await self.revive(name)
            await part.until_healthy()

    async def stop(self) -> None:
        for part in (*self.workers, *self.routers, self.network):
            await part.stop()
        await self.nats.kill()
        await self.postgres.stop()

    def kills(self) -> dict[str, int]:
        found = {name: part.kills for name, part in self.parts.items()}
        return found | {"postgres": self.postgres_kills, "nats": self.nats.kills}

    @asynccontextmanager
    async def database(self) -> AsyncIterator[Any]:
        """A connection of the test's own."""
        connection = await asyncpg.connect(self.postgres.url, timeout=10)
        try:
            yield connection
        finally:
            await connection.close()


@asynccontextmanager
async def running_crash_market(folder: Path, routers: int) -> AsyncIterator[CrashMarketRig]:
    """All parts, up and connected; whatever is still alive at the end is stopped."""
    rig = CrashMarketRig(folder, routers)
    try:
        await rig.start()
        yield rig
    finally:
        await rig.stop()
