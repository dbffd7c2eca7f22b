"""Raising the offer of a waiting job, cancelling in each state, and clients that go away."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from tests.door_tools import (
    CHAT,
    RATES,
    balance_msat,
    code,
    event_stream,
    post_job,
    set_rates,
    until_state,
)
from tests.router_rig import Rig, ScriptedWorker

FUNDS = 100_000
BASE = 1064  # of door_tools.CHAT at door_tools.RATES


def token(links: dict[str, Any]) -> dict[str, str]:
    return {"Authorization": f"Bearer {links['token']}"}


async def bump(
    router: Rig, links: dict[str, Any], headers: dict[str, str] | None = None, **body: Any
) -> httpx.Response:
    path = f"{links['status_url']}/bump"
    return await router.http.post(path, json=body, headers=headers or token(links))


async def busy_worker(router: Rig, worker: ScriptedWorker) -> dict[str, Any]:
    """Let a worker be busy with a job of somebody else; the job."""
    await post_job(router, await router.bearer(FUNDS))
    return await worker.job()


# --- bump -----------------------------------------------------------------------------------------


async def test_a_bumped_job_overtakes_and_keeps_its_time(router: Rig):
    await set_rates(router, RATES)
    payer = await router.bearer(FUNDS)
    async with router.worker() as worker:
        busy = await busy_worker(router, worker)
        first = await post_job(router, payer)
        second = await post_job(router, payer, fee_multiplier="1.5")
        view = (await bump(router, first, offer_msat=1596)).json()
        # Equal now: the one that was queued first is served first.
        assert (view["multiplier"], view["position"], view["held_msat"]) == ("1.500", 1, 1596)
        raised = (await bump(router, second, fee_multiplier="2")).json()
        assert (raised["multiplier"], raised["position"]) == ("2.000", 1)
        same = await bump(router, second, offer_msat=raised["held_msat"])
        assert same.status_code == 200
        await worker.finish(busy, tokens=0)
        for links in (second, first):
            job = await worker.job()
            assert job["job_id"] == links["id"]
            await worker.finish(job, tokens=0)
        row = await until_state(router, first["id"], "succeeded")
        assert row["charged_msat"] == 1500  # the prompt fee at the new multiplier
    assert await balance_msat(router, payer) == FUNDS - 1500 - 2000
    assert (await router.books()).in_order


async def test_a_bump_that_makes_no_sense_is_refused(router: Rig):
    await set_rates(router, RATES)
    payer = await router.bearer(FUNDS * 100)
    async with router.worker() as worker:
        await busy_worker(router, worker)
        links = await post_job(router, payer, fee_multiplier="1.5")
        wrong: list[dict[str, Any]] = [
            {},
            {"offer_msat": 1595},
            {"offer_msat": -1},
            {"offer_msat": 0},
            {"offer_msat": True},
            {"offer_msat": "2000"},
            {"offer_msat": 2000.5},
            {"offer_msat": 2000, "fee_multiplier": 2},
            {"offer_msat": BASE * 1000 + 1},
            {"offer_msat": 10**30},
            {"fee_multiplier": 1.4},
            {"fee_multiplier": 0.1},
            {"fee_multiplier": "NaN"},
            {"fee_multiplier": 1001},
            {"fee_multiplier": "1e2"},
        ]
        for body in wrong:
            assert code(await bump(router, links, **body)) == (400, "bad_request"), body
        (row,) = await router.query("select held_msat from jobs where id = $1", links["id"])
        assert row["held_msat"] == 1596


async def test_a_bump_without_balance_is_a_402_for_the_difference(router: Rig):
    await set_rates(router, RATES)
    payer = await router.bearer(2000)
    async with router.worker() as worker:
        await busy_worker(router, worker)
        links = await post_job(router, payer)
        refused = await bump(router, links, offer_msat=5064)
        assert code(refused) == (402, "payment_required")
        due = refused.json()
        assert due["offer_msat"] == 5064
        # 4000 more, of which 936 are on the account: 3064, in whole satoshis.
        assert due["amount_msat"] == 4000 and due["simulated"] is True
        assert refused.headers["www-authenticate"].startswith("L402 ")
        await router.pay(due["invoice"])
        async with asyncio.timeout(10):
            while (await router.http.get(links["status_url"], headers=payer)).json()[
                "held_msat"
            ] != 5064:
                await asyncio.sleep(0.02)
        view = (await router.http.get(links["status_url"], headers=payer)).json()
        assert view["multiplier"] == "4.759"
        assert await balance_msat(router, payer) == 936 + 4000 - 4000
    assert (await router.books()).in_order


async def test_a_bump_that_is_paid_too_late_is_credited(router: Rig):
    await set_rates(router, RATES)
    payer = await router.bearer(2000)
    async with router.worker() as worker:
        busy = await busy_worker(router, worker)
        links = await post_job(router, payer)
        due = (await bump(router, links, offer_msat=5064)).json()
        await worker.finish(busy, tokens=0)
        job = await worker.job()
        assert code(await bump(router, links, offer_msat=1100)) == (409, "job_not_waiting")
        await router.pay(due["invoice"])
        async with asyncio.timeout(10):
            while await balance_msat(router, payer) != 936 + 4000:
                await asyncio.sleep(0.02)
        await worker.finish(job, tokens=0)
        row = await until_state(router, links["id"], "succeeded")
        assert (row["held_msat"], row["charged_msat"]) == (BASE, 1000)
    assert await balance_msat(router, payer) == 2000 + 4000 - 1000
    assert (await router.books()).in_order


async def test_a_bump_counts_against_the_limit_of_the_key_that_bought_the_job(router: Rig):
    await set_rates(router, RATES)
    owner = await router.bearer(FUNDS)
    made = await router.http.post("/balance/keys", json={"limit_msat": 3000}, headers=owner)
    limited = {"Authorization": f"Bearer {made.json()['key']}"}
    async with router.worker() as worker:
        busy = await busy_worker(router, worker)
        links = await post_job(router, limited)
        over = await bump(router, links, limited, offer_msat=3001)
        # The account could pay it, the key may not: only fresh money raises the job further.
        assert code(over) == (402, "payment_required")
        assert over.json()["amount_msat"] == 2000 and over.json()["offer_msat"] == 3001
        assert (await bump(router, links, limited, offer_msat=3000)).status_code == 200
        refused = await router.http.post("/jobs", json={"kind": "chat", **CHAT}, headers=limited)
        assert code(refused) == (402, "insufficient_balance")
        await worker.finish(busy, tokens=0)
        await worker.finish(await worker.job(), tokens=0)
        await until_state(router, links["id"], "succeeded")
        keys = (await router.http.get("/balance/keys", headers=owner)).json()["keys"]
        assert [key["spent_msat"] for key in keys if key["limit_msat"]] == [2819]


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
        await asyncio.sleep(0.1)
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
        await asyncio.sleep(0.1)
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
