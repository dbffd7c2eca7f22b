"""Connections that are used in unusual ways: by clients that ask ahead, and then go."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from router.connections import MUCH_BYTES, HeadWithBody, StraightFrames
from tests.door_tools import CHAT, until_state
from tests.router_rig import MODEL, PATIENCE_S, Rig

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def connected(router: Rig) -> AsyncIterator[Streams]:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(router.url.rpartition(":")[2]))
    try:
        yield reader, writer
    finally:
        writer.close()


def asks(payer: dict[str, str], **changes: Any) -> bytes:
    """A request for a streamed answer."""
    said = json.dumps(CHAT | {"stream": True} | changes).encode()
    head = ["POST /v1/chat/completions HTTP/1.1", "Host: x", f"Content-Length: {len(said)}"]
    head += [f"{name}: {value}" for name, value in payer.items()]
    return "\r\n".join([*head, "", ""]).encode() + said


async def until_read(reader: asyncio.StreamReader, what: bytes) -> bytes:
    got = b""
    async with asyncio.timeout(PATIENCE_S):
        while what not in got:
            more = await reader.read(65_536)
            assert more, got
            got += more
    return got


async def test_a_client_that_asks_ahead_and_goes_takes_its_job_along(
    router: Rig, caplog: pytest.LogCaptureFixture
):
    """uvicorn tells only the last of several requests on a connection that it is gone."""
    payer = await router.bearer()
    async with router.worker() as worker:
        async with connected(router) as (reader, writer):
            writer.write(asks(payer) + b"GET /info HTTP/1.1\r\nHost: x\r\n\r\n")
            job = await worker.job()
            await worker.say(job, "one", seq=0)
            await until_read(reader, b"one")
            writer.transport.abort()
        with caplog.at_level(logging.WARNING):
            for seq in range(1, 8):
                await worker.say(job, "more", seq=seq)
            stop = await worker.receive()
            assert (stop["type"], stop["job_id"]) == ("cancel", job["job_id"])
            await worker.finish(job, "cancelled", tokens=1)
            row = await until_state(router, job["job_id"], "cancelled")
        assert row["end_reason"] == "client_gone"
        # Nothing is written to a connection that is gone.
        assert not caplog.records
    assert (await router.books()).in_order


async def test_requests_that_are_sent_ahead_are_answered_in_order(router: Rig):
    payer = await router.bearer()
    async with router.worker() as worker, connected(router) as (reader, writer):
        writer.write(asks(payer) + asks(payer) + b"GET /info HTTP/1.1\r\nHost: x\r\n\r\n")
        for word in ("first", "second"):
            job = await worker.job()
            for seq in range(5):
                await worker.say(job, f"{word}{seq} ", seq=seq)
                await asyncio.sleep(0)
            await worker.finish(job, tokens=5)
        got = (await until_read(reader, b"max_multiplier")).decode()
    places = [got.index(f"{word}{seq} ") for word in ("first", "second") for seq in range(5)]
    assert places == sorted(places)
    assert got.count("data: [DONE]") == 2 and got.index("max_multiplier") > places[-1]


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_a_stream_to_a_client_that_wants_its_connection_closed_ends_with_it(
    router: Rig, version: str
):
    """HTTP/1.0 knows no chunks: there the end of the connection is all that says that it is whole."""
    payer = await router.bearer()
    head = b"HTTP/1.1\r\nExpect: 100-continue\r\nConnection: close\r\n"
    async with router.worker() as worker, connected(router) as (reader, writer):
        request = asks(payer).replace(b"HTTP/1.1\r\n", head.replace(b"1.1", version.encode()))
        writer.write(request)
        job = await worker.job()
        await worker.say(job, "one ", seq=0)
        got = await until_read(reader, b"one ")
        await worker.say(job, "two ", seq=1)
        got += await until_read(reader, b"two ")
        await worker.finish(job, tokens=2)
        got += await asyncio.wait_for(reader.read(), PATIENCE_S)
    if version == "1.1":
        said, _, got = got.partition(b"\r\n\r\n")
        assert said == b"HTTP/1.1 100 Continue"
    said, _, body = got.partition(b"\r\n\r\n")
    assert said.startswith(b"HTTP/1.1 200") and b"\r\nconnection: close" in said
    assert b"content-length" not in said
    assert (b"transfer-encoding: chunked" in said) == (version == "1.1")
    if version == "1.1":
        assert body.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    else:
        assert body.endswith(b"data: [DONE]\n\n")
        events = body.decode().removesuffix("\n\n").split("\n\n")
        assert all(event.startswith(("data: ", ":")) for event in events), events


@pytest.mark.parametrize("path", ["/info", "/docs", "/nowhere", "/metrics"])
async def test_a_whole_answer_says_its_length_to_a_client_of_any_version(router: Rig, path: str):
    async with connected(router) as (reader, writer):
        writer.write(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        got = await asyncio.wait_for(reader.read(), PATIENCE_S)
    head, _, body = got.partition(b"\r\n\r\n")
    assert f"content-length: {len(body)}".encode() in head.lower().split(b"\r\n")
    assert b"transfer-encoding" not in head and b"\r\nconnection: close" in head


async def test_what_a_request_or_a_worker_needed_is_free_as_soon_as_it_is_over(router: Rig):
    """Without Python's collector, which a router lets come seldom."""
    payer = await router.bearer()

    async def ask() -> None:
        async with router.worker() as worker:
            asked = asyncio.create_task(
                router.http.post(
                    "/v1/chat/completions", json=CHAT | {"stream": True}, headers=payer
                )
            )
            await worker.serve()
            assert "[DONE]" in (await asked).text

    async def none_is_left(before: int) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while _in_memory() > before:
                await asyncio.sleep(0.05)

    await ask()
    gc.collect()
    gc.disable()
    try:
        before = _in_memory()
        for _ in range(5):
            await ask()
        await none_is_left(before)
    finally:
        gc.enable()


