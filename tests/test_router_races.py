"""Two things at once, and what arrives too late: whoever comes second changes nothing."""

from __future__ import annotations

import asyncio
import random
from datetime import timedelta
from typing import Any

import asyncpg
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from billing.invoices import utc_now
from router import dispatcher, standing
from router.job_endings import end_many
from router.job_records import Claim, Ending, GiveBack
from router.job_states import Event
from router.job_store import claim_many
from router.kept_chunks import news_of
from tests import crash_checks
from tests.router_rig import PATIENCE_S, Rig, ScriptedWorker
from tests.test_paid_job import CHAT
from worker.protocol import Kind

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


async def post_waiting(router: Rig) -> str:
    """A job that nobody serves."""
    async with router.worker():
        router.core.dispatcher.paused = True
        key = await router.bearer()
        made = await router.http.post("/jobs", json=CHAT | {"kind": "chat"}, headers=key)
        return made.json()["jobs"][0]["id"]


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


async def test_one_job_that_cannot_be_taken_back_does_not_keep_the_others(router: Rig):
    """Else a single broken row would keep a router from ever starting again."""
    key = await router.bearer()
    async with router.worker(slots=2) as worker:
        router.core.dispatcher.paused = True
        ids = []
        for _ in range(2):
            made = await router.http.post("/jobs", json=CHAT | {"kind": "chat"}, headers=key)
            ids.append(made.json()["jobs"][0]["id"])
            claim = Claim(
                ids[-1], worker.id, router.core.router_id, 0, utc_now() + timedelta(minutes=1)
            )
            assert await router.core.writer.write("claim", claim)
        await router.query("update jobs set kind = 'nonsense' where id = $1", ids[0])
        async with asyncio.timeout(PATIENCE_S):
            assert await router.core.maintenance.take_back_own() == 1
        assert await state_of(router, "jobs", ids[1]) == "queued"
        assert await state_of(router, "jobs", ids[0]) == "running"


async def test_a_clock_that_is_ahead_ends_nobodys_waiting(
    router: Rig, monkeypatch: pytest.MonkeyPatch
):
    """A wait ends by the clock that it was begun by, the database's, whatever this host's shows."""
    made = await post_waiting(router)
    ahead = utc_now() + timedelta(days=2)
    monkeypatch.setattr(router.core.maintenance, "_clock", lambda: ahead)
    await router.core.maintenance.expire_waits()
    assert await state_of(router, "jobs", made) == "queued"


async def test_a_running_job_is_not_taken_for_an_unsent_claim(router: Rig):
    async with router.worker() as worker:
        asked = ask(router, await router.bearer())
        job = await worker.job()
        await router.query("update jobs set started_at = now() - interval '1 hour'")
        assert await router.core.maintenance.take_back_lost() == 0
        await worker.finish(job, tokens=1)
        assert (await asked).status_code == 200


async def test_a_job_that_lost_its_lease_is_not_answered_by_two_workers_at_once(router: Rig):
    """Another router took it back and this one claims it again, while the first worker goes on."""
    key = await router.bearer()
    async with router.worker() as first:
        asked = ask(router, key)
        job = await first.job()
        await first.say(job, "first ")
        async with router.worker() as second:
            running = router.core.attempts.running[job["job_id"]]
            rows = await router.query("select model from jobs where id = $1", job["job_id"])
            lane = router.core.models.lane(
                Kind.CHAT,
                rows[0]["model"],
                prompt_tokens=running.claimed.prompt_tokens,
                max_tokens=running.claimed.max_tokens,
            )
            back = GiveBack(job["job_id"], 1, lane, "lost", "router", "lease ended")
            assert await router.core.writer.write("give_back", back)
            router.core.dispatcher.wake()
            again = await second.job()
            assert again["attempt"] == 2
            assert (await first.receive())["type"] == "cancel"
            await second.say(again, "second ")
            await first.say(job, "first again", seq=1)
            await first.finish(job, tokens=9)
            await second.say(again, "only", seq=1)
            await second.finish(again, tokens=2)
            reply = await asked
    assert reply.json()["choices"][0]["message"]["content"] == "second only"
    worker_ids = await router.query("select worker_id from jobs")
    assert [row["worker_id"] for row in worker_ids] == [second.id]
    assert (await router.books()).in_order


