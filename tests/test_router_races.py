"""Two things at once, and what arrives too late: whoever comes second changes nothing."""

from __future__ import annotations

import asyncio

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from tests.router_rig import PATIENCE_S, Rig, ScriptedWorker
from tests.test_paid_job import CHAT

NUL = "\0"


async def until(condition, *, timeout_s: float = PATIENCE_S) -> None:
    """Wait until `condition()` gives something true."""
    async with asyncio.timeout(timeout_s):
        while not await condition():
            await asyncio.sleep(0.02)


def ask(router: Rig, headers: dict[str, str], **changes) -> asyncio.Task:
    return asyncio.create_task(
        router.http.post("/v1/chat/completions", json=CHAT | changes, headers=headers)
    )


# --- what workers say --------------------------------------------------------------------------


async def test_a_nul_in_an_answer_keeps_nobody_from_being_stored(router: Rig):
    """PostgreSQL has no NUL in its texts: one answer with it must not stop the storing of others."""
    async with router.worker(slots=2) as worker:
        key = await router.bearer()
        asked = [ask(router, key), ask(router, key, user="another")]
        jobs = [await worker.job() for _ in asked]
        await worker.say(jobs[0], f"a{NUL}b")
        await worker.say(jobs[1], "well")

        async def stored() -> bool:
            return len(await router.query("select 1 from job_chunks")) == 2

        await until(stored)
        for job in jobs:
            await worker.finish(job, tokens=1)
        replies = await asyncio.gather(*asked)
    said = {reply.json()["choices"][0]["message"]["content"] for reply in replies}
    assert said == {"a\N{REPLACEMENT CHARACTER}b", "well"}


async def test_a_nul_in_a_failure_does_not_keep_the_job_from_ending(router: Rig):
    async with router.worker() as worker:
        asked = ask(router, await router.bearer())
        job = await worker.job()
        await worker.send(
            {
                "type": "failed",
                "job_id": job["job_id"],
                "attempt": job["attempt"],
                "code": "bad_request",
                "message": f"broken{NUL}",
                "retryable": False,
            }
        )
        reply = await asked
    assert reply.status_code == 400
    assert (await router.books()).in_order
    attempts = await router.query("select error from attempts")
    assert [row["error"] for row in attempts] == ["broken\N{REPLACEMENT CHARACTER}"]


async def test_a_registration_with_a_nul_is_refused(router: Rig):
    async with connect(router.url.replace("http", "ws") + "/worker") as socket:
        models = [{"id": f"m{NUL}", "kind": "text", "context_length": 64, "max_tokens": 64}]
        worker = ScriptedWorker(socket, router.lnurl_host, models=models)
        with pytest.raises(AssertionError, match="bad_registration"):
            await worker.register()
        with pytest.raises(ConnectionClosed):
            await socket.recv()


async def test_a_job_id_with_a_nul_is_no_job(router: Rig):
    reply = await router.http.get("/jobs/%00", headers=await router.bearer())
    assert reply.status_code == 404


async def test_a_token_that_is_not_ascii_opens_nothing(router: Rig):
    reply = await router.http.get("/jobs/none", headers={"X-Job-Token": "jt-é".encode()})
    assert reply.status_code == 401
