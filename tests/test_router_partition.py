"""Two routers parted for real: one does not reach NATS any more, and nobody tells it so.

Router A is a process in a network namespace of its own, with one line for clients and one to NATS; B
is in this process. Both have PostgreSQL, whose socket file knows no network. What a line does that is
cut with a word to both ends is in tests/test_two_routers.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.asyncio.client import connect

from tests.crash_rig import router_part
from tests.nats_tools import NatsServer
from tests.net_spaces import NetSpace, net_space
from tests.ports import free_port
from tests.reading import CHAT, PATIENCE_S, Reader, until
from tests.router_rig import Rig, ScriptedWorker, running_network, running_router

SECRET = "6" * 64
# NATS finds out by its pings.
LATE_S = 30.0


class Parted:
    """A, by its URL; B; and the line between A and NATS."""

    def __init__(self, a: httpx.AsyncClient, b: Rig, space: NetSpace) -> None:
        self.a = a
        self.b = b
        self.space = space

    async def until_bus(self, word: str) -> None:
        """Until A says so of its bus: "ok" or "away"."""

        async def says() -> bool:
            ready = (await self.a.get("/health/ready")).json()
            return ready["parts"]["bus"] == word

        await until(says, timeout_s=LATE_S)

    @asynccontextmanager
    async def worker_at_a(self, model: str) -> AsyncIterator[ScriptedWorker]:
        url = str(self.a.base_url).rstrip("/").replace("http", "ws") + "/worker"
        models = [{"id": model, "kind": "text", "context_length": 2048, "max_tokens": 1024}]
        async with connect(url, max_size=None) as socket:
            worker = ScriptedWorker(socket, self.b.lnurl_host, models=models)
            await worker.register()
            yield worker


@pytest.fixture
async def parted(tmp_path: Path, database_url: str) -> AsyncIterator[Parted]:
    with net_space() as space:
        here, there = space.add_line("clients")
        bus_here, _ = space.add_line("nats")
        nats = NatsServer(tmp_path, address="0.0.0.0")
        await nats.start()
        port = free_port()
        async with (
            running_network(tmp_path, host=here) as (network, network_url),
            running_router(
                tmp_path / "b",
                database_url,
                network,
                network_url,
                secret=SECRET,
                nats_url=nats.url,
            ) as b,
            httpx.AsyncClient(
                base_url=f"http://{there}:{port}", timeout=PATIENCE_S, trust_env=False
            ) as http,
        ):
            a = router_part(
                tmp_path,
                host=there,
                port=port,
                network_url=network_url,
                database_url=database_url,
                secret=SECRET,
                nats_url=f"nats://{bus_here}:{nats.port}",
                name="a",
            )
            a.inside = space.inside
            await a.start()
            try:
                await a.until_healthy()
                pair = Parted(http, b, space)
                await pair.until_bus("ok")
                yield pair
            finally:
                await a.stop()
                await nats.kill()


async def post_job(http: httpx.AsyncClient, key: dict[str, str], **changes: Any) -> str:
    reply = await http.post("/jobs", json=CHAT | {"kind": "chat"} | changes, headers=key)
    assert reply.status_code == 202, reply.text
    return reply.json()["jobs"][0]["id"]


async def the_dearer_goes_first(parted: Parted, key: dict[str, str], at_b: ScriptedWorker) -> None:
    """Of two jobs that wait for B's worker, the one of A at 2.0 and the one of B at 1.5."""
    await post_job(parted.b.http, key)
    first = await at_b.job()
    cheap = await post_job(parted.b.http, key, fee_multiplier=1.5)
    dear = await post_job(parted.a, key, fee_multiplier=2.0)
    await at_b.finish(first, tokens=1)
    for job_id in (dear, cheap):
        job = await at_b.job()
        assert job["job_id"] == job_id
        await at_b.finish(job, tokens=1)


async def test_parted_routers_are_one_market_and_are_whole_again_when_it_is_mended(
    parted: Parted,
):
    a, b, space = parted.a, parted.b, parted.space
    key = await b.bearer()
    async with parted.worker_at_a("model-a") as at_a, b.worker() as at_b:

        async def known() -> bool:
            replies = [(await http.get("/info")).json()["models"] for http in (a, b.http)]
            return all(sum(m["workers"] for m in models) == 2 for models in replies)

        await until(known)
        reader = Reader(a, key)
        job = await at_b.job()
        await at_b.say(job, "before, ")
        await reader.until_shown("before, ")

        space.cut("nats")
        await at_b.say(job, "parted, ", seq=1)
        await reader.until_shown("before, parted, ")
        await parted.until_bus("away")
        assert b.core.relay.bus.up
        await at_b.finish(job, tokens=4)
        await asyncio.wait_for(reader.task, PATIENCE_S)
        assert reader.done and reader.text == "before, parted, " and not reader.errors
        # Each is asked for at the router that does not have its worker.
        elsewhere = Reader(b.http, key, model="model-a")
        await at_a.serve("from A")
        await asyncio.wait_for(elsewhere.task, PATIENCE_S)
        assert elsewhere.done and elsewhere.text == "from A"
        await the_dearer_goes_first(parted, key, at_b)

        reader = Reader(a, key)
        job = await at_b.job()
        await at_b.say(job, "still parted, ")
        await reader.until_shown("still parted, ")
        space.mend("nats")
        await parted.until_bus("ok")
        await at_b.say(job, "and whole.", seq=1)
        await reader.until_shown("still parted, and whole.")
        await at_b.finish(job, tokens=4)
        await asyncio.wait_for(reader.task, PATIENCE_S)
        assert reader.done and not reader.errors
        await the_dearer_goes_first(parted, key, at_b)

    async def ended() -> bool:
        return not await b.query("select 1 from jobs where state in ('queued', 'running')")

    await until(ended)
    states = await b.query("select state, count(*) from jobs group by 1")
    assert {row["state"]: row["count"] for row in states} == {"succeeded": 9}
    books = await b.books()
    assert books.in_order and not books.lines.get("liabilities:escrow")