def _in_memory() -> int:
    kinds = (RequestResponseCycle, StraightFrames)
    return sum(type(one) in kinds for one in gc.get_objects())


async def test_one_that_sends_without_end_is_read_in_turns_with_others(
    router: Rig, monkeypatch: pytest.MonkeyPatch
):
    """A worker that floods would keep the router from everything else, its database first."""
    pieces: list[tuple[int, bool]] = []
    received = StraightFrames.data_received

    def noted(self: StraightFrames, data: bytes) -> None:
        received(self, data)
        pieces.append((len(data), self.transport.is_reading()))

    monkeypatch.setattr(StraightFrames, "data_received", noted)
    models = [{"id": MODEL, "kind": "text", "context_length": 1 << 20, "max_tokens": 1 << 17}]
    payer = await router.bearer(500_000_000)
    async with router.worker(models=models) as worker:
        body = CHAT | {"max_tokens": 1 << 17}
        asked = asyncio.create_task(
            router.http.post("/v1/chat/completions", json=body, headers=payer)
        )
        job = await worker.job()
        for seq in range(40):
            await worker.say(job, "x" * 200_000, seq=seq)
        await worker.finish(job, tokens=40)
        reply = await asyncio.wait_for(asked, 3 * PATIENCE_S)
    assert reply.json()["choices"][0]["message"]["content"] == "x" * 200_000 * 40
    large = [reading for size, reading in pieces if size >= MUCH_BYTES]
    assert large and not any(large)


class Written:
    """A transport that remembers each write."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []
        self.closed = False

    def write(self, data: bytes) -> None:
        assert not self.closed
        self.writes.append(data)

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True


async def test_a_head_goes_out_with_what_follows_at_once_and_else_without():
    loop = asyncio.get_running_loop()
    together, apart, alone = Written(), Written(), Written()
    answers = [HeadWithBody(cast(Any, one), loop) for one in (together, apart, alone)]
    for answer in answers:
        answer.write(b"head")
    answers[0].write(b" body")
    answers[2].close()
    assert (together.writes, apart.writes, alone.writes) == ([b"head body"], [], [b"head"])
    await asyncio.sleep(0)
    assert apart.writes == [b"head"]
    for answer in answers[:2]:
        answer.write(b"more")
    await asyncio.sleep(0)
    assert together.writes == [b"head body", b"more"] and apart.writes == [b"head", b"more"]
    assert alone.closed and alone.writes == [b"head"]


async def test_a_streamed_answer_and_a_whole_one_come_in_as_few_writes_as_can_be(
    router: Rig, monkeypatch: pytest.MonkeyPatch
):
    writes: list[bytes] = []
    write = HeadWithBody.write
    let_go = HeadWithBody._let_go

    def counted(self: HeadWithBody, data: bytes) -> None:
        if self._wrote:
            writes.append(self._held + data)
        write(self, data)

    def late(self: HeadWithBody) -> None:
        if self._held:
            writes.append(self._held)
        let_go(self)

    payer = await router.bearer()
    monkeypatch.setattr(HeadWithBody, "write", counted)
    monkeypatch.setattr(HeadWithBody, "_let_go", late)
    async with router.worker() as worker:
        for stream, most in ((True, 2), (False, 1)):
            writes.clear()
            asked = asyncio.create_task(
                router.http.post(
                    "/v1/chat/completions", json=CHAT | {"stream": stream}, headers=payer
                )
            )
            await worker.serve("Hi.")
            assert (await asked).status_code == 200
            assert 1 <= len(writes) <= most and writes[0].startswith(b"HTTP/1.1 200 OK")
