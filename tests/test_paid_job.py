"""The story that everything else stands on: a prompt is priced, paid, queued, answered, settled."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from tests.router_rig import MODEL, Rig

CHAT: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Say hello to the world, please."}],
    "max_tokens": 64,
}


async def test_a_prompt_is_paid_queued_answered_and_settled(router: Rig):
    async with router.worker() as worker:
        credential, challenge = await router.buy("/v1/chat/completions", CHAT)
        assert challenge.json()["simulated"] is True
        assert challenge.headers["www-authenticate"].startswith("L402 macaroon=")
        # Paying has queued the job: the worker has it before the client comes back.
        served = await worker.serve("Hello, world.")
        reply = await router.http.post("/v1/chat/completions", json=CHAT, headers=credential)
        assert reply.status_code == 200, reply.text
        body = reply.json()
        assert body["choices"][0]["message"] == {"role": "assistant", "content": "Hello, world."}
        assert body["usage"]["completion_tokens"] == 3
        quote = challenge.json()["quote"]
        fee = int(reply.headers["x-satherd-fee-msat"])
        assert fee + int(reply.headers["x-satherd-refund-msat"]) == quote["offer_msat"]
        assert served["job"]["messages"] == CHAT["messages"]
    books = await router.books()
    assert books.in_order
    assert books.lines["liabilities:worker"] == -(fee - fee * 50_000 // 1_000_000)
    assert books.lines["income:router_fees"] == -(fee * 50_000 // 1_000_000)
    assert "liabilities:escrow" not in {k for k, v in books.lines.items() if v}


async def test_twenty_parallel_uses_of_one_credential_are_one_job_and_one_charge(router: Rig):
    """E6-4 of the peer rules."""
    async with router.worker(slots=4) as worker:
        credential, _ = await router.buy("/v1/chat/completions", CHAT)
        uses = [
            asyncio.create_task(
                router.http.post("/v1/chat/completions", json=CHAT, headers=credential)
            )
            for _ in range(20)
        ]
        await worker.serve("Once.")
        replies = await asyncio.gather(*uses)
        await worker.nothing()
    assert {reply.status_code for reply in replies} == {200}
    assert len({reply.headers["x-satherd-job"] for reply in replies}) == 1
    assert len(await router.query("select 1 from jobs where state = 'succeeded'")) == 1
    assert len(await router.query("select 1 from ledger_transfers where code = 'hold'")) == 1


async def test_the_dearer_job_behind_a_busy_worker_is_served_first(router: Rig):
    async with router.worker() as worker:
        key = await router.bearer()
        first = asyncio.create_task(
            router.http.post("/v1/chat/completions", json=CHAT, headers=key)
        )
        busy = await worker.job()

        async def bought(multiplier: str) -> asyncio.Task:
            body = CHAT | {"user": multiplier}
            headers = key | {"X-Fee-Multiplier": multiplier}
            task = asyncio.create_task(
                router.http.post("/v1/chat/completions", json=body, headers=headers)
            )
            await _until_waiting(router, multiplier)
            return task

        cheap = await bought("1.000")
        assert (await _info(router, queue_length=1))["multiplier_to_be_next"] == "1.001"
        dear = await bought("2.000")
        assert (await _info(router, queue_length=2))["multiplier_to_be_next"] == "2.001"
        await worker.finish(busy, tokens=1)
        order = []
        for _ in range(2):
            job = await worker.job()
            rows = await router.query(
                "select multiplier_milli from jobs where id = $1", job["job_id"]
            )
            order.append(rows[0]["multiplier_milli"])
            await worker.finish(job, tokens=1)
        assert order == [2000, 1000]
        replies = await asyncio.gather(first, cheap, dear)
    assert [reply.status_code for reply in replies] == [200, 200, 200]
    assert (await router.books()).in_order


async def _info(router: Rig, *, queue_length: int) -> dict[str, Any]:
    """The model as `/info` shows it, once it has seen the queue."""
    async with asyncio.timeout(20):
        while True:
            info = (await router.http.get("/info")).json()
            if info["queue_length"] == queue_length:
                return info["models"][0]
            await asyncio.sleep(0.02)


async def _until_waiting(router: Rig, multiplier: str) -> None:
    milli = int(float(multiplier) * 1000)
    async with asyncio.timeout(20):
        while not await router.query("select 1 from queue where multiplier_milli = $1", milli):
            await asyncio.sleep(0.01)


async def test_a_stream_carries_usage_and_ends_with_done_after_the_commit(router: Rig):
    async with router.worker() as worker:
        key = await router.bearer()
        body = CHAT | {"stream": True, "stream_options": {"include_usage": True}}

        async def read() -> list[str]:
            lines = []
            async with router.http.stream(
                "POST", "/v1/chat/completions", json=body, headers=key
            ) as reply:
                assert reply.status_code == 200
                async for line in reply.aiter_lines():
                    if line.startswith("data: "):
                        lines.append(line[6:])
                        if line == "data: [DONE]":
                            rows = await router.query("select state from jobs")
                            assert [row["state"] for row in rows] == ["succeeded"]
            return lines

        reader = asyncio.create_task(read())
        job = await worker.job()
        for i, text in enumerate(("One", " two", " three")):
            await worker.say(job, text, seq=i)
        await worker.finish(job, tokens=3)
        lines = await reader
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    said = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"])
    assert said == "One two three"
    last = next(c for c in chunks if c["choices"] and c["choices"][0]["finish_reason"])
    assert last["usage"]["satherd"]["completion_tokens"] == 3
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 3
