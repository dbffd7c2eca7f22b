"""`/admin`: workers, jobs, goodwill refunds, payouts."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed

from billing import ledger
from billing.ledger import Transfer
from router import worker_controls
from tests.balance_tools import CHAT, balance, code
from tests.router_rig import MODEL, PATIENCE_S, Rig, ScriptedWorker
from tests.test_api_admin import admin, changes


async def run_job(router: Rig, worker: ScriptedWorker, key: dict[str, str]) -> tuple[str, int]:
    """Buy a job and have it served; its id and what it was charged."""
    job = asyncio.create_task(router.http.post("/v1/chat/completions", json=CHAT, headers=key))
    await worker.serve()
    reply = await job
    assert reply.status_code == 200, reply.text
    return reply.headers["x-satherd-job"], int(reply.headers["x-satherd-fee-msat"])


# --- workers --------------------------------------------------------------------------------------


async def test_workers_are_listed_with_what_they_do_and_are_owed(router: Rig):
    async with router.worker(slots=2) as first, router.worker(ln_url=None) as second:
        key = await router.bearer()
        job = asyncio.create_task(router.http.post("/v1/chat/completions", json=CHAT, headers=key))
        waits = {asyncio.create_task(worker.job()): worker for worker in (first, second)}
        done, left = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        left.pop().cancel()
        taken = done.pop()
        shown = (await admin(router, "GET", "/workers")).json()["workers"]
        by_id = {worker["id"]: worker for worker in shown}
        assert [worker["id"] for worker in shown] == [second.id, first.id]
        assert {w["busy"] for w in shown} == {0, 1}
        assert by_id[waits[taken].id]["busy"] == 1
        assert by_id[first.id]["ln_url"] == f"worker@{router.lnurl_host}"
        assert by_id[second.id]["ln_url"] is None
        assert all(worker["online"] and not worker["banned"] for worker in shown)
        assert first.key not in str(shown)
        await waits[taken].say(taken.result(), "Hi.")
        await waits[taken].finish(taken.result(), tokens=1)
        await job
    page = (await admin(router, "GET", "/workers?limit=1")).json()
    rest = (await admin(router, "GET", f"/workers?limit=1&cursor={page['cursor']}")).json()
    assert [w["id"] for w in page["workers"] + rest["workers"]] == [second.id, first.id]
    assert rest["cursor"] is None
    assert code(await admin(router, "GET", "/workers?cursor=nonsense")) == (400, "bad_request")


async def test_a_banned_worker_is_cut_off_and_comes_back_only_when_unbanned(router: Rig):
    async with router.worker() as worker:
        key = await router.bearer()
        job = asyncio.create_task(router.http.post("/v1/chat/completions", json=CHAT, headers=key))
        await worker.job()
        body = {"reason": "wrong answers"}
        banned = await admin(router, "POST", f"/workers/{worker.id}/ban", body)
        assert banned.status_code == 200
        async with asyncio.timeout(PATIENCE_S):
            try:
                while True:
                    await worker.socket.recv()
            except ConnectionClosed as closed:
                assert closed.rcvd is not None and closed.rcvd.code == 1008
    with pytest.raises(AssertionError, match="wrong answers"):
        async with router.worker(key=worker.key):
            pass
    # The job that it held waits for somebody else.
    async with router.worker() as other:
        await other.serve()
        assert (await job).status_code == 200
    shown = (await admin(router, "GET", "/workers")).json()["workers"]
    assert [w["ban_reason"] for w in shown if w["banned"]] == ["wrong answers"]
    await admin(router, "POST", f"/workers/{worker.id}/unban")
    async with router.worker(key=worker.key) as back:
        assert back.id == worker.id
    free = {"banned": False, "reason": None}
    held = {"banned": True, "reason": "wrong answers"}
    assert await changes(router) == [
        ("worker.ban", worker.id, free, held),
        ("worker.unban", worker.id, held, free),
    ]


async def test_a_worker_is_drained_and_taken_back(router: Rig):
    async with router.worker() as worker:
        await admin(router, "POST", f"/workers/{worker.id}/drain")
        key = await router.bearer() | {"X-Max-Wait-S": "60"}
        job = asyncio.create_task(router.http.post("/v1/chat/completions", json=CHAT, headers=key))
        await worker.nothing()
        assert (await admin(router, "GET", "/workers")).json()["workers"][0]["draining"] is True
        await admin(router, "POST", f"/workers/{worker.id}/resume")
        await worker.serve()
        assert (await job).status_code == 200
    assert await changes(router) == [
        ("worker.drain", worker.id, {"draining": False}, {"draining": True}),
        ("worker.resume", worker.id, {"draining": True}, {"draining": False}),
    ]


async def test_what_was_ordered_at_another_router_is_followed_here(router: Rig):
    async with router.worker() as worker:
        live = router.core.fleet.get(worker.id)
        assert live is not None
        for draining in (True, False):
            await router.query("update workers set draining = $1", draining)
            await worker_controls.follow(router.core)
            assert live.draining is draining
        # What a worker decides for itself is not undone.
        live.draining = True
        await worker_controls.follow(router.core)
        assert live.draining is True
        await router.query("update workers set banned_at = now()")
        async with asyncio.timeout(PATIENCE_S):
            while router.core.fleet.get(worker.id) is not None:
                await asyncio.sleep(0.05)


async def test_there_is_nothing_to_do_to_a_worker_that_is_not_known(router: Rig):
    for act in ("ban", "unban", "drain", "resume"):
        assert code(await admin(router, "POST", f"/workers/nobody/{act}")) == (404, "not_found")
    async with router.worker() as worker:
        for body in ({"reason": 5}, {"reason": "x" * 501}, {"why": "typo"}, ["x"]):
            reply = await admin(router, "POST", f"/workers/{worker.id}/ban", body)
            assert code(reply) == (400, "bad_request"), body
    assert await changes(router) == []


# --- jobs -----------------------------------------------------------------------------------------


async def test_jobs_are_listed_with_every_attempt_and_without_their_texts(router: Rig):
    async with router.worker() as worker:
        key = await router.bearer()
        job = asyncio.create_task(router.http.post("/v1/chat/completions", json=CHAT, headers=key))
        await worker.fail(await worker.job(), "engine_error")
        await worker.serve("The secret answer.")
        first_id = (await job).headers["x-satherd-job"]
        second_id, fee_msat = await run_job(router, worker, key)
        listed = await admin(router, "GET", "/jobs")
        shown = listed.json()["jobs"]
        assert [row["id"] for row in shown] == [second_id, first_id]
        assert "secret answer" not in listed.text and "Say hello" not in listed.text
        assert [(a["n"], a["outcome"], a["blame"], a["error"]) for a in shown[1]["attempts"]] == [
            (1, "engine_error", "worker", "as the test wants it"),
            (2, "succeeded", None, None),
        ]
        assert shown[0]["charged_msat"] == fee_msat
        assert shown[0]["refunded_msat"] == shown[0]["held_msat"] - fee_msat
        assert (shown[0]["state"], shown[0]["worker"]) == ("succeeded", worker.id)

        async def found(query: str) -> list[str]:
            return [j["id"] for j in (await admin(router, "GET", f"/jobs?{query}")).json()["jobs"]]

        assert await found("state=succeeded") == [second_id, first_id]
        assert await found("state=queued") == []
        assert await found(f"model={MODEL}&worker={worker.id}") == [second_id, first_id]
        assert await found("model=other") == await found("worker=nobody") == []
        page = (await admin(router, "GET", "/jobs?limit=1")).json()
        assert await found(f"limit=1&cursor={page['cursor']}") == [first_id]
        for query in ("state=lost", "limit=x", "cursor=%25%25", f"model={'x' * 201}"):
            assert code(await admin(router, "GET", f"/jobs?{query}")) == (400, "bad_request"), query


async def test_a_goodwill_refund_is_given_once(router: Rig):
    async with router.worker() as worker:
        key = await router.bearer()
        job_id, fee_msat = await run_job(router, worker, key)
        other_id, _ = await run_job(router, worker, key)
    before = (await balance(router, key))["balance_msat"]
    wrong: list[Any] = [
        {"amount_msat": fee_msat + 1},
        {"amount_msat": 0},
        {"amount_msat": -1},
        {"amount_msat": 1.5},
        {"amount_msat": True},
        {"amount_msat": 10**30},
        {"reason": 5},
        {"amount": 5},
    ]
    for body in wrong:
        reply = await admin(router, "POST", f"/jobs/{job_id}/refund", body)
        assert code(reply) == (400, "bad_request"), body
    assert await changes(router) == []
    body = {"amount_msat": 500, "reason": "it was rude"}
    replies = await asyncio.gather(
        *(admin(router, "POST", f"/jobs/{job_id}/refund", body) for _ in range(5))
    )
    assert sorted(reply.status_code for reply in replies) == [200, 409, 409, 409, 409]
    again = await admin(router, "POST", f"/jobs/{job_id}/refund")
    assert code(again) == (409, "conflict")
    assert (await balance(router, key))["balance_msat"] == before + 500
    whole = await admin(router, "POST", f"/jobs/{other_id}/refund")
    assert whole.json()["goodwill_msat"] == fee_msat
    shown = (await admin(router, "GET", "/jobs")).json()["jobs"]
    assert [job["goodwill_msat"] for job in shown] == [fee_msat, 500]
    books = await router.books()
    assert books.in_order and books.lines["expenses:goodwill"] == fee_msat + 500
    assert (await changes(router))[0] == (
        "job.refund",
        job_id,
        {"goodwill_msat": 0, "reason": None},
        {"goodwill_msat": 500, "reason": "it was rude"},
    )


async def test_nothing_is_given_back_for_a_job_that_cost_nothing(router: Rig):
    assert code(await admin(router, "POST", "/jobs/none/refund")) == (404, "no_such_job")
    async with router.worker() as worker:
        key = await router.bearer()
        job = asyncio.create_task(router.http.post("/v1/chat/completions", json=CHAT, headers=key))
        taken = await worker.job()
        running = await admin(router, "POST", f"/jobs/{taken['job_id']}/refund")
        assert code(running) == (409, "conflict")
        await worker.fail(taken, "bad_request")
        assert (await job).status_code >= 400
        failed = await admin(router, "POST", f"/jobs/{taken['job_id']}/refund")
        assert code(failed) == (409, "conflict")
    assert await changes(router) == []


# --- payouts --------------------------------------------------------------------------------------


async def owe(router: Rig, worker: ScriptedWorker, amount_msat: int) -> None:
    async with router.core.database.transaction() as connection:
        earned = Transfer(
            ledger.LIGHTNING, ledger.worker(worker.id), amount_msat, "received", "a test"
        )
        await ledger.post(connection, [earned])
    router.core.payouts.wake()


async def payouts_once(router: Rig, query: str, count: int) -> list[dict[str, Any]]:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            shown = (await admin(router, "GET", f"/payouts?{query}")).json()["payouts"]
            if len(shown) == count:
                return shown
            await asyncio.sleep(0.02)


async def test_paused_payouts_are_sent_when_they_are_resumed(router: Rig):
    async with router.worker() as worker:
        await admin(router, "POST", "/payouts/pause", {"reason": "looking at the node"})
        await owe(router, worker, 2_000_000)
        await router.core.payouts.run_once()
        shown = (await admin(router, "GET", "/payouts")).json()
        assert shown["payouts"] == [] and shown["paused"] == "looking at the node"
        assert shown["unresolved"]["count"] == 0
        assert await router.network.paid_out("router") == []
        await admin(router, "POST", "/payouts/resume")
        paid = await payouts_once(router, "state=paid", 1)
        assert (paid[0]["kind"], paid[0]["owner"]) == ("worker", worker.id)
        assert paid[0]["amount_msat"] == 2_000_000 and len(paid[0]["preimage"]) == 64
        assert await payouts_once(router, f"worker={worker.id}&kind=worker", 1) == paid
        assert await payouts_once(router, "worker=nobody", 0) == []
        for query in ("state=lost", "kind=gift", "cursor=x", "limit=0"):
            assert code(await admin(router, "GET", f"/payouts?{query}")) == (400, "bad_request")
    assert await changes(router) == [
        ("payouts.pause", "payouts", {"paused": None}, {"paused": "looking at the node"}),
        ("payouts.pause", "payouts", {"paused": "looking at the node"}, {"paused": None}),
    ]
    assert (await router.books()).in_order


async def test_only_a_payout_that_waits_for_a_person_can_be_decided(router: Rig):
    async with router.worker() as worker:
        await owe(router, worker, 2_000_000)
        paid = (await payouts_once(router, "state=paid", 1))[0]
    path = f"/payouts/{paid['id']}"
    for body in ({"failed": True}, {"preimage": paid["preimage"], "fee_msat": 0}):
        assert code(await admin(router, "POST", f"{path}/decide", body)) == (400, "bad_request")
    wrong: list[Any] = [
        {},
        {"failed": False},
        {"failed": 1},
        {"failed": True, "preimage": "00"},
        {"preimage": 5},
        {"preimage": "00" * 32, "fee_msat": -1},
    ]
    for body in wrong:
        assert code(await admin(router, "POST", f"{path}/decide", body)) == (400, "bad_request")
    for act, body in (("retry", None), ("decide", {"failed": True})):
        unknown = await admin(router, "POST", f"/payouts/none/{act}", body)
        assert code(unknown) == (404, "not_found")
    assert await changes(router) == []
    assert (await admin(router, "POST", f"{path}/retry")).status_code == 200
    assert [(action, subject) for action, subject, *_ in await changes(router)] == [
        ("payout.retry", paid["id"])
    ]
    # A payout that is paid stays paid, and nothing is sent twice.
    assert (await payouts_once(router, "state=paid", 1))[0]["id"] == paid["id"]
    assert len(await router.network.paid_out("router")) == 1
