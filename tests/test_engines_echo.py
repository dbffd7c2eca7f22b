"""The echo engine does what load tests and router tests rely on."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from tests.worker_stand_ins import PATIENCE_S, RecordingSink
from worker.engines.echo import EchoEngine
from worker.errors import JobError
from worker.protocol import (
    ChatSpec,
    CompletionSpec,
    EmbeddingSpec,
    FailureCode,
    FinishReason,
    JobSpec,
    Usage,
)
from worker.settings import EchoFault


def completion(prompt: str | list[int] = "a b c", **fields: Any) -> CompletionSpec:
    return CompletionSpec(model="echo", prompt=prompt, **{"max_tokens": 5, **fields})


async def run(engine: EchoEngine, job: JobSpec, sink: RecordingSink | None = None):
    sink = sink or RecordingSink()
    try:
        return sink, await asyncio.wait_for(engine.generate(job, sink), PATIENCE_S)
    finally:
        await engine.aclose()


async def test_it_repeats_the_prompt_up_to_max_tokens():
    sink, done = await run(EchoEngine(), completion())
    assert sink.text == "a b c a b "
    assert done.usage == Usage(prompt_tokens=3, completion_tokens=5)
    assert (done.finish_reason, sink.tokens) == (FinishReason.LENGTH, 5)


async def test_of_a_chat_it_repeats_the_last_message_with_words():
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "no"},
        {"role": "user", "content": [{"type": "text", "text": "yes sir"}]},
        {"role": "assistant", "content": None},
    ]
    job = ChatSpec(model="echo", messages=messages, max_tokens=3)
    sink, _ = await run(EchoEngine(), job)
    assert sink.text == "yes sir yes "


async def test_a_stop_string_ends_it():
    sink, done = await run(EchoEngine(), completion(stop=["b c"]))
    assert (sink.text, done.finish_reason) == ("a ", FinishReason.STOP)


async def test_prompts_without_words_or_too_long_are_refused():
    for job, code in [
        (completion("  "), FailureCode.BAD_REQUEST),
        (completion([1] * 20), FailureCode.PROMPT_TOO_LONG),
    ]:
        with pytest.raises(JobError) as caught:
            await run(EchoEngine(context=16), job)
        assert caught.value.code is code


async def test_equal_texts_have_equal_vectors_and_others_not():
    _, done = await run(EchoEngine(), EmbeddingSpec(model="echo", input=["a", "b", "a", [1]]))
    assert done.data is not None
    assert done.data[0] == done.data[2] != done.data[1]
    assert done.usage == Usage(prompt_tokens=4)


async def test_a_step_takes_its_time_and_serves_every_job():
    engine = EchoEngine(token_s=0.1)
    began = time.monotonic()
    sinks = [RecordingSink() for _ in range(20)]
    await asyncio.gather(*(engine.generate(completion(), sink) for sink in sinks))
    await engine.aclose()
    took_s = time.monotonic() - began
    # Five steps of twenty tokens, not a hundred tokens one after another.
    assert 0.5 <= took_s < 9
    assert {sink.text for sink in sinks} == {"a b c a b "}


async def test_faults_come_when_they_are_ordered():
    engine = EchoEngine(fault=EchoFault.FAIL_MIDWAY, fault_every=2)
    sink, done = await run(engine, completion())
    assert done.finish_reason is FinishReason.LENGTH
    broken = RecordingSink()
    with pytest.raises(JobError) as caught:
        await run(engine, completion(), broken)
    assert caught.value.code is FailureCode.ENGINE_ERROR
    assert (sink.tokens, broken.tokens) == (5, 2)
    nothing = RecordingSink()
    with pytest.raises(JobError):
        await run(EchoEngine(fault=EchoFault.FAIL_BEFORE), completion(), nothing)
    assert nothing.text == ""


async def test_a_stalled_job_says_nothing_until_it_is_cancelled():
    engine = EchoEngine(fault=EchoFault.STALL)
    sink = RecordingSink()
    running = asyncio.create_task(run(engine, completion(max_tokens=4), sink))
    async with asyncio.timeout(PATIENCE_S):
        while sink.tokens < 2:
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)
    assert not running.done() and sink.tokens == 2
    sink.cancel()
    _, done = await running
    assert done.finish_reason is FinishReason.CANCELLED
    assert done.usage is not None and done.usage.completion_tokens == 2
