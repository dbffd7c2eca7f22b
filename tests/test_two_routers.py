"""Two routers, one market: a client at either is served by a worker at either.

Both routers run in this process, over one PostgreSQL, joined by the in-process bus or by a real NATS
server. What happens when processes die is in tests/test_router_losses.py.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from router import dispatcher, jobs
from tests.nats_tools import CutProxy, NatsServer
from tests.pair_rig import joined, parted, running_pair, worker_at
from tests.reading import CHAT, PATIENCE_S, Reader, until
from tests.router_rig import ADMIN_TOKEN, Rig


async def test_a_client_at_one_router_is_served_by_a_worker_at_the_other(pair):
    """Tokens cross in order, and `[DONE]` comes after the commit."""
    a, b = pair
    key = await a.bearer()
    async with worker_at(b, known_at=a) as worker:
        reader = Reader(a.http, key)
        job = await worker.job()
        for seq, text in enumerate(("One ", "two ", "three.")):
            await worker.say(job, text, seq=seq)
            await reader.until_shown("One two three."[: reader_length(seq)])
        states = await a.query("select state, router_id from jobs")
        assert [tuple(row) for row in states] == [("running", b.core.router_id)]
        await worker.finish(job, tokens=3)
        await asyncio.wait_for(reader.task, PATIENCE_S)
        assert reader.done and reader.text == "One two three." and not reader.errors
    assert (await a.books()).in_order


async def test_routers_in_one_process_need_no_server_between_them(
    tmp_path: Path, database_url: str
):
    async with running_pair(tmp_path, database_url, lines=(None, None)) as (a, b):
        key = await a.bearer()
        async with worker_at(b, known_at=a) as worker:
            reader = Reader(a.http, key)
            await worker.serve("Next door.")
            await asyncio.wait_for(reader.task, PATIENCE_S)
            assert reader.done and reader.text == "Next door."


def reader_length(seq: int) -> int:
    return (4, 8, 14)[seq]


async def test_a_whole_answer_comes_from_the_other_router(pair):
    a, b = pair
    key = await a.bearer()
    async with worker_at(b, known_at=a) as worker:
        asked = asyncio.create_task(a.http.post("/v1/chat/completions", json=CHAT, headers=key))
        await worker.serve("From far away.")
        reply = await asked
        assert reply.status_code == 200
        assert reply.json()["choices"][0]["message"]["content"] == "From far away."
        assert reply.headers["x-satherd-worker"] == worker.id


async def test_a_reader_who_comes_late_to_another_router_resumes_there(pair):
    """Last-Event-ID at any router: places are characters (decision 4)."""
    a, b = pair
    key = await b.bearer()
    async with worker_at(b, known_at=a) as worker:
        made = await b.http.post("/jobs", json=CHAT | {"kind": "chat"}, headers=key)
        link = made.json()["jobs"][0]
        token = {"Authorization": f"Bearer {link['token']}"}
        job = await worker.job()
        await worker.say(job, "Half of it")
        first = await events(b, link["events_url"], token, until_text="Half of it")
        seen = "".join(event["text"] for event in first if "text" in event)
        assert seen == "Half of it"
        resumed = asyncio.create_task(
            events(a, link["events_url"], token | {"Last-Event-ID": "5"}, until_text=None)
        )
        await worker.say(job, " and the rest.", seq=1)
        await worker.finish(job, tokens=5)
        later = await asyncio.wait_for(resumed, PATIENCE_S)
        assert "".join(e["text"] for e in later if "text" in e) == "of it and the rest."
        assert later[-1]["job"]["state"] == "succeeded"


async def events(
    rig: Rig, path: str, headers: dict[str, str], *, until_text: str | None
) -> list[dict[str, Any]]:
    """The data of a job's events until it has said `until_text`, or to the end."""
    found: list[dict[str, Any]] = []
    async with rig.http.stream("GET", path, headers=headers) as reply:
        assert reply.status_code == 200, await reply.aread()
        async for line in reply.aiter_lines():
            if line.startswith("data: "):
                found.append(json.loads(line.removeprefix("data: ")))
                said = "".join(event.get("text", "") for event in found)
                if until_text is not None and said == until_text:
                    break
    return found


