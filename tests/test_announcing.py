"""Which routers hear of a job that waits, and that none waits for not being told of."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from router import announcing, dispatcher
from router.announcing import Announcer
from router.bus import InProcessBus
from router.job_records import NewJob
from router.workers import FarWorkers, Fleet, Worker
from tests.nats_tools import nats_if_any
from tests.pair_rig import running_pair, worker_at
from tests.reading import CHAT, until
from tests.router_rig import Rig
from worker.protocol import ModelKind, ServedModel

JOB = NewJob("", 0, "chat", "m", "{}", "{}", 5, 5, 1, 1, 1000, lane="")


class Heard(InProcessBus):
    """A bus that keeps what is sent; `all` counts what everybody was told."""

    def __init__(self) -> None:
        super().__init__("us")
        self.told: Counter[str] = Counter()
        self.all = 0

    def send(self, to: str, message: list[Any]) -> None:
        assert message == ["work", []]
        self.told[to] += 1

    def tell_everybody(self) -> None:
        self.all += 1


class Here:
    """An announcer among other routers, each with workers of model `m`."""

    def __init__(self, free: dict[str, int], *, own_slots: int = 0) -> None:
        self.bus, self.fleet = Heard(), Fleet()
        self.announcer = Announcer(self.bus, self.fleet, self.bus.tell_everybody)
        models = [ServedModel(id="m", kind=ModelKind.TEXT, context_length=2048)]
        for router_id, slots in free.items():
            far = FarWorkers(
                router_id, None, models, 4, True, None, {}, router_id=router_id, free=slots
            )
            self.fleet.set_elsewhere(router_id, [far])
        if own_slots:
            self.fleet.add(Worker("own", None, models, own_slots, True, None, {}))
        (far, *_) = self.fleet.elsewhere()
        self._lane = min(far.lanes)
        self._made = 0

    def queue(self, jobs: int, lane: str | None = None) -> list[str]:
        new = [
            dataclasses.replace(JOB, id=str(self._made + n), lane=lane or self._lane)
            for n in range(jobs)
        ]
        self._made += jobs
        self.announcer.queued(new)
        return [job.id for job in new]

    async def told(self) -> Counter[str]:
        """Who was told since the last time."""
        await asyncio.sleep(3 * announcing.EVERY_S)
        told, self.bus.told = self.bus.told, Counter()
        return told


HUNDRED = {f"r{n}": 1 for n in range(100)}


@pytest.fixture
def claimed_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing counts as unclaimed, however long this process is kept from running."""
    monkeypatch.setattr(announcing, "UNCLAIMED_S", 60.0)


async def test_a_job_is_told_to_a_few_that_have_room_in_turn(claimed_late: None):
    here = Here(HUNDRED | {f"full{n}": 0 for n in range(50)})
    everybody: Counter[str] = Counter()
    for _ in range(20):
        for job_id in here.queue(1):
            told = await here.told()
            assert len(told) == 1 + announcing.SPARE
            everybody += told
            here.announcer.claimed(job_id)
    assert not any(router_id.startswith("full") for router_id in everybody)
    assert len(everybody) >= 20 and here.bus.all == 0


async def test_many_jobs_are_told_to_as_many_as_have_room_for_them():
    here = Here(HUNDRED)
    here.queue(40)
    assert len(await here.told()) == 40 + announcing.SPARE
    large = Here(dict.fromkeys(HUNDRED, 500))
    large.queue(40)
    assert len(await large.told()) == 1


async def test_a_router_with_an_idle_worker_of_its_own_says_nothing():
    here = Here(HUNDRED, own_slots=2)
    here.queue(2)
    assert not await here.told()
    here.queue(5)
    assert len(await here.told()) == 3 + announcing.SPARE


async def test_with_few_others_all_are_told_whatever_they_have_said(claimed_late: None):
    here = Here({"full": 0, "other": 0})
    here.queue(1)
    await here.told()
    assert here.bus.all == 1


