"""kill -9 of one of two routers in the middle of a paid stream: the market goes on without it.

Real processes: two routers over one PostgreSQL and one NATS server, and a worker that knows both.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from router import presence
from router.database import DatabaseUnavailable
from tests.follower import Follower
from tests.market_rig import ASK, JOB, SEEN_FIRST, Market, market_of_processes
from tests.reading import PATIENCE_S, until
from tests.router_rig import Rig

# The processes are started once.
pytestmark = pytest.mark.xdist_group("pair of processes")


@pytest.fixture(scope="module")
def pair_of_processes(postgres_url: str, template: str) -> Iterator[Market]:
    with market_of_processes(postgres_url, 2, template) as market:
        yield market


@pytest.fixture
async def pair(pair_of_processes: Market) -> Market:
    await pair_of_processes.start()
    return pair_of_processes


async def test_a_client_whose_router_is_killed_resumes_at_the_other(pair: Market):
    """The worker is at B, the client at A. Not a character is lost or said twice."""
    async with pair.worker(1, 0):
        paid, link = await pair.buy(0)
        follower = Follower(link, paid)
        async with pair.client(0) as a:
            await follower.read(a, at_least=SEEN_FIRST)
        await pair.kill(0)
        assert follower.done is None
        async with pair.client(1) as b:
            await asyncio.wait_for(follower.read(b), PATIENCE_S)
            assert follower.text == follower.answer
            assert follower.attempts == {1}
            # And the OpenAI way: the same credential, the same request, the same answer.
            again = await b.post("/jobs", json=JOB, headers=paid)
            assert again.json()["jobs"][0]["id"] == link["id"]
    await pair.check_books(jobs=1)


async def test_a_stream_goes_on_when_the_router_of_its_worker_is_killed(pair: Market):
    """The client at A sees nothing of it: the worker comes to A and goes on with the job."""
    async with pair.worker(1, 0):
        paid, link = await pair.buy(0)
        follower = Follower(link, paid)
        async with pair.client(0) as a:
            reading = asyncio.create_task(follower.read(a))

            async def begun() -> bool:
                return len(follower.text) >= SEEN_FIRST

            await until(begun)
            await pair.kill(1)
            await asyncio.wait_for(reading, PATIENCE_S)
            assert follower.text == follower.answer
            assert follower.attempts == {1}
    await pair.check_books(jobs=1)


async def test_client_and_worker_of_a_killed_router_meet_again_at_the_other(pair: Market):
    async with pair.worker(1, 0):
        paid, link = await pair.buy(1)
        follower = Follower(link, paid)
        async with pair.client(1) as b:
            await follower.read(b, at_least=SEEN_FIRST)
        await pair.kill(1)
        assert follower.done is None
        async with pair.client(0) as a:
            await asyncio.wait_for(follower.read(a), PATIENCE_S)
        assert follower.text == follower.answer
        assert follower.attempts == {1}
    await pair.check_books(jobs=1)


async def test_what_hung_on_a_lost_router_is_taken_back_or_cancelled(
    router: Rig, monkeypatch: pytest.MonkeyPatch
):
    """Its running jobs without waiting for their leases; jobs of its clients' connections (§3.5)."""
    monkeypatch.setattr(presence, "LOST_S", 1.0)
    monkeypatch.setattr(presence, "STALE_S", 0.5)
    key = await router.bearer()
    ask = {"kind": "chat", "model": "test-model", "messages": ASK["messages"], "max_tokens": 20}
    async with router.worker() as worker:
        links = []
        for _ in range(3):
            made = await router.http.post("/jobs", json=ask, headers=key)
            links.append(made.json()["jobs"][0]["id"])
        await worker.job()
        await router.query(
            "insert into routers (id, seen_at) values ('dead', now() - interval '5 minutes')"
        )
        await router.query("update jobs set attached_to = 'dead' where id = $1", links[1])
        await router.query(
            "with gone as (delete from queue where job_id = $1)"
            " update jobs set state = 'running', attempt = 1, router_id = 'dead', worker_id = 'x',"
            " started_at = now(), commission_ppm = 0, lease_ends_at = now() + interval '1 hour'"
            " where id = $1",
            links[2],
        )

        async def settled() -> bool:
            rows = await router.query("select id, state, attempt, end_reason from jobs")
            found = {row["id"]: row for row in rows}
            gone = found[links[1]]
            assert found[links[0]]["state"] == "running"
            return (gone["state"], gone["end_reason"]) == ("cancelled", "client_gone") and found[
                links[2]
            ]["state"] == "queued"

        await until(settled)
    assert (await router.books()).in_order


async def test_a_router_that_has_only_clients_is_not_lost_with_the_database(
    router: Rig, monkeypatch: pytest.MonkeyPatch
):
    """Without a bus its row is its only sign of life, and nobody can write one meanwhile: its
    clients are still there, and so are the jobs that they wait for (§3.5)."""
    now_s, looks = time.monotonic(), 0
    monkeypatch.setattr(presence, "time", SimpleNamespace(monotonic=lambda: now_s))
    monkeypatch.setattr(presence, "WRITE_S", 0.02)
    here = router.core.presence

    class Away:
        def connection(self) -> Any:
            nonlocal looks
            looks += 1
            raise DatabaseUnavailable("away")

    async def looked() -> bool:
        return looks > before

    router.core.relay.on_hello("front", [[], {}])
    await here.turn()
    with monkeypatch.context() as patch:
        patch.setattr(here, "_database", Away())
        for _ in range(4):
            now_s, before = now_s + presence.LOST_S / 2, looks
            assert here.lost() == []
            await until(looked)
    await here.turn()
    assert not here.is_lost("front")

    async def lost() -> bool:
        nonlocal now_s
        now_s += presence.LOST_S + 1
        await here.turn()
        return here.is_lost("front")

    await until(lost)


async def test_leases_that_ran_out_while_the_database_was_away_cost_nobody_an_answer(router: Rig):
    """Nobody could renew one. A router that is there looks after its jobs itself; what no router
    that we know of has is taken back."""
    key = await router.bearer()
    ask = {"kind": "chat", "model": "test-model", "messages": ASK["messages"], "max_tokens": 20}
    async with router.worker(slots=1):
        router.core.dispatcher.paused = True
        for at in ("other", "never heard of"):
            made = await router.http.post("/jobs", json=ask, headers=key)
            await router.query(
                "with gone as (delete from queue where job_id = $1)"
                " update jobs set state = 'running', attempt = 1, router_id = $2, worker_id = 'x',"
                " started_at = now(), commission_ppm = 0,"
                " lease_ends_at = now() + interval '1 hour' where id = $1",
                made.json()["jobs"][0]["id"],
                at,
            )
        router.core.relay.on_hello("other", [[], {}])
        await router.query("update jobs set lease_ends_at = now() - interval '1 minute'")
        await router.core.maintenance.take_back_lost()
        rows = await router.query("select state, router_id from jobs where state = 'running'")
        assert [row["router_id"] for row in rows] == ["other"]
    assert (await router.books()).in_order
