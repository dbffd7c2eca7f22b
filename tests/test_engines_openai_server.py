"""The engine for OpenAI-compatible servers, against a stand-in with their answers' real shapes."""

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
    ModelKind,
    Sampling,
    Usage,
)
from worker.settings import EngineName, WorkerSettings

KEY = "key-of-the-server"


class OpenAIServerStandIn:
    """Streams `deltas` for every prompt. Remembers what it was asked."""

    def __init__(self) -> None:
        self.models: Any = {
            "object": "list",
            "data": [
                {"id": "tiny", "object": "model", "max_model_len": 2048},
                {"id": "nomic-embed-text", "object": "model"},
            ],
        }
        self.deltas: list[dict[str, Any]] = [
            {"role": "assistant", "content": ""},
            {"content": "Hello"},
            {"content": " wörld"},
        ]
        self.finish_reason = "stop"
        self.usage: dict[str, int] | None = {
            "prompt_tokens": 9,
            "completion_tokens": 3,
            "total_tokens": 12,
        }
        self.refusals: list[Response] = []
        self.refuses_stream_options = False
        self.hangs_after = False
        self.breaks_off = False
        self.hung_up = asyncio.Event()
        self.bodies: list[dict[str, Any]] = []

    def routes(self) -> list[Route]:
        return [
            Route("/v1/models", self.list_models),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.complete, methods=["POST"]),
            Route("/v1/embeddings", self.embed, methods=["POST"]),
        ]

    async def list_models(self, request: Request) -> Response:
        if request.headers.get("authorization") != f"Bearer {KEY}":
            return JSONResponse({"error": {"message": "no key"}}, 401)
        return JSONResponse(self.models)

    async def chat(self, request: Request) -> Response:
        return await self.answer(request, "chat.completion.chunk", lambda delta: {"delta": delta})

    async def complete(self, request: Request) -> Response:
        return await self.answer(
            request, "text_completion", lambda delta: {"text": delta.get("content", "")}
        )

    async def answer(self, request: Request, kind: str, shape: Any) -> Response:
        body = await request.json()
        self.bodies.append(body)
        if self.refusals:
            return self.refusals.pop(0)
        if self.refuses_stream_options and "stream_options" in body:
            return JSONResponse({"error": {"message": "unknown field stream_options"}}, 400)
        return StreamingResponse(self.events(body, kind, shape), media_type="text/event-stream")

    async def events(self, body: dict[str, Any], kind: str, shape: Any) -> AsyncIterator[str]:
        def event(**fields: Any) -> str:
            head = {"id": "x", "object": kind, "model": body["model"]}
            return f"data: {json.dumps(head | fields, ensure_ascii=False)}\n\n"

        try:
            yield ": a comment\n\n"
            for delta in self.deltas:
                yield event(choices=[{"index": 0, "finish_reason": None, **shape(delta)}])
            if self.hangs_after:
                await asyncio.sleep(PATIENCE_S)
            if self.breaks_off:
                yield event(error={"message": "CUDA out of memory"})
                return
            last = {"index": 0, "finish_reason": self.finish_reason, **shape({})}
            yield event(choices=[last])
            if self.usage is not None and "stream_options" in body:
                yield event(choices=[], usage=self.usage)
            yield "data: [DONE]\n\n"
        finally:
            self.hung_up.set()

    async def embed(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        if self.refusals:
            return self.refusals.pop(0)
        entries = [
            {"object": "embedding", "index": index, "embedding": [float(index), 0.5]}
            for index in range(len(body["input"]))
        ]
        # In another order, as nothing forbids.
        return JSONResponse(
            {"data": entries[::-1], "usage": {"prompt_tokens": 4, "total_tokens": 4}}
        )


@asynccontextmanager
async def engine_for(
    server: OpenAIServerStandIn, suffix: str = "", **fields: Any
) -> AsyncIterator[Engine]:
    async with http_server(*server.routes()) as url:
        values: dict[str, Any] = {
            "engine": EngineName.OPENAI,
            "engine_url": url + suffix,
            "engine_api_key": KEY,
            "slots": 4,
            **fields,
        }
        engine = open_engine(WorkerSettings(_env_file=None, **values))  # pyright: ignore[reportCallIssue]
        engine._busy_pause_s = 0.01  # pyright: ignore[reportAttributeAccessIssue]
        try:
            await engine.start(lambda fraction, words: None)
            yield engine
        finally:
            await engine.aclose()


def chat(**fields: Any) -> ChatSpec:
    fields = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 20, **fields}
    return ChatSpec(model="tiny", **fields)


async def run(engine: Engine, job: JobSpec, sink: RecordingSink | None = None):
    sink = sink or RecordingSink()
    done = await asyncio.wait_for(engine.generate(job, sink), PATIENCE_S)
    return sink, done


