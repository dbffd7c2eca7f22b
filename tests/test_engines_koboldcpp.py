"""The engine for KoboldAI servers, against stand-ins for KoboldCpp and KoboldAI (KC-13, KP-8)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.worker_stand_ins import PATIENCE_S, RecordingSink, http_server
from worker.engines import Engine, open_engine
from worker.errors import EngineStartError, JobError
from worker.protocol import (
    ChatSpec,
    CompletionSpec,
    EmbeddingSpec,
    FailureCode,
    FinishReason,
    JobSpec,
    Sampling,
    Usage,
)
from worker.settings import ChatTemplate, EngineName, WorkerSettings


class KoboldCppStandIn:
    """KoboldCpp's paths; a token is a word. `old` leaves out what KoboldAI United has not."""

    def __init__(self, *, old: bool = False) -> None:
        self.old = old
        self.name = "koboldcpp/tiny" if not old else "tiny-united"
        self.words = ["Once", " upon", " a", " time"]
        self.busy_times = 0
        self.hangs_after = False
        self.finish_reason = "length"
        self.bodies: list[dict[str, Any]] = []
        self.aborted: list[str] = []

    def routes(self) -> list[Route]:
        root = "/api/latest" if self.old else "/api/v1"
        routes = [
            Route(f"{root}/model", self.model),
            Route(f"{root}/config/max_context_length", self.max_context_length),
            Route(f"{root}/config/max_length", self.max_length),
            Route(f"{root}/generate", self.generate, methods=["POST"]),
        ]
        if not self.old:
            extra = "/api/extra"
            routes += [
                Route(f"{extra}/true_max_context_length", self.true_context),
                Route(f"{extra}/tokencount", self.token_count, methods=["POST"]),
                Route(f"{extra}/generate/stream", self.stream, methods=["POST"]),
                Route(f"{extra}/abort", self.abort, methods=["POST"]),
            ]
        return routes

    async def model(self, request: Request) -> Response:
        return JSONResponse({"result": self.name})

    async def max_context_length(self, request: Request) -> Response:
        return JSONResponse({"value": 4096})

    async def true_context(self, request: Request) -> Response:
        return JSONResponse({"value": 64})

    async def max_length(self, request: Request) -> Response:
        return JSONResponse({"value": 32})

    async def token_count(self, request: Request) -> Response:
        text = (await request.json())["prompt"]
        return JSONResponse({"value": len(text.split()), "ids": []})

    async def generate(self, request: Request) -> Response:
        self.bodies.append(await request.json())
        if self.busy_times:
            self.busy_times -= 1
            return JSONResponse({"detail": {"msg": "Server is busy", "type": "busy"}}, 503)
        return JSONResponse({"results": [{"text": "".join(self.words)}]})

    async def stream(self, request: Request) -> Response:
        self.bodies.append(await request.json())
        if self.busy_times:
            self.busy_times -= 1
            return JSONResponse({"detail": {"msg": "Server is busy", "type": "busy"}}, 503)
        return StreamingResponse(self.events(), media_type="text/event-stream")

    async def events(self) -> AsyncIterator[str]:
        for word in self.words:
            data = json.dumps({"token": word, "finish_reason": None})
            yield f"event: message\ndata: {data}\n\n"
        if self.hangs_after:
            await asyncio.sleep(PATIENCE_S)
        data = json.dumps({"token": "", "finish_reason": self.finish_reason})
        yield f"event: message\ndata: {data}\n\n"

    async def abort(self, request: Request) -> Response:
        self.aborted.append((await request.json())["genkey"])
        return JSONResponse({"success": "true", "done": "true"})


@asynccontextmanager
async def engine_for(server: KoboldCppStandIn, **fields: Any) -> AsyncIterator[Engine]:
    async with http_server(*server.routes()) as url:
        values: dict[str, Any] = {"engine": EngineName.KOBOLDCPP, "engine_url": url, **fields}
        engine = open_engine(WorkerSettings(_env_file=None, **values))  # pyright: ignore[reportCallIssue]
        engine._busy_pause_s = 0.01  # pyright: ignore[reportAttributeAccessIssue]
        try:
            await engine.start(lambda fraction, words: None)
            yield engine
        finally:
            await engine.aclose()


def completion(prompt: str = "Tell me", **fields: Any) -> CompletionSpec:
    return CompletionSpec(model="m", **{"prompt": prompt, "max_tokens": 10, **fields})


async def run(engine: Engine, job: JobSpec, sink: RecordingSink | None = None):
    sink = sink or RecordingSink()
    done = await asyncio.wait_for(engine.generate(job, sink), PATIENCE_S)
    return sink, done


async def failure(engine: Engine, job: JobSpec) -> FailureCode:
    with pytest.raises(JobError) as caught:
        await run(engine, job)
    return caught.value.code


async def test_model_and_lengths_are_discovered():
    async with engine_for(KoboldCppStandIn()) as engine:
        [model] = engine.models
        assert (model.id, model.context_length, model.max_tokens) == ("koboldcpp/tiny", 64, 32)
        assert engine.slots == 1


async def test_koboldai_united_is_found_under_its_own_path():
    async with engine_for(KoboldCppStandIn(old=True)) as engine:
        [model] = engine.models
        assert (model.id, model.context_length, model.max_tokens) == ("tiny-united", 4096, 32)


async def test_a_server_without_a_model_is_refused():
    server = KoboldCppStandIn()
    server.name = "inactive"
    with pytest.raises(EngineStartError, match="no model loaded"):
        async with engine_for(server):
            pass


