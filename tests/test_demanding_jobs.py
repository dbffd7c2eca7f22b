"""A job that demands something of its worker, and waits at a router that has not met it, keeps its
place: looks for such jobs are rare there, and none may be for nothing."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.door_tools import post_job
from tests.router_rig import PATIENCE_S, Rig, ScriptedWorker

OTHER: list[dict[str, Any]] = [{"id": "other-model", "kind": "text", "context_length": 2048}]


@pytest.fixture
async def by_hand(router: Rig) -> AsyncIterator[Rig]:
    """A router that looks at its queue only when the test wants it to."""
    await router.core.dispatcher.stop()
    yield router


def forget(router: Rig) -> None:
    """As if all that waits had been queued by another router, some time ago."""
    router.core.fleet.demanded_at = -math.inf
    router.core.dispatcher._looked_at = -math.inf


async def finish(router: Rig, worker: ScriptedWorker, job: dict[str, Any]) -> None:
    """Let a worker end its job, until it is idle again."""
    await worker.finish(job, tokens=1)
    async with asyncio.timeout(PATIENCE_S):
        while not (here := router.core.fleet.get(worker.id)) or not here.free_slots:
            await asyncio.sleep(0.01)


async def test_a_look_while_nobody_is_idle_does_not_count(by_hand: Rig):
    key = await by_hand.bearer()
    async with by_hand.worker() as worker:
        await post_job(by_hand, key)
        first = await worker.job()
        await post_job(by_hand, key)
        wanted = {"worker_id": worker.id}
        dear = await post_job(by_hand, key, gpu_filter=wanted, fee_multiplier="3.0")
        forget(by_hand)
        # As whatever is queued meanwhile makes it look.
        assert not await by_hand.core.dispatcher.dispatch_once()
        await finish(by_hand, worker, first)
        await by_hand.core.dispatcher.dispatch_once()
        assert (await worker.job())["job_id"] == dear["id"]


async def test_once_seen_no_seat_is_kept_before_it_for_its_worker(by_hand: Rig):
    key = await by_hand.bearer()
    async with by_hand.worker() as worker, by_hand.worker(models=OTHER):
        await post_job(by_hand, key)
        first = await worker.job()
        wanted = {"worker_id": worker.id}
        dear = await post_job(by_hand, key, gpu_filter=wanted, fee_multiplier="3.0")
        forget(by_hand)
        # Somebody else is idle, and the job is not for him.
        await by_hand.core.dispatcher.dispatch_once()
        await finish(by_hand, worker, first)
        await post_job(by_hand, key)
        await by_hand.core.dispatcher.dispatch_once()
        assert (await worker.job())["job_id"] == dear["id"]


async def test_one_that_nobody_here_could_do_holds_up_nobody(by_hand: Rig):
    key = await by_hand.bearer() | {"X-Max-Wait-S": "60"}
    async with by_hand.worker() as worker, by_hand.worker(models=OTHER):
        await post_job(by_hand, key, gpu_filter={"slug": "nobody"}, fee_multiplier="3.0")
        forget(by_hand)
        await by_hand.core.dispatcher.dispatch_once()
        plain = await post_job(by_hand, key)
        assert (await worker.job())["job_id"] == plain["id"]
