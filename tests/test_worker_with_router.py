"""Both halves of the protocol together: a real router, a real worker, the real llama.cpp."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.router_rig import PATIENCE_S, Rig
from worker import demo_model
from worker.main import run_worker
from worker.settings import WorkerSettings
from worker.shutdown import Shutdown


class Running:
    """A worker in this process. `shutdown` stops it, `task` ends when it has."""

    def __init__(self, rig: Rig, folder: Path, **fields: Any) -> None:
        values: dict[str, Any] = {
            "router_url": rig.url,
            "data_dir": folder,
            "ln_url": f"worker@{rig.lnurl_host}",
            "reconnect_max_s": 0.1,
            **fields,
        }
        settings = WorkerSettings(_env_file=None, **values)  # pyright: ignore[reportCallIssue]
        self.shutdown = Shutdown()
        self.registered = asyncio.Event()
        self.task = asyncio.create_task(
            run_worker(
                settings,
                shutdown=self.shutdown,
                on_registered=lambda answer: self.registered.set(),
            )
        )


@asynccontextmanager
async def worker(rig: Rig, folder: Path, **fields: Any) -> AsyncIterator[Running]:
    running = Running(rig, folder, **fields)
    try:
        await asyncio.wait_for(running.registered.wait(), PATIENCE_S)
        yield running
    finally:
        running.shutdown.ask()
        running.shutdown.ask()
        await asyncio.wait_for(running.task, PATIENCE_S)


def chat(question: str, model: str = demo_model.NAME, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}]
    return {"model": model, "messages": messages, "max_tokens": 60, **fields}


async def test_a_bought_answer_comes_from_the_model_and_is_charged_by_its_count(
    router: Rig, tmp_path: Path
):
    async with worker(router, tmp_path / "worker"):
        credential, _ = await router.buy(
            "/v1/chat/completions", chat("What is the capital of France?", temperature=0)
        )
        reply = await router.http.post(
            "/v1/chat/completions",
            json=chat("What is the capital of France?", temperature=0),
            headers=credential,
        )
        body = reply.json()
        assert "Paris" in body["choices"][0]["message"]["content"]
        assert body["choices"][0]["finish_reason"] == "stop"
        assert body["usage"]["completion_tokens"] == 11
    books = await router.books()
    assert books.in_order and books.lines["liabilities:worker"] < 0


async def test_four_streams_at_once_are_each_whole(router: Rig, tmp_path: Path):
    cities = {"France": "Paris", "Japan": "Tokyo", "Italy": "Rome", "Peru": "Lima"}
    async with worker(router, tmp_path / "worker", slots=4):
        key = await router.bearer()

        async def stream(country: str) -> str:
            body = chat(f"What is the capital of {country}?", stream=True, temperature=0)
            text = ""
            async with router.http.stream(
                "POST", "/v1/chat/completions", json=body, headers=key
            ) as reply:
                assert reply.status_code == 200
                lines = [line async for line in reply.aiter_lines() if line.startswith("data: ")]
            assert lines.pop() == "data: [DONE]"
            for line in lines:
                choices = json.loads(line.removeprefix("data: "))["choices"]
                text += choices[0]["delta"].get("content") or "" if choices else ""
            return text

        texts = await asyncio.gather(*map(stream, cities))
        for text, city in zip(texts, cities.values(), strict=True):
            assert city in text


async def test_embeddings_are_bought_as_well(router: Rig, tmp_path: Path):
    async with worker(router, tmp_path / "worker"):
        reply = await router.http.post(
            "/v1/embeddings",
            json={"model": demo_model.NAME, "input": ["one", "two"]},
            headers=await router.bearer(),
        )
        assert reply.status_code == 200, reply.text
        assert [len(entry["embedding"]) for entry in reply.json()["data"]] == [192, 192]


async def test_a_client_that_goes_frees_the_workers_only_slot(router: Rig, tmp_path: Path):
    """api.md 3.5: prepaid and without an idempotency key, leaving cancels the job."""
    settings = {"engine": "echo", "slots": 1, "echo_token_s": 0.01}
    async with worker(router, tmp_path / "worker", **settings):
        key = await router.bearer(100_000_000)
        body = chat("one two three", "echo", stream=True, max_tokens=20_000)
        async with router.http.stream(
            "POST", "/v1/chat/completions", json=body, headers=key
        ) as reply:
            async for line in reply.aiter_lines():
                if "one" in line:
                    break
        next_one = chat("four", "echo", max_tokens=2)
        reply = await asyncio.wait_for(
            router.http.post("/v1/chat/completions", json=next_one, headers=key), PATIENCE_S
        )
        assert reply.json()["choices"][0]["message"]["content"].split() == ["four", "four"]
        [ended] = await router.query("select state from jobs where state <> 'succeeded'")
        assert ended["state"] == "cancelled"


async def test_a_worker_that_leaves_finishes_its_job_and_gets_no_other(router: Rig, tmp_path: Path):
    """While it finishes, what waits is left for others, and no attempt of it is used up."""
    slow = {"engine": "echo", "slots": 2, "echo_token_s": 0.02}
    async with worker(router, tmp_path / "one", **slow) as leaving:
        key = await router.bearer(100_000_000)

        def buy(words: str, tokens: int) -> asyncio.Task[Any]:
            body = chat(words, "echo", max_tokens=tokens)
            return asyncio.create_task(
                router.http.post(
                    "/v1/chat/completions", json=body, headers=key | {"X-Max-Wait-S": "60"}
                )
            )

        long = buy("long", 40)
        # Until it says something the job may still be on its way to the worker, which then returns it.
        async with asyncio.timeout(PATIENCE_S):
            while not any(running.chunks for running in router.core.attempts.running.values()):
                await asyncio.sleep(0.01)
        leaving.shutdown.ask()
        short = buy("short", 1)
        reply = await asyncio.wait_for(long, PATIENCE_S)
        assert len(reply.json()["choices"][0]["message"]["content"].split()) == 40
        await asyncio.wait_for(leaving.task, PATIENCE_S)
        assert not short.done()
        async with worker(router, tmp_path / "two", **slow):
            reply = await asyncio.wait_for(short, PATIENCE_S)
            assert reply.status_code == 200, reply.text
    attempts = await router.query("select worker_id from attempts")
    assert len(attempts) == 2


async def _until(router: Rig, sql: str) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not await router.query(sql):
            await asyncio.sleep(0.01)
