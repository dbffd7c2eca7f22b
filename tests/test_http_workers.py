"""Workers that are servers, called by HTTP: a real server on a real port answers as the test says."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from router import http_answers
from router.http_endpoints import Endpoints
from router.http_sessions import HttpModel, HttpSession, HttpWorker
from router.sessions import RefusedWorker
from router.settings import Settings
from router.workers import hash_identity
from tests.door_tools import CHAT, post_job, set_rates, until_state
from tests.ports import free_port
from tests.router_rig import MODEL, PATIENCE_S, Rig
from tests.worker_stand_ins import http_server
from worker.protocol import ModelKind


class Model:
    """A server of a model: each request waits until the test has put an answer for it."""

    def __init__(self) -> None:
        self.url = ""
        self.asked: asyncio.Queue[tuple[str, dict[str, Any]]] = asyncio.Queue()
        self.answers: asyncio.Queue[Response] = asyncio.Queue()
        self.probes = 0
        self.connections: set[object] = set()

    async def post(self, request: Request) -> Response:
        self.connections.add(request.client)
        self.asked.put_nowait((request.url.path, json.loads(await request.body())))
        return await self.answers.get()

    async def models(self, request: Request) -> Response:
        self.probes += 1
        return JSONResponse({"object": "list", "data": []})

    async def next(self) -> tuple[str, dict[str, Any]]:
        return await asyncio.wait_for(self.asked.get(), PATIENCE_S)

    def answer(self, body: Any, status: int = 200) -> None:
        self.answers.put_nowait(JSONResponse(body, status))

    def stream(
        self, *events: Any, hold: asyncio.Event | None = None, ends_after_s: float = 0.0
    ) -> None:
        """Events as `data:` lines; with `hold`, the last comes only when it is set. The answer's end
        may come a while after."""

        async def lines() -> AsyncIterator[str]:
            for event in events[:-1]:
                yield f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n"
            if hold is not None:
                await hold.wait()
            last = events[-1]
            yield f"data: {last if isinstance(last, str) else json.dumps(last)}\n\n"
            await asyncio.sleep(ends_after_s)

        self.answers.put_nowait(StreamingResponse(lines(), media_type="text/event-stream"))


@asynccontextmanager
async def model_server() -> AsyncIterator[Model]:
    model = Model()
    routes = (
        Route("/v1/models", model.models),
        Route("/v1/{rest:path}", model.post, methods=["POST"]),
    )
    async with http_server(*routes) as url:
        model.url = url
        yield model


def described(model: Model, **changes: Any) -> HttpWorker:
    given = {
        "identity": hash_identity("project", "test"),
        "models": (HttpModel(MODEL, f"{model.url}/v1/chat/completions", context_length=2048),),
    }
    return HttpWorker(**(given | changes))


def said(text: str, *, reason: str | None = "stop", **more: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    return {"choices": [{"index": 0, "message": message, "finish_reason": reason}], **more}


def delta(text: str, reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": reason}]}


async def test_an_answer_and_its_counts_come_from_the_server_and_the_project_is_paid(router: Rig):
    """DG-1, DG-8: whatever `/v1` path was registered, the job's own is called."""
    await set_rates(router)
    payer = await router.bearer()
    async with model_server() as model:
        address = f"project@{router.lnurl_host}"
        session = await router.core.gate.register_http(described(model, ln_url=address))
        links = await post_job(router, payer)
        path, body = await model.next()
        assert path == "/v1/chat/completions" and body["messages"] == CHAT["messages"]
        assert (body["model"], body["max_tokens"]) == (MODEL, 64)
        usage = {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}
        model.answer(said("Hello.", code=0, message="success", usage=usage))
        row = await until_state(router, links["id"], "succeeded")
        assert row["charged_msat"] == 1002 and session.worker.payable
        completion = await post_job(router, payer, kind="completion", prompt="Once")
        path, _ = await model.next()
        assert path == "/v1/completions"
        model.answer({"choices": [{"index": 0, "text": " more", "finish_reason": "length"}]})
        row = await until_state(router, completion["id"], "succeeded")
        assert row["end_reason"] == "length"


