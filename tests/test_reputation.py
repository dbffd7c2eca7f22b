"""Fair blame (peers.md D2-8, E3-38), rests (QB-R10), and what answers say about their workers."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from router import judging
from router.standing import (
    FAULTS_BEFORE_REST,
    LONGEST_REST_S,
    OVERLOADED,
    REST_S,
    Habit,
    Standing,
)
from tests.door_tools import CHAT, post_job, until_state
from tests.router_rig import MODEL, PATIENCE_S, Rig, ScriptedWorker

# --- standing -------------------------------------------------------------------------------------


def test_a_fault_that_is_taken_back_was_never_there():
    blamed, innocent = Standing(), Standing()
    for standing in (blamed, innocent):
        standing.fault("before", 1, "engine_error")
    blamed.fault("shifted", 1, "engine_error")
    assert blamed.reliability < innocent.reliability
    for _ in range(4):
        blamed.good()
        innocent.good()
    assert blamed.forgive("shifted") and not blamed.forgive("shifted")
    assert blamed.reliability == pytest.approx(innocent.reliability)
    assert not blamed.forgive("another")


def test_a_worker_rests_after_faults_in_a_row_and_any_answer_ends_it():
    """QB-R10: punished for a while, and forgiven by any success."""
    standing = Standing()
    for job in range(FAULTS_BEFORE_REST - 1):
        standing.fault(f"job{job}", 1, "stalled")
        assert standing.rests_s == 0
    # The same job again says more about the job.
    standing.fault("job0", 2, "stalled")
    assert standing.rests_s == 0
    standing.fault("another", 1, "stalled")
    assert 0 < standing.rests_s <= REST_S
    standing.fault("one more", 1, "stalled")
    assert REST_S < standing.rests_s <= 2 * REST_S
    for job in range(20):
        standing.fault(f"more{job}", 1, "stalled")
    assert standing.rests_s <= LONGEST_REST_S
    standing.good()
    assert standing.rests_s == 0 and standing.in_a_row == 0


def test_who_says_that_it_is_overloaded_is_left_alone_for_a_moment():
    """QB-R10: 30 seconds for `busy`."""
    standing = Standing()
    standing.fault("job", 1, OVERLOADED)
    assert 0 < standing.rests_s <= 30


def test_a_rest_ends_with_the_faults_that_are_taken_back():
    standing = Standing()
    for job in range(FAULTS_BEFORE_REST):
        standing.fault(f"job{job}", 1, "engine_error")
    assert standing.rests_s > 0
    standing.forgive("job1")
    assert standing.rests_s == 0


# --- judging --------------------------------------------------------------------------------------


def test_a_limit_that_was_not_there_is_noticed_and_a_short_answer_is_not():
    def judged(reason: str, tokens: int | None, **changes: int) -> Any:
        facts = {"prompt_tokens": 10, "max_tokens": 100, "context_length": 2048} | changes
        return judging.truncated(reason=reason, tokens=tokens, **facts)

    found = judged("length", 40)
    assert found is not None and found.code == "truncated" and 0 < found.weight < 1
    assert judged("length", 95) is None
    assert judged("length", None) is None
    assert judged("stop", 1) is None  # it had no more to say
    assert judged("length", 40, prompt_tokens=2000) is None  # the context was full


@pytest.mark.parametrize(
    "model, tokens, seconds, is_noted",
    [
        ("llama-3.3-70b-instruct", 1000, 0.1, True),
        ("llama-3.3-70b-instruct", 1000, 1.0, False),
        ("qwen2.5-14B", 1000, 0.1, True),
        ("tiny-0.5b", 1000, 0.1, False),
        ("tiny-0.5b", 1000, 0.001, True),
        ("a-model", 50, 0.0, False),
        ("a-model", None, 0.0, False),
    ],
)
def test_more_than_any_machine_can_is_noted(
    model: str, tokens: int | None, seconds: float, is_noted: bool
):
    """AH-35: the bound depends on the model's size."""
    found = judging.too_fast(model, tokens=tokens, seconds=seconds)
    assert (found is not None) is is_noted
    if found is not None:
        assert found.weight == 0  # a suspicion is no fault


def habit(bytes_per_token: float, tokens: int, answers: int = 20) -> Habit:
    made = Habit()
    for _ in range(answers):
        made.add(tokens=tokens, utf8_bytes=round(bytes_per_token * tokens))
    return made


def test_habits_are_held_against_those_of_others_over_many_answers():
    """api.md 1: bytes per token that stand far off their model's are looked at."""
    others = {"a": habit(4.0, 200), "b": habit(4.4, 180), "c": habit(3.8, 220)}

    def codes(own: Habit) -> list[str]:
        return [note.code for note in judging.habits("m", "own", others | {"own": own})]

    assert codes(habit(4.1, 150)) == []
    assert codes(habit(1.0, 150)) == ["odd_bytes"]
    assert codes(habit(12.0, 150)) == ["odd_bytes"]
    assert codes(habit(4.0, 5)) == ["short"]
    assert codes(habit(1.0, 150, answers=5)) == []  # too few to say
    few = {"a": others["a"], "own": habit(1.0, 150)}
    assert judging.habits("m", "own", few) == []


