"""Two things at once, and what arrives too late: whoever comes second changes nothing."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from billing.invoices import utc_now
from router.job_store import Claim
from router.kept_chunks import news_of
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
    reply = await router.http.get("/jobs/none", headers={b"X-Job-Token": "jt-é".encode()})
    assert reply.status_code == 401


# --- the last moment ---------------------------------------------------------------------------


async def open_quote(router: Rig) -> dict[str, Any]:
    """What a 402 said, of a quote whose time is over by now."""
    due = (await router.http.post("/v1/chat/completions", json=CHAT)).json()
    await router.query(
        "update quotes set expires_at = now() - interval '1 hour' where id = $1",
        due["quote"]["quote_id"],
    )
    return due


async def blocked(router: Rig) -> bool:
    """Whether some statement waits for a lock of another transaction."""
    return bool(
        await router.query(
            "select 1 from pg_stat_activity"
            " where datname = current_database() and wait_event_type = 'Lock'"
        )
    )


async def state_of(router: Rig, table: str, row_id: str) -> str:
    return (await router.query(f"select state from {table} where id = $1", row_id))[0]["state"]


async def test_a_payment_in_the_moment_of_expiry_is_not_overwritten(router: Rig):
    """A router that was down finds the payment and the expiry in the same moment."""
    async with router.worker():
        quote_id = (await open_quote(router))["quote"]["quote_id"]
        async with router.core.database.transaction() as paying:
            await paying.execute("update quotes set state = 'paid' where id = $1", quote_id)
            expiring = asyncio.create_task(router.core.maintenance.expire_quotes())
            await until(lambda: blocked(router))
        await expiring
    assert await state_of(router, "quotes", quote_id) == "paid"


async def test_a_quote_and_its_jobs_expire_in_one_transaction(router: Rig):
    """A router that dies in between would leave jobs, with their texts, that nobody looks for."""
    async with router.worker():
        quote_id = (await open_quote(router))["quote"]["quote_id"]
        (job,) = await router.query("select id from jobs where quote_id = $1", quote_id)
        async with router.core.database.transaction() as other:
            await other.execute("select 1 from jobs where id = $1 for update", job["id"])
            expiring = asyncio.create_task(router.core.maintenance.expire_quotes())
            await until(lambda: blocked(router))
            assert await state_of(router, "quotes", quote_id) == "open"
        await expiring
    assert await state_of(router, "quotes", quote_id) == "expired"
    assert await state_of(router, "jobs", job["id"]) == "expired"


async def test_jobs_of_a_quote_that_is_paid_too_late_expire_and_the_money_is_credited(router: Rig):
    async with router.worker() as worker:
        due = await open_quote(router)
        await router.query(
            "update invoices set expires_at = now() - interval '1 hour' where payment_hash = $1",
            due["payment_hash"],
        )
        preimage = await router.pay(due["invoice"])
        quote_id = due["quote"]["quote_id"]

        async def late() -> bool:
            return await state_of(router, "quotes", quote_id) == "late"

        await until(late)
        jobs = await router.query("select state, wipe_at from jobs where quote_id = $1", quote_id)
        assert [job["state"] for job in jobs] == ["expired"]
        assert jobs[0]["wipe_at"] is not None
        # The money is the payer's: the same credential spends it, as it would any balance.
        paid = {"Authorization": f"L402 {due['l402_token']}:{preimage}"}
        balance = (await router.http.get("/balance", headers=paid)).json()
        assert balance["balance_msat"] == due["amount_msat"]
        asked = ask(router, paid)
        await worker.serve("Late, and paid for.")
        assert (await asked).status_code == 200
    assert (await router.books()).in_order


# --- what a lost attempt leaves behind ---------------------------------------------------------


async def test_what_a_lost_attempt_said_is_not_stored_for_the_next(router: Rig):
    """Storing takes a while; the job may be with another worker by then."""
    async with router.worker() as first:
        asked = ask(router, await router.bearer())
        job = await first.job()
        await first.say(job, "of the first attempt")
        running = router.core.attempts.running[job["job_id"]]

        async def heard() -> bool:
            return running.chunks == 1

        await until(heard)
        # What is about to be stored, while the attempt is lost and the next one begins to speak.
        news = news_of(running)
        async with router.worker() as second:
            await first.socket.close()
            again = await second.job()
            await second.say(again, "se")
            await second.say(again, "cond", seq=1)
            news.stream.keep(news.attempt, news.pieces, shown=news.shown)

            async def stored() -> bool:
                rows = await router.query("select text from job_chunks where n = 2 order by start")
                return "".join(row["text"] for row in rows) == "second"

            await until(stored)
            assert news.attempt == 1
            await second.finish(again, tokens=2)
            reply = await asked
    assert reply.json()["choices"][0]["message"]["content"] == "second"


async def test_a_claim_that_was_never_sent_is_taken_back(router: Rig):
    """The commit of a claim may come through while its answer is lost with the database."""
    key = await router.bearer()
    async with router.worker() as worker:
        body = CHAT | {"kind": "chat"}
        router.core.dispatcher.paused = True
        made = (await router.http.post("/jobs", json=body, headers=key)).json()["jobs"][0]
        claim = Claim(
            made["id"], worker.id, router.core.router_id, 0, utc_now() + timedelta(minutes=1)
        )
        assert await router.core.writer.write("claim", claim) is not None
        assert await router.core.maintenance.take_back_lost() == 0
        await router.query(
            "update jobs set started_at = now() - interval '11 seconds' where id = $1", made["id"]
        )
        await router.core.maintenance.take_back_lost()
        assert await state_of(router, "jobs", made["id"]) == "queued"
        router.core.dispatcher.paused = False
        router.core.dispatcher.wake()
        job = await worker.serve("At last.")
        assert job["attempt"] == 2

        async def succeeded() -> bool:
            return await state_of(router, "jobs", made["id"]) == "succeeded"

        await until(succeeded)
    assert (await router.books()).in_order


async def test_a_running_job_is_not_taken_for_an_unsent_claim(router: Rig):
    async with router.worker() as worker:
        asked = ask(router, await router.bearer())
        job = await worker.job()
        await router.query("update jobs set started_at = now() - interval '1 hour'")
        assert await router.core.maintenance.take_back_lost() == 0
        await worker.finish(job, tokens=1)
        assert (await asked).status_code == 200
