"""Checks on what is sold: bought like any job at the operator's cost, judged over many."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from billing import ledger, payees
from billing.ledger import Transfer
from billing.payout_settings import PayoutSettings
from router import check_scores
from router.check_scores import LEAST_CHECKS
from router.database import Database
from tests.door_tools import RATES, set_rates, until_state
from tests.router_rig import ADMIN_TOKEN, MODEL, PATIENCE_S, Rig, ScriptedWorker

ADMIN = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
QUESTION = "What is the capital of France?"

# --- scores ---------------------------------------------------------------------------------------


def test_a_canary_is_scored_by_what_is_there_and_not_by_how_it_is_said():
    def score(text: str, *expected: str) -> float:
        return check_scores.canary_score(text, expected)

    assert score("It is PARIS, of course.", "Paris") == 1
    assert score("the  answer:\n42.", "answer 42") == 1
    assert score("Paris", "Paris", "London") == 0.5
    assert score("I do not know.", "Paris") == 0


def test_duplicates_are_held_against_how_much_honest_answers_differ():
    """llama.md §4: batched decoding rounds differently, so one text proves nothing."""
    honest = [
        "A lock is a device that keeps a door shut until the right key is turned in it.",
        "A lock is a mechanical device which keeps the door closed unless the right key is used.",
        "A lock keeps a door shut. When the right key is turned in it, the device opens.",
        "The lock is a device for keeping a door shut until somebody turns the right key.",
    ]
    own, *others = honest
    assert check_scores.duplicate_score(own, others) == pytest.approx(1, abs=0.2)
    assert check_scores.duplicate_score("Bananas bananas bananas.", others) == 0
    assert check_scores.duplicate_score("", others) == 0
    assert check_scores.duplicate_score(own, []) is None
    # With one other there is no telling how much is usual: little in common is enough.
    assert check_scores.duplicate_score(own, others[:1]) == 1


def test_nothing_follows_from_a_few_checks():
    assert check_scores.quality([0.0] * (LEAST_CHECKS - 1)) == 1
    assert check_scores.quality([0.0] * LEAST_CHECKS) == 0
    assert check_scores.quality([1.0, 0.9, 0.5, 0.7, 0.6]) == 1
    assert check_scores.quality([0.5] * 10) < check_scores.HELD_BELOW


# --- checks in a running router -------------------------------------------------------------------


@pytest.fixture(name="router")
async def that_looks_when_it_is_told(router: Rig) -> Rig:
    """Its own look, every two seconds, would buy or judge what a test is about to."""
    await router.core.checks.stop()
    return router


async def add(router: Rig, prompt: str = QUESTION, **more: Any) -> dict[str, Any]:
    made = await router.http.post("/admin/checks", json={"prompt": prompt, **more}, headers=ADMIN)
    assert made.status_code == 201, made.text
    return made.json()


async def buy(router: Rig) -> list[str]:
    """Buy the next check, however lately the last one was bought."""
    await router.query("update checks set created_at = created_at - interval '1 day'")
    # The whole day's budget is free again.
    return await router.core.checks.buy_if_due()


async def seen_idle(router: Rig, count: int) -> None:
    """Wait until the endings of all jobs are through."""
    async with asyncio.timeout(PATIENCE_S):
        while sum(worker.free_slots for worker in router.core.fleet.all()) != count:
            await asyncio.sleep(0.02)


async def answer(worker: ScriptedWorker, text: str) -> dict[str, Any]:
    job = await worker.job()
    await worker.say(job, text, tokens=3)
    await worker.finish(job, tokens=3)
    return job


async def checked(router: Rig, worker: ScriptedWorker, text: str) -> None:
    (job_id,) = await buy(router)
    await answer(worker, text)
    await until_state(router, job_id, "succeeded")
    await router.core.checks.judge()
    await seen_idle(router, 1)


async def me(router: Rig, worker: ScriptedWorker) -> dict[str, Any]:
    shown = await router.http.get("/workers/me", headers={"Authorization": f"Bearer {worker.key}"})
    return shown.json()


async def test_old_answers_are_forgotten_and_a_clock_that_was_ahead_stops_no_checks(router: Rig):
    await add(router, expected=["Paris"])
    async with router.worker() as worker:
        await checked(router, worker, "It is Paris.")
        await router.query("update checks set created_at = created_at - interval '91 days'")
        await checked(router, worker, "Paris.")
        rows = await router.query("select answer, score from checks order by created_at")
        assert [tuple(row) for row in rows] == [(None, 1), ("Paris.", 1)]
        await router.query("update checks set created_at = now() + interval '30 days'")
        assert await router.core.checks.buy_if_due()
        await worker.serve("Paris.")


async def test_a_check_is_a_job_like_any_other_and_the_operator_pays_for_it(router: Rig):
    await set_rates(router, RATES)
    await add(router, expected=["Paris"])
    async with router.worker() as worker:
        (job_id,) = await router.core.checks.buy_if_due()
        job = await answer(worker, "It is Paris.")
        assert job["job_id"] == job_id
        # A client's job asks in the same words for the same things.
        client = {"model": MODEL, "messages": [{"role": "user", "content": QUESTION}]}
        key = await router.bearer()
        asked = asyncio.create_task(
            router.http.post(
                "/v1/chat/completions",
                json=client | {"max_tokens": 64, "temperature": 0},
                headers=key,
            )
        )
        other = await answer(worker, "Paris.")
        assert (await asked).status_code == 200
        different = {"job_id", "attempt"}
        assert {k: v for k, v in job.items() if k not in different} == {
            k: v for k, v in other.items() if k not in different
        }
        row = await until_state(router, job_id, "succeeded")
        assert row["charged_msat"] == 1003
        await router.core.checks.judge()
        shown = (await router.http.get("/admin/checks", headers=ADMIN)).json()
        assert shown["spent_in_a_day_msat"] == 1003
        assert shown["prompts"][0]["mean_score"] == 1.0 and shown["prompts"][0]["answers"] == 1
        assert (await me(router, worker))["earned_msat"] == 2 * (1003 - 50)
    async with router.core.database.connection() as connection:
        cost = await connection.fetchval(
            "select sum(case when debit = $1 then amount_msat else -amount_msat end)::bigint"
            " from ledger_transfers where $1 in (debit, credit)",
            ledger.CHECKS,
        )
    assert cost == 1003
    books = await router.books()
    assert books.in_order


async def test_a_worker_that_fails_many_checks_gets_less_work_and_waits_for_its_money(router: Rig):
    """AH-35: escrow for those who are not trusted; nothing is lost."""
    await add(router, expected=["Paris"])
    async with router.worker() as worker:
        for number in range(LEAST_CHECKS):
            assert (await me(router, worker))["reputation"]["quality"] == 1, number
            await checked(router, worker, "I like trains.")
        await router.core.attempts.reputation.keep()
        async with asyncio.timeout(PATIENCE_S):
            while (shown := await me(router, worker))["reputation"]["quality"] == 1:
                await asyncio.sleep(0.05)
        reputation = shown["reputation"]
        assert reputation["score"] == 0 and reputation["reliability"] > 0.9
        assert {event["code"] for event in reputation["events"]} == {"check_failed"}
        assert shown["next_payout"]["blocked"] == "checks_failed"
        held_until = datetime.fromisoformat(shown["next_payout"]["held_until"])
        assert held_until > datetime.now(UTC) + timedelta(days=6)
        assert shown["pending_msat"] == shown["earned_msat"] > 0
        listed = (await router.http.get("/admin/checks", headers=ADMIN)).json()["workers"]
        assert [(w["id"], w["checks"], w["quality"]) for w in listed] == [(worker.id, 5, 0)]
        # It does better, and is trusted again.
        for _ in range(14):
            await checked(router, worker, "Paris!")
        async with asyncio.timeout(PATIENCE_S):
            while (shown := await me(router, worker))["reputation"]["quality"] < 1:
                await asyncio.sleep(0.05)
        assert "held_until" not in shown["next_payout"]
    assert (await router.books()).in_order


async def test_what_is_held_is_paid_when_its_time_is_over(database: Database):
    now = datetime.now(UTC)
    settings = PayoutSettings()
    async with database.transaction() as connection:
        await payees.set_address(connection, "w", "w@wallet.example", now=now)
        earned = Transfer(ledger.LIGHTNING, ledger.worker("w"), settings.threshold_msat, "e", "j")
        await ledger.post(connection, [earned])

        async def due(at: datetime) -> list[str]:
            found = await payees.due_payees(connection, settings, now=at, limit=10)
            return [payee.id for payee in found]

        assert await due(now) == ["w"]
        await payees.hold(connection, "w", now + timedelta(days=7))
        assert await due(now + timedelta(days=6)) == []
        assert await due(now + timedelta(days=8)) == ["w"]
        await payees.hold(connection, "w", None)
        assert await due(now) == ["w"]


async def test_a_duplicate_is_compared_with_the_answers_of_other_workers(router: Rig):
    await add(router, "How does a lock work?")
    good = "A lock keeps a door shut until the right key is turned in it."
    async with router.worker() as one, router.worker() as other:
        ids = await buy(router)
        assert len(ids) == 2
        await answer(one, good)
        await answer(other, "Trains trains trains.")
        for job_id in ids:
            await until_state(router, job_id, "succeeded")
        await router.core.checks.judge()
        rows = await router.query("select worker_id, score from checks")
        # Two that differ say nothing about which is wrong; with more of them it shows.
        assert {row["worker_id"] for row in rows} == {one.id, other.id}
        assert all(row["score"] == 0 for row in rows)


async def test_checks_keep_to_their_time_and_their_budget(router: Rig):
    await add(router, expected=["Paris"])
    async with router.worker() as worker:
        router.core.settings.check_every_s = 3600
        assert len(await router.core.checks.buy_if_due()) == 1
        assert await router.core.checks.buy_if_due() == []
        router.core.settings.check_every_s = 0
        router.core.settings.check_budget_msat = 1
        assert await router.core.checks.buy_if_due() == []
        await worker.job()


async def test_no_check_is_bought_where_nobody_could_answer_it(router: Rig):
    await add(router, model="another-model")
    async with router.worker():
        assert await router.core.checks.buy_if_due() == []


async def test_a_check_that_fails_says_nothing_about_quality(router: Rig):
    await add(router, expected=["Paris"])
    async with router.worker() as worker:
        (job_id,) = await router.core.checks.buy_if_due()
        await worker.fail(await worker.job(), "engine_error", retryable=False)
        await until_state(router, job_id, "failed")
        assert await router.core.checks.judge() == 0
        (row,) = await router.query("select score, scored_at from checks")
        assert row["score"] is None and row["scored_at"] is not None
    assert (await router.books()).in_order


REFUSED: list[dict[str, Any]] = [
    {},
    {"prompt": " "},
    {"prompt": "x", "expected": []},
    {"prompt": "x", "expected": "Paris"},
    {"prompt": "x", "expected": ["Paris", ""]},
    {"prompt": "x", "max_tokens": 0},
    {"prompt": "x", "expect": ["Paris"]},
]


async def test_a_check_that_cannot_be_judged_is_refused(router: Rig):
    for body in REFUSED:
        refused = await router.http.post("/admin/checks", json=body, headers=ADMIN)
        assert refused.status_code == 400, f"{body}: {refused.text}"
    assert (await router.http.get("/admin/checks", headers=ADMIN)).json()["prompts"] == []


async def test_prompts_come_and_go_and_the_audit_knows(router: Rig):
    added = await add(router, expected=["Paris"], model=MODEL, max_tokens=12)
    assert (added["kind"], added["model"], added["max_tokens"]) == ("canary", MODEL, 12)
    removed = await router.http.delete(f"/admin/checks/{added['id']}", headers=ADMIN)
    assert removed.json() == {"id": added["id"], "removed": True}
    again = await router.http.delete(f"/admin/checks/{added['id']}", headers=ADMIN)
    assert again.json()["removed"] is False
    audit = (await router.http.get("/admin/audit", headers=ADMIN)).json()["changes"]
    assert [row["action"] for row in audit] == ["checks.remove", "checks.add"]
    assert (await router.http.get("/admin/checks")).status_code == 401