# --- blame ----------------------------------------------------------------------------------------


def standing(router: Rig, worker: ScriptedWorker) -> Standing:
    return router.core.attempts.reputation.standing(worker.id)


async def blames(router: Rig) -> list[str | None]:
    return [row["blame"] for row in await router.query("select blame from attempts order by n")]


async def record(router: Rig, worker: ScriptedWorker) -> tuple[int, float]:
    await router.core.maintenance.keep_records()
    (row,) = await router.query(
        "select jobs_failed, reliability from workers where id = $1", worker.id
    )
    return row["jobs_failed"], row["reliability"]


async def taken(worker: ScriptedWorker) -> tuple[ScriptedWorker, dict[str, Any]]:
    return worker, await worker.job()


async def test_a_second_worker_that_fails_at_a_job_shifts_the_blame_to_the_job(router: Rig):
    """D2-8: two workers that break over one prompt were both unlucky."""
    async with router.worker() as first:
        links = await post_job(router, await router.bearer())
        job = await first.job()
        async with router.worker() as second:
            await first.fail(job, "engine_error")
            again = await second.job()
            assert standing(router, first).reliability < 1
            assert await record(router, first) == (1, pytest.approx(0.8))
            await second.fail(again, "engine_error")
            # Both have had it, and it may go to either.
            (done,), (waiting,) = await asyncio.wait(
                [asyncio.create_task(taken(worker)) for worker in (first, second)],
                return_when=asyncio.FIRST_COMPLETED,
            )
            waiting.cancel()
            last, third = done.result()
            assert await blames(router) == ["job", "job", None]
            assert standing(router, first).reliability == pytest.approx(1)
            assert standing(router, second).reliability == 1
            assert await record(router, first) == (0, pytest.approx(1))
            assert await record(router, second) == (0, 1)
            # What was not the workers' fault ends as before: tried often enough, and refunded.
            await last.fail(third, "engine_error")
            row = await until_state(router, links["id"], "failed")
            assert row["end_reason"] == "attempts_exhausted" and row["charged_msat"] == 0
            assert await blames(router) == ["job", "job", "job"]
    assert (await router.books()).in_order


async def test_a_worker_that_fails_twice_at_a_job_has_nobody_to_share_the_blame_with(router: Rig):
    async with router.worker() as worker:
        await post_job(router, await router.bearer())
        await worker.fail(await worker.job(), "engine_error")
        await worker.fail(await worker.job(), "engine_error")
        await worker.job()
        assert await blames(router) == ["worker", "worker", None]


async def test_a_fault_shifted_at_another_router_is_taken_back_here(router: Rig):
    async with router.worker() as worker:
        await post_job(router, await router.bearer())
        await worker.fail(await worker.job(), "engine_error")
        await worker.job()
        assert standing(router, worker).reliability < 1
        await router.query("update attempts set blame = 'job' where n = 1")
        await router.core.attempts.reputation.keep()
        assert standing(router, worker).reliability == pytest.approx(1)


async def test_a_worker_that_is_lost_with_its_connection_is_remembered(router: Rig):
    payer = await router.bearer()
    async with router.worker() as worker:
        links = await post_job(router, payer)
        await worker.job()
    async with asyncio.timeout(PATIENCE_S):
        while (await blames(router)) != ["worker"]:
            await asyncio.sleep(0.02)
    assert await record(router, worker) == (1, pytest.approx(0.8))
    # It comes back as what it was.
    async with router.worker(key=worker.key) as back:
        await back.serve()
        await until_state(router, links["id"], "succeeded")
        async with asyncio.timeout(PATIENCE_S):
            while standing(router, back).reliability < 0.83:
                await asyncio.sleep(0.02)
        assert standing(router, back).reliability == pytest.approx(0.84)


async def test_a_cancelled_job_is_the_clients_doing(router: Rig):
    async with router.worker() as worker:
        links = await post_job(router, await router.bearer())
        await worker.job()
        await router.core.jobs.cancel(links["id"])
        assert await blames(router) == ["client"]
        assert standing(router, worker).reliability == 1


async def test_an_empty_answer_is_asked_for_again_and_believed_the_second_time(router: Rig):
    """D2-4: nobody pays for a worker that says nothing where another would have answered."""
    async with router.worker() as silent:
        links = await post_job(router, await router.bearer())
        job = await silent.job()
        async with router.worker() as other:
            await silent.finish(job, tokens=0)
            again = await other.job()
            assert standing(router, silent).reliability < 1
            await other.say(again, "Hello.")
            await other.finish(again, tokens=2)
            row = await until_state(router, links["id"], "succeeded")
            assert row["worker_id"] == other.id
            assert await blames(router) == ["worker", None]