async def test_a_job_that_is_cancelled_between_claim_and_assignment_is_stopped(router: Rig):
    """Claim and cancel in one batch: the worker is told to stop, and is not paid."""
    key = await router.bearer()
    async with router.worker() as worker:
        router.core.dispatcher.paused = True
        made = await router.http.post("/jobs", json=CHAT | {"kind": "chat"}, headers=key)
        job_id = made.json()["jobs"][0]["id"]
        idle = router.core.fleet.all()[0]
        claim = Claim(job_id, worker.id, router.core.router_id, 0, utc_now() + timedelta(minutes=1))

        async def start() -> None:
            router.core.gate.assign(await router.core.writer.write("claim", claim), idle)

        cancelling = asyncio.create_task(router.core.jobs.cancel(job_id))
        await asyncio.create_task(start())
        outcome = await cancelling
        assert outcome is not None and outcome.state == "cancelled" and outcome.charged_msat == 0
        await worker.job()
        assert (await worker.receive())["type"] == "cancel"
        await worker.finish({"job_id": job_id, "attempt": 1}, "cancelled")
    assert not router.core.attempts.running
    books = await router.books()
    assert books.in_order and not books.lines.get("liabilities:worker")


# --- many at once ------------------------------------------------------------------------------


async def test_one_idempotency_key_on_twenty_connections_is_one_job(router: Rig):
    key = await router.bearer() | {"Idempotency-Key": "twenty"}
    async with router.worker(slots=4) as worker:
        asked = [ask(router, key) for _ in range(20)]
        await worker.serve("One.")
        replies = await asyncio.gather(*asked)
        other = await ask(router, key, user="another request")
        await worker.nothing()
    assert {reply.status_code for reply in replies} == {200}
    assert len({reply.headers["x-satherd-job"] for reply in replies}) == 1
    assert other.status_code == 409
    assert len(await router.query("select 1 from ledger_transfers where code = 'hold'")) == 1


async def test_a_repeat_finds_its_job_though_no_worker_is_left(router: Rig):
    """What was bought is there for its payer, whoever could be found to do it again."""
    key = await router.bearer() | {"Idempotency-Key": "left"}
    async with router.worker() as worker:
        asked = ask(router, key)
        await worker.serve("Kept.")
        first = await asked
    again = await ask(router, key)
    assert again.status_code == 200 and again.json() == first.json()
    fresh = await ask(router, key | {"Idempotency-Key": "fresh"})
    assert fresh.json()["error"]["code"] == "no_worker"


async def test_bumping_and_cancelling_does_not_stretch_the_limit_of_a_key(router: Rig):
    """What is given back at the end is all that was held, so all of it must have been counted."""
    made = (await router.http.post("/balance/topups", json={"amount_msat": 1_000_000})).json()
    paid = {"Authorization": f"L402 {made['l402_token']}:{await router.pay(made['invoice'])}"}
    limited = await router.http.post("/balance/keys", json={"limit_msat": 5_000}, headers=paid)
    assert limited.status_code == 201, limited.text
    key = {"Authorization": f"Bearer {limited.json()['key']}"}

    async def spent_msat() -> int:
        rows = await router.query("select spent_msat from account_keys where limit_msat = 5000")
        return rows[0]["spent_msat"]

    async with router.worker() as worker:
        asked = ask(router, key)
        await worker.serve("Paid for.")
        charged_msat = int((await asked).headers["x-satherd-fee-msat"])
        assert await spent_msat() == charged_msat
        router.core.dispatcher.paused = True
        made = await router.http.post("/jobs", json=CHAT | {"kind": "chat"}, headers=key)
        job = made.json()["jobs"][0]
        too_much = await router.http.post(
            f"{job['status_url']}/bump", json={"offer_msat": 900_000}, headers=key
        )
        assert too_much.status_code == 402
        bumped = await router.http.post(
            f"{job['status_url']}/bump", json={"offer_msat": 3_000}, headers=key
        )
        assert bumped.status_code == 200, bumped.text
        assert await spent_msat() == charged_msat + 3_000
        assert (await router.http.delete(job["status_url"], headers=key)).status_code == 200
        assert await spent_msat() == charged_msat
    assert (await router.books()).in_order


