"""A router that is stopped while another is there: its workers go there, and no client is refused."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import httpx
import pytest
from websockets.exceptions import ConnectionClosed

from router.app import drain
from router.bus import Exchange
from tests.pair_rig import SECRET, running_pair, worker_at
from tests.reading import CHAT, PATIENCE_S, Reader, until
from tests.router_rig import Rig, ScriptedWorker, running_network, running_router

JOB = CHAT | {"kind": "chat"}


async def until_let_go(worker: ScriptedWorker) -> None:
    """Read what comes until the router hangs up."""
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(ConnectionClosed):
            while True:
                await worker.socket.recv()


async def queue_one(rig: Rig, key: dict[str, str]) -> None:
    made = await rig.http.post("/jobs", json=JOB, headers=key)
    assert made.status_code == 202, made.text


async def test_an_idle_worker_goes_to_the_other_router_and_nobody_is_refused_meanwhile(
    tmp_path: Path, database_url: str
):
    async with running_pair(tmp_path, database_url, lines=(None, None), drain_s=20) as (a, b):
        key = await b.bearer()
        async with (
            worker_at(a, known_at=b, slots=2) as worker,
            a.worker(slots=1) as other,
        ):
            # One that is busy keeps its router from its end.
            await queue_one(a, key)
            await queue_one(a, key)
            await queue_one(a, key)
            jobs = [await worker.job(), await worker.job(), await other.job()]
            stopping = asyncio.create_task(drain(a.core))
            for job in jobs[:2]:
                await worker.finish(job, tokens=1)
                await queue_one(b, key)
            await until_let_go(worker)
            assert not stopping.done()
            # On its way: it is counted on.
            await queue_one(b, key)
            async with b.worker(key=worker.key, slots=3) as again:
                for _ in range(3):
                    await again.finish(await again.job(), tokens=1)
            await other.finish(jobs[2], tokens=1)
            await asyncio.wait_for(stopping, PATIENCE_S)


async def test_what_runs_longer_than_a_router_may_take_to_stop_goes_on_at_the_other(
    tmp_path: Path, database_url: str
):
    """As it does when a router is killed: its reader sees no seam."""
    async with running_pair(tmp_path, database_url, lines=(None, None), drain_s=0.3) as (a, b):
        key = await b.bearer()
        async with worker_at(a, known_at=b) as worker:
            reader = Reader(b.http, key)
            job = await worker.job()
            await worker.say(job, "One ")
            await reader.until_shown("One ")
            stopping = asyncio.create_task(drain(a.core))
            await until_let_go(worker)
            held = {"job_id": job["job_id"], "attempt": job["attempt"]}
            async with b.worker(key=worker.key, holding=[held]) as again:
                assert again.registered["resume"] == [held]
                await again.say(job, "One two ")
                await reader.until_shown("One two ")
                await asyncio.wait_for(stopping, PATIENCE_S)
                await again.say(job, "three.", seq=1)
                await again.finish(job, tokens=3)
                await asyncio.wait_for(reader.task, PATIENCE_S)
        assert reader.done and reader.text == "One two three." and not reader.errors
        states = await b.query("select state, attempt from jobs")
        assert [tuple(row) for row in states] == [("succeeded", 1)]


async def test_what_a_worker_does_not_take_along_is_given_back_at_once(
    tmp_path: Path, database_url: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("router.worker_gate.COME_S", 0.3)
    async with running_pair(tmp_path, database_url, lines=(None, None), drain_s=0.3) as (a, b):
        key = await b.bearer()
        async with worker_at(a, known_at=b) as worker:
            await queue_one(b, key)
            job = await worker.job()
            stopping = asyncio.create_task(drain(a.core))
            await until_let_go(worker)
            await asyncio.wait_for(stopping, PATIENCE_S)

        async def waits() -> bool:
            return [tuple(row) for row in await b.query("select state from jobs")] == [("queued",)]

        await until(waits)
        async with b.worker() as other:
            assert (await other.job())["job_id"] == job["job_id"]


async def test_a_router_that_stops_takes_no_new_connections_and_ends_its_streams(
    tmp_path: Path, database_url: str
):
    """A load balancer then goes to another, in place of handing on what this one would refuse."""
    exchange = Exchange()
    async with (
        AsyncExitStack() as stack,
        running_network(tmp_path) as (network, url),
        running_router(
            tmp_path / "b", database_url, network, url, exchange=exchange, secret=SECRET
        ) as b,
    ):
        start_of_a = running_router(
            tmp_path / "a",
            database_url,
            network,
            url,
            exchange=exchange,
            secret=SECRET,
            drain_s=60,
        )
        a = await stack.enter_async_context(start_of_a)
        key = await a.bearer()
        async with (
            worker_at(a, known_at=b) as worker,
            httpx.AsyncClient(base_url=a.url, timeout=PATIENCE_S, trust_env=False) as kept,
            httpx.AsyncClient(trust_env=False) as new,
        ):
            reader = Reader(kept, key)
            job = await worker.job()
            await worker.say(job, "Half of it")
            await reader.until_shown("Half of it")
            stopping = asyncio.create_task(stack.aclose())

            async def is_refused() -> bool:
                try:
                    await new.get(f"{a.url}/info", headers={"Connection": "close"})
                except httpx.ConnectError:
                    return True
                return False

            await until(is_refused, timeout_s=PATIENCE_S / 2)
            assert not stopping.done()
            await worker.say(job, " and the rest.", seq=1)
            await worker.finish(job, tokens=5)
            await asyncio.wait_for(reader.task, PATIENCE_S)
            assert reader.done and reader.text == "Half of it and the rest."
            await asyncio.wait_for(stopping, PATIENCE_S)
