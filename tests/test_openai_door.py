"""The official `openai` package, unchanged, with a prepaid key."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from tests.door_tools import RATES, set_rates, workers_left
from tests.router_rig import MODEL, Rig, ScriptedWorker

HELLO: list[Any] = [{"role": "user", "content": "Say hello to the world, please."}]
EMBEDDER = [{"id": "embed", "kind": "embedding", "context_length": 512}]


@pytest.fixture
async def client(router: Rig) -> AsyncIterator[AsyncOpenAI]:
    async with sdk(router, await router.key()) as made:
        yield made


def sdk(router: Rig, key: str) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{router.url}/v1", api_key=key, max_retries=0, timeout=10)


async def answer(worker: ScriptedWorker, *texts: str, reason: str = "stop") -> dict[str, Any]:
    """Take a job and stream these texts as its answer."""
    job = await worker.job()
    for seq, text in enumerate(texts):
        await worker.say(job, text, seq=seq)
    await worker.finish(job, reason, tokens=len(texts))
    return job


async def test_a_chat(router: Rig, client: AsyncOpenAI):
    await set_rates(router, RATES)
    async with router.worker() as worker:
        served = asyncio.create_task(answer(worker, "Hello", ", world."))
        reply = await client.chat.completions.with_raw_response.create(
            model=MODEL,
            messages=HELLO,
            max_completion_tokens=64,
            temperature=0.5,
            stop=["END"],
            seed=7,
            extra_body={"top_k": 40},
        )
        spec = (await served)["job"]
    said = reply.parse()
    assert said.object == "chat.completion" and said.model == MODEL and said.created > 0
    assert said.choices[0].message.content == "Hello, world."
    assert (said.choices[0].index, said.choices[0].finish_reason) == (0, "stop")
    assert said.usage is not None
    assert (said.usage.prompt_tokens, said.usage.completion_tokens) == (5, 2)
    satherd = said.usage.model_extra["satherd"] if said.usage.model_extra else {}
    assert satherd["prompt_tokens"] == 8 and satherd["completion_tokens"] == 2
    assert reply.headers["x-satherd-fee-msat"] == str(satherd["fee_msat"]) == "1002"
    assert reply.headers["x-satherd-refund-msat"] == "62"
    assert reply.headers["x-satherd-worker"] == worker.id
    assert said.id.endswith(reply.headers["x-satherd-job"])
    assert spec["stop"] == ["END"] and spec["max_tokens"] == 64
    assert (spec["sampling"]["top_k"], spec["sampling"]["seed"]) == (40, 7)


async def test_a_stream_with_text_that_was_cut_anywhere(router: Rig, client: AsyncOpenAI):
    pieces = ["Grü", "ße \U0001f469‍", "\U0001f680 ", "\u202eé", "\n\n data: [DONE]", ' "quoted" \\']
    async with router.worker() as worker:
        served = asyncio.create_task(answer(worker, *pieces, reason="length"))
        stream = await client.chat.completions.create(
            model=MODEL, messages=HELLO, max_tokens=64, stream=True
        )
        chunks = [chunk async for chunk in stream]
        await served
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "".join(pieces)
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["length"]
    # Without stream_options the facts are in the chunk that has finish_reason (§3.6).
    assert chunks[-1].usage is not None and chunks[-1].usage.model_extra is not None
    assert chunks[-1].usage.model_extra["satherd"]["worker"] == worker.id


async def test_a_stream_with_usage_in_a_chunk_of_its_own(router: Rig, client: AsyncOpenAI):
    async with router.worker() as worker:
        served = asyncio.create_task(answer(worker, "One", " two"))
        stream = await client.chat.completions.create(
            model=MODEL,
            messages=HELLO,
            max_tokens=64,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
        await served
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 2


async def test_three_answers_of_which_one_fails(router: Rig, client: AsyncOpenAI):
    await set_rates(router, RATES)
    async with router.worker(slots=3) as worker:
        for stream in (False, True):
            asked = asyncio.create_task(_ask(client, n=3, stream=stream))
            jobs = sorted([await worker.job() for _ in range(3)], key=_by_seed)
            await worker.fail(jobs[1], "bad_request")
            for job, text in ((jobs[2], "third"), (jobs[0], "first")):
                await worker.say(job, text)
                await worker.finish(job, tokens=1)
            texts, usage = await asked
            assert texts[0] == "first" and texts[2] == "third" and not texts.get(1)
            (failed,) = usage["failed"]
            assert (failed["index"], failed["code"]) == (1, "bad_request")
            # Two prompt fees and two tokens; the third job's money is back.
            assert (usage["fee_msat"], usage["refund_msat"]) == (2002, 3 * 1064 - 2002)
    assert (await router.books()).in_order


def _by_seed(job: dict[str, Any]) -> int:
    return job["job"]["sampling"]["seed"]


async def _ask(client: AsyncOpenAI, *, n: int, stream: bool) -> tuple[dict[int, str], Any]:
    """The texts by index, and `usage.satherd`."""
    if not stream:
        said = await client.chat.completions.create(
            model=MODEL, messages=HELLO, max_tokens=64, n=n, seed=1
        )
        assert said.usage is not None and said.usage.model_extra is not None
        texts = {choice.index: choice.message.content or "" for choice in said.choices}
        return texts, said.usage.model_extra["satherd"]
    texts, usage = {}, None
    chunks = await client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        max_tokens=64,
        n=n,
        seed=1,
        stream=True,
        stream_options={"include_usage": True},
    )
    async for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
        usage = chunk.usage or usage
    assert usage is not None and usage.model_extra is not None
    return texts, usage.model_extra["satherd"]


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_of_which_everything_fails_is_an_error(
    router: Rig, client: AsyncOpenAI, n: int, stream: bool
):
    async with router.worker(slots=3) as worker:
        asked = asyncio.create_task(_ask(client, n=n, stream=stream))
        for _ in range(n):
            await worker.fail(await worker.job(), "bad_request")
        with pytest.raises(openai.APIError) as refused:
            await asked
        assert refused.value.code == "bad_request"
    assert {row["charged_msat"] for row in await router.query("select * from jobs")} == {0}


async def test_a_stream_that_breaks_off_is_an_error_after_its_text(
    router: Rig, client: AsyncOpenAI
):
    async with router.worker() as worker:
        stream = asyncio.create_task(
            client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=64, stream=True)
        )
        job = await worker.job()
        await worker.say(job, "Half")
        chunks = await stream
        first = [await anext(chunks), await anext(chunks)]
        assert first[1].choices[0].delta.content == "Half"
        await worker.fail(job, "engine_error")
        with pytest.raises(openai.APIError) as broken:
            await anext(chunks)
        assert broken.value.code == "job_failed"
        await chunks.close()


async def test_tool_calls_whole_and_in_deltas(router: Rig, client: AsyncOpenAI):
    tools: list[Any] = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    call = {"index": 0, "id": "call_1", "type": "function"}
    pieces = [{"name": "look", "arguments": ""}, {"arguments": '{"a"'}, {"arguments": ":1}"}]

    async def calls(worker: ScriptedWorker) -> dict[str, Any]:
        job = await worker.job()
        for seq, piece in enumerate(pieces):
            delta = {"tool_calls": [(call if seq == 0 else {"index": 0}) | {"function": piece}]}
            frame = {"type": "chunk", "job_id": job["job_id"], "attempt": 1, "seq": seq}
            await worker.send(frame | {"delta": delta, "tokens": 2})
        await worker.finish(job, "tool_calls", tokens=6)
        return job

    async with router.worker() as worker:
        served = asyncio.create_task(calls(worker))
        said = await client.chat.completions.create(model=MODEL, messages=HELLO, tools=tools)
        assert (await served)["job"]["tools"] == tools
        choice = said.choices[0]
        assert choice.finish_reason == "tool_calls" and choice.message.content is None
        assert choice.message.tool_calls is not None
        made: Any = choice.message.tool_calls[0]
        assert (made.id, made.function.name, made.function.arguments) == (
            "call_1",
            "look",
            '{"a":1}',
        )
        served = asyncio.create_task(calls(worker))
        stream = await client.chat.completions.create(
            model=MODEL, messages=HELLO, tools=tools, stream=True
        )
        arguments = ""
        async for chunk in stream:
            for part in chunk.choices[0].delta.tool_calls or ():
                assert part.index == 0 and part.function is not None
                arguments += part.function.arguments or ""
        await served
    assert arguments == '{"a":1}'


async def test_completions_of_several_prompts_with_their_echo(router: Rig, client: AsyncOpenAI):
    async with router.worker(slots=4) as worker:

        async def both() -> None:
            for _ in range(2):
                job = await worker.job()
                assert not job["job"]["echo"], "engines that are asked to echo do it as well"
                await worker.say(job, f"<{job['job']['prompt']}>")
                await worker.finish(job, tokens=1)

        served = asyncio.create_task(both())
        said = await client.completions.create(model=MODEL, prompt=["a", "b"], max_tokens=5)
        await served
        assert said.object == "text_completion"
        assert [(c.index, c.text) for c in said.choices] == [(0, "<a>"), (1, "<b>")]
        served = asyncio.create_task(both())
        said = await client.completions.create(
            model=MODEL, prompt=["a", "b"], max_tokens=5, echo=True
        )
        await served
        assert [choice.text for choice in said.choices] == ["a<a>", "b<b>"]
        served = asyncio.create_task(both())
        texts = {0: "", 1: ""}
        async for chunk in await client.completions.create(
            model=MODEL, prompt=["a", "b"], max_tokens=5, echo=True, stream=True
        ):
            texts[chunk.choices[0].index] += chunk.choices[0].text
        await served
        assert texts == {0: "a<a>", 1: "b<b>"}


async def test_embeddings_as_numbers_and_as_base64(router: Rig, client: AsyncOpenAI):
    """RC-2: clients that ask for base64 decode whatever comes back."""
    vectors = [[0.5, -1.25, 3.0], [1.0, 0.0, 2.0**-10]]
    async with router.worker(models=EMBEDDER) as worker:

        async def serve() -> None:
            await worker.finish(await worker.job(), tokens=0, data=vectors)

        for encoding in ("float", "base64", None):
            served = asyncio.create_task(serve())
            given: dict[str, Any] = {} if encoding is None else {"encoding_format": encoding}
            made = await client.embeddings.create(model="embed", input=["one", "two"], **given)
            await served
            assert [entry.index for entry in made.data] == [0, 1]
            if encoding == "base64":
                assert isinstance(made.data[0].embedding, str)
            else:
                assert [entry.embedding for entry in made.data] == vectors
            assert made.usage.prompt_tokens == made.usage.total_tokens == 5


async def test_models(router: Rig, client: AsyncOpenAI):
    odd = [{"id": "org/name:Q4_K_M", "kind": "text", "context_length": 512}]
    async with router.worker(models=odd):
        listed = await client.models.list()
        assert [model.id for model in listed.data] == ["org/name:Q4_K_M"]
        one = await client.models.retrieve("org/name:Q4_K_M")
        assert (one.id, one.object) == ("org/name:Q4_K_M", "model")
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("nowhere")


async def test_every_refusal_is_the_packages_own_exception(router: Rig, client: AsyncOpenAI):
    async with router.worker():

        async def ask(key: str = client.api_key, **changes: Any) -> None:
            given: dict[str, Any] = {"model": MODEL, "messages": HELLO, "max_tokens": 5} | changes
            async with sdk(router, key) as asker:
                await asker.chat.completions.create(**given)

        with pytest.raises(openai.BadRequestError) as bad:
            await ask(max_tokens=-1)
        assert (bad.value.code, bad.value.param) == ("bad_request", "max_tokens")
        assert bad.value.type == "invalid_request_error"
        with pytest.raises(openai.BadRequestError) as long:
            await ask(messages=[{"role": "user", "content": "x" * 10_000}])
        assert long.value.code == "prompt_too_long"
        with pytest.raises(openai.NotFoundError) as unknown:
            await ask(model="nowhere")
        assert unknown.value.code == "unknown_model"
        with pytest.raises(openai.AuthenticationError) as stranger:
            await ask("sk-" + "A" * 22)
        assert stranger.value.type == "authentication_error"
        # A key that is none of ours, as clients without one send: what anybody without one gets.
        with pytest.raises(openai.APIStatusError) as unpaid:
            await ask("EMPTY")
        assert (unpaid.value.status_code, unpaid.value.code) == (402, "payment_required")
        poor = await router.key(1000)
        with pytest.raises(openai.APIStatusError) as short:
            await ask(poor, max_tokens=1000)
        assert (short.value.status_code, short.value.code) == (402, "insufficient_balance")
        body: Any = short.value.body
        assert body["balance_msat"] == 1000 and body["affordable_max_tokens"] == 0
    await workers_left(router, 0)
    with pytest.raises(openai.InternalServerError) as away:
        await ask()
    assert (away.value.status_code, away.value.code) == (503, "no_worker")
