"""The llama.cpp engine with the real library and the model that ships with it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import random
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.worker_stand_ins import PATIENCE_S, RecordingSink
from worker import demo_model
from worker.engines import Done
from worker.engines.llama_cpp import LlamaCppEngine
from worker.engines.llama_measuring import SLOT_OPTIONS
from worker.errors import JobError
from worker.protocol import (
    ChatSpec,
    CompletionSpec,
    EmbeddingSpec,
    FailureCode,
    FinishReason,
    JobSpec,
    ModelKind,
    Sampling,
)

GREEDY = Sampling(temperature=0)
ENDLESS = {"2": -100.0}  # token 2 is the model's end of text
END_OF_TEXT = 2


@pytest_asyncio.fixture
async def engine() -> AsyncIterator[LlamaCppEngine]:
    engine = LlamaCppEngine(demo_model.PATH, name=demo_model.NAME, slots=4, threads=1)
    await engine.start(lambda fraction, words: None)
    yield engine
    await engine.aclose()


def chat(question: str, **fields: Any) -> ChatSpec:
    fields = {"max_tokens": 80, "sampling": GREEDY, **fields}
    return ChatSpec(
        model=demo_model.NAME, messages=[{"role": "user", "content": question}], **fields
    )


async def run(
    engine: LlamaCppEngine, job: JobSpec, sink: RecordingSink | None = None
) -> tuple[str, Done]:
    sink = sink or RecordingSink()
    done = await asyncio.wait_for(engine.generate(job, sink), PATIENCE_S)
    return sink.text, done


async def fails(engine: LlamaCppEngine, job: JobSpec) -> JobError:
    with pytest.raises(JobError) as caught:
        await run(engine, job)
    return caught.value


async def test_it_answers_by_the_chat_template_of_the_file(engine: LlamaCppEngine):
    text, done = await run(engine, chat("What is the capital of France?"))
    assert "Paris" in text
    assert done.finish_reason is FinishReason.STOP


async def test_the_model_is_served_for_text_and_for_embeddings(engine: LlamaCppEngine):
    assert [(model.id, model.kind) for model in engine.models] == [
        (demo_model.NAME, ModelKind.TEXT),
        (demo_model.NAME, ModelKind.EMBEDDING),
    ]
    assert engine.models[0].context_length == 1024
    assert engine.slots == 4


async def test_the_load_reports_its_progress_up_to_the_end():
    seen: list[float] = []
    engine = LlamaCppEngine(demo_model.PATH, name="m", slots=1, threads=1)
    await engine.start(lambda fraction, words: seen.append(fraction))
    await engine.aclose()
    assert seen == sorted(seen)
    assert seen[-1] == 1


async def test_several_answers_are_written_at_the_same_time(engine: LlamaCppEngine):
    """Four slots: every answer has begun before any of them has ended."""
    order: list[tuple[str, int]] = []

    class Watched(RecordingSink):
        def __init__(self, number: int) -> None:
            super().__init__()
            self.number = number

        def write(
            self, text: str, *, tokens: int | None = None, delta: dict[str, Any] | None = None
        ) -> None:
            order.append(("wrote", self.number))
            super().write(text, tokens=tokens, delta=delta)

    async def one(number: int) -> str:
        job = chat(f"Tell me a story about {number} foxes.", sampling=Sampling(seed=number))
        text, done = await run(engine, job, Watched(number))
        order.append(("ended", number))
        assert done.usage is not None and done.usage.completion_tokens > 20
        return text

    texts = await asyncio.gather(*map(one, range(4)))
    begun = list(itertools.takewhile(lambda event: event[0] == "wrote", order))
    assert {number for _, number in begun} == {0, 1, 2, 3}
    assert len(set(texts)) == 4


async def test_without_settings_it_measures_how_many_slots_and_threads_are_best(
    caplog: pytest.LogCaptureFixture,
):
    engine = LlamaCppEngine(demo_model.PATH, name="m")
    told: list[str] = []
    with caplog.at_level(logging.INFO, logger="worker"):
        await engine.start(lambda fraction, words: told.append(words))
    try:
        assert engine.slots in SLOT_OPTIONS
        assert {"measuring threads", "measuring slots"} <= set(told)
        assert "tokens/s by threads 1:" in caplog.text
        sink = RecordingSink()
        done = await engine.generate(chat("What is the capital of France?"), sink)
        assert done.usage is not None and sink.text
    finally:
        await engine.aclose()


async def test_more_jobs_than_slots_all_end(engine: LlamaCppEngine):
    answers = await asyncio.gather(
        *(run(engine, chat(f"What is {n} plus 1?", max_tokens=20)) for n in range(11))
    )
    assert all(text and done.usage for text, done in answers)


async def test_sequences_in_one_batch_do_not_mix(engine: LlamaCppEngine):
    questions = {
        "What is the capital of Japan?": "Tokyo",
        "What is the opposite of hot?": "cold",
        "What is the capital of Italy?": "Rome",
        "What is the opposite of big?": "small",
    }
    answers = await asyncio.gather(*(run(engine, chat(question)) for question in questions))
    for (text, _), expected in zip(answers, questions.values(), strict=True):
        assert expected in text


async def test_token_counts_are_exact(engine: LlamaCppEngine):
    """What is billed: the counts agree with the tokenizer, and the chunks with the total."""
    sink = RecordingSink()
    text, done = await run(engine, chat("Tell me a story about a fox.", max_tokens=50), sink)
    assert done.usage is not None
    assert done.usage.completion_tokens == 50 == sink.tokens
    assert done.finish_reason is FinishReason.LENGTH
    prompt = "<|im_start|>user\nTell me a story about a fox.<|im_end|>\n<|im_start|>assistant\n"
    again = await run(engine, CompletionSpec(model="m", prompt=prompt, max_tokens=1))
    assert again[1].usage is not None
    assert again[1].usage.prompt_tokens == done.usage.prompt_tokens
    # The text, given back as a prompt, is as many tokens as were counted for it.
    counted = await run(engine, CompletionSpec(model="m", prompt=text, max_tokens=1))
    assert counted[1].usage is not None
    assert counted[1].usage.prompt_tokens == 50


async def test_the_end_token_is_not_counted_or_shown(engine: LlamaCppEngine):
    sink = RecordingSink()
    text, done = await run(engine, chat("What is the opposite of hot?"), sink)
    assert done.usage is not None and done.usage.completion_tokens == sink.tokens
    assert "<|" not in text and text.endswith("cold.")


async def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(engine: LlamaCppEngine):
    whole, _ = await run(engine, chat("Tell me a story about a fox."))
    stop = whole[20:31]
    text, done = await run(engine, chat("Tell me a story about a fox.", stop=[stop]))
    assert text == whole[: whole.index(stop)]
    assert done.finish_reason is FinishReason.STOP


async def test_without_its_stop_string_the_answer_is_whole(engine: LlamaCppEngine):
    whole, _ = await run(engine, chat("Tell me a story about a fox."))
    text, _ = await run(engine, chat("Tell me a story about a fox.", stop=["never said"]))
    assert text == whole


async def test_a_cancelled_job_ends_soon_with_its_counts(engine: LlamaCppEngine):
    job = chat("Tell me a story.", max_tokens=900, sampling=Sampling(seed=1, logit_bias=ENDLESS))
    sink = RecordingSink(cancel_after_tokens=10)
    _, done = await run(engine, job, sink)
    assert done.finish_reason is FinishReason.CANCELLED
    assert done.usage is not None
    assert 10 <= done.usage.completion_tokens == sink.tokens < 900
    text, _ = await run(engine, chat("What is the capital of France?"))
    assert "Paris" in text


async def test_a_job_cancelled_while_it_waits_for_a_slot_ends_without_output(
    engine: LlamaCppEngine,
):
    long = chat("Tell me a story.", max_tokens=300, sampling=Sampling(seed=1, logit_bias=ENDLESS))
    sinks = [RecordingSink() for _ in range(4)]
    running = [asyncio.create_task(run(engine, long, sink)) for sink in sinks]
    await asyncio.gather(*(asyncio.wait_for(sink.wrote.wait(), PATIENCE_S) for sink in sinks))
    waiting = RecordingSink()
    waiting.cancel()
    text, done = await run(engine, long, waiting)
    assert (text, done.finish_reason) == ("", FinishReason.CANCELLED)
    for sink in sinks:
        sink.cancel()
    await asyncio.gather(*running)


async def test_the_same_seed_gives_the_same_answer_and_another_seed_another(
    engine: LlamaCppEngine,
):
    async def story(seed: int) -> str:
        job = chat("Tell me a story.", sampling=Sampling(temperature=1, seed=seed))
        return (await run(engine, job))[0]

    first, again, other = await story(7), await story(7), await story(8)
    assert first == again != other


async def test_without_a_seed_answers_differ(engine: LlamaCppEngine):
    job = chat("Tell me a story.", sampling=Sampling(temperature=1))
    assert len({(await run(engine, job))[0] for _ in range(4)}) > 1


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1e-30},
        {"temperature": 5, "top_k": 0, "top_p": 1, "min_p": 0},
        {"top_p": 0},
        {"min_p": 1},
        {"repeat_penalty": 1e-30},
        {"repeat_penalty": 0},
        {"presence_penalty": 2, "frequency_penalty": -2},
        {"seed": -1},
        {"seed": 2**63 - 1},
        {"logit_bias": {"5": 1e30, "6": -1e30}},
        {"top_k": 1_000_000},
    ],
    ids=str,
)
async def test_the_ends_of_every_sampling_range_are_survived(
    engine: LlamaCppEngine, sampling: dict[str, Any]
):
    _, done = await run(engine, chat("Hello!", max_tokens=12, sampling=Sampling(**sampling)))
    assert done.usage is not None


async def test_a_bias_forces_and_forbids_tokens(engine: LlamaCppEngine):
    forced = Sampling(temperature=0, logit_bias={"300": 100})
    text, done = await run(engine, chat("Hello!", max_tokens=3, sampling=forced))
    assert done.usage is not None and done.usage.completion_tokens == 3
    assert len(text) % 3 == 0 and text == text[: len(text) // 3] * 3


async def test_penalties_keep_the_model_from_repeating_itself(engine: LlamaCppEngine):
    async def distinct(sampling: dict[str, Any]) -> int:
        job = CompletionSpec(
            model="m",
            prompt="the the the the the the the",
            max_tokens=30,
            sampling=Sampling(temperature=0, logit_bias=ENDLESS | {"300": 20.0}, **sampling),
        )
        return len(set((await run(engine, job))[0].split()))

    assert await distinct({"frequency_penalty": 2, "presence_penalty": 2}) > await distinct({})


async def test_a_bias_on_a_token_that_is_not_there_is_refused(engine: LlamaCppEngine):
    error = await fails(engine, chat("Hello!", sampling=Sampling(logit_bias={"99999": 1})))
    assert error.code is FailureCode.BAD_REQUEST and not error.retryable


async def test_a_prompt_longer_than_the_context_is_the_jobs_fault(engine: LlamaCppEngine):
    """api.md 1: the job ends with a full refund, and no blame on the worker."""
    error = await fails(engine, chat("word " * 3000))
    assert error.code is FailureCode.PROMPT_TOO_LONG and not error.retryable
    error = await fails(engine, CompletionSpec(model="m", prompt=[5] * 1024, max_tokens=1))
    assert error.code is FailureCode.PROMPT_TOO_LONG


async def test_the_longest_prompt_that_fits_gets_one_token(engine: LlamaCppEngine):
    job = CompletionSpec(
        model="m", prompt=[300] * 1023, max_tokens=50, sampling=Sampling(logit_bias=ENDLESS)
    )
    _, done = await run(engine, job)
    assert done.usage is not None
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (1023, 1)
    assert done.finish_reason is FinishReason.LENGTH


async def test_a_full_context_ends_the_answer_by_length(engine: LlamaCppEngine):
    job = CompletionSpec(
        model="m", prompt=[300] * 1000, max_tokens=500, sampling=Sampling(logit_bias=ENDLESS)
    )
    _, done = await run(engine, job)
    assert done.usage is not None and done.usage.completion_tokens == 24
    assert done.finish_reason is FinishReason.LENGTH


async def test_a_long_prompt_does_not_stop_an_answer_that_is_being_written(
    engine: LlamaCppEngine,
):
    writer = RecordingSink()
    endless = chat("Tell me a story.", max_tokens=900, sampling=Sampling(logit_bias=ENDLESS))
    running = asyncio.create_task(run(engine, endless, writer))
    await asyncio.wait_for(writer.wrote.wait(), PATIENCE_S)
    before = writer.tokens
    _, done = await run(engine, CompletionSpec(model="m", prompt=[301] * 900, max_tokens=1))
    assert done.usage is not None and done.usage.prompt_tokens == 900
    assert writer.tokens > before and not running.done()
    writer.cancel()
    await running


@pytest.mark.parametrize("prompt", ["", []])
async def test_an_empty_prompt_is_refused(engine: LlamaCppEngine, prompt: str | list[int]):
    error = await fails(engine, CompletionSpec(model="m", prompt=prompt, max_tokens=5))
    assert error.code is FailureCode.BAD_REQUEST


async def test_token_ids_that_the_model_does_not_have_are_refused(engine: LlamaCppEngine):
    for token in (-1, 10**6):
        error = await fails(engine, CompletionSpec(model="m", prompt=[token], max_tokens=5))
        assert error.code is FailureCode.BAD_REQUEST


async def test_echo_shows_the_prompt_first_and_does_not_count_it(engine: LlamaCppEngine):
    for prompt in ("Once upon a time", [300, 301]):
        sink = RecordingSink()
        job = CompletionSpec(model="m", prompt=prompt, max_tokens=5, echo=True, sampling=GREEDY)
        text, done = await run(engine, job, sink)
        plain, _ = await run(engine, job.model_copy(update={"echo": False}))
        assert text.endswith(plain) and len(text) > len(plain)
        assert done.usage is not None and done.usage.completion_tokens == sink.tokens == 5


async def test_a_suffix_is_refused_by_a_model_that_cannot_fill_in(engine: LlamaCppEngine):
    job = CompletionSpec(model="m", prompt="a", suffix="b", max_tokens=5)
    assert (await fails(engine, job)).code is FailureCode.BAD_REQUEST


async def test_characters_of_several_tokens_come_out_whole(engine: LlamaCppEngine):
    """The model has no token for these: it is made to say them byte by byte."""
    words = "naïve 😀 日本"
    form = {"type": "json_object", "schema": {"const": words}}
    sink = RecordingSink()
    text, done = await run(engine, chat("Hello!", response_format=form), sink)
    assert json.loads(text) == words
    assert not any("\ufffd" in piece for piece, _ in sink.pieces)
    assert done.usage is not None
    assert done.usage.completion_tokens == sink.tokens > len(sink.pieces)


async def test_json_mode_gives_json(engine: LlamaCppEngine):
    schema = {
        "type": "object",
        "properties": {"answer": {"type": "string", "maxLength": 12}},
        "required": ["answer"],
    }
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    text, done = await run(engine, chat("Say hi", response_format=form))
    assert len(json.loads(text)["answer"]) <= 12
    assert done.finish_reason is FinishReason.STOP


async def test_a_grammar_and_a_ban_of_the_end_do_not_break_the_engine(engine: LlamaCppEngine):
    """Together they leave no token allowed; llama.cpp would end the process if it came to that."""
    schema = {"type": "object", "properties": {}, "additionalProperties": False}
    job = chat(
        "Say hi",
        response_format={"type": "json_object", "schema": schema},
        sampling=Sampling(temperature=0, logit_bias={str(t): -1e9 for t in range(100)}),
    )
    text, done = await run(engine, job)
    assert json.loads(text) == {}
    assert done.finish_reason is FinishReason.STOP


@pytest.mark.parametrize(
    "constant",
    [
        "naïve 😀 日本",
        'quote " and \\ backslash',
        "line\nbreak\ttab",
        "\x00",
        {"a\\n": ["é"]},
        7,
        None,
    ],
    ids=str,
)
async def test_a_constant_comes_out_as_it_was_asked_for(engine: LlamaCppEngine, constant: Any):
    form = {"type": "json_object", "schema": {"const": constant}}
    text, _ = await run(engine, chat("Hello!", response_format=form))
    assert json.loads(text) == constant


@pytest.mark.parametrize(
    ("pattern", "flags"),
    [
        (r"^\d{3}$", r"[0-9]{3}"),
        (r"^[\w\-]{1,4}\.$", r"[\w-]{1,4}[.]"),
        (r"^(yes|no)$", "(yes|no)"),
    ],
)
async def test_a_pattern_is_kept_to(engine: LlamaCppEngine, pattern: str, flags: str):
    form = {"type": "json_object", "schema": {"type": "string", "pattern": pattern}}
    text, _ = await run(engine, chat("Hello!", response_format=form))
    assert re.fullmatch(flags, json.loads(text), re.ASCII)


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#/properties/a", "properties": {"a": {"$ref": "#/properties/a"}}},
        {"type": "object", "properties": {"a": {"$ref": "#/properties/a"}}, "required": ["a"]},
        {"enum": []},
        {"type": "string", "pattern": r"^\bsecret word$"},
        {"type": "string", "pattern": "^a**$"},
        {"anyOf": []},
    ],
    ids=str,
)
async def test_a_schema_that_makes_no_sense_harms_nobody_and_is_not_printed(
    engine: LlamaCppEngine, schema: dict[str, Any], capfd: pytest.CaptureFixture[str]
):
    form = {"type": "json_object", "schema": schema}
    with contextlib.suppress(JobError):
        await run(engine, chat("Hello!", response_format=form, max_tokens=20))
    text, _ = await run(engine, chat("What is the capital of France?"))
    assert "Paris" in text
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "form",
    [
        {"type": "json_schema"},
        {"type": "yaml"},
        {"type": "json_object", "schema": {"type": "no such type"}},
        {"type": "json_object", "schema": {"$ref": "https://example.org/schema"}},
        {"type": "json_object", "schema": {"type": "string", "maxLength": 10**9}},
        {"type": "json_object", "schema": {"type": "string", "pattern": "^a{1000000}$"}},
        {"type": "json_object", "schema": {"enum": ["x" * 20_000]}},
    ],
    ids=["no schema", "unknown type", "bad schema", "remote", "long", "pattern", "large"],
)
async def test_a_format_that_cannot_be_kept_is_refused(
    engine: LlamaCppEngine, form: dict[str, Any]
):
    error = await fails(engine, chat("Say hi", response_format=form))
    assert error.code is FailureCode.BAD_REQUEST


async def test_messages_in_parts_are_read_and_images_refused(engine: LlamaCppEngine):
    parts = [{"type": "text", "text": "What is the "}, {"type": "text", "text": "capital of Peru?"}]
    job = chat("").model_copy(update={"messages": [{"role": "user", "content": parts}]})
    assert "Lima" in (await run(engine, job))[0]
    image = [{"type": "image_url", "image_url": {"url": "data:"}}]
    job = chat("").model_copy(update={"messages": [{"role": "user", "content": image}]})
    assert (await fails(engine, job)).code is FailureCode.BAD_REQUEST


async def test_embeddings_have_length_one_and_are_alike_for_like_texts(engine: LlamaCppEngine):
    texts = ["Tell me a story about a fox.", "A story about a wolf, please.", "What is 3 plus 4?"]
    job = EmbeddingSpec(model="m", input=[*texts, *texts, [300, 301]])
    _, done = await run(engine, job)
    assert done.data is not None and done.usage is not None
    assert [len(vector) for vector in done.data] == [192] * 7
    for vector in done.data:
        assert sum(x * x for x in vector) == pytest.approx(1, abs=1e-4)

    def likeness(one: int, other: int) -> float:
        assert done.data is not None
        return sum(x * y for x, y in zip(done.data[one], done.data[other], strict=True))

    assert likeness(0, 3) == pytest.approx(1, abs=1e-3)
    assert likeness(0, 1) > likeness(0, 2)
    alone = await run(engine, EmbeddingSpec(model="m", input=[texts[0]]))
    assert alone[1].data is not None
    assert alone[1].data[0] == pytest.approx(done.data[0], abs=0.02)


async def test_more_texts_than_one_batch_holds_are_all_embedded(engine: LlamaCppEngine):
    texts: list[str | list[int]] = [f"Text number {n} of many. " * 8 for n in range(40)]
    _, done = await run(engine, EmbeddingSpec(model="m", input=texts))
    assert done.data is not None and len(done.data) == 40
    assert len({tuple(vector) for vector in done.data}) == 40


async def test_embedding_goes_on_beside_writing(engine: LlamaCppEngine):
    story, embedded = await asyncio.gather(
        run(engine, chat("Tell me a story about a fox.")),
        run(engine, EmbeddingSpec(model="m", input=["one", "two"])),
    )
    assert story[0] and embedded[1].data is not None


@pytest.mark.parametrize("entries", [[], [""], ["word " * 5000]])
async def test_what_cannot_be_embedded_is_refused(engine: LlamaCppEngine, entries: list[str]):
    job = EmbeddingSpec(model="m", input=list(entries))
    error = await fails(engine, job)
    assert error.code in (FailureCode.BAD_REQUEST, FailureCode.PROMPT_TOO_LONG)


async def test_a_closed_engine_fails_jobs_and_does_not_hang():
    engine = LlamaCppEngine(demo_model.PATH, name="m", slots=1, threads=1)
    await engine.start(lambda fraction, words: None)
    job = chat("Tell me a story.", max_tokens=900, sampling=Sampling(logit_bias=ENDLESS))
    sink = RecordingSink()
    running = asyncio.create_task(run(engine, job, sink))
    await asyncio.wait_for(sink.wrote.wait(), PATIENCE_S)
    await engine.aclose()
    await engine.aclose()
    with pytest.raises(JobError) as caught:
        await running
    assert caught.value.code is FailureCode.ENGINE_ERROR and caught.value.retryable
    with pytest.raises(JobError):
        await run(engine, job)


async def test_the_context_can_be_set_smaller(tmp_path: Path):
    engine = LlamaCppEngine(
        demo_model.PATH, name="m", slots=2, threads=1, context=256, max_tokens=9999
    )
    await engine.start(lambda fraction, words: None)
    assert engine.models[0].context_length == engine.models[0].max_tokens == 256
    assert (await fails(engine, chat("word " * 400))).code is FailureCode.PROMPT_TOO_LONG
    await engine.aclose()


async def test_a_crowd_of_jobs_with_cancels_leaves_the_engine_well(engine: LlamaCppEngine):
    """Every job ends, whatever happens to it, and no slot is lost."""
    rng = random.Random(1)

    async def one(number: int) -> FinishReason | FailureCode:
        sink = RecordingSink(cancel_after_tokens=rng.choice([None, None, 1, 5, 30]))
        if rng.random() < 0.1:
            sink.cancel()
        job: JobSpec = chat(
            rng.choice(["Tell me a story.", "Hello!", f"What is {number} plus 1?", "x " * 2000]),
            max_tokens=rng.choice([1, 10, 60]),
            stop=rng.choice([[], ["."], ["the"]]),
            sampling=Sampling(seed=number, temperature=rng.choice([0, 1])),
        )
        if rng.random() < 0.2:
            job = EmbeddingSpec(model="m", input=[f"text {number}"] * rng.randint(1, 40))
        await asyncio.sleep(rng.random() / 10)
        try:
            done = await engine.generate(job, sink)
        except JobError as error:
            return error.code
        if done.usage is not None and not isinstance(job, EmbeddingSpec):
            assert sink.tokens <= done.usage.completion_tokens <= job.max_tokens
        return done.finish_reason

    async with asyncio.timeout(2 * PATIENCE_S):
        endings = set(await asyncio.gather(*map(one, range(80))))
    assert endings == {
        FinishReason.STOP,
        FinishReason.LENGTH,
        FinishReason.CANCELLED,
        FailureCode.PROMPT_TOO_LONG,
    }
    texts = await asyncio.gather(
        *(run(engine, chat("What is the capital of France?")) for _ in range(4))
    )
    assert all("Paris" in text for text, _ in texts)
