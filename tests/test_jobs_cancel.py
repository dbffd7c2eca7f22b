"""Cancelling a job in each state, and clients that go away."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from tests.door_tools import (
    CHAT,
    RATES,
    balance_msat,
    busy_worker,
    event_stream,
    post_job,
    set_rates,
    token,
    until_state,
)
from tests.router_rig import Rig

FUNDS = 100_000
BASE = 1064  # of door_tools.CHAT at door_tools.RATES


# --- cancel ---------------------------------------------------------------------------------------


async def test_a_waiting_job_is_cancelled_for_nothing(router: Rig):
    await set_rates(router, RATES)
    payer = await router.bearer(FUNDS)
    async with router.worker() as worker:
        busy = await busy_worker(router, worker)
        links = await post_job(router, payer)
        ended = (await router.http.delete(links["status_url"], headers=token(links))).json()
        assert (ended["state"], ended["charged_msat"]) == ("cancelled", 0)
        assert ended["refunded_msat"] == BASE and ended["error"]["code"] == "cancelled"
        assert await balance_msat(router, payer) == FUNDS
        await worker.finish(busy, tokens=0)
        await worker.nothing()
        again = (await router.http.delete(links["status_url"], headers=token(links))).json()
        assert again == ended


async def test_a_running_job_is_cancelled_and_settled_as_it_stands(router: Rig):
    await set_rates(router, RATES)
    payer = await router.bearer(FUNDS)
    async with router.worker() as worker:
        links = await post_job(router, payer)
        job = await worker.job()
        await worker.say(job, "So far", tokens=2)
        async with event_stream(router, links["events_url"], token(links)) as stream:
            await stream.until("chunk")
            ended = (await router.http.delete(links["status_url"], headers=payer)).json()
            assert (await stream.until("done"))[-1].data["job"]["state"] == "cancelled"
        assert (ended["state"], ended["charged_msat"]) == ("cancelled", 1002)
        assert ended["result"]["choices"][0]["message"]["content"] == "So far"
    assert await balance_msat(router, payer) == FUNDS - 1002
    assert (await router.books()).in_order


async def test_a_job_that_has_ended_stays_as_it_ended(router: Rig):
    payer = await router.bearer(FUNDS)
    async with router.worker() as worker:
        links = await post_job(router, payer)
        await worker.serve()
        await until_state(router, links["id"], "succeeded")
        before = (await router.http.get(links["status_url"], headers=payer)).json()
        after = (await router.http.delete(links["status_url"], headers=payer)).json()
        assert after == before and after["state"] == "succeeded"


async def test_parallel_cancels_and_an_end_at_once_settle_once(router: Rig):
    await set_rates(router, RATES)
    payer = await router.bearer(FUNDS)
    async with router.worker(slots=5) as worker:
        for _ in range(5):
            links = await post_job(router, payer)
            job = await worker.job()
            replies = await asyncio.gather(
                *(router.http.delete(links["status_url"], headers=payer) for _ in range(4)),
                worker.finish(job, tokens=0),
            )
            states = {reply.json()["state"] for reply in replies[:4] if reply is not None}
            assert len(states) == 1 and states <= {"cancelled", "succeeded"}
    assert await balance_msat(router, payer) == FUNDS - 5 * 1000
    assert (await router.books()).in_order


# --- clients that go away (§3.5) ------------------------------------------------------------------


async def _ask_and_go(
    router: Rig, headers: dict[str, str], *, stream: bool, when: asyncio.Event
) -> None:
    """Send a request on a connection of its own and hang up when told."""
    async with httpx.AsyncClient(base_url=router.url, trust_env=False, timeout=10) as client:
        body = CHAT | {"stream": stream}
        request = asyncio.create_task(_read(client, body, headers))
        await when.wait()
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)


async def _read(client: httpx.AsyncClient, body: dict[str, Any], headers: dict[str, str]) -> None:
    async with client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as reply:
        async for _ in reply.aiter_lines():
            pass


async def the_job(router: Rig, *states: str) -> Any:
    """The youngest job, once it is in one of these states."""
    async with asyncio.timeout(10):
        while True:
            rows = await router.query("select * from jobs order by created_at desc limit 1")
            if rows and rows[0]["state"] in states:
                return rows[0]
            await asyncio.sleep(0.02)


async def heard(router: Rig, job: dict[str, Any], text: str) -> None:
    """Wait until the router has this much of the answer."""
    stream = router.core.jobs.hub.get(job["job_id"])
    assert stream is not None
    async with asyncio.timeout(10):
        while stream.text() != text:
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_prepaid_client_that_goes_takes_its_job_along(router: Rig, stream: bool):
    await set_rates(router, RATES)
    payer = await router.bearer(FUNDS)
    async with router.worker() as worker:
        busy = await busy_worker(router, worker)
        gone = asyncio.Event()
        asked = asyncio.create_task(_ask_and_go(router, payer, stream=stream, when=gone))
        await the_job(router, "queued")
        gone.set()
        await asked
        row = await the_job(router, "cancelled")
        assert (row["end_reason"], row["charged_msat"]) == ("client_gone", 0)
        await worker.finish(busy, tokens=0)
        gone = asyncio.Event()
        asked = asyncio.create_task(_ask_and_go(router, payer, stream=stream, when=gone))
        job = await worker.job()
        await worker.say(job, "Some", tokens=1)
        await heard(router, job, "Some")
        gone.set()
        await asked
        row = await the_job(router, "cancelled")
        assert (row["end_reason"], row["charged_msat"]) == ("client_gone", 1001)
        assert (await worker.receive())["type"] == "cancel"
    assert await balance_msat(router, payer) == FUNDS - 1001


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("means", ["idempotency key", "credential"])
async def test_a_job_that_can_be_fetched_goes_on_without_its_client(
    router: Rig, stream: bool, means: str
):
    async with router.worker() as worker:
        if means == "credential":
            headers, _ = await router.buy("/v1/chat/completions", CHAT | {"stream": stream})
        else:
            headers = await router.bearer(FUNDS) | {"Idempotency-Key": "mine"}
        gone = asyncio.Event()
        asked = asyncio.create_task(_ask_and_go(router, headers, stream=stream, when=gone))
        job = await worker.job()
        await worker.say(job, "All ", seq=0)
        await heard(router, job, "All ")
        gone.set()
        await asked
        await worker.nothing()
        await worker.say(job, "of it", seq=1)
        await worker.finish(job, tokens=3)
        await the_job(router, "succeeded")
        body = CHAT | {"stream": stream}
        again = await router.http.post("/v1/chat/completions", json=body, headers=headers)
        assert again.status_code == 200 and "All of it" in again.text.replace('"}', "")
        await worker.nothing()
    assert len(await router.query("select 1 from jobs")) == 1


async def test_a_job_of_our_own_door_goes_on_without_its_client(router: Rig):
    payer = await router.bearer(FUNDS)
    async with router.worker() as worker:
        links = await post_job(router, payer)
        job = await worker.job()
        async with event_stream(router, links["events_url"], token(links)) as stream:
            await stream.next()
        await worker.nothing()
        await worker.say(job, "Still here.")
        await worker.finish(job, tokens=2)
        await until_state(router, links["id"], "succeeded")