async def failure(engine: Engine, job: JobSpec) -> FailureCode:
    with pytest.raises(JobError) as caught:
        await run(engine, job)
    return caught.value.code


async def test_models_are_discovered_with_their_kind_and_context():
    async with engine_for(OpenAIServerStandIn()) as engine:
        assert [(m.id, m.kind, m.context_length, m.max_tokens) for m in engine.models] == [
            ("tiny", ModelKind.TEXT, 2048, 2048),
            ("nomic-embed-text", ModelKind.EMBEDDING, 4096, 0),
        ]


async def test_a_base_url_with_v1_works_as_well():
    async with engine_for(OpenAIServerStandIn(), suffix="/v1/") as engine:
        sink, _ = await run(engine, chat())
        assert sink.text == "Hello wörld"


async def test_one_model_can_be_chosen_and_renamed():
    server = OpenAIServerStandIn()
    async with engine_for(server, model="tiny", model_name="mine", context=512) as engine:
        assert [(m.id, m.context_length) for m in engine.models] == [("mine", 512)]
        await run(engine, chat().model_copy(update={"model": "mine"}))
        assert server.bodies[0]["model"] == "tiny"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model": "absent"}, "has no model absent"),
        ({"engine_api_key": "wrong"}, "SATHERD_ENGINE_API_KEY"),
        ({"model_name": "mine"}, "SATHERD_MODEL"),
        ({"engine_url": "ftp://x"}, "http"),
        ({"engine_url": "http://127.0.0.1:9"}, "no server answers"),
    ],
    ids=["unknown model", "wrong key", "one name for two", "no http", "nobody there"],
)
async def test_what_cannot_be_served_is_told_at_the_start(fields: dict[str, Any], words: str):
    with pytest.raises(EngineStartError, match=words):
        async with engine_for(OpenAIServerStandIn(), **fields):
            pass


@pytest.mark.parametrize("listed", [{"data": []}, {"error": "x"}, ["tiny"]])
async def test_a_server_that_lists_no_models_is_refused(listed: Any):
    server = OpenAIServerStandIn()
    server.models = listed
    with pytest.raises(EngineStartError):
        async with engine_for(server):
            pass


async def test_chat_is_streamed_with_the_servers_counts():
    server = OpenAIServerStandIn()
    async with engine_for(server) as engine:
        sink, done = await run(engine, chat())
        assert [text for text, _ in sink.pieces] == ["Hello", " wörld"]
        assert done.usage == Usage(prompt_tokens=9, completion_tokens=3)
        assert done.finish_reason is FinishReason.STOP
        assert server.bodies[0]["stream_options"] == {"include_usage": True}


async def test_completions_are_streamed():
    server = OpenAIServerStandIn()
    async with engine_for(server) as engine:
        job = CompletionSpec(model="tiny", prompt="Once", suffix="end", max_tokens=5, echo=True)
        sink, _ = await run(engine, job)
        assert sink.text == "Hello wörld"
        body = server.bodies[0]
        assert (body["prompt"], body["suffix"], body["echo"]) == ("Once", "end", True)


async def test_all_that_the_job_asks_for_is_passed_on_and_nothing_else():
    server = OpenAIServerStandIn()
    tools = [{"type": "function", "function": {"name": "f"}}]
    async with engine_for(server) as engine:
        job = chat(
            stop=["\n"],
            tools=tools,
            tool_choice="auto",
            response_format={"type": "json_object"},
            sampling=Sampling(temperature=0.5, seed=3, logit_bias={"5": -1}, repeat_penalty=1.1),
        )
        await run(engine, job)
        assert server.bodies[0] == {
            "model": "tiny",
            "messages": [{"role": "user", "content": "Hi"}],
            "max_tokens": 20,
            "stream": True,
            "stream_options": {"include_usage": True},
            "stop": ["\n"],
            "tools": tools,
            "tool_choice": "auto",
            "response_format": {"type": "json_object"},
            "temperature": 0.5,
            "seed": 3,
            "logit_bias": {"5": -1},
            "repeat_penalty": 1.1,
            "repetition_penalty": 1.1,
        }
        await run(engine, chat())
        assert set(server.bodies[1]) == {
            "model", "messages", "max_tokens", "stream", "stream_options",
        }  # fmt: skip


async def test_a_server_that_does_not_know_stream_options_is_asked_without_once_and_for_all():
    server = OpenAIServerStandIn()
    server.refuses_stream_options = True
    async with engine_for(server) as engine:
        sink, done = await run(engine, chat())
        assert (sink.text, done.usage) == ("Hello wörld", None)
        await run(engine, chat())
        assert ["stream_options" in body for body in server.bodies] == [True, False, False]