async def test_what_is_queued_at_one_router_wakes_the_dispatcher_of_the_other(
    pair, monkeypatch: pytest.MonkeyPatch
):
    """It does not wait until that one looks by itself."""
    a, b = pair
    key = await a.bearer()
    async with worker_at(b, known_at=a) as worker:
        monkeypatch.setattr(dispatcher, "POLL_S", 600.0)
        b.core.dispatcher.wake()
        await worker.nothing(0.1)
        await a.http.post("/jobs", json=CHAT | {"kind": "chat"}, headers=key)
        await worker.job()


async def test_the_dearer_job_wins_at_whichever_router_the_worker_is(pair):
    a, b = pair
    key = await a.bearer()
    async with worker_at(b, known_at=a) as worker:
        busy = await a.http.post("/jobs", json=CHAT | {"kind": "chat"}, headers=key)
        assert busy.status_code == 202
        first = await worker.job()
        cheap = await b.http.post(
            "/jobs", json=CHAT | {"kind": "chat", "fee_multiplier": 1.5}, headers=key
        )
        dear = await a.http.post(
            "/jobs", json=CHAT | {"kind": "chat", "fee_multiplier": 2.0}, headers=key
        )
        await worker.finish(first, tokens=1)
        order = []
        for _ in range(2):
            job = await worker.job()
            order.append(job["job_id"])
            await worker.finish(job, tokens=1)
        assert order == [reply.json()["jobs"][0]["id"] for reply in (dear, cheap)]


async def test_a_bump_at_one_router_counts_at_the_other(pair):
    a, b = pair
    key = await a.bearer()
    async with worker_at(b, known_at=a) as worker:
        await b.http.post("/jobs", json=CHAT | {"kind": "chat"}, headers=key)
        first = await worker.job()
        links = [
            (await rig.http.post("/jobs", json=CHAT | {"kind": "chat"}, headers=key)).json()
            for rig in (b, a)
        ]
        last = links[1]["jobs"][0]
        bumped = await b.http.post(
            f"{last['status_url']}/bump",
            json={"fee_multiplier": 1.7},
            headers={"Authorization": f"Bearer {last['token']}"},
        )
        assert bumped.status_code == 200 and bumped.json()["position"] == 1
        await worker.finish(first, tokens=1)
        assert (await worker.job())["job_id"] == last["id"]


async def test_a_cancel_reaches_the_router_that_runs_the_job(pair):
    """It is settled there as it stands, and answered here."""
    a, b = pair
    key = await a.bearer()
    async with worker_at(b, known_at=a) as worker:
        made = await a.http.post("/jobs", json=CHAT | {"kind": "chat"}, headers=key)
        link = made.json()["jobs"][0]
        job = await worker.job()
        await worker.say(job, "as far as it came", tokens=4)
        token = {"Authorization": f"Bearer {link['token']}"}
        await until(lambda: _said(b, job["job_id"]))
        cancelled = await a.http.delete(link["status_url"], headers=token)
        assert cancelled.status_code == 200
        view = cancelled.json()
        assert view["state"] == "cancelled" and 0 < view["charged_msat"] < view["held_msat"]
        assert view["result"]["choices"][0]["message"]["content"] == "as far as it came"
        stop = await worker.receive()
        assert (stop["type"], stop["job_id"]) == ("cancel", job["job_id"])
    assert (await a.books()).in_order


async def _said(rig: Rig, job_id: str) -> bool:
    running = rig.core.attempts.running.get(job_id)
    return running is not None and running.stream.length > 0


async def test_a_client_who_goes_takes_along_what_runs_at_the_other_router(pair):
    """Prepaid without an Idempotency-Key (§3.5)."""
    a, b = pair
    key = await a.bearer()
    async with worker_at(b, known_at=a) as worker:
        reader = Reader(a.http, key)
        job = await worker.job()
        await worker.say(job, "enough", tokens=1)
        await reader.until_shown("enough")
        reader.task.cancel()
        stop = await worker.receive()
        assert (stop["type"], stop["job_id"]) == ("cancel", job["job_id"])

        async def cancelled() -> bool:
            (row,) = await a.query("select state, end_reason, charged_msat from jobs")
            return row["state"] == "cancelled" and row["charged_msat"] > 0

        await until(cancelled)


