"""Event streams of jobs and quotes: what they say, and resuming them where a reader was."""

from __future__ import annotations

from typing import Any

from tests.door_tools import (
    JOB,
    Sse,
    Stream,
    code,
    event_stream,
    info,
    let_quotes_expire,
    post_job,
    said,
    token,
    until_state,
)
from tests.router_rig import Rig

FUNDS = 100_000
CALL = {"index": 0, "id": "call_1", "type": "function"}


async def replay(router: Rig, links: dict[str, Any], last_event_id: str | None) -> list[Sse]:
    async with event_stream(
        router, links["events_url"], token(links), last_event_id=last_event_id
    ) as stream:
        return await stream.until("done")


async def test_a_stream_tells_states_places_output_and_the_end(router: Rig):
    payer = await router.bearer(FUNDS)
    async with router.worker() as worker:
        await post_job(router, payer)
        busy = await worker.job()
        links = await post_job(router, payer, fee_multiplier="1.5")
        await info(router, waiting=1)
        async with event_stream(router, links["events_url"], token(links)) as stream:
            first = await stream.next()
            assert (first.name, first.data["state"]) == ("state", "queued")
            place = await stream.next()
            assert place.name == "position" and place.data["job"] == links["id"]
            assert place.data["position"] == 1 and place.data["servable"] is True
            assert place.data["multiplier_to_be_next"] == "1.501"
            await worker.finish(busy, tokens=0)
            job = await worker.job()
            await worker.say(job, "One", seq=0)
            events = await stream.until("chunk")
            # Its place is told again every two seconds while it waits.
            started = next(event for event in events if event.name != "position")
            assert (started.name, started.data["state"]) == ("state", "running")
            await worker.say(job, " two", seq=1)
            await worker.finish(job, tokens=2)
            events += await stream.until("done")
    assert said(events) == "One two"
    ids = [int(event.id or -1) for event in events]
    assert ids == sorted(ids) and ids[-1] == len("One two")
    done = events[-1].data["job"]
    assert done["state"] == "succeeded" and done["result"]["choices"]
    assert all(event.data["seq"] == int(event.id or -1) for event in events)


async def test_a_reader_resumes_where_it_was_while_the_job_runs_and_after(router: Rig):
    payer = await router.bearer(FUNDS)
    async with router.worker() as worker:
        links = await post_job(router, payer)
        job = await worker.job()
        await worker.say(job, "Grüße", seq=0)
        async with event_stream(router, links["events_url"], token(links)) as stream:
            last = (await stream.until("chunk"))[-1].id
        assert last == "5"
        await worker.say(job, ", Welt", seq=1)
        async with event_stream(
            router, links["events_url"], token(links), last_event_id=last
        ) as stream:
            assert said(await stream.until("chunk")) == ", Welt"
        await worker.finish(job, tokens=2)
        await until_state(router, links["id"], "succeeded")
    # After the end it comes from the database, at the same places.
    for had, rest in ((None, "Grüße, Welt"), ("0", "Grüße, Welt"), ("2", "üße, Welt"), ("11", "")):
        events = await replay(router, links, had)
        assert said(events) == rest
        assert events[-1].id == "11" and events[-1].data["job"]["state"] == "succeeded"


async def test_a_reader_of_a_lost_attempt_is_told_to_start_over(router: Rig):
    """E6-1: never a mixture of two answers."""
    payer = await router.bearer(FUNDS)
    async with router.worker() as worker:
        links = await post_job(router, payer)
        job = await worker.job()
        await worker.say(job, "First try", seq=0)
        # Nobody has read it, so that the job may be begun again.
        await worker.fail(job, "engine_error")
        again = await worker.job()
        await worker.say(again, "Second", seq=0)
        # A reader that was at character 6 of the first attempt, on another connection before.
        async with event_stream(
            router, links["events_url"], token(links), last_event_id="6"
        ) as stream:
            events = await stream.until("chunk")
            assert events[0].data["attempt"] == 2
            assert said(events) == "Second"
            assert events[-1].id == str(1_000_000_000 + 6)
        await worker.say(again, " try", seq=1)
        await worker.finish(again, tokens=2)
        await until_state(router, links["id"], "succeeded")
    assert said(await replay(router, links, "6")) == "Second try"
    assert said(await replay(router, links, "1000000006")) == " try"


async def test_an_id_that_is_none_is_refused_and_one_from_the_future_waits(router: Rig):
    payer = await router.bearer(FUNDS)
    async with router.worker() as worker:
        links = await post_job(router, payer)
        await worker.serve("Short.")
        await until_state(router, links["id"], "succeeded")
    for bad in ("x", "-1", "1.5", "9" * 30):
        headers = token(links) | {"Last-Event-ID": bad}
        reply = await router.http.get(links["events_url"], headers=headers)
        assert code(reply) == (400, "bad_request"), bad
    assert said(await replay(router, links, "99999")) == ""


