"""What a worker sees of itself over HTTP, where it is paid, and the bare numbers of all workers."""

from __future__ import annotations

import asyncio
import secrets
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from billing import ledger, payees
from billing.ledger import Transfer
from billing.payees import PayeeAddress, PayeeStatus
from billing.payout_settings import PayoutSettings
from router.queue_counts import Step
from router.skips import skips
from router.standing import FAULTS_BEFORE_REST, Standing
from router.worker_views import next_due_at
from router.workers import Worker
from tests.balance_tools import CHAT, bearer, code, let_through
from tests.router_rig import MODEL, PATIENCE_S, Rig, ScriptedWorker, running_rig
from worker.protocol import ServedModel


async def me(router: Rig, worker: ScriptedWorker) -> dict[str, Any]:
    shown = await router.http.get("/workers/me", headers=bearer(worker.key))
    assert shown.status_code == 200, shown.text
    return shown.json()


async def test_a_worker_sees_what_it_earned_and_nobody_else_does(router: Rig):
    async with router.worker(slots=2) as worker:
        key = await router.bearer()
        job = asyncio.create_task(router.http.post("/v1/chat/completions", json=CHAT, headers=key))
        taken = await worker.job()
        while_busy = await me(router, worker)
        await worker.say(taken, "Hello.", tokens=3)
        await worker.finish(taken, tokens=3)
        fee_msat = int((await job).headers["x-satherd-fee-msat"])
        shown = await me(router, worker)
        earned_msat = fee_msat - fee_msat * 50_000 // 1_000_000
        assert while_busy["busy"] == 1
        assert shown["worker_id"] == worker.id
        assert (shown["online"], shown["slots"], shown["busy"]) == (True, 2, 0)
        assert shown["ln_url"] == f"worker@{router.lnurl_host}" and shown["payable"] is True
        assert shown["earned_msat"] == shown["pending_msat"] == earned_msat
        assert (shown["paid_msat"], shown["sending_msat"], shown["payouts"]) == (0, 0, [])
        assert shown["next_payout"] == {"due_at": None, "threshold_msat": 1_000_000}
        assert [model["id"] for model in shown["models"]] == [MODEL]
        assert shown["reputation"]["score"] == 1.0
        assert shown["reputation"]["events"] == [] and shown["skips"] == []
        assert shown["simulated"] is True
        for headers in ({}, bearer("x" * 64), {"Authorization": worker.key}, key):
            reply = await router.http.get("/workers/me", headers=headers)
            assert code(reply) == (401, "unauthorized")
        assert worker.key not in str(shown)


async def test_a_payout_is_shown_with_its_proof(router: Rig):
    async with router.worker() as worker:
        async with router.core.database.transaction() as connection:
            owed = Transfer(
                ledger.LIGHTNING, ledger.worker(worker.id), 2_000_500, "received", "a test"
            )
            await ledger.post(connection, [owed])
        router.core.payouts.wake()
        async with asyncio.timeout(PATIENCE_S):
            while (shown := await me(router, worker))["paid_msat"] == 0:
                await asyncio.sleep(0.02)
    assert shown["earned_msat"] == 2_000_500
    assert (shown["paid_msat"], shown["sending_msat"], shown["pending_msat"]) == (2_000_000, 0, 500)
    payout = shown["payouts"][0]
    assert (payout["state"], payout["amount_msat"]) == ("paid", 2_000_000)
    assert len(payout["preimage"]) == len(payout["payment_hash"]) == 64
    assert datetime.fromisoformat(payout["at"]) <= datetime.now(UTC) + timedelta(seconds=5)


async def test_a_failure_of_its_own_stands_in_its_record(router: Rig):
    async with router.worker() as worker:
        key = await router.bearer()
        job = asyncio.create_task(router.http.post("/v1/chat/completions", json=CHAT, headers=key))
        await worker.fail(await worker.job(), "engine_error")
        await worker.serve()
        assert (await job).status_code == 200
        shown = await me(router, worker)
    assert shown["reputation"]["score"] < 1
    assert [event["code"] for event in shown["reputation"]["events"]] == ["engine_error"]
    assert shown["reputation"]["events"][0]["message"] == "as the test wants it"