async def test_a_stream_is_relayed_as_it_comes(router: Rig):
    """DG-2; a server that refuses `stream_options` is asked without."""
    payer = await router.bearer()
    async with model_server() as model:
        await router.core.gate.register_http(described(model))
        body = CHAT | {"stream": True}
        hold = asyncio.Event()
        async with router.http.stream(
            "POST", "/v1/chat/completions", json=body, headers=payer
        ) as reply:
            _, first = await model.next()
            assert first["stream_options"] == {"include_usage": True}
            model.answer({"error": {"message": "unknown field", "code": 400}}, 400)
            _, again = await model.next()
            assert "stream_options" not in again and again["stream"] is True
            usage = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}
            end = delta("", "stop") | {"usage": usage}
            model.stream(delta("Hello, "), delta("world."), end, "[DONE]", hold=hold)
            text = ""
            async with asyncio.timeout(PATIENCE_S):
                async for line in reply.aiter_lines():
                    text += line
                    if "world." in line:
                        hold.set()
        assert "Hello, " in text and '"completion_tokens":3' in text


async def test_several_jobs_at_once_up_to_its_slots_and_a_cancelled_one_is_hung_up_on(router: Rig):
    payer = await router.bearer()
    async with model_server() as model:
        session = await router.core.gate.register_http(described(model, slots=2))
        jobs = [await post_job(router, payer) for _ in range(3)]
        await model.next()
        await model.next()
        assert model.asked.empty() and len(session.worker.busy) == 2
        held = [j for j in jobs if j["id"] in session.worker.busy]
        gone = held[0]
        await router.http.delete(
            gone["status_url"], headers={"Authorization": f"Bearer {gone['token']}"}
        )
        await model.next()
        for _ in range(3):
            model.answer(said("Yes."))
        for job in jobs:
            row = await until_state(router, job["id"], "succeeded", "cancelled")
            assert (row["state"] == "cancelled") == (job is gone)


async def test_pictures_edits_and_vectors_go_to_their_own_paths(router: Rig):
    """DG-3, DG-4: types 1 and 2."""
    payer = await router.bearer()
    png = base64.b64encode(b"a picture").decode()
    async with model_server() as model:
        models = tuple(
            HttpModel("painter", model.url, kind, context_length=8192)
            for kind in (ModelKind.IMAGE, ModelKind.IMAGE_EDIT)
        )
        vectors = HttpModel("embedder", f"{model.url}/v1", ModelKind.EMBEDDING)
        await router.core.gate.register_http(described(model, models=(*models, vectors)))
        picture = {"kind": "image", "model": "painter", "prompt": "A rabbit.", "size": "512x512"}
        edit = picture | {"kind": "image_edit", "image": f"data:image/png;base64,{png}"}
        embedding = {"kind": "embedding", "model": "embedder", "input": ["one"]}
        for body, path, data in (
            (picture, "/v1/images/generations", [{"b64_json": png}]),
            (edit, "/v1/images/edits", [{"b64_json": png}]),
            (embedding, "/v1/embeddings", [{"embedding": [0.5], "index": 0}]),
        ):
            made = await router.http.post("/jobs", json=body, headers=payer)
            assert made.status_code == 202, made.text
            asked, sent = await model.next()
            assert asked == path and sent["model"] == body["model"]
            model.answer({"created": 1, "data": data})
            await until_state(router, made.json()["jobs"][0]["id"], "succeeded")


