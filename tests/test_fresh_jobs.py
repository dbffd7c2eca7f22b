"""A job whose invoice is paid while a worker waits starts with the credit, and overtakes nobody."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.door_tools import JOB
from tests.router_rig import PATIENCE_S, Rig


async def buy(router: Rig) -> str:
    """Buy a job by its invoice; its id, once it is queued."""
    due = (await router.http.post("/jobs", json=JOB)).json()
    await router.pay(due["invoice"])
    return await queued(router, due["quote"]["quote_id"])


async def queued(router: Rig, quote_id: str) -> str:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            (job,) = await router.query("select id, state from jobs where quote_id = $1", quote_id)
            if job["state"] != "awaiting_payment":
                return job["id"]
            await asyncio.sleep(0.02)


async def submit(router: Rig, key: dict[str, str], **changes: Any) -> str:
    """Buy a job from a balance that waits, although there may be a worker for it."""
    before, router.core.dispatcher.paused = router.core.dispatcher.paused, True
    made = await router.http.post("/jobs", json=JOB | changes, headers=key)
    router.core.dispatcher.paused = before
    assert made.status_code == 202, made.text
    return made.json()["jobs"][0]["id"]


@pytest.fixture
def no_looks(router: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    async def look() -> bool:
        return False

    monkeypatch.setattr(router.core.dispatcher, "dispatch_once", look)


@pytest.mark.usefixtures("no_looks")
async def test_an_idle_worker_gets_it_without_a_look(router: Rig):
    async with router.worker() as worker:
        bought = await buy(router)
        job = await worker.serve("Hi.")
        assert job["job_id"] == bought
    assert (await router.books()).in_order


@pytest.mark.usefixtures("no_looks")
@pytest.mark.parametrize("waits", [{"fee_multiplier": "2.0"}, {}], ids=["dearer", "earlier"])
async def test_it_goes_after_what_waits_for_that_worker(router: Rig, waits: dict[str, Any]):
    key = await router.bearer()
    async with router.worker() as worker:
        first = await submit(router, key, prompt="Something else.", **waits)
        bought = await buy(router)
        await worker.nothing()
        (row,) = await router.query("select state, attempt from jobs where id = $1", bought)
        assert (row["state"], row["attempt"]) == ("queued", 0)
        assert not await router.query("select 1 from attempts where job_id = $1", bought)
        assert len(await router.query("select from queue where job_id = $1", bought)) == 1
        # Its seat was given up: the worker has all its room.
        assert not router.core.gate.sessions[worker.id].worker.busy
        assert first != bought


@pytest.mark.usefixtures("no_looks")
async def test_it_goes_before_what_is_cheaper(router: Rig):
    key = await router.bearer()
    async with router.worker(slots=2) as worker:
        await submit(router, key)
        due = (await router.http.post("/jobs", json=JOB | {"fee_multiplier": "1.5"})).json()
        await router.pay(due["invoice"])
        job = await worker.job()
        assert job["job_id"] == await queued(router, due["quote"]["quote_id"])
        await worker.nothing()


async def test_with_a_look_all_are_served_in_order(router: Rig):
    key = await router.bearer()
    router.core.dispatcher.paused = True
    async with router.worker() as worker:
        dear = await submit(router, key, fee_multiplier="3.0")
        early = await submit(router, key)
        bought = await buy(router)
        router.core.dispatcher.paused = False
        router.core.dispatcher.wake()
        served = [(await worker.serve("Hi."))["job_id"] for _ in range(3)]
    assert served == [dear, early, bought]
    assert (await router.books()).in_order