async def test_where_two_workers_have_nothing_to_say_there_is_nothing_to_be_said(router: Rig):
    async with router.worker() as silent:
        links = await post_job(router, await router.bearer())
        job = await silent.job()
        async with router.worker() as other:
            await silent.finish(job, tokens=0)
            await other.finish(await other.job(), tokens=0)
            await until_state(router, links["id"], "succeeded")
            async with asyncio.timeout(PATIENCE_S):
                while await blames(router) != ["job", None]:
                    await asyncio.sleep(0.02)
                # Known here a moment after it stands in the database.
                while standing(router, silent).reliability != pytest.approx(1):
                    await asyncio.sleep(0.02)


@pytest.mark.parametrize("why", ["alone", "a stop string"])
async def test_an_empty_answer_is_believed_where_it_may_well_be_one(router: Rig, why: str):
    async with router.worker() as silent:
        more = {"stop": ["\n"]} if why == "a stop string" else {}
        links = await post_job(router, await router.bearer(), **more)
        job = await silent.job()
        if why == "alone":
            await silent.finish(job, tokens=0)
        else:
            async with router.worker():
                await silent.finish(job, tokens=0)
                await until_state(router, links["id"], "succeeded")
        await until_state(router, links["id"], "succeeded")
        assert await blames(router) == [None]


# --- what is shown --------------------------------------------------------------------------------


async def me(router: Rig, worker: ScriptedWorker) -> dict[str, Any]:
    shown = await router.http.get("/workers/me", headers={"Authorization": f"Bearer {worker.key}"})
    assert shown.status_code == 200, shown.text
    return shown.json()


async def test_a_worker_sees_what_was_noted_about_its_answers(router: Rig):
    async with router.worker() as worker:
        links = await post_job(router, await router.bearer(), max_tokens=900)
        job = await worker.job()
        await worker.say(job, "word " * 50, tokens=50)
        await worker.finish(job, "length", tokens=50)
        await until_state(router, links["id"], "succeeded")
        async with asyncio.timeout(PATIENCE_S):
            while not router.core.attempts.reputation._events:  # pyright: ignore[reportPrivateUsage]
                await asyncio.sleep(0.02)
        await router.core.attempts.reputation.keep()
        shown = (await me(router, worker))["reputation"]
        (event,) = shown["events"]
        assert event["code"] == "truncated"
        assert event["facts"] == {"tokens": 50, "max_tokens": 900}
        assert 0.85 < shown["score"] < 1
        (row,) = await router.query("select facts from worker_events")
        assert json.loads(row["facts"]) == event["facts"]


async def test_a_worker_that_rests_gets_no_job_and_is_told_why(router: Rig):
    payer = await router.bearer()
    async with router.worker() as worker:
        resting = standing(router, worker)
        for number in range(FAULTS_BEFORE_REST):
            resting.fault(f"job{number}", 1, "engine_error")
        await post_job(router, payer)
        await worker.nothing()
        (skip,) = (await me(router, worker))["skips"]
        assert (skip["code"], skip["count"]) == ("cooling_down", 1)
        assert skip["facts"]["faults_in_a_row"] == FAULTS_BEFORE_REST
        # When the rest is over it is tried again, and one answer clears it.
        resting.rests_until = 0.001
        await worker.serve()


async def test_a_worker_is_told_what_went_to_better_ones(router: Rig):
    """AH-27: skip reasons are true."""
    payer = await router.bearer()
    async with router.worker() as slow, router.worker() as fast:
        for worker, speed in ((slow, 5.0), (fast, 50.0)):
            found = router.core.fleet.get(worker.id)
            assert found is not None
            found.speeds[MODEL] = speed
        answering = asyncio.create_task(
            router.http.post("/v1/chat/completions", json=CHAT, headers=payer)
        )
        await fast.serve()
        assert (await answering).status_code == 200
        (skip,) = (await me(router, slow))["skips"]
        assert (skip["code"], skip["count"]) == ("others_were_better", 1)
        assert skip["facts"]["others_tokens_per_s"] == 50.0
        assert skip["facts"]["your_tokens_per_s"] == 5.0
        assert (await me(router, fast))["skips"] == []


async def test_what_was_noted_long_ago_is_forgotten_by_itself(router: Rig):
    """Else a table would grow for as long as there are workers."""
    await router.query(
        "insert into worker_events (worker_id, at, code, facts) values"
        " ('w', now() - interval '31 days', 'old', '{}'), ('w', now(), 'new', '{}')"
    )
    await router.core.maintenance.prune()
    rows = await router.query("select code from worker_events")
    assert [row["code"] for row in rows] == ["new"]
    names = {task.get_name() for task in asyncio.all_tasks()}
    assert "maintenance-3600.0" in names