async def test_a_worker_that_went_is_offline_and_keeps_its_earnings(router: Rig):
    async with router.worker() as worker:
        pass
    async with asyncio.timeout(PATIENCE_S):
        while (shown := await me(router, worker))["online"]:
            await asyncio.sleep(0.02)
    assert shown["slots"] == 1 and shown["busy"] == 0
    assert shown["payable"] is True


# --- its address ----------------------------------------------------------------------------------


async def put_address(router: Rig, key: str, body: Any) -> Any:
    return await router.http.put("/workers/me/ln_url", json=body, headers=bearer(key))


async def test_a_first_address_counts_at_once_and_a_change_after_an_hour(router: Rig):
    async with router.worker(ln_url=None) as worker:
        before = await me(router, worker)
        assert before["payable"] is False and before["next_payout"]["blocked"] == "no_address"
        first = await put_address(router, worker.key, {"ln_url": f"Worker@{router.lnurl_host}"})
        assert first.json() == {
            "worker_id": worker.id,
            "ln_url": f"worker@{router.lnurl_host}",
            "payable": True,
            "address_status": "payable",
        }
        # From now on the connected worker earns.
        live = router.core.fleet.get(worker.id)
        assert live is not None and live.payable
        second = await put_address(router, worker.key, {"ln_url": f"thief@{router.lnurl_host}"})
        shown = second.json()
        assert shown["ln_url"] == f"worker@{router.lnurl_host}"
        assert shown["next_ln_url"] == f"thief@{router.lnurl_host}"
        wait = datetime.fromisoformat(shown["next_ln_url_at"]) - datetime.now(UTC)
        assert timedelta(minutes=59) < wait <= timedelta(minutes=60, seconds=5)
        assert (await me(router, worker))["next_ln_url"] == f"thief@{router.lnurl_host}"
        back = await put_address(router, worker.key, {"ln_url": f"worker@{router.lnurl_host}"})
        assert "next_ln_url" not in back.json()
        none = await put_address(router, worker.key, {"ln_url": None})
        assert none.json()["payable"] is True and none.json()["next_ln_url"] is None


async def test_an_address_is_not_changed_to_one_that_cannot_be_paid_or_by_a_stranger(router: Rig):
    async with router.worker() as worker:
        for ln_url in ("nonsense", "not a name@" + router.lnurl_host, "a@no-such-host.invalid"):
            reply = await put_address(router, worker.key, {"ln_url": ln_url})
            assert code(reply) == (400, "bad_lightning_address"), reply.text
            assert reply.json()["error"]["reason"]
        for body in ({}, {"ln_url": 5}, {"ln_url": "x" * 2001}, {"ln_url": None, "more": 1}, [1]):
            assert code(await put_address(router, worker.key, body)) == (400, "bad_request")
        stranger = await put_address(router, "k" * 64, {"ln_url": f"thief@{router.lnurl_host}"})
        assert code(stranger) == (401, "unauthorized")
        shown = await me(router, worker)
        assert shown["ln_url"] == f"worker@{router.lnurl_host}" and "next_ln_url" not in shown


async def test_an_address_can_be_checked_before_a_worker_starts(router: Rig):
    good = await router.http.post(
        "/worker/check-address", json={"ln_url": f"Somebody@{router.lnurl_host}"}
    )
    assert good.json() == {
        "ok": True,
        "ln_url": f"somebody@{router.lnurl_host}",
        "min_sendable_msat": 1000,
        "max_sendable_msat": 100_000_000_000,
    }
    bad = await router.http.post("/worker/check-address", json={"ln_url": "nonsense"})
    assert code(bad) == (400, "bad_lightning_address")
    assert bad.json()["error"]["reason"] in ("not_understood", "bad_address")
    for body in ({}, {"ln_url": ""}, {"ln_url": None}, {"ln_url": 1}, {"address": "a@b.c"}):
        reply = await router.http.post("/worker/check-address", json=body)
        assert code(reply) == (400, "bad_request")