async def test_what_nobody_claims_is_told_to_all_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(announcing, "UNCLAIMED_S", 0.05)
    here = Here(HUNDRED)
    first, second = here.queue(2)
    here.announcer.claimed(first)
    await asyncio.sleep(0.2)
    assert here.bus.all == 1
    here.announcer.claimed(second)
    (third,) = here.queue(1)
    here.announcer.claimed(third)
    await asyncio.sleep(0.2)
    assert here.bus.all == 1


async def test_while_all_are_busy_nobody_is_told(monkeypatch: pytest.MonkeyPatch):
    """Whoever is done looks by itself."""
    monkeypatch.setattr(announcing, "UNCLAIMED_S", 0.05)
    here = Here(dict.fromkeys(HUNDRED, 0))
    here.queue(10)
    assert not await here.told()
    here.queue(10, lane="another/lane")
    assert not await here.told()
    await asyncio.sleep(0.2)
    assert here.bus.all == 0


async def test_workers_that_poll_are_no_room_to_be_told_of():
    here = Here(HUNDRED)
    for group in here.fleet.elsewhere():
        group.pulls = group.router_id != "r7"
    here.queue(1)
    assert list(await here.told()) == ["r7"]


# --- with routers --------------------------------------------------------------------------------


@pytest.fixture
async def pair(
    tmp_path: Path, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Rig, Rig]]:
    """Routers A and B that choose whom they tell, as among a hundred; and that never look unasked."""
    monkeypatch.setattr(announcing, "FEW", 0)
    async with (
        nats_if_any(tmp_path) as line,
        running_pair(tmp_path, database_url, lines=(line, line)) as rigs,
    ):
        monkeypatch.setattr(dispatcher, "POLL_S", 600.0)
        for rig in rigs:
            rig.core.dispatcher.wake()
        yield rigs


async def post_job(rig: Rig, key: dict[str, str], **changes: Any) -> str:
    reply = await rig.http.post("/jobs", json=CHAT | {"kind": "chat"} | changes, headers=key)
    assert reply.status_code == 202, reply.text
    return reply.json()["jobs"][0]["id"]


async def test_a_job_reaches_an_idle_worker_elsewhere_though_the_word_is_lost(
    pair, monkeypatch: pytest.MonkeyPatch
):
    a, b = pair
    key = await a.bearer()
    async with worker_at(b, known_at=a) as worker:
        await post_job(a, key)
        job = await worker.job()
        await worker.finish(job, tokens=1)

        async def has_room() -> bool:
            return any(group.free for group in a.core.fleet.elsewhere())

        await until(has_room)
        # B looks once more, since its worker is free again: not when the next job is there already.
        await worker.nothing()
        send, lost = a.core.relay.bus.send, []

        def lose_one(to: str, message: list[Any]) -> None:
            if message[0] == "work" and not lost:
                lost.append(message)
            else:
                send(to, message)

        monkeypatch.setattr(a.core.relay.bus, "send", lose_one)
        second = await post_job(a, key)
        job = await worker.job()
        assert job["job_id"] == second and lost


async def test_the_dearer_job_wins_whoever_was_told_of_which(pair):
    """With a worker at each router, each takes what is dearest, wherever it was bought."""
    a, b = pair
    key = await a.bearer()
    async with worker_at(b, known_at=a) as at_b:
        await post_job(a, key)
        first = await at_b.job()
        cheap = await post_job(b, key, fee_multiplier=1.5)
        dear = await post_job(a, key, fee_multiplier=2.0)
        dearest = await post_job(b, key, fee_multiplier=3.0)
        await at_b.finish(first, tokens=1)
        for job_id in (dearest, dear):
            job = await at_b.job()
            assert job["job_id"] == job_id
            await at_b.finish(job, tokens=1)
        job = await at_b.job()
        assert job["job_id"] == cheap
        # A worker that comes to A takes what waits there or anywhere, the dearest first.
        low = await post_job(b, key)
        high = await post_job(b, key, fee_multiplier=1.2)
        async with worker_at(a, known_at=b) as at_a:
            for job_id in (high, low):
                found = await at_a.job()
                assert found["job_id"] == job_id
                await at_a.finish(found, tokens=1)
            await at_b.finish(job, tokens=1)
    assert (await a.books()).in_order
