"""Two routers in this process over one PostgreSQL, joined by the in-process bus or by a NATS server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from router.bus import Exchange
from tests.reading import until
from tests.router_rig import Rig, ScriptedWorker, running_network, running_router

SECRET = "5" * 64


@asynccontextmanager
async def running_pair(
    folder: Path, database_url: str, *, lines: tuple[str | None, str | None], **settings: Any
) -> AsyncIterator[tuple[Rig, Rig]]:
    """Routers A and B. `lines`: each one's URL of NATS; None for the bus within this process."""
    exchange = Exchange()
    async with AsyncExitStack() as stack:
        network, network_url = await stack.enter_async_context(running_network(folder))
        rigs = [
            await stack.enter_async_context(
                running_router(
                    folder / name,
                    database_url,
                    network,
                    network_url,
                    exchange=exchange,
                    secret=SECRET,
                    nats_url=line,
                    **settings,
                )
            )
            for name, line in zip("ab", lines, strict=True)
        ]
        await until(lambda: joined(rigs))
        yield rigs[0], rigs[1]


@asynccontextmanager
async def worker_at(rig: Rig, *, known_at: Rig, **options: Any) -> AsyncIterator[ScriptedWorker]:
    """A worker of one router, once the other has heard of it."""

    async def known() -> bool:
        return bool(known_at.core.fleet.elsewhere())

    async with rig.worker(**options) as worker:
        await until(known)
        yield worker


async def joined(rigs: list[Rig]) -> bool:
    """Whether the lines of all of them are up."""
    return all(rig.core.relay.bus.up for rig in rigs)


async def parted(rigs: list[Rig]) -> bool:
    """Whether the lines of all of them are down."""
    return not any(rig.core.relay.bus.up for rig in rigs)