async def test_tool_calls_are_passed_on_as_deltas():
    server = OpenAIServerStandIn()
    call = [{"index": 0, "id": "c1", "function": {"name": "f", "arguments": "{}"}}]
    server.deltas = [{"role": "assistant", "content": None}, {"tool_calls": call}]
    server.finish_reason = "tool_calls"
    async with engine_for(server) as engine:
        sink, done = await run(engine, chat())
        assert sink.deltas == [{"tool_calls": call}]
        assert done.finish_reason is FinishReason.TOOL_CALLS


async def test_cancelling_hangs_up_on_the_server():
    server = OpenAIServerStandIn()
    server.hangs_after = True
    async with engine_for(server) as engine:
        sink = RecordingSink()
        running = asyncio.create_task(run(engine, chat(), sink))
        await asyncio.wait_for(sink.wrote.wait(), PATIENCE_S)
        sink.cancel()
        _, done = await running
        assert done.finish_reason is FinishReason.CANCELLED
        await asyncio.wait_for(server.hung_up.wait(), PATIENCE_S)


async def test_a_job_cancelled_before_it_begins_ends_as_cancelled():
    server = OpenAIServerStandIn()
    async with engine_for(server) as engine:
        sink = RecordingSink()
        sink.cancel()
        _, done = await run(engine, chat(), sink)
        assert (sink.text, done.finish_reason) == ("", FinishReason.CANCELLED)
        assert not server.bodies


async def test_a_busy_server_is_asked_again():
    server = OpenAIServerStandIn()
    server.refusals = [JSONResponse({}, 503), JSONResponse({}, 429)]
    async with engine_for(server) as engine:
        sink, _ = await run(engine, chat())
        assert sink.text == "Hello wörld" and len(server.bodies) == 3


async def test_a_server_that_stays_busy_is_overloaded():
    server = OpenAIServerStandIn()
    server.refusals = [JSONResponse({}, 503) for _ in range(5)]
    async with engine_for(server) as engine:
        assert await failure(engine, chat()) is FailureCode.OVERLOADED


@pytest.mark.parametrize(
    ("status", "message", "code"),
    [
        (400, "This model's maximum context length is 2048 tokens", FailureCode.PROMPT_TOO_LONG),
        (400, "the request exceeds the available context size", FailureCode.PROMPT_TOO_LONG),
        (400, "messages must alternate", FailureCode.BAD_REQUEST),
        (422, "bad", FailureCode.BAD_REQUEST),
        (401, "key", FailureCode.ENGINE_ERROR),
        (404, "no such model", FailureCode.MODEL_NOT_SERVED),
        (500, "oops", FailureCode.ENGINE_ERROR),
    ],
)
async def test_a_refusal_becomes_our_code(status: int, message: str, code: FailureCode):
    server = OpenAIServerStandIn()
    server.refusals = [JSONResponse({"error": {"message": message}}, status) for _ in range(2)]
    async with engine_for(server) as engine:
        assert await failure(engine, chat()) is code


async def test_an_error_within_the_stream_fails_the_job():
    server = OpenAIServerStandIn()
    server.breaks_off = True
    async with engine_for(server) as engine:
        assert await failure(engine, chat()) is FailureCode.ENGINE_ERROR


async def test_a_stream_of_something_else_fails_the_job():
    server = OpenAIServerStandIn()
    server.refusals = [Response("data: <html>\n\n"), Response("")]
    async with engine_for(server) as engine:
        assert await failure(engine, chat()) is FailureCode.ENGINE_ERROR
        assert await failure(engine, chat()) is FailureCode.ENGINE_ERROR


async def test_embeddings_come_in_the_order_of_the_inputs():
    server = OpenAIServerStandIn()
    async with engine_for(server) as engine:
        job = EmbeddingSpec(model="nomic-embed-text", input=["a", "b", [1, 2]])
        _, done = await run(engine, job)
        assert done.data == [[0.0, 0.5], [1.0, 0.5], [2.0, 0.5]]
        assert done.usage == Usage(prompt_tokens=4)
        assert server.bodies[0]["input"] == ["a", "b", [1, 2]]


async def test_embeddings_that_are_missing_fail_the_job():
    server = OpenAIServerStandIn()
    server.refusals = [JSONResponse({"data": []}), JSONResponse({"oops": 1})]
    async with engine_for(server) as engine:
        job = EmbeddingSpec(model="nomic-embed-text", input=["a"])
        assert await failure(engine, job) is FailureCode.ENGINE_ERROR
        assert await failure(engine, job) is FailureCode.ENGINE_ERROR


async def test_a_server_that_has_gone_is_noticed():
    async with engine_for(OpenAIServerStandIn()) as engine:
        assert await engine.check()
        engine._server.url = "http://127.0.0.1:9"  # pyright: ignore[reportAttributeAccessIssue]
        assert not await engine.check()
        assert await failure(engine, chat()) is FailureCode.ENGINE_ERROR