async def test_a_server_that_is_not_there_is_told():
    with pytest.raises(EngineStartError, match="no server answers"):
        async with engine_for(KoboldCppStandIn(), engine_url="http://127.0.0.1:9"):
            pass


async def test_the_answer_is_streamed_and_counted():
    async with engine_for(KoboldCppStandIn()) as engine:
        sink, done = await run(engine, completion())
        assert [text for text, _ in sink.pieces] == ["Once", " upon", " a", " time"]
        assert done.usage == Usage(prompt_tokens=2, completion_tokens=4)
        assert done.finish_reason is FinishReason.LENGTH


async def test_an_old_server_answers_at_once_and_uncounted():
    server = KoboldCppStandIn(old=True)
    async with engine_for(server) as engine:
        for _ in range(2):
            sink, done = await run(engine, completion())
            assert (sink.text, done.usage) == ("Once upon a time", None)
            assert done.finish_reason is FinishReason.STOP
        assert len(server.bodies) == 2


async def test_the_request_is_in_koboldais_words():
    server = KoboldCppStandIn()
    async with engine_for(server) as engine:
        sampling = Sampling(temperature=0.5, top_k=3, repeat_penalty=1.1, seed=7, min_p=0.1)
        await run(engine, completion(max_tokens=1000, stop=["\n"], sampling=sampling))
        body = server.bodies[0]
        assert body.pop("genkey").startswith("KCPP")
        assert body == {
            "prompt": "Tell me",
            "max_context_length": 64,
            "max_length": 32,
            "quiet": True,
            "stop_sequence": ["\n"],
            "temperature": 0.5,
            "top_k": 3,
            "rep_pen": 1.1,
            "sampler_seed": 7,
            "min_p": 0.1,
        }


async def test_a_stop_string_that_the_server_leaves_in_is_taken_out():
    server = KoboldCppStandIn()
    async with engine_for(server) as engine:
        sink, done = await run(engine, completion(stop=["n a t"]))
        assert sink.text == "Once upo"
        assert done.finish_reason is FinishReason.STOP


async def test_a_busy_server_is_asked_again_until_it_takes_the_job():
    """KC-13: 503 means busy, retry the same job."""
    for old in (False, True):
        server = KoboldCppStandIn(old=old)
        server.busy_times = 3
        async with engine_for(server) as engine:
            sink, _ = await run(engine, completion())
            assert sink.text == "Once upon a time" and len(server.bodies) == 4


async def test_a_cancelled_job_is_aborted_at_the_server():
    server = KoboldCppStandIn()
    server.hangs_after = True
    async with engine_for(server) as engine:
        sink = RecordingSink()
        running = asyncio.create_task(run(engine, completion(), sink))
        await asyncio.wait_for(sink.wrote.wait(), PATIENCE_S)
        sink.cancel()
        _, done = await running
        assert done.finish_reason is FinishReason.CANCELLED
        assert server.aborted == [server.bodies[0]["genkey"]]


async def test_a_prompt_that_would_be_cut_off_is_refused():
    async with engine_for(KoboldCppStandIn()) as engine:
        code = await failure(engine, completion("word " * 64))
        assert code is FailureCode.PROMPT_TOO_LONG


@pytest.mark.parametrize(
    "job",
    [
        completion([1, 2]),  # pyright: ignore[reportArgumentType]
        completion(""),
        completion(suffix="x"),
        ChatSpec(model="m", messages=[{"role": "user", "content": ""}], max_tokens=1),
        ChatSpec(model="m", messages=[{"role": "tool", "content": "x"}], max_tokens=1),
        ChatSpec(
            model="m",
            messages=[{"role": "user", "content": [{"type": "image_url"}]}],
            max_tokens=1,
        ),
        ChatSpec(
            model="m",
            messages=[{"role": "user", "content": "x"}],
            max_tokens=1,
            response_format={"type": "json_object"},
        ),
    ],
    ids=["ids", "empty", "suffix", "empty chat", "role", "image", "json"],
)
async def test_what_the_api_cannot_do_is_refused(job: JobSpec):
    async with engine_for(KoboldCppStandIn()) as engine:
        assert await failure(engine, job) is FailureCode.BAD_REQUEST


async def test_it_does_not_embed():
    async with engine_for(KoboldCppStandIn()) as engine:
        job = EmbeddingSpec(model="m", input=["a"])
        assert await failure(engine, job) is FailureCode.MODEL_NOT_SERVED


@pytest.mark.parametrize(
    ("template", "prompt", "stop"),
    [
        (
            ChatTemplate.ALPACA,
            "Be kind.\n\n### Instruction:\nHi\n\n### Response:\n",
            "### Instruction:",
        ),
        (
            ChatTemplate.CHATML,
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\n",
            "<|im_end|>",
        ),
        (ChatTemplate.PLAIN, "Be kind.\nUser: Hi\nAssistant:", "\nUser:"),
    ],
)
async def test_chat_is_written_out_by_a_template(template: ChatTemplate, prompt: str, stop: str):
    server = KoboldCppStandIn()
    async with engine_for(server, chat_template=template) as engine:
        parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
        messages: list[dict[str, Any]] = [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": parts},
        ]
        await run(engine, ChatSpec(model="m", messages=messages, max_tokens=5))
        assert server.bodies[0]["prompt"] == prompt
        assert stop in server.bodies[0]["stop_sequence"]