async def test_the_tool_calls_of_an_answer_that_has_ended_are_told_again(router: Rig):
    payer = await router.bearer(FUNDS)
    async with router.worker() as worker:
        links = await post_job(router, payer)
        job = await worker.job()
        frame = {"type": "chunk", "job_id": job["job_id"], "attempt": 1}
        await worker.say(job, "Let me see.", seq=0)
        for seq, arguments in ((1, '{"city":'), (2, '"Bern"}')):
            delta = {"tool_calls": [CALL | {"function": {"name": "", "arguments": arguments}}]}
            await worker.send(frame | {"seq": seq, "delta": delta, "tokens": 1})
        await worker.finish(job, "tool_calls", tokens=3)
        await until_state(router, links["id"], "succeeded")
    events = await replay(router, links, None)
    assert said(events) == "Let me see."
    (delta,) = [e.data["delta"] for e in events if "delta" in e.data]
    assert delta["tool_calls"][0]["index"] == 0
    assert delta["tool_calls"][0]["function"]["arguments"] == '{"city":"Bern"}'
    # Who had the text only gets the calls, who had some of them finds them in `done`.
    had_text = await replay(router, links, "11")
    assert said(had_text) == "" and any("delta" in event.data for event in had_text)
    had_some = await replay(router, links, "12")
    assert not any("delta" in event.data for event in had_some)
    calls = had_some[-1].data["job"]["result"]["choices"][0]["message"]["tool_calls"]
    assert calls[0]["function"]["arguments"] == '{"city":"Bern"}'


# --- quotes ---------------------------------------------------------------------------------------


async def _quote(router: Rig, **changes: Any) -> tuple[str, dict[str, Any]]:
    made = (await router.http.post("/quotes", json=JOB | changes)).json()
    due = (await router.http.post(f"/quotes/{made['quote_id']}/invoice")).json()
    return f"/quotes/{made['quote_id']}/events", due


async def test_one_stream_tells_of_the_payment_and_then_of_all_jobs(router: Rig):
    """A page needs one connection: opened before the payment, with what the payment makes good."""
    async with router.worker(slots=2) as worker:
        path, due = await _quote(router, n=2)
        claim = {"X-Claim-Token": due["claim_token"]}
        async with event_stream(router, path, claim) as stream:
            await router.pay(due["invoice"])
            assert (await stream.next()).name == "paid"
            jobs = [await worker.job() for _ in range(2)]
            for job in jobs:
                await worker.say(job, job["job_id"][:4])
                await worker.finish(job, tokens=2)
            events = await stream.until("done")
            events += await stream.until("done")
    ends = {e.data["job"]["id"] for e in events if e.name == "done"}
    assert ends == {job["job_id"] for job in jobs}
    async with event_stream(router, path, claim, last_event_id=events[-1].id) as stream:
        assert (await stream.next()).name == "paid"
        rest = await stream.until("done") + await stream.until("done")
        assert said(rest) == ""
    async with event_stream(router, path, claim, last_event_id="2-2") as stream:
        await stream.next()
        rest = await stream.until("done") + await stream.until("done")
        assert sorted(e.data["text"] for e in rest if e.name == "chunk") == sorted(
            job["job_id"][2:4] for job in jobs
        )


async def test_who_only_knows_a_quotes_id_sees_the_payment_and_no_jobs(router: Rig):
    async with router.worker() as worker:
        path, due = await _quote(router)
        async with event_stream(router, path, {}) as stream:
            await router.pay(due["invoice"])
            assert (await stream.next()).name == "paid"
            await worker.serve()
            assert await _is_over(stream)


async def test_a_stream_tells_of_a_payment_that_came_late_and_of_none(router: Rig):
    async with router.worker():
        path, due = await _quote(router)
        await let_quotes_expire(router)
        async with event_stream(router, path, {}) as stream:
            assert (await stream.next()).name == "expired"
            assert await _is_over(stream)
        await router.pay(due["invoice"])
        claim = {"X-Claim-Token": due["claim_token"]}
        assert (await router.http.get("/balance", headers=claim)).status_code == 200
        async with event_stream(router, path, claim) as stream:
            assert (await stream.next()).name == "late"
            assert await _is_over(stream)


async def _is_over(stream: Stream) -> bool:
    try:
        await stream.next()
    except StopAsyncIteration:
        return True
    return False
