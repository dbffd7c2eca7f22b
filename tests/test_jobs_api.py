"""Our own door: buying jobs, looking at them, who may, and the same thing asked for twice."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.door_tools import (
    CHAT,
    JOB,
    RATES,
    balance_msat,
    code,
    event_stream,
    post_job,
    set_rates,
    token,
    until_state,
)
from tests.router_rig import Rig

FUNDS = 100_000
SHAPE = {
    *("id", "quote_id", "kind", "model", "state", "attempt", "multiplier", "held_msat"),
    *("created_at", "queued_at", "started_at", "first_token_at", "ended_at", "end_reason"),
}


async def test_a_job_has_the_contracts_shape_from_queue_to_result(router: Rig):
    await set_rates(router, RATES)
    payer = await router.bearer(FUNDS)
    async with router.worker() as worker:
        await post_job(router, payer)
        busy = await worker.job()
        links = await post_job(router, payer)
        waiting = (await router.http.get(links["status_url"], headers=token(links))).json()
        assert waiting.keys() == SHAPE | {"position", "wait_s"}
        assert (waiting["state"], waiting["position"]) == ("queued", 1)
        assert waiting["wait_s"].keys() == {"p50", "p90"}
        assert waiting["held_msat"] == 1064 and waiting["ended_at"] is None
        await worker.finish(busy, tokens=0)
        job = await worker.job()
        running = (await router.http.get(links["status_url"], headers=payer)).json()
        assert running.keys() == SHAPE | {"worker"}
        assert (running["state"], running["attempt"]) == ("running", 1)
        await worker.say(job, "Hi there.", tokens=3)
        await worker.finish(job, tokens=3)
        await until_state(router, links["id"], "succeeded")
        ended = (await router.http.get(links["status_url"], headers=token(links))).json()
    paid = {"charged_msat", "refunded_msat", "usage", "result", "worker"}
    assert ended.keys() == SHAPE | paid
    assert ended["charged_msat"] == 1003 and ended["refunded_msat"] == 61
    assert ended["end_reason"] == "stop"
    assert ended["result"]["object"] == "chat.completion"
    assert ended["result"]["choices"][0]["message"]["content"] == "Hi there."
    times = [ended[f"{name}_at"] for name in ("created", "queued", "started", "first_token")]
    assert times == sorted(times) and all(moment.endswith("Z") for moment in times)


async def test_jobs_without_a_credential_are_a_402_that_paying_turns_into_jobs(router: Rig):
    async with router.worker() as worker:
        proof, challenge = await router.buy("/jobs", JOB)
        body = challenge.json()
        assert body["error"]["code"] == "payment_required"
        assert body["quote"]["queue"]["position"] == 1 and body["claim_token"]
        job = await worker.serve("Bought.")
        made = await router.http.post("/jobs", json=JOB, headers=proof)
        assert made.status_code == 202
        (links,) = made.json()["jobs"]
        assert links["id"] == job["job_id"]
        assert links["status_url"] == f"/jobs/{links['id']}" and links["token"].startswith("jt-")


async def test_several_models_are_one_job_each(router: Rig):
    payer = await router.bearer(FUNDS)
    models = [
        {"id": name, "kind": "text", "context_length": 2048, "max_tokens": 512} for name in "ab"
    ]
    async with router.worker(models=models, slots=2) as worker:
        body = {name: value for name, value in JOB.items() if name != "model"}
        made = await router.http.post("/jobs", json=body | {"models": ["a", "b"]}, headers=payer)
        assert len(made.json()["jobs"]) == 2
        assert {(await worker.job())["job"]["model"] for _ in range(2)} == {"a", "b"}


async def test_a_job_is_opened_by_its_token_or_its_payer_and_nobody_else(router: Rig):
    """E3-36: whoever sees an id reads nothing and cancels nothing."""
    payer, stranger = await router.bearer(FUNDS), await router.bearer(FUNDS)
    async with router.worker() as worker:
        links, other = await post_job(router, payer), await post_job(router, stranger)
        await worker.job()
        forged = {"Authorization": f"Bearer {links['token'][:-1]}x"}
        wrong = [
            ({}, (401, "unauthorized")),
            (forged, (401, "unauthorized")),
            ({"Authorization": "Bearer sk-" + "A" * 22}, (401, "unauthorized")),
            ({"Authorization": "Bearer jt-\xe9"}, (401, "unauthorized")),
            (token(other), (401, "unauthorized")),
            (stranger, (403, "forbidden")),
        ]
        for headers, expected in wrong:
            for method, path in (
                ("GET", ""),
                ("GET", "/events"),
                ("POST", "/bump"),
                ("DELETE", ""),
            ):
                reply = await router.http.request(
                    method,
                    links["status_url"] + path,
                    headers={k: v.encode("latin-1") for k, v in headers.items()},
                    json={"offer_msat": 5000} if method == "POST" else None,
                )
                assert code(reply) == expected, (headers, method, path)
        for headers in (token(links), payer, {"X-Job-Token": links["token"]}):
            assert (await router.http.get(links["status_url"], headers=headers)).status_code == 200
        # Any scheme word (QB-R2).
        plain = {"Authorization": f"bearer: {links['token']}"}
        assert (await router.http.get(links["status_url"], headers=plain)).status_code == 200


@pytest.mark.parametrize("job_id", ["nowhere", "%00", "a" * 3000, "%F0%9F%98%80", "..%2Fx"])
async def test_a_job_that_does_not_exist_is_a_clear_error(router: Rig, job_id: str):
    payer = await router.bearer(10_000)
    for path in (f"/jobs/{job_id}", f"/jobs/{job_id}/events", f"/quotes/{job_id}"):
        reply = await router.http.get(path, headers=payer)
        assert reply.status_code in (400, 404), path
        assert reply.json()["error"]["code"] in {
            *("no_such_job", "no_such_quote", "not_found", "bad_request")
        }


async def test_the_same_idempotency_key_is_the_same_jobs_and_another_body_a_conflict(router: Rig):
    payer = await router.bearer(FUNDS)
    once = payer | {"Idempotency-Key": "order-1"}
    async with router.worker(slots=3) as worker:
        replies = await asyncio.gather(
            *(router.http.post("/jobs", json=JOB, headers=once) for _ in range(10))
        )
        assert {reply.status_code for reply in replies} == {202}
        assert len({reply.json()["jobs"][0]["id"] for reply in replies}) == 1
        await worker.serve()
        await worker.nothing()
        changed = await router.http.post("/jobs", json=JOB | {"n": 2}, headers=once)
        assert code(changed) == (409, "idempotency_conflict")
        # The key is its account's: another payer's is another.
        other = await router.bearer(FUNDS) | {"Idempotency-Key": "order-1"}
        theirs = await router.http.post("/jobs", json=JOB | {"n": 2}, headers=other)
        assert theirs.status_code == 202
    holds = await router.query("select 1 from ledger_transfers where code = 'hold'")
    assert len(holds) == 3


async def test_an_idempotency_key_that_is_too_long_is_refused_and_an_empty_one_is_none(router: Rig):
    payer = await router.bearer(FUNDS)
    async with router.worker(slots=3):
        # Cut, they would be the same.
        for last in "ab":
            long = payer | {"Idempotency-Key": "x" * 255 + last}
            refused = await router.http.post("/jobs", json=JOB, headers=long)
            assert code(refused) == (400, "bad_request")
        assert not await router.query("select 1 from jobs")
        for name, jobs in (("x" * 255, 1), ("", 2)):
            headers = payer | {"Idempotency-Key": name}
            replies = [await router.http.post("/jobs", json=JOB, headers=headers) for _ in range(2)]
            assert len({reply.json()["jobs"][0]["id"] for reply in replies}) == jobs


async def test_a_repeated_streaming_request_gets_the_same_answer_again(router: Rig):
    payer = await router.bearer(FUNDS) | {"Idempotency-Key": "stream-1"}
    async with router.worker() as worker:
        served = asyncio.create_task(worker.serve("Once and for all."))
        body = CHAT | {"stream": True}
        replies = []
        for _ in range(2):
            reply = await router.http.post("/v1/chat/completions", json=body, headers=payer)
            replies.append(reply.text)
        await served
        await worker.nothing()
    assert all("Once and for all." in text and "[DONE]" in text for text in replies)
    assert len(await router.query("select 1 from jobs")) == 1


async def test_a_wiped_answer_is_gone_and_its_money_record_stays(router: Rig):
    async with router.worker() as worker:
        proof, _ = await router.buy("/v1/chat/completions", CHAT)
        job = await worker.serve("Soon forgotten.")
        await until_state(router, job["job_id"], "succeeded")
        await router.core.database.pool.execute("update jobs set wipe_at = now()")
        await router.core.maintenance.wipe()
        (row,) = await router.query("select spec, result, wiped, charged_msat from jobs")
        assert (row["spec"], row["result"], row["wiped"]) == (None, None, True)
        assert row["charged_msat"] > 0
        shown = (await router.http.get(f"/jobs/{job['job_id']}", headers=proof)).json()
        assert shown["wiped"] is True and "result" not in shown and shown["charged_msat"] > 0
        events = await router.http.get(f"/jobs/{job['job_id']}/events", headers=proof)
        assert code(events) == (410, "wiped")
        for body in (CHAT, CHAT | {"stream": False}):
            again = await router.http.post("/v1/chat/completions", json=CHAT, headers=proof)
            assert code(again) == (410, "wiped"), body
        await worker.nothing()


async def test_asking_for_an_answer_puts_its_wiping_off(router: Rig):
    payer = await router.bearer(FUNDS)
    async with router.worker() as worker:
        links = await post_job(router, payer)
        await worker.serve()
        await until_state(router, links["id"], "succeeded")
        await router.core.database.pool.execute("update jobs set wipe_at = now()")
        await router.http.get(links["status_url"], headers=payer)
        await router.core.maintenance.wipe()
        again = (await router.http.get(links["status_url"], headers=payer)).json()
        assert "result" in again


async def test_what_is_held_is_not_in_the_balance_and_comes_back(router: Rig):
    await set_rates(router, RATES)
    payer = await router.bearer(FUNDS)
    async with router.worker() as worker:
        links = await post_job(router, payer, n=1)
        job = await worker.job()
        held = (await router.http.get("/balance", headers=payer)).json()
        assert (held["balance_msat"], held["held_msat"]) == (FUNDS - 1064, 1064)
        await worker.finish(job, tokens=0)
        await until_state(router, links["id"], "succeeded")
        assert await balance_msat(router, payer) == FUNDS - 1000
        async with event_stream(router, links["events_url"], token(links)) as stream:
            done = (await stream.until("done"))[-1].data["job"]
        assert done["refunded_msat"] == 64


@pytest.mark.parametrize("kind", ["picture", "", 5, True, [], ["chat"], {"chat": 1}], ids=repr)
async def test_a_kind_that_is_none_is_refused(router: Rig, kind: Any):
    async with router.worker():
        for path in ("/quotes", "/jobs"):
            said = await router.http.post(path, json=JOB | {"kind": kind})
            assert (said.status_code, said.json()["error"]["param"]) == (400, "kind")