@pytest.mark.parametrize(
    ("answer", "status", "outcome", "blame"),
    [
        ({"error": {"message": "it broke"}}, 500, "engine_error", "worker"),
        ({"code": 1007, "message": "Model not found"}, 200, "engine_error", "worker"),
        ({"error": {"message": "slow down"}}, 429, "overloaded", "nobody"),
        (
            {"error": {"message": "bad", "code": "context_length_exceeded"}},
            400,
            "prompt_too_long",
            "job",
        ),
        ({"choices": []}, 200, "bad_answer", "worker"),
        (["no object"], 200, "bad_answer", "worker"),
    ],
)
async def test_what_a_server_answers_instead_of_an_answer(
    router: Rig, answer: Any, status: int, outcome: str, blame: str
):
    payer = await router.bearer()
    async with model_server() as model:
        session = await router.core.gate.register_http(described(model))
        session.worker.slots = 1
        links = await post_job(router, payer)
        await model.next()
        model.answer(answer, status)
        await until_state(router, links["id"], "queued", "failed", "running")
        model.answer(said("Yes."))
        await until_state(router, links["id"], "succeeded", "failed")
    (first, *_) = await router.query("select outcome, blame from attempts order by n")
    assert (first["outcome"], first["blame"]) == (outcome, blame)


async def test_connections_to_this_machine_are_kept(router: Rig):
    payer = await router.bearer()
    async with model_server() as model:
        await router.core.gate.register_http(described(model))
        for stream in (False, True, False):
            links = await post_job(router, payer, stream=stream)
            await model.next()
            if stream:
                # The end of its answer mostly comes in a packet of its own.
                model.stream(delta("Hello."), delta("", "stop"), "[DONE]", ends_after_s=0.02)
            else:
                model.answer(said("Hello."))
            await until_state(router, links["id"], "succeeded")
        assert len(model.connections) == 1


async def test_a_server_that_does_not_end_its_answer_holds_up_nobody(router: Rig):
    payer = await router.bearer()
    async with model_server() as model:
        await router.core.gate.register_http(described(model))
        links = await post_job(router, payer, stream=True)
        await model.next()
        model.stream(delta("Hello."), delta("", "stop"), "[DONE]", ends_after_s=3600)
        await until_state(router, links["id"], "succeeded")


async def test_a_compressed_answer_is_not_unpacked(router: Rig):
    """Its length would say nothing about what it holds."""
    payer = await router.bearer()
    packed = gzip.compress(json.dumps(said("x" * 100_000)).encode())
    async with model_server() as model:
        session = await router.core.gate.register_http(described(model))
        session.worker.slots = 1
        links = await post_job(router, payer)
        await model.next()
        headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
        model.answers.put_nowait(Response(packed, headers=headers))
        await until_state(router, links["id"], "queued", "failed", "running")
        model.answer(said("Yes."))
        await until_state(router, links["id"], "succeeded", "failed")
    (first, *_) = await router.query("select outcome, blame from attempts order by n")
    assert (first["outcome"], first["blame"]) == ("bad_answer", "worker")