@pytest.mark.parametrize("at", ["a", "b"])
async def test_a_payment_seen_by_one_router_is_heard_by_the_readers_of_the_other(pair, at: str):
    """The L402 way: the 402 from A, the payment, the proof shown to B, the worker at either."""
    a, b = pair
    at_a = at == "a"
    async with worker_at(a if at_a else b, known_at=b if at_a else a) as worker:
        body = CHAT | {"stream": True}
        due = (await a.http.post("/v1/chat/completions", json=body)).json()
        preimage = await a.pay(due["invoice"])
        paid = {"Authorization": f"L402 {due['l402_token']}:{preimage}"}
        readers = [Reader(rig.http, paid) for rig in (a, b)]
        await worker.serve("Paid once.")
        for reader in readers:
            await asyncio.wait_for(reader.task, PATIENCE_S)
            assert reader.done and reader.text == "Paid once."
    assert len(await a.query("select 1 from jobs")) == 1


async def test_a_lost_worker_is_followed_by_one_at_the_other_router(pair):
    """A job that moves to another router is followed there; nothing was shown of the first try."""
    a, b = pair
    key = await a.bearer()
    reader = None
    async with worker_at(b, known_at=a) as lost:
        reader = Reader(a.http, key)
        await lost.job()
    async with worker_at(a, known_at=b) as worker:
        job = await worker.job()
        assert job["attempt"] == 2
        await worker.say(job, "from here", tokens=2)
        await worker.finish(job, tokens=2)
        await asyncio.wait_for(reader.task, PATIENCE_S)
        assert reader.done and reader.text == "from here"
    assert (await a.books()).in_order


async def test_a_worker_that_comes_to_another_router_goes_on_with_its_job_there(pair):
    """Though the first router has not noticed that it left: what that one still does is void."""
    a, b = pair
    key = await b.bearer()
    async with worker_at(b, known_at=a) as before:
        reader = Reader(b.http, key)
        job = await before.job()
        await before.say(job, "Said to the one, ")
        await reader.until_shown("Said to the one, ")
        held = [{"job_id": job["job_id"], "attempt": 1}, {"job_id": "nobodys", "attempt": 3}]
        async with a.worker(key=before.key, holding=held) as worker:
            assert worker.registered["resume"] == held[:1]
            # It says all of it again, cut in other pieces.
            await worker.say(job, "Said to the")
            await worker.say(job, " one, and to the other.", seq=1, tokens=5)
            await worker.finish(job, tokens=6)
            await asyncio.wait_for(reader.task, PATIENCE_S)
            assert reader.done and reader.text == "Said to the one, and to the other."

            async def sent_away() -> bool:
                return not b.core.fleet.all()

            await until(sent_away)
    (row,) = await a.query("select state, attempt, router_id from jobs")
    assert tuple(row) == ("succeeded", 1, a.core.router_id)
    assert (await a.books()).in_order


async def test_what_a_reader_elsewhere_was_shown_is_charged_when_the_worker_is_lost(pair):
    """He is told, and never shown a mixture of two answers (decisions: no silent restart)."""
    a, b = pair
    key = await a.bearer()
    async with worker_at(b, known_at=a) as worker:
        reader = Reader(a.http, key)
        job = await worker.job()
        await worker.say(job, "Once upon a time", tokens=4)
        await reader.until_shown("Once upon a time")
        running = b.core.attempts.running[job["job_id"]]

        async def known() -> bool:
            return running.stream.shown

        await until(known)
    await asyncio.wait_for(reader.task, PATIENCE_S)
    assert not reader.done
    assert [error["end_reason"] for error in reader.errors] == ["worker_lost"]
    (row,) = await a.query("select state, end_reason, charged_msat, held_msat from jobs")
    assert (row["state"], row["end_reason"]) == ("failed", "worker_lost")
    assert 0 < row["charged_msat"] < row["held_msat"]
    assert (await a.books()).in_order