async def test_a_storm_of_bumps_cancels_expiries_and_endings_divides_each_escrow_once(
    router: Rig, monkeypatch: pytest.MonkeyPatch
):
    """Whatever comes first wins, whatever comes second finds nothing to do (E3-34)."""
    # By chance the worker fails so often in a row that it would be left alone, and the rest would wait.
    monkeypatch.setattr(standing, "FAULTS_BEFORE_REST", 1_000)
    draw = random.Random(34)
    key = await router.bearer(10_000_000)
    async with router.worker(slots=8) as worker:

        async def serve() -> None:
            while True:
                frame = await worker.receive()
                if frame["type"] != "assign":
                    continue
                await worker.say(frame, "word ", tokens=1)
                ends = draw.random()
                if ends < 0.6:
                    await worker.finish(frame, tokens=1)
                elif ends < 0.8:
                    for _ in range(3):
                        await worker.fail(frame, "engine_error")
                else:
                    await worker.finish(frame, "cancelled")

        async def life() -> None:
            made = await router.http.post("/jobs", json=CHAT | {"kind": "chat"}, headers=key)
            job = made.json()["jobs"][0]
            acts = [
                router.http.post(
                    f"{job['status_url']}/bump",
                    json={"offer_msat": draw.randrange(2_000, 9_000)},
                    headers=key,
                ),
                router.http.delete(job["status_url"], headers=key),
                expire(job["id"]),
                router.core.attempts.end(Ending(job["id"], Event.EXPIRE, "max_wait")),
            ]
            draw.shuffle(acts)
            chosen, rest = acts[: draw.randrange(1, 5)], acts
            for act in rest[len(chosen) :]:
                close = getattr(act, "close", None)
                if close:
                    close()
            await asyncio.sleep(draw.random() * 0.02)
            for reply in await asyncio.gather(*chosen):
                if reply is not None:
                    assert reply.status_code in (200, 400, 402, 409), reply.text

        async def expire(job_id: str) -> None:
            await router.query(
                "update jobs set wait_ends_at = now() - interval '1 second' where id = $1", job_id
            )
            await router.core.maintenance.expire_waits()

        serving = asyncio.create_task(serve())
        for wave in range(6):
            # Every other wave waits for sure: an expiry is seldom faster than an idle worker.
            router.core.dispatcher.paused = wave % 2 == 1
            await asyncio.gather(*(life() for _ in range(10)))
        router.core.dispatcher.paused = False
        router.core.dispatcher.wake()

        async def quiet() -> bool:
            return not await router.query(
                "select 1 from jobs where state in ('queued', 'running') limit 1"
            )

        await until(quiet)
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
    async with router.core.database.connection() as connection:
        assert await crash_checks.books(connection) == []
        assert await crash_checks.escrows(connection) == []
        ended = await connection.fetch("select distinct state from jobs")
    assert len(ended) >= 3, "the storm was too tame to tell"


async def test_refunds_and_withdrawals_at_once_leave_no_msat_twice(router: Rig):
    """Each takes the same balance; together they never take more than there is."""
    made = (await router.http.post("/balance/topups", json={"amount_msat": 100_000})).json()
    owner = {"Authorization": f"L402 {made['l402_token']}:{await router.pay(made['invoice'])}"}
    shown = await router.http.get(f"/balance/topups/{made['payment_hash']}", headers=owner)
    key = {"Authorization": f"Bearer {shown.json()['key']}"}
    await router.network.ensure_wallet("purse")
    async with router.worker():
        router.core.dispatcher.paused = True
        body = CHAT | {"kind": "chat", "offer_msat": 20_000}
        jobs = [
            (await router.http.post("/jobs", json=body, headers=key)).json()["jobs"][0]
            for _ in range(4)
        ]
        invoices = [
            await router.network.create_invoice(
                "purse", amount_msat=15_000, description="out", expiry_s=600
            )
            for _ in range(8)
        ]

        async def withdraw(bolt11: str) -> int:
            reply = await router.http.post(
                "/balance/withdrawals", json={"invoice": bolt11}, headers=owner
            )
            assert reply.status_code in (202, 402), reply.text
            return reply.status_code

        async def refund(job: dict[str, Any]) -> int:
            return (await router.http.delete(job["status_url"], headers=key)).status_code

        statuses = await asyncio.gather(
            *(withdraw(invoice.bolt11) for invoice in invoices), *(refund(job) for job in jobs)
        )
        assert statuses[8:] == [200] * 4
        ordered = statuses[:8].count(202)
        assert 1 <= ordered <= 5  # 100 satoshi hold five times fifteen and the fee cap of five

        async def quiet() -> bool:
            return not await router.query("select 1 from payouts where state <> 'paid'")

        await until(quiet)
    arrived = [record.amount_received_msat for record in await router.network.received("purse")]
    assert [amount for amount in arrived if amount] == [15_000] * ordered
    async with router.core.database.connection() as connection:
        assert await crash_checks.books(connection) == []


