"""Two routers, NATS and all that belongs to them as processes of their own, each to be killed alone.

router-a, router-b  two routers over one database          python -m cli.main router
worker-a, worker-b  workers that know both, each another first
nats                the bus between the routers             nats-server
postgres            the postmaster, which a supervisor starts again
network             the simulated Lightning network
"""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import asyncpg

from router.embedded_postgres import EmbeddedPostgres
from tests.crash_rig import Part, free_port, network_part, router_part, worker_part
from tests.nats_tools import NatsServer

SECRET = "9" * 64


class CrashPairRig:
    """What `tests.crash_rig.CrashRig` is for one router."""

    VICTIMS = ("router-a", "router-b", "postgres", "nats", "worker-a", "worker-b", "network")

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.network_url = f"http://127.0.0.1:{(network_port := free_port())}"
        self.ports = [free_port(), free_port()]
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
            for name, urls in (("worker-a", self.urls), ("worker-b", self.urls[::-1]))
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
            for name, port in zip(("router-a", "router-b"), self.ports, strict=True)
        ]
        for part in self.parts.values():
            await part.start()
            await part.until_healthy()

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
async def running_crash_pair(folder: Path) -> AsyncIterator[CrashPairRig]:
    """All parts, up and connected; whatever is still alive at the end is stopped."""
    rig = CrashPairRig(folder)
    try:
        await rig.start()
        yield rig
    finally:
        await rig.stop()
