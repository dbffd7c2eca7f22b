"""Who writes to many jobs at once locks them by their ids, as those do that end them: two that want the
same jobs wait for each other in one order, and PostgreSQL need end neither."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from tests.door_tools import post_job
from tests.router_rig import PATIENCE_S, Rig

JOBS = 12
Write = Callable[[Rig, list[str]], Coroutine[Any, Any, None]]


async def renewed(router: Rig, ids: list[str]) -> None:
    await router.core.maintenance.renew_leases()


async def kept(router: Rig, ids: list[str]) -> None:
    await router.core.maintenance.keep_chunks()


async def shown(router: Rig, ids: list[str]) -> None:
    hub = router.core.jobs.hub
    streams = [stream for job_id in ids if (stream := hub.get(job_id)) is not None]
    assert len(streams) == JOBS
    await router.core.far_jobs._keep_shown(streams)


@pytest.mark.parametrize("write", [renewed, kept, shown])
async def test_whoever_waits_for_the_first_of_many_jobs_holds_none_of_the_others(
    router: Rig, write: Write
):
    key = await router.bearer()
    maintenance = router.core.maintenance
    await maintenance.stop()
    async with router.worker(slots=JOBS) as worker:
        ids = [(await post_job(router, key))["id"] for _ in range(JOBS)]
        jobs = [await worker.job() for _ in ids]
        for job in jobs:
            await worker.say(job, "so far")
        running = router.core.attempts.running
        async with asyncio.timeout(PATIENCE_S):
            while not all(running[job_id].chunks for job_id in ids):
                await asyncio.sleep(0.01)
        async with router.core.database.transaction() as connection:
            await connection.execute("select from jobs where id = $1 for update", min(ids))
            writing = asyncio.create_task(write(router, ids))
            async with asyncio.timeout(PATIENCE_S):
                while not await connection.fetchval(
                    "select exists (select from pg_locks where not granted)"
                ):
                    await asyncio.sleep(0.01)
            free = await connection.fetch("select from jobs for update skip locked")
            assert len(free) == JOBS
        await writing
        for job in jobs:
            await worker.finish(job, tokens=1)
        async with asyncio.timeout(PATIENCE_S):
            while await router.query("select from jobs where state <> 'succeeded'"):
                await asyncio.sleep(0.02)
    assert (await router.books()).in_order
