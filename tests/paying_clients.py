"""Clients of a real router with money to spend, and a worker that answers them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from client import AsyncClient, Patience, SimulatedWallet
from tests.router_rig import Rig, ScriptedWorker

PROMPT = "Say hello to the world, please."
PATIENCE = Patience(attempts=6, first_s=0.05, longest_s=0.5)


def paying(router: Rig, **options: Any) -> AsyncClient:
    """A client with a wallet of simulated money."""
    wallet = SimulatedWallet(router.url)
    return AsyncClient(router.url, wallet=wallet, patience=PATIENCE, **options)


async def keyed(router: Rig, amount_msat: int = 1_000_000) -> AsyncClient:
    return AsyncClient(router.url, key=await router.key(amount_msat), patience=PATIENCE)


@asynccontextmanager
async def serving(worker: ScriptedWorker, *texts: str) -> AsyncIterator[None]:
    """A worker that answers the next jobs, one text each, while the block runs."""

    async def serve() -> None:
        for text in texts:
            await worker.serve(text)

    task = asyncio.create_task(serve())
    yield
    await asyncio.wait_for(task, 10)
