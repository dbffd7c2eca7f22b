"""The OpenAI door while a job waits, when there is nobody to wait for, and at its edges."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from tests.door_tools import CHAT, JOB, busy_worker, code, post_job, token, until_state
from tests.router_rig import MODEL, PATIENCE_S, Rig

PATH = "/v1/chat/completions"
FUNDS = 100_000


async def test_a_stream_that_waits_shows_its_place_in_comments(router: Rig):
    """§3.5: clients and proxies must not time out, and clients must not see an event they do not
    know."""
    payer = await router.bearer(FUNDS)
    async with router.worker() as worker:
        busy = await busy_worker(router, worker)
        await post_job(router, payer, fee_multiplier="2")
        lines: list[str] = []
        placed = asyncio.Event()

        async def read() -> None:
            body = CHAT | {"stream": True}
            async with router.http.stream("POST", PATH, json=body, headers=payer) as reply:
                assert reply.status_code == 200
                assert reply.headers["content-type"].startswith("text/event-stream")
                assert reply.headers["x-satherd-job"]
                async for line in reply.aiter_lines():
                    lines.append(line)
                    if line == ": position 2":
                        placed.set()

        reader = asyncio.create_task(read())
        await asyncio.wait_for(placed.wait(), PATIENCE_S)
        await worker.finish(busy, tokens=0)
        for text in ("Not mine.", "Mine."):
            await worker.serve(text)
        await reader
    assert [line for line in lines if line and not line.startswith((":", "data: "))] == []
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == "Mine."
    assert lines[lines.index("data: [DONE]") :] == ["data: [DONE]", ""]


async def test_what_fails_at_once_is_an_http_error_and_no_stream(router: Rig):
    """E1-8: decided before the first byte leaves."""
    payer = await router.bearer(FUNDS)
    async with router.worker() as worker:
        body = CHAT | {"stream": True}
        asked = asyncio.create_task(router.http.post(PATH, json=body, headers=payer))
        await worker.fail(await worker.job(), "prompt_too_long")
        reply = await asked
        assert code(reply) == (400, "prompt_too_long")
        assert reply.json()["error"]["refunded_msat"] > 0


async def test_a_router_that_shuts_down_takes_nothing_new_and_finishes_what_runs(router: Rig):
    payer = await router.bearer(FUNDS)
    async with router.worker() as worker:
        links = await post_job(router, payer)
        job = await worker.job()
        router.core.draining = True
        try:
            for path, body in ((PATH, CHAT), ("/jobs", JOB), ("/quotes", JOB)):
                refused = await router.http.post(path, json=body, headers=payer)
                assert code(refused) == (503, "draining"), path
                assert int(refused.headers["retry-after"]) > 0
            await worker.say(job, "To the end.")
            await worker.finish(job, tokens=3)
            await until_state(router, links["id"], "succeeded")
            shown = await router.http.get(links["status_url"], headers=token(links))
            assert shown.json()["result"]["choices"][0]["message"]["content"] == "To the end."
        finally:
            router.core.draining = False
    assert await router.query("select 1 from jobs where id <> $1", links["id"]) == []


async def test_a_prompt_reaches_the_worker_as_it_was_sent(router: Rig):
    payer = await router.bearer(FUNDS)
    content = [
        {"type": "text", "text": 'NUL \0, \u202e, \U0001f469\u200d\U0001f680, é, \\, "quoted"'},
        {"type": "text", "text": "</s><|im_end|>\n\ndata: [DONE]"},
    ]
    messages: list[Any] = [
        {"role": "system", "content": None, "name": "x"},
        {"role": "user", "content": content},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {}}]},
        {"role": "tool", "content": "", "tool_call_id": "1"},
    ]
    async with router.worker() as worker:
        await post_job(router, payer, messages=messages, tools=[{"a": None}], tool_choice="auto")
        spec = (await worker.job())["job"]
    assert spec["messages"] == messages
    assert (spec["tools"], spec["tool_choice"]) == ([{"a": None}], "auto")
    assert spec["kind"] == "chat" and spec["model"] == MODEL


async def test_vectors_of_several_models_are_no_one_answer(router: Rig):
    models = [{"id": name, "kind": "embedding", "context_length": 512} for name in "ab"]
    payer = await router.bearer(FUNDS)
    async with router.worker(models=models, slots=2) as worker:
        body = {"models": ["a", "b"], "input": "x"}
        refused = await router.http.post("/v1/embeddings", json=body, headers=payer)
        assert code(refused) == (400, "bad_request")
        assert refused.json()["error"]["param"] == "models"
        # At our own door they are two jobs with an answer each.
        body |= {"kind": "embedding"}
        made = await router.http.post("/jobs", json=body, headers=payer)
        for _ in made.json()["jobs"]:
            job = await worker.job()
            vector = [1.0] if job["job"]["model"] == "a" else [2.0]
            await worker.finish(job, tokens=0, data=[vector])
        for links, expected in zip(made.json()["jobs"], ([1.0], [2.0]), strict=True):
            await until_state(router, links["id"], "succeeded")
            shown = await router.http.get(links["status_url"], headers=token(links))
            assert shown.json()["result"]["data"][0]["embedding"] == expected


async def test_answers_of_several_models_stand_side_by_side(router: Rig):
    models = [{"id": name, "kind": "text", "context_length": 2048} for name in "ab"]
    payer = await router.bearer(FUNDS)
    async with router.worker(models=models, slots=2) as worker:
        body = {"models": ["a", "b"], "messages": CHAT["messages"], "max_tokens": 9}
        for stream in (False, True):
            asked = asyncio.create_task(
                router.http.post(PATH, json=body | {"stream": stream}, headers=payer)
            )
            for _ in range(2):
                job = await worker.job()
                await worker.say(job, f"I am {job['job']['model']}.")
                await worker.finish(job, tokens=3)
            reply = await asked
            assert reply.status_code == 200, reply.text
            if stream:
                chunks = [json.loads(x[6:]) for x in reply.text.splitlines() if '"content":"I' in x]
                said = {c["choices"][0]["index"]: c["choices"][0]["delta"] for c in chunks}
                assert {chunk["model"] for chunk in chunks} == {"a", "b"}
            else:
                said = {c["index"]: c["message"] for c in reply.json()["choices"]}
                assert len(reply.json()["usage"]["satherd"]["jobs"]) == 2
            assert {i: d["content"] for i, d in said.items()} == {0: "I am a.", 1: "I am b."}