async def test_prices_waits_and_what_is_served_go_by_the_workers_of_all_routers(pair):
    a, b = pair
    refused = await a.http.post("/v1/chat/completions", json=CHAT)
    assert refused.json()["error"]["code"] == "unknown_model"
    async with worker_at(b, known_at=a, slots=2) as worker:
        (model,) = (await a.http.get("/info")).json()["models"]
        assert (model["workers"], model["idle_workers"], model["servable"]) == (1, 1, True)
        quote = (await a.http.post("/quotes", json=CHAT | {"kind": "chat"})).json()
        assert quote["queue"]["servable"] and quote["queue"]["wait_s"] == {"p50": 0, "p90": 0}
        mine = {"Authorization": f"Bearer {worker.key}"}

        async def online() -> bool:
            view = (await a.http.get("/workers/me", headers=mine)).json()
            return view["online"]

        await until(online)
        assert (await a.http.get("/worker/stats")).json() == {"connected": 1, "busy": 0}

    async def gone() -> bool:
        reply = await a.http.post("/v1/chat/completions", json=CHAT)
        return reply.status_code == 503 and reply.json()["error"]["code"] == "no_worker"

    await until(gone)


async def test_a_cancel_at_a_router_that_is_not_answered_is_accepted_and_kept(
    router: Rig, monkeypatch: pytest.MonkeyPatch
):
    """The job runs at a dead router: whoever takes it back cancels it, for nothing."""
    monkeypatch.setattr(jobs, "CANCEL_S", 0.2)
    key = await router.bearer()
    async with router.worker():
        router.core.dispatcher.paused = True
        made = await router.http.post("/jobs", json=CHAT | {"kind": "chat"}, headers=key)
        link = made.json()["jobs"][0]
        await router.query(
            "with gone as (delete from queue where job_id = $1)"
            " update jobs set state = 'running', attempt = 1, router_id = 'dead', worker_id = 'x',"
            " started_at = now(), commission_ppm = 0, lease_ends_at = now() + interval '1 hour'"
            " where id = $1",
            link["id"],
        )
        token = {"Authorization": f"Bearer {link['token']}"}
        asked = await router.http.delete(link["status_url"], headers=token)
        assert (asked.status_code, asked.json()["state"]) == (202, "running")
        await router.query("update jobs set lease_ends_at = now()")

        async def cancelled() -> bool:
            view = (await router.http.get(link["status_url"], headers=token)).json()
            return view["state"] == "cancelled" and view["charged_msat"] == 0

        await until(cancelled)
    assert (await router.books()).in_order


async def test_what_an_admin_orders_at_one_router_reaches_the_workers_of_the_other(pair):
    """Drain, ban, pause and fees: told by the bus, and read again from time to time without it."""
    a, b = pair
    admin = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
    async with worker_at(b, known_at=a) as worker:
        drained = await a.http.post(f"/admin/workers/{worker.id}/drain", headers=admin)
        assert drained.status_code == 200

        async def draining() -> bool:
            return b.core.fleet.all()[0].draining

        await until(draining)
        changed = await a.http.put("/admin/fees", json={"prompt_fee_msat": 7000}, headers=admin)
        assert changed.status_code == 200

        async def shown() -> bool:
            return (await b.http.get("/info")).json()["fees"]["prompt_fee_msat"] == 7000

        await until(shown)
        await a.http.post("/admin/pause", json={"message": "back soon"}, headers=admin)

        async def paused() -> bool:
            return (await b.http.get("/info")).json()["paused"] == "back soon"

        await until(paused)
        banned = await a.http.post(
            f"/admin/workers/{worker.id}/ban", json={"reason": "bad"}, headers=admin
        )
        assert banned.status_code == 200

        async def sent_away() -> bool:
            return not b.core.fleet.all()

        await until(sent_away)