async def test_a_server_that_is_away_gets_no_jobs_until_it_answers_again(
    router: Rig, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(http_answers, "FIRST_REST_S", 0.05)
    payer = await router.bearer()
    port = free_port()
    models = (HttpModel(MODEL, f"http://127.0.0.1:{port}", context_length=2048),)
    worker = HttpWorker(hash_identity("project", "away"), models)
    session = await router.core.gate.register_http(worker)
    links = await post_job(router, payer)
    await until_state(router, links["id"], "queued")
    async with asyncio.timeout(PATIENCE_S):
        while not session.worker.resting:
            await asyncio.sleep(0.01)
    async with router.worker() as other:
        job = await other.job()
        assert job["job_id"] == links["id"]
        await other.say(job, "Here.")
        await other.finish(job, tokens=1)
    await until_state(router, links["id"], "succeeded")


async def test_a_server_that_has_come_back_is_given_jobs_again(
    router: Rig, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(http_answers, "FIRST_REST_S", 0.05)
    payer = await router.bearer()
    async with model_server() as model:
        session = await router.core.gate.register_http(described(model))
        links = await post_job(router, payer)
        await model.next()
        model.answer({"error": {"message": "restarting"}}, 503)
        await model.next()
        model.answer(said("Back."))
        await until_state(router, links["id"], "succeeded")
        assert model.probes >= 1 and not session.worker.resting


async def test_registering_again_unchanged_keeps_the_session_and_anew_replaces_it(router: Rig):
    """DG-6: also updates. DG-7."""
    payer = await router.bearer()
    async with model_server() as model:
        gate = router.core.gate
        first = await gate.register_http(described(model))
        assert await gate.register_http(described(model)) is first
        links = await post_job(router, payer)
        await model.next()
        second = await gate.register_http(described(model, slots=2))
        assert second is not first and first.closed and second.worker.id == first.worker.id
        assert list(gate.sessions.values()) == [second]
        await model.next()
        model.answer(said("Never read."))
        model.answer(said("Read."))
        await until_state(router, links["id"], "succeeded")
        second.cut("unregistered", blame="nobody")
        assert gate.sessions == {} and router.core.fleet.all() == []
    (attempt, _) = await router.query("select outcome, blame from attempts order by n")
    assert attempt["blame"] == "nobody"
    assert isinstance(second, HttpSession)


async def test_a_server_of_the_newer_internet_is_called(tmp_path: Path):
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        await writer.drain()
        writer.close()

    asked: list[bytes] = []
    async with await asyncio.start_server(answer, "::1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        calling = endpoints(tmp_path)
        url = calling.read(f"http://[::1]:{port}")
        async with calling.call(url, "GET", "/models") as response:
            assert response.status == 200
        await calling.aclose()
    assert asked[0].startswith(b"GET /v1/models ") and b"Host: [::1]:%d\r\n" % port in asked[0]


# --- which URLs ---------------------------------------------------------------------------------


def endpoints(folder: Path, **settings: Any) -> Endpoints:
    given = {"data_dir": folder, "port": 8000, "database_url": "postgresql://u@127.0.0.1:5544/x"}
    return Endpoints(Settings(_env_file=None, **(given | settings)))  # pyright: ignore


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/", "/v1/chat/completions"])
def test_of_a_registered_url_the_server_counts(tmp_path: Path, path: str):
    read = endpoints(tmp_path).read(f"http://127.0.0.1:1088{path}")
    assert str(read) == "http://127.0.0.1:1088/v1"


@pytest.mark.parametrize(
    ("api", "code"),
    [
        ("http://127.0.0.1:1088/admin", "bad_url"),
        ("http://127.0.0.1:1088/v1/../admin", "bad_url"),
        ("http://127.0.0.1:1088/v1?x=1", "bad_url"),
        ("http://user:pw@127.0.0.1:1088/v1", "bad_url"),
        ("ftp://127.0.0.1/v1", "bad_url"),
        ("file:///etc/passwd", "bad_url"),
        ("http://127.0.0.1:22/v1", "bad_url"),
        ("http://192.168.0.7:1088/v1", "not_loopback"),
        ("http://169.254.169.254/v1", "not_loopback"),
        ("http://model.example.org/v1", "not_loopback"),
        ("http://127.0.0.1:8000/v1", "own_port"),
        ("http://localhost:5544/v1", "own_port"),
        ("http://127.0.0.1:8080/v1", "own_port"),
        ("http://[::1]:4222/v1", "own_port"),
        ("http://127.0.0.1:9123/v1", "own_port"),
    ],
)
def test_what_is_not_a_models_server_is_refused(tmp_path: Path, api: str, code: str):
    """api.md 4: loopback, `/v1`, never our own ports, the database's or the node's."""
    rules = endpoints(tmp_path, lnd_url="https://127.0.0.1:8080", nats_url="nats://127.0.0.1")
    with pytest.raises(RefusedWorker) as refused:
        rules.read(api, own_ports=frozenset({9123}))
    assert refused.value.answer.code == code


def test_servers_elsewhere_need_leave_and_https_and_a_public_address(tmp_path: Path):
    rules = endpoints(tmp_path, http_workers="outside")
    assert str(rules.read("https://model.example.org:8443/v1/images")).endswith(":8443/v1")
    for api in ("http://model.example.org/v1", "https://10.0.0.7/v1", "http://127.0.0.1:1088/v1"):
        with pytest.raises(RefusedWorker) as refused:
            rules.read(api)
        assert refused.value.answer.code == "bad_url"
    with pytest.raises(RefusedWorker, match="calls no servers"):
        endpoints(tmp_path, http_workers="off").read("http://127.0.0.1:1088/v1")
