"""What engines in front of an HTTP server share: lines, events, proxies, connections."""

from __future__ import annotations

import asyncio
import socket
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.worker_stand_ins import http_server
from worker.engines import remote
from worker.engines.remote import Server, json_object, open_server, sse_data
from worker.errors import EngineAbsent, EngineStartError, JobError
from worker.protocol import FailureCode
from worker.settings import WorkerSettings

STREAM = (
    b": a comment\r\n\r\n"
    b"data: one\n\n"
    b"event: message\rdata:two\rid: 7\r\r"
    b"data: three\r\ndata: four\r\n\r\n"
    b"data\ndata: \n\n"
    b"retry: 5\n\n"
    b"data: last"
)
DATA = [b"one", b"two", b"three\nfour", b"\n", b"last"]


async def _pieces(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
async def test_events_are_the_same_however_the_stream_is_cut(size: int):
    pieces = [STREAM[at : at + size] for at in range(0, len(STREAM), size)]
    assert [data async for data in sse_data(_pieces(*pieces))] == DATA


@pytest.mark.parametrize(("end", "said"), [(b"", "a line"), (b"\n", "an event")])
async def test_a_line_or_event_without_an_end_fails_the_job(
    monkeypatch: pytest.MonkeyPatch, end: bytes, said: str
):
    monkeypatch.setattr(remote, "LONGEST_LINE_BYTES", 100)
    with pytest.raises(JobError, match=f"sent {said} without an end") as caught:
        async for _ in sse_data(_pieces(*[b"data: " + b"x" * 60 + end] * 2)):
            pass
    assert caught.value.code is FailureCode.ENGINE_ERROR


async def test_events_are_bounded_and_not_the_stream(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(remote, "LONGEST_LINE_BYTES", 100)
    pieces = _pieces(*[b"data: " + b"x" * 60 + b"\n\n"] * 5)
    assert [data async for data in sse_data(pieces)] == [b"x" * 60] * 5


async def test_a_whole_answer_without_an_end_fails_the_job(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(remote, "LONGEST_ANSWER_BYTES", 1000)

    async def say(request: Request) -> Response:
        return StreamingResponse(iter([b"x" * 500] * 3))

    async with http_server(Route("/x", say, methods=["GET", "POST"])) as url:
        server = Server(url, timeout_s=10)
        with pytest.raises(JobError) as caught:
            await server.post("/x", {})
        assert caught.value.code is FailureCode.ENGINE_ERROR
        with pytest.raises(EngineAbsent):
            await server.discover("/x")
        assert not await server.answers("/x")
        await server.aclose()


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"\xff", b'"x"'])
def test_what_is_no_object_fails_the_job(text: bytes):
    with pytest.raises(JobError) as caught:
        json_object(text)
    assert caught.value.code is FailureCode.ENGINE_ERROR


class Counting:
    """Says `{"path": …}` to every POST; counts the connections that it is asked on."""

    def __init__(self) -> None:
        self.connections: set[tuple[str, int]] = set()
        self.proxied: list[str] = []
        self.logins: list[str | None] = []

    def routes(self) -> list[Route]:
        return [
            Route("/events", self.stream, methods=["POST"]),
            Route("/moved", self.move, methods=["POST"]),
            Route("/{path:path}", self.say, methods=["GET", "POST"]),
        ]

    async def say(self, request: Request) -> Response:
        self._note(request)
        return JSONResponse({"path": request.url.path})

    async def stream(self, request: Request) -> Response:
        self._note(request)
        return StreamingResponse(iter(["data: 1\n\n"]), media_type="text/event-stream")

    async def move(self, request: Request) -> Response:
        return Response(status_code=307, headers={"Location": "/elsewhere"})

    def _note(self, request: Request) -> None:
        assert request.client is not None
        self.connections.add(request.client)
        self.logins.append(request.headers.get("authorization"))
        # A proxy is asked for the whole URL.
        if request.headers["host"].startswith("model.invalid"):
            self.proxied.append(request.headers["host"])


async def test_connections_are_kept_and_as_many_as_requests_at_once():
    counting = Counting()
    async with http_server(*counting.routes()) as url:
        server = Server(url, timeout_s=10)
        for _ in range(3):
            assert await server.post("/x", {}) == {"path": "/x"}
            assert [data async for data in server.events("/events", {})] == [b"1"]
        assert len(counting.connections) == 1
        await asyncio.gather(*(server.post("/x", {}) for _ in range(40)))
        assert len(counting.connections) > 1
        await server.aclose()


async def test_a_redirect_is_not_followed_with_the_prompt():
    async with http_server(*Counting().routes()) as url:
        server = Server(url, timeout_s=10)
        with pytest.raises(JobError, match="307"):
            await server.post("/moved", {"prompt": "secret"})
        await server.aclose()


async def test_a_proxy_of_the_environment_is_asked_but_for_this_machine(
    monkeypatch: pytest.MonkeyPatch,
):
    counting = Counting()
    async with http_server(*counting.routes()) as url:
        monkeypatch.setenv("http_proxy", url)
        monkeypatch.setenv("no_proxy", "")
        far, near = Server("http://model.invalid:9", timeout_s=10), Server(url, timeout_s=10)
        assert await far.answers("/models")
        assert counting.proxied == ["model.invalid:9"]
        assert await near.answers("/models")
        assert len(counting.proxied) == 1
        monkeypatch.setenv("no_proxy", "model.invalid")
        direct = Server("http://model.invalid:9", timeout_s=10)
        assert not await direct.answers("/models")
        for server in (far, near, direct):
            await server.aclose()


async def test_a_proxy_may_be_named_without_its_scheme(monkeypatch: pytest.MonkeyPatch):
    counting = Counting()
    async with http_server(*counting.routes()) as url:
        monkeypatch.setenv("http_proxy", url.removeprefix("http://"))
        monkeypatch.setenv("no_proxy", "")
        server = Server("http://model.invalid:9", timeout_s=10)
        assert await server.answers("/models")
        assert counting.proxied == ["model.invalid:9"]
        await server.aclose()


async def test_a_password_in_the_url_is_used_and_never_shown():
    counting = Counting()
    async with http_server(*counting.routes()) as url:
        with_password = url.replace("http://", "http://me:s%40fe@") + "/v1"
        for key in (None, "key"):
            server = Server(with_password, api_key=key, timeout_s=10)
            assert server.url == f"{url}/v1"
            assert await server.post("/x", {}) == {"path": "/v1/x"}
            await server.aclose()
    login = b64encode(b"me:s@fe").decode()
    assert counting.logins == [f"Basic {login}", "Bearer key"]


@pytest.mark.parametrize("url", ["http://[::1", "http://a..b/v1", f"http://{'x' * 70}.example"])
def test_a_url_that_is_none_is_said_at_the_start(url: str):
    with pytest.raises(EngineStartError, match="SATHERD_ENGINE_URL"):
        open_server(WorkerSettings(engine_url=url), "")


@asynccontextmanager
async def mute() -> AsyncIterator[str]:
    """A server that takes connections and never reads from them."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")
async def test_a_server_that_does_not_read_is_given_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(remote, "CONNECT_TIMEOUT_S", 0.2)
    async with mute() as url, asyncio.timeout(10):
        server = Server(url, timeout_s=0.2)
        with pytest.raises(JobError, match="lost the server"):
            await server.post("/x", {"picture": "x" * 20_000_000})
        await server.aclose()


async def test_a_proxy_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(remote, "CONNECT_TIMEOUT_S", 0.2)
    async with mute() as url, asyncio.timeout(10):
        monkeypatch.setenv("https_proxy", url)
        monkeypatch.setenv("no_proxy", "")
        server = Server("https://model.invalid", timeout_s=30)
        with pytest.raises(JobError, match="lost the server"):
            await server.post("/x", {})
        await server.aclose()


async def test_a_server_that_says_nothing_is_given_up():
    async def silent(_request: Request) -> Response:
        await asyncio.sleep(5)
        return Response()

    async with http_server(Route("/x", silent, methods=["POST"])) as url:
        server = Server(url, timeout_s=0.2)
        with pytest.raises(JobError, match="lost the server") as caught:
            await server.post("/x", {})
        assert caught.value.code is FailureCode.ENGINE_ERROR
        await server.aclose()
