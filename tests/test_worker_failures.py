"""Jobs whose workers fail, stall or leave: who is blamed, who tries again, what is refunded."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from billing.settlement import divide
from tests.door_tools import (
    CHAT,
    RATES,
    balance_msat,
    code,
    event_stream,
    post_job,
    said,
    set_rates,
    until_state,
)
from tests.router_rig import Rig, ScriptedWorker, running_rig

FUNDS = 100_000


async def attempts(router: Rig) -> list[tuple[str, str | None]]:
    rows = await router.query("select outcome, blame from attempts order by n")
    return [(row["outcome"], row["blame"]) for row in rows]


@pytest.mark.parametrize("failure", ["prompt_too_long", "bad_request"])
async def test_a_fault_of_the_job_ends_it_without_a_second_try_or_blame(router: Rig, failure: str):
    payer = await router.bearer(FUNDS)
    async with router.worker() as worker, router.worker() as other:
        asked = asyncio.create_task(
            router.http.post("/v1/chat/completions", json=CHAT, headers=payer)
        )
        (done,), waiting = await _first_job(worker, other)
        owner, job = done
        await owner.fail(job, failure)
        reply = await asked
        assert code(reply) == (400, failure)
        assert reply.headers["x-satherd-fee-msat"] == "0"
        for task in waiting:
            task.cancel()
        assert await attempts(router) == [(failure, "job")]
        blamed = router.core.fleet.get(owner.id)
        assert blamed is not None and blamed.failed == 0 and blamed.reliability == 1.0
    assert await balance_msat(router, payer) == FUNDS


async def _first_job(*workers: ScriptedWorker) -> tuple[list[Any], set[asyncio.Task]]:
    async def take(worker: ScriptedWorker) -> tuple[ScriptedWorker, dict[str, Any]]:
        return worker, await worker.job()

    tasks = {asyncio.create_task(take(worker)) for worker in workers}
    done, waiting = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    return [task.result() for task in done], waiting


@pytest.mark.parametrize(
    "failure, blame",
    [
        ("engine_error", "worker"),
        ("model_not_served", "worker"),
        ("overloaded", "worker"),
        ("returned", "nobody"),
    ],
)
async def test_a_fault_of_a_worker_sends_the_job_to_another_one(
    router: Rig, failure: str, blame: str
):
    """E3-38: a worker is blamed for its own faults only."""
    payer = await router.bearer(FUNDS)
    async with router.worker() as first:
        links = await post_job(router, payer)
        job = await first.job()
        async with router.worker() as second:
            await first.fail(job, failure)
            again = await second.job()
            assert (again["job_id"], again["attempt"]) == (links["id"], 2)
            # The lost worker is last in line for it, though it is idle again.
            await first.nothing()
            await second.say(again, "Hi.")
            await second.finish(again, tokens=1)
            await until_state(router, links["id"], "succeeded")
            assert await attempts(router) == [(failure, blame), ("succeeded", None)]
            was = router.core.fleet.get(first.id)
            assert was is not None and was.failed == (1 if blame == "worker" else 0)
    assert (await router.books()).in_order


async def test_a_job_is_tried_three_times_at_most_and_then_refunded(router: Rig):
    """E2-21, E3-34."""
    payer = await router.bearer(FUNDS)
    async with router.worker() as worker:
        asked = asyncio.create_task(
            router.http.post("/v1/chat/completions", json=CHAT, headers=payer)
        )
        for attempt in (1, 2, 3):
            job = await worker.job()
            assert job["attempt"] == attempt
            await worker.fail(job, "engine_error")
            # E6-6: said again, it changes nothing.
            await worker.fail(job, "engine_error")
        reply = await asked
        assert code(reply) == (502, "job_failed")
        error = reply.json()["error"]
        assert error["end_reason"] == "attempts_exhausted"
        assert error["charged_msat"] == 0 and error["refunded_msat"] > 0
        assert worker.id not in reply.text and "as the test wants it" not in reply.text
        await worker.nothing()
    assert await balance_msat(router, payer) == FUNDS
    assert (await router.books()).in_order


async def test_a_failure_that_is_not_worth_a_second_try_is_refunded_at_once(router: Rig):
    payer = await router.bearer(FUNDS)
    async with router.worker() as worker:
        links = await post_job(router, payer)
        await worker.fail(await worker.job(), "engine_error", retryable=False)
        row = await until_state(router, links["id"], "failed")
        assert row["end_reason"] == "worker_failed" and row["charged_msat"] == 0
        await worker.nothing()
    assert await balance_msat(router, payer) == FUNDS


async def test_output_that_was_shown_is_charged_without_the_prompt_fee_and_not_begun_again(
    router: Rig,
):
    """A job that has shown output is not silently restarted (architecture.md, Decisions)."""
    await set_rates(router, RATES)
    payer = await router.bearer(FUNDS)
    async with router.worker() as worker:
        links = await post_job(router, payer)
        job = await worker.job()
        token = {"Authorization": f"Bearer {links['token']}"}
        async with event_stream(router, links["events_url"], token) as stream:
            await worker.say(job, "Half of it", tokens=4)
            assert said(await stream.until("chunk")) == "Half of it"
            await worker.fail(job, "engine_error")
            view = (await stream.until("done"))[-1].data["job"]
        assert view["state"] == "failed" and view["end_reason"] == "worker_lost"
        assert view["charged_msat"] == 4 and view["refunded_msat"] == 1064 - 4
        assert view["result"]["choices"][0]["message"]["content"] == "Half of it"
        await worker.nothing()
        owed = await router.query(
            "select balance_msat from ledger_balances where account = $1",
            f"liabilities:worker:{worker.id}",
        )
        parts = divide(escrow_msat=1064, charge_msat=4, commission_ppm=50_000, payable=True)
        assert owed[0]["balance_msat"] == parts.worker_msat
    assert await balance_msat(router, payer) == FUNDS - 4
    assert (await router.books()).in_order


async def test_output_that_nobody_read_is_thrown_away_and_begun_again(router: Rig):
    payer = await router.bearer(FUNDS)
    async with router.worker() as worker:
        links = await post_job(router, payer)
        job = await worker.job()
        await worker.say(job, "Half of it", tokens=4)
        await worker.fail(job, "engine_error")
        again = await worker.job()
        await worker.say(again, "All of it", tokens=4)
        await worker.finish(again, tokens=4)
        row = await until_state(router, links["id"], "succeeded")
        assert "Half" not in row["result"] and "All of it" in row["result"]


async def test_a_worker_that_falls_silent_loses_the_job_and_is_told_to_stop(
    tmp_path: Path, database_url: str
):
    """E2-21: never answered, never refunded."""
    settings = {"first_token_timeout_s": 0.2, "stall_timeout_s": 0.2}
    async with running_rig(tmp_path, database_url, **settings) as rig:
        payer = await rig.bearer(FUNDS)
        async with rig.worker(slots=2) as worker:
            links = await post_job(rig, payer)
            job = await worker.job()
            cancel = await worker.receive()
            assert (cancel["type"], cancel["job_id"], cancel["attempt"]) == (
                "cancel",
                job["job_id"],
                1,
            )
            # It holds the lost attempt still, so it does not get the second one beside it.
            await worker.nothing()
            await worker.finish(job, "cancelled")
            again = await worker.job()
            assert again["attempt"] == 2
            session = rig.core.gate.sessions[worker.id]
            # Frames that say nothing do not keep a job alive for ever.
            for seq in range(4):
                await worker.say(again, "", seq=seq, tokens=0)
            await worker.receive()
            assert session.closed is False
            rows = await rig.query("select outcome, blame from attempts order by n")
            assert tuple(rows[0]) == ("stalled", "worker")
        await until_state(rig, links["id"], "queued", "failed")


async def test_a_job_that_waits_longer_than_its_client_is_refunded(router: Rig):
    payer = await router.bearer(FUNDS)
    async with router.worker() as worker:
        await post_job(router, payer)
        held = await worker.job()
        waits = {"X-Max-Wait-S": "1"}
        reply = await router.http.post("/v1/chat/completions", json=CHAT, headers=payer | waits)
        assert code(reply) == (503, "max_wait")
        assert reply.json()["error"]["charged_msat"] == 0
        assert int(reply.headers["retry-after"]) > 0
        await worker.say(held, "x")
        await worker.finish(held, tokens=1)
        await worker.nothing()
        states = {row["state"] for row in await router.query("select state from jobs")}
        assert "expired" in states
    assert (await router.books()).in_order


async def test_a_cancel_reaches_the_worker_and_its_slot_is_free_when_it_has_stopped(router: Rig):
    payer = await router.bearer(FUNDS)
    async with router.worker() as worker:
        links = await post_job(router, payer)
        job = await worker.job()
        await worker.say(job, "One two", tokens=2)
        token = {"Authorization": f"Bearer {links['token']}"}
        ended = await router.http.delete(links["status_url"], headers=token)
        assert ended.json()["state"] == "cancelled"
        cancel = await worker.receive()
        assert (cancel["type"], cancel["job_id"]) == ("cancel", job["job_id"])
        following = await post_job(router, payer)
        await worker.nothing()
        # What it still says of the job it was told to stop is not delivered, and not charged.
        await worker.say(job, " three", seq=1, tokens=50)
        await worker.finish(job, "cancelled", tokens=52)
        assert (await worker.job())["job_id"] == following["id"]
    row = (await router.query("select * from jobs where id = $1", links["id"]))[0]
    assert "three" not in row["result"] and '"completion_tokens":2' in row["result"]


async def test_a_worker_that_stops_a_job_unasked_is_blamed(router: Rig):
    payer = await router.bearer(FUNDS)
    async with router.worker() as worker:
        await post_job(router, payer)
        await worker.finish(await worker.job(), "cancelled")
        assert (await worker.job())["attempt"] == 2
    assert (await attempts(router))[0] == ("stopped", "worker")


async def test_vectors_that_are_not_one_for_each_input_are_not_delivered(router: Rig):
    payer = await router.bearer(FUNDS)
    vectors = [{"id": "e", "kind": "embedding", "context_length": 512}]
    wrong: list[Any] = [None, [[1.0]], [[1.0], []], [[], []], [[1.0], [1.0, 2.0]]]
    async with router.worker(models=vectors) as worker:
        links = await post_job(router, payer, kind="embedding", model="e", input=["a", "b"])
        for data in wrong[:3]:
            await worker.finish(await worker.job(), data=data)
        await until_state(router, links["id"], "failed")
        links = await post_job(router, payer, kind="embedding", model="e", input=["a", "b"])
        for data in wrong[3:]:
            await worker.finish(await worker.job(), data=data)
        await worker.finish(await worker.job(), data=[[1.0, 2.0], [3.0, 4.0]])
        await until_state(router, links["id"], "succeeded")
    outcomes = [outcome for outcome, _ in await attempts(router)]
    assert outcomes.count("bad_answer") == 5 and outcomes.count("succeeded") == 1