async def test_address_checks_and_guesses_of_keys_are_rationed(tmp_path: Path, database_url: str):
    async with running_rig(tmp_path, database_url, rate_limits="on") as router:
        asked = {"ln_url": f"somebody@{router.lnurl_host}"}
        checks = await let_through(
            lambda: router.http.post("/worker/check-address", json=asked), most=30
        )
        # The resolver has a window of its own, which answers 400 and lets nothing more through.
        assert 30 <= checks <= 35
        guesses = await let_through(
            lambda: router.http.get("/workers/me", headers=bearer(secrets.token_hex(32))), most=60
        )
        assert 60 <= guesses <= 65


# --- draining -------------------------------------------------------------------------------------


async def test_a_draining_worker_gets_no_job_until_it_resumes(router: Rig):
    async with router.worker() as worker:
        drained = await router.http.post("/workers/me/drain", headers=bearer(worker.key))
        assert drained.json() == {"worker_id": worker.id, "draining": True}
        key = await router.bearer()
        headers = key | {"X-Max-Wait-S": "60"}
        job = asyncio.create_task(
            router.http.post("/v1/chat/completions", json=CHAT, headers=headers)
        )
        await worker.nothing()
        shown = await me(router, worker)
        assert shown["draining"] is True
        assert [(skip["code"], skip["count"]) for skip in shown["skips"]] == [("draining", 1)]
        stranger = await router.http.post("/workers/me/resume", headers=bearer("x" * 64))
        assert code(stranger) == (401, "unauthorized")
        await worker.nothing()
        resumed = await router.http.post("/workers/me/resume", headers=bearer(worker.key))
        assert resumed.json()["draining"] is False
        await worker.serve()
        assert (await job).status_code == 200


async def test_a_worker_that_drains_still_drains_when_it_comes_back(router: Rig):
    async with router.worker() as worker:
        await router.http.post("/workers/me/drain", headers=bearer(worker.key))
    async with router.worker(key=worker.key):
        live = router.core.fleet.get(worker.id)
        assert live is not None and live.free_slots == 0


# --- the bare numbers -----------------------------------------------------------------------------


async def test_connected_counts_only_the_idle(router: Rig):
    """QB-R17."""
    assert (await router.http.get("/worker/stats")).json() == {"connected": 0, "busy": 0}
    async with router.worker() as first, router.worker() as second:
        assert (await router.http.get("/worker/stats")).json() == {"connected": 2, "busy": 0}
        key = await router.bearer()
        job = asyncio.create_task(router.http.post("/v1/chat/completions", json=CHAT, headers=key))
        waits = [asyncio.create_task(worker.job()) for worker in (first, second)]
        done, left = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        assert (await router.http.get("/worker/stats")).json() == {"connected": 1, "busy": 1}
        left.pop().cancel()
        worker = first if waits[0] in done else second
        taken = done.pop().result()
        await worker.say(taken, "Hi.")
        await worker.finish(taken, tokens=1)
        assert (await job).status_code == 200


async def test_detail_shows_what_workers_are_and_never_who(router: Rig):
    """QB-R18."""
    async with router.worker() as worker:
        shown = (await router.http.get("/worker/detail")).json()
        assert shown == [
            {
                "worker_version": None,
                "capabilities": ["llama-infer"],
                "gpu_cnt": 0,
                "perf": None,
                "cnt": 0,
                "busy": False,
            }
        ]
        one = await router.http.get("/worker/detail", params={"query": worker.id})
        assert len(one.json()) == 1
        for query in ("user", "uid:5", worker.key, "x' or true --"):
            reply = await router.http.get("/worker/detail", params={"query": query})
            assert (reply.status_code, reply.json()) == (200, [])


# --- pure -----------------------------------------------------------------------------------------

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)
SETTINGS = PayoutSettings(threshold_msat=1_000_000, minimum_msat=100_000, interval_s=3600)


