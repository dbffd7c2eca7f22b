"""Frames of a worker: which count, which are dropped, and which end the connection."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed

from tests.door_tools import RATES, event_stream, post_job, said, set_rates, until_state
from tests.reading import until
from tests.router_rig import PATIENCE_S, Rig, ScriptedWorker


async def closed(worker: ScriptedWorker) -> str:
    """Wait for the router to hang up; the reason it gives."""
    with pytest.raises(ConnectionClosed):
        while True:
            await asyncio.wait_for(worker.socket.recv(), PATIENCE_S)
    assert worker.socket.close_code == 1008
    return worker.socket.close_reason or ""


async def result_of(router: Rig, links: dict[str, Any]) -> dict[str, Any]:
    token = {"Authorization": f"Bearer {links['token']}"}
    return (await router.http.get(links["status_url"], headers=token)).json()


async def test_a_late_chunk_of_a_lost_attempt_is_dropped(router: Rig):
    """E1-1, E6-1: nobody sees a byte of an attempt that was taken away."""
    payer = await router.bearer()
    async with router.worker(slots=2) as slow:
        links = await post_job(router, payer)
        lost = await slow.job()
        session = router.core.gate.sessions[slow.id]
        session.check_progress(first_token_s=-1, stall_s=-1)
        assert (await slow.receive())["type"] == "cancel"
        async with router.worker() as second:
            job = await second.job()
            assert (job["job_id"], job["attempt"]) == (links["id"], 2)
            await slow.say(lost, "SECRET OF THE FIRST")
            await second.say(job, "Right answer.", tokens=3)
            await slow.say(lost, " AND MORE", seq=1)
            await slow.finish(lost, tokens=99)
            await second.finish(job, tokens=3)
            await until_state(router, links["id"], "succeeded")
    body = await result_of(router, links)
    assert body["result"]["choices"][0]["message"]["content"] == "Right answer."
    assert body["attempt"] == 2 and body["worker"] == second.id
    assert body["usage"]["satherd"]["completion_tokens"] == 3
    assert (await router.books()).in_order


async def test_frames_about_jobs_of_others_or_of_nobody_change_nothing(router: Rig):
    payer = await router.bearer()
    async with router.worker() as one, router.worker(slots=3) as other:
        links = await post_job(router, payer)
        frames = {id(w): asyncio.create_task(w.job()) for w in (one, other)}
        (done,), _ = await asyncio.wait(frames.values(), return_when=asyncio.FIRST_COMPLETED)
        job = done.result()
        owner, thief = (one, other) if frames[id(one)] is done else (other, one)
        frames[id(thief)].cancel()
        for attempt in (1, 2, 0):
            forged = job | {"attempt": attempt}
            await thief.say(forged, "stolen")
            await thief.finish(forged, tokens=1)
            await thief.fail(forged, "engine_error")
        await thief.say({"job_id": "nowhere", "attempt": 1}, "x")
        await owner.say({**job, "attempt": 7}, "from the future")
        await owner.say(job, "Mine.")
        await owner.finish(job, tokens=2)
        await until_state(router, links["id"], "succeeded")

        async def thief_was_heard() -> bool:
            # By a line of its own, which may be slower than its owner's.
            return router.core.gate.sessions[thief.id].dropped_frames >= 10

        await until(thief_was_heard)
        assert router.core.gate.sessions[thief.id].dropped_frames == 10
        assert router.core.gate.sessions[owner.id].dropped_frames == 1
    body = await result_of(router, links)
    assert body["result"]["choices"][0]["message"]["content"] == "Mine."


async def test_a_chunk_said_twice_is_heard_once(router: Rig):
    payer = await router.bearer()
    async with router.worker() as worker:
        links = await post_job(router, payer)
        job = await worker.job()
        for seq, text in ((0, "a"), (0, "a"), (1, "b"), (0, "a"), (1, "b"), (2, "c")):
            await worker.say(job, text, seq=seq)
        await worker.finish(job, tokens=3)
        await until_state(router, links["id"], "succeeded")
    body = await result_of(router, links)
    assert body["result"]["choices"][0]["message"]["content"] == "abc"


async def test_an_answer_with_a_hole_is_not_delivered(router: Rig):
    payer = await router.bearer()
    async with router.worker() as worker:
        links = await post_job(router, payer)
        job = await worker.job()
        await worker.say(job, "a", seq=0)
        await worker.say(job, "c", seq=2)
        assert (await worker.receive())["type"] == "cancel"
        await worker.finish(job, "cancelled")
        again = await worker.job()
        assert again["attempt"] == 2
        (first, _) = await router.query("select * from attempts order by n")
        assert (first["outcome"], first["blame"]) == ("chunks_missing", "worker")
        await worker.say(again, "abc")
        await worker.finish(again, tokens=3)
        await until_state(router, links["id"], "succeeded")
    body = await result_of(router, links)
    assert body["result"]["choices"][0]["message"]["content"] == "abc"


async def test_several_chunks_in_one_frame_are_those_of_several_frames(router: Rig):
    payer = await router.bearer()
    async with router.worker(slots=2) as worker:
        links = [await post_job(router, payer, user=str(i)) for i in range(2)]
        jobs = [await worker.job() for _ in links]
        items = [[j["job_id"], 1, seq, f"{seq} ", 1] for seq in range(3) for j in jobs]
        await worker.send({"type": "chunks", "items": items})
        for job in jobs:
            await worker.finish(job, tokens=3)
        for made in links:
            await until_state(router, made["id"], "succeeded")
            body = await result_of(router, made)
            assert body["result"]["choices"][0]["message"]["content"] == "0 1 2 "


BROKEN: list[Any] = [
    "{",
    "[]",
    "null",
    '{"type": "chunk"}',
    '{"type": "dance"}',
    '{"type": "chunks"}',
    '{"type": "chunks", "items": [["j", 1, 0, "x"]]}',
    '{"type": "chunks", "items": [["j", 1, 0, "x", -1]]}',
    '{"type": "chunks", "items": [["j", "1", 0, "x", 1]]}',
    '{"type": "chunk", "job_id": "j", "attempt": 1, "seq": 0, "text": "x", "tokens": -5}',
    '{"type": "chunk", "job_id": "j", "attempt": 1, "seq": 0, "delta": {"tool_calls": "x"}}',
    '{"type": "chunk", "job_id": "j", "attempt": 1, "seq": 0, "delta": {"tool_calls": [5]}}',
    '{"type": "finished", "job_id": "j", "attempt": 1, "finish_reason": "bored"}',
    '{"type": "finished", "job_id": "j", "attempt": 1, "finish_reason": "stop",'
    ' "usage": {"completion_tokens": -1}}',
    '{"type": "finished", "job_id": "j", "attempt": 1, "finish_reason": "stop",'
    ' "usage": {"completion_tokens": 1e30}}',
    '{"type": "finished", "job_id": "j", "attempt": 1, "finish_reason": "stop", "data": [["nan"]]}',
    '{"type": "failed", "job_id": "j", "attempt": 1, "code": "because"}',
    b"\xff\xfe",
]


async def test_a_frame_that_no_correct_worker_sends_ends_the_connection(router: Rig):
    for frame in BROKEN:
        async with router.worker(ln_url=None) as worker:
            await worker.socket.send(frame)
            assert await closed(worker), frame
    # A frame names the fault in the reason, never what it held.
    async with router.worker(ln_url=None) as worker:
        await worker.send({"type": "x" * 500})
        assert len(await closed(worker)) <= 120


async def test_a_worker_that_breaks_the_protocol_loses_its_job_to_another(router: Rig):
    payer = await router.bearer()
    async with router.worker() as bad:
        links = await post_job(router, payer)
        await bad.job()
        await bad.send({"type": "dance"})
        await closed(bad)
    row = await until_state(router, links["id"], "queued")
    assert row["attempt"] == 1
    async with router.worker() as good:
        assert (await good.serve())["job_id"] == links["id"]
        await until_state(router, links["id"], "succeeded")


@pytest.mark.parametrize("what", ["text", "delta", "tokens", "deltas"])
async def test_a_worker_that_says_far_too_much_is_stopped(router: Rig, what: str):
    payer = await router.bearer()
    async with router.worker() as worker:
        links = await post_job(router, payer, max_tokens=16)
        job = await worker.job()
        frame = {"type": "chunk", "job_id": job["job_id"], "attempt": 1, "seq": 0}
        delta = {"tool_calls": [{"index": 0, "id": "x" * 70_000}]}
        if what == "deltas":
            small = {"tool_calls": [{"index": 0}]}
            for seq in range(16 + 1025):
                await worker.send(frame | {"seq": seq, "delta": small})
        else:
            said_once = {"text": {"text": "x" * 70_000}, "delta": {"delta": delta}}
            await worker.send(frame | said_once.get(what, {"text": "x", "tokens": 5000}))
        assert (await worker.receive())["type"] == "cancel"
        await until_state(router, links["id"], "queued")
        (attempt,) = await router.query("select * from attempts")
        assert (attempt["outcome"], attempt["blame"]) == ("too_much_output", "worker")


async def test_odd_characters_are_delivered_and_stored(router: Rig):
    """U+0000 has no place in a PostgreSQL text; it must not stop what others say from being kept."""
    payer = await router.bearer()
    async with router.worker() as worker:
        links = await post_job(router, payer)
        job = await worker.job()
        text = "NUL \0, é, \U0001f600, \u202e, \ufffd."
        await worker.say(job, text, tokens=9)
        token = {"Authorization": f"Bearer {links['token']}"}
        async with event_stream(router, links["events_url"], token) as stream:
            shown = text.replace("\0", "\ufffd")
            assert said(await stream.until("chunk")) == shown
            await router.core.maintenance.keep_chunks()
            (kept,) = await router.query("select text from job_chunks")
            assert kept["text"] == shown
            await worker.fail(job, "engine_error")
            row = await until_state(router, links["id"], "failed")
            assert row["end_reason"] == "worker_lost"
    async with router.worker() as worker:
        links = await post_job(router, payer)
        job = await worker.job()
        await worker.send(
            {"type": "failed", "job_id": job["job_id"], "attempt": 1, "code": "engine_error"}
            | {"message": "out of \0 memory", "retryable": False}
        )
        await until_state(router, links["id"], "failed")


async def test_the_bytes_of_a_tool_call_are_charged_like_those_of_a_text(router: Rig):
    payer = await router.bearer()
    await set_rates(router, RATES)
    async with router.worker() as worker:
        links = await post_job(router, payer)
        job = await worker.job()
        call = {"index": 0, "id": "call_1", "type": "function"}
        pieces = [{"name": "look", "arguments": ""}, {"arguments": '{"city":'}, {"arguments": "1}"}]
        for seq, piece in enumerate(pieces):
            delta = {"tool_calls": [call | {"function": piece}]}
            frame = {"type": "chunk", "job_id": job["job_id"], "attempt": 1, "seq": seq}
            await worker.send(frame | {"delta": delta, "tokens": 4})
        await worker.finish(job, "tool_calls", tokens=12)
        row = await until_state(router, links["id"], "succeeded")
    # "look" + '{"city":' + "1}" are 14 bytes: at most 7 tokens, whatever the worker counts.
    assert json.loads(row["usage"])["satherd"]["completion_tokens"] == 7
    assert row["charged_msat"] == 1000 + 7
    message = json.loads(row["result"])["choices"][0]["message"]
    assert message["content"] is None
    assert message["tool_calls"][0]["function"] == {"name": "look", "arguments": '{"city":1}'}