async def test_of_two_endings_in_one_batch_the_one_that_may_happen_is_settled(router: Rig):
    """An expiry that comes with the end of a running job must not take its settlement over."""
    async with router.worker() as worker:
        asked = ask(router, await router.bearer())
        job = await worker.job()
        held_msat = (await router.query("select held_msat from jobs"))[0]["held_msat"]
        expiry = Ending(job["job_id"], Event.EXPIRE, "max_wait")
        finish = Ending(
            job["job_id"], Event.FINISH, "stop", attempt=1, charge_msat=1_000, payee=worker.id
        )
        again = Ending(job["job_id"], Event.FINISH, "stop", attempt=1, charge_msat=7)
        async with router.core.database.transaction() as connection:
            results = await end_many(connection, [expiry, finish, again], wipe_after_s=60)
        assert results[0] is None and results[2] is None
        assert results[1] is not None
        assert results[1].charged_msat == 1_000
        assert results[1].refunded_msat == held_msat - 1_000
        await worker.finish(job, tokens=1)
        await asked
    async with router.core.database.connection() as connection:
        assert await crash_checks.books(connection) == []
        assert await crash_checks.escrows(connection) == []


async def test_claims_that_fail_together_are_made_one_by_one(
    router: Rig, monkeypatch: pytest.MonkeyPatch
):
    """Whatever is wrong with one job must not keep the others from their workers."""
    together = 0

    async def fail(connection: Any, claims: list[Claim]) -> list[Any]:
        nonlocal together
        together += 1
        raise asyncpg.DataError("one of them")

    monkeypatch.setattr(dispatcher, "claim_many", fail)
    async with router.worker(slots=2) as worker:
        router.core.dispatcher.paused = True
        key = await router.bearer()
        asked = [ask(router, key), ask(router, key, user="another")]
        while len(await router.query("select from queue")) < len(asked):
            await asyncio.sleep(0.02)
        router.core.dispatcher.paused = False
        router.core.dispatcher.wake()
        for _ in asked:
            await worker.serve()
        assert {reply.status_code for reply in await asyncio.gather(*asked)} == {200}
    assert together > 0
    assert (await router.books()).in_order


async def test_a_cancel_that_waits_for_a_claim_ends_its_attempt_too(router: Rig):
    """Its statement began before the attempt was there."""
    core = router.core
    async with router.worker() as worker:
        core.dispatcher.paused = True
        key = await router.bearer()
        made = await router.http.post("/jobs", json=CHAT | {"kind": "chat"}, headers=key)
        job_id = made.json()["jobs"][0]["id"]
        claim = Claim(job_id, worker.id, core.router_id, 0, utc_now() + timedelta(minutes=1))
        async with core.database.transaction() as connection:
            assert await claim_many(connection, [claim]) != [None]
            cancelling = asyncio.create_task(
                core.attempts.end(
                    Ending(job_id, Event.CANCEL, "cancelled", router_id=core.router_id)
                )
            )

            async def waits() -> bool:
                return bool(
                    await router.query(
                        "select 1 from pg_stat_activity where wait_event_type = 'Lock'"
                        " and query like '%ended as (%'"
                    )
                )

            await until(waits)
        await cancelling
    (attempt,) = await router.query("select * from attempts where job_id = $1", job_id)
    assert attempt["ended_at"] is not None and attempt["outcome"] == "cancelled"
    async with core.database.connection() as connection:
        assert await crash_checks.books(connection) == []
    assert (await router.books()).in_order


async def test_two_claims_of_one_job_in_one_batch_start_it_once(router: Rig):
    key = await router.bearer()
    async with router.worker() as one, router.worker() as two:
        router.core.dispatcher.paused = True
        made = await router.http.post("/jobs", json=CHAT | {"kind": "chat"}, headers=key)
        job_id = made.json()["jobs"][0]["id"]
        ends_at = utc_now() + timedelta(minutes=1)
        claims = [
            Claim(job_id, worker.id, router.core.router_id, 0, ends_at) for worker in (one, two)
        ]
        async with router.core.database.transaction() as connection:
            claimed = await claim_many(connection, claims)
        assert [found and found.worker_id for found in claimed] == [one.id, None]