def address(ln_url: str | None = "a@b.c", next_try_at: datetime | None = None) -> PayeeAddress:
    return PayeeAddress(ln_url, None, None, PayeeStatus.PAYABLE, None, next_try_at)


HOUR = timedelta(hours=1)


@pytest.mark.parametrize(
    "payee, owed_msat, owed_since, due_at",
    [
        (address(), 1_000_000, None, NOW),
        (address(), 999_999, NOW - HOUR / 2, NOW + HOUR / 2),
        (address(), 100_000, None, NOW + HOUR),
        (address(), 99_999, NOW - HOUR, None),
        (address(None), 5_000_000, NOW - HOUR, None),
        (None, 5_000_000, None, None),
        (address(next_try_at=NOW + 5 * HOUR), 5_000_000, None, NOW + 5 * HOUR),
        (address(next_try_at=NOW - 5 * HOUR), 5_000_000, None, NOW),
    ],
)
def test_when_a_payout_is_due(
    payee: PayeeAddress | None,
    owed_msat: int,
    owed_since: datetime | None,
    due_at: datetime | None,
):
    found = next_due_at(SETTINGS, payee, owed_msat=owed_msat, owed_since=owed_since, now=NOW)
    assert found == due_at


def a_worker(**changes: Any) -> Worker:
    served = ServedModel(id="a/b", context_length=2048, max_tokens=512)
    worker = Worker(
        id="w", name=None, models=[served], slots=1, payable=True, ln_url=None, speeds={}
    )
    for name, value in changes.items():
        setattr(worker, name, value)
    return worker


STEPS = [
    Step(("text/512/512/a/b",), 1000, 4),
    Step(("text/8192/512/a/b",), 1000, 2),
    Step(("text/32768/512/a/b",), 2000, 1),
    Step(("text/2048/2048/a/b",), 1000, 5),
    Step(("text/512/512/other",), 1000, 7),
    Step(("embedding/512/0/a/b",), 1000, 1),
]


def test_the_reasons_for_skips_name_what_the_jobs_need():
    found = {skip.code: (skip.count, skip.facts) for skip in skips(a_worker(), STEPS)}
    assert found == {
        "model_not_served": (8, {"models": ["other", "a/b"]}),
        "max_tokens_too_low": (5, {"needed": 2048, "yours": 512}),
        "context_too_short": (3, {"needed": 32768, "yours": 2048}),
    }


def test_jobs_that_it_could_have_are_skipped_only_while_it_cannot_take_them():
    def codes(worker: Worker | None) -> dict[str, int]:
        return {skip.code: skip.count for skip in skips(worker, STEPS[:1])}

    assert codes(a_worker()) == {}
    assert codes(a_worker(busy={"job"})) == {"busy": 4}
    assert codes(a_worker(draining=True)) == {"draining": 4}
    assert codes(None) == {"offline": 4}
    resting = Standing()
    for number in range(FAULTS_BEFORE_REST):
        resting.fault(f"job{number}", 1, "engine_error")
    assert codes(a_worker(standing=resting)) == {"cooling_down": 4}


async def test_a_worker_sees_that_its_address_fails_and_after_a_week_that_it_has_failed(
    router: Rig, monkeypatch: pytest.MonkeyPatch
):
    """What is owed stays owed, and is tried again daily."""
    async with router.worker() as worker:
        core, now = router.core, router.core.clock()
        for days, failures, status in ((0, 1, "retrying"), (8, 9, "address_failing")):
            moment = now + timedelta(days=days)
            async with core.database.transaction() as connection:
                for _ in range(failures):
                    await payees.note_failure(
                        connection, worker.id, "unreachable", now=moment, jitter=0.5
                    )
            monkeypatch.setattr(core, "clock", lambda moment=moment: moment)
            shown = await me(router, worker)
            assert shown["address_status"] == status
            assert shown["address_failure"] == "unreachable"
            next_try_at = datetime.fromisoformat(shown["next_try_at"])
            assert moment < next_try_at <= moment + timedelta(days=1)
            assert shown["payable"] is True