async def test_tool_calls_cross_to_the_other_router(pair):
    a, b = pair
    key = await a.bearer()
    async with worker_at(b, known_at=a) as worker:
        reader = asyncio.create_task(deltas(a, key))
        job = await worker.job()
        first = {
            "tool_calls": [
                {
                    "index": 0,
                    "id": "c1",
                    "type": "function",
                    "function": {"name": "look", "arguments": ""},
                }
            ]
        }
        more = {"tool_calls": [{"index": 0, "function": {"arguments": '{"at": 1}'}}]}
        for seq, delta in enumerate((first, more)):
            await worker.send(
                {
                    "type": "chunk",
                    "job_id": job["job_id"],
                    "attempt": 1,
                    "seq": seq,
                    "text": "",
                    "delta": delta,
                    "tokens": 2,
                }
            )
        await worker.finish(job, "tool_calls", tokens=4)
        said = await asyncio.wait_for(reader, PATIENCE_S)
        arguments = "".join(
            call["function"].get("arguments", "")
            for delta in said
            for call in delta.get("tool_calls", ())
        )
        assert arguments == '{"at": 1}'


async def deltas(rig: Rig, key: dict[str, str]) -> list[dict[str, Any]]:
    """All deltas of a streamed answer."""
    found = []
    async with rig.http.stream(
        "POST", "/v1/chat/completions", json=CHAT | {"stream": True}, headers=key
    ) as reply:
        async for line in reply.aiter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line.removeprefix("data: "))["choices"]:
                    found.append(choice["delta"])
    return found


# --- NATS away -----------------------------------------------------------------------------------


async def test_a_stream_goes_on_while_nats_is_killed_and_when_it_is_back(
    tmp_path: Path, database_url: str
):
    """By the database meanwhile: slower, and not a character lost or repeated."""
    nats = NatsServer(tmp_path)
    await nats.start()
    async with running_pair(tmp_path, database_url, lines=(nats.url, nats.url)) as (a, b):
        key = await a.bearer()
        async with worker_at(b, known_at=a) as worker:
            reader = Reader(a.http, key)
            job = await worker.job()
            await worker.say(job, "before, ")
            await reader.until_shown("before, ")
            await nats.kill()
            await worker.say(job, "while it is away, ", seq=1)
            await reader.until_shown("before, while it is away, ")
            # The text may have come by the database before this one noticed.
            await until(lambda: parted([a, b]))
            health = await a.http.get("/health/ready")
            assert health.status_code == 200 and health.json()["degraded"]
            assert health.json()["parts"]["bus"] == "away"
            assert "satherd_bus_up 0.0" in (await a.http.get("/metrics")).text
            await nats.start()
            await until(lambda: joined([a, b]))
            await worker.say(job, "and after.", seq=2)
            await reader.until_shown("before, while it is away, and after.")
            await worker.finish(job, tokens=9)
            await asyncio.wait_for(reader.task, PATIENCE_S)
            assert reader.done and reader.text == "before, while it is away, and after."
        assert (await a.books()).in_order
    await nats.kill()


async def test_a_router_cut_off_from_nats_is_still_one_market_with_the_other(
    tmp_path: Path, database_url: str
):
    """A partition: only the client's router does not reach NATS. Work, streams, cancels go on."""
    nats = NatsServer(tmp_path)
    await nats.start()
    line = CutProxy(nats.port)
    await line.start()
    lines = (f"nats://127.0.0.1:{line.port}", nats.url)
    async with running_pair(tmp_path, database_url, lines=lines) as (a, b):
        key = await a.bearer()
        await line.cut()
        async with worker_at(b, known_at=a) as worker:
            reader = Reader(a.http, key)
            job = await worker.job()
            await worker.say(job, "through the database")
            await reader.until_shown("through the database")
            made = await a.http.post("/jobs", json=CHAT | {"kind": "chat"}, headers=key)
            await worker.finish(job, tokens=3)
            await asyncio.wait_for(reader.task, PATIENCE_S)
            assert reader.done and reader.text == "through the database"
            link = made.json()["jobs"][0]
            job = await worker.job()
            token = {"Authorization": f"Bearer {link['token']}"}
            cancelled = await a.http.delete(link["status_url"], headers=token)
            assert (cancelled.status_code, cancelled.json()["state"]) == (200, "cancelled")
            await line.start()
            await until(lambda: joined([a, b]))
            await line.cut()
        assert (await a.books()).in_order
    await nats.kill()
