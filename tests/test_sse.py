"""Streams of events as ASGI answers: sent to the end, cut when the client goes or the server stops."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, MutableMapping
from typing import Any

import pytest

from router.api.leaving import ClientGone, UnlessGone
from router.api.short_ways import LINE
from router.api.sse import EventStream

PATIENCE_S = 20.0


class Wire:
    """The server's end of one request, which may tell by itself that the client has gone."""

    def __init__(self, *, tells: bool) -> None:
        self.sent: list[MutableMapping[str, Any]] = []
        self.gone = asyncio.Event()
        self.grew = asyncio.Event()
        self.tells = tells
        self.told: Callable[[], None] | None = None

    @property
    def scope(self) -> dict[str, Any]:
        return {"type": "http", "extensions": {LINE: self} if self.tells else {}}

    def on_gone(self, told: Callable[[], None] | None) -> None:
        self.told = told

    def go(self) -> None:
        self.gone.set()
        if self.told is not None:
            self.told()

    async def receive(self) -> dict[str, Any]:
        assert not self.tells
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: MutableMapping[str, Any]) -> None:
        self.sent.append(message)
        self.grew.set()

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)


class Source:
    """Events of which the test says when they come, and that knows when it was closed."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.closed = False

    async def events(self) -> AsyncGenerator[bytes, None]:
        try:
            while (item := await self.queue.get()) is not None:
                yield item
        finally:
            self.closed = True


@pytest.fixture(params=[True, False], ids=["told", "listening"])
def wire(request: pytest.FixtureRequest) -> Wire:
    return Wire(tells=request.param)


@pytest.fixture
def source() -> Source:
    return Source()


def _start(stream: EventStream, wire: Wire) -> asyncio.Task[None]:
    return asyncio.create_task(stream(wire.scope, wire.receive, wire.send))


async def _until_sent(wire: Wire, text: bytes) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while text not in wire.body:
            wire.grew.clear()
            await wire.grew.wait()


async def test_a_stream_is_sent_to_its_end_and_nobody_is_said_to_have_gone(
    wire: Wire, source: Source
):
    gone: list[str] = []
    task = _start(EventStream(source.events(), on_gone=lambda: gone.append("gone")), wire)
    for item in (b"one", b"two", None):
        source.queue.put_nowait(item)
    await asyncio.wait_for(task, PATIENCE_S)
    assert wire.sent[0]["status"] == 200
    assert (b"content-type", b"text/event-stream; charset=utf-8") in wire.sent[0]["headers"]
    assert wire.body == b"onetwo"
    assert wire.sent[-1]["more_body"] is False
    assert source.closed and gone == []


async def test_a_client_that_goes_is_noticed_while_nothing_is_said(wire: Wire, source: Source):
    gone: list[str] = []
    task = _start(EventStream(source.events(), on_gone=lambda: gone.append("gone")), wire)
    source.queue.put_nowait(b"one")
    await _until_sent(wire, b"one")
    wire.go()
    await asyncio.wait_for(task, PATIENCE_S)
    assert not task.cancelled()
    assert source.closed and gone == ["gone"]


async def test_a_server_that_stops_cuts_the_stream_and_is_not_taken_for_the_client(
    wire: Wire, source: Source
):
    gone: list[str] = []
    task = _start(EventStream(source.events(), on_gone=lambda: gone.append("gone")), wire)
    source.queue.put_nowait(b"one")
    await _until_sent(wire, b"one")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, PATIENCE_S)
    assert source.closed and gone == ["gone"]


async def test_a_source_that_fails_ends_the_answer_unfinished(wire: Wire):
    async def failing() -> AsyncGenerator[bytes, None]:
        yield b"one"
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        await asyncio.wait_for(_start(EventStream(failing()), wire), PATIENCE_S)
    assert all(message.get("more_body") is not False for message in wire.sent)


async def test_work_for_a_client_ends_when_it_goes_and_by_a_word_of_its_own(wire: Wire):
    async def work() -> None:
        with UnlessGone(wire.scope, wire.receive):
            await asyncio.sleep(PATIENCE_S)

    working = asyncio.create_task(work())
    await asyncio.sleep(0)
    wire.go()
    with pytest.raises(ClientGone):
        await asyncio.wait_for(working, PATIENCE_S)


async def test_whoever_is_stopped_while_the_client_goes_is_stopped(wire: Wire):
    ended = asyncio.Event()

    async def work() -> None:
        try:
            with UnlessGone(wire.scope, wire.receive):
                await asyncio.sleep(PATIENCE_S)
        finally:
            ended.set()

    working = asyncio.create_task(work())
    await asyncio.sleep(0)
    working.cancel()
    wire.go()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(working, PATIENCE_S)
    assert ended.is_set()


async def test_whoever_goes_after_the_work_disturbs_nobody(wire: Wire):
    async def work() -> int:
        with UnlessGone(wire.scope, wire.receive):
            await asyncio.sleep(0)
        wire.go()
        await asyncio.sleep(0.01)
        return 7

    assert await asyncio.create_task(work()) == 7
    assert wire.told is None


async def test_what_fails_while_the_client_goes_fails_as_it_does(wire: Wire):
    async def work() -> None:
        with UnlessGone(wire.scope, wire.receive):
            try:
                await asyncio.sleep(PATIENCE_S)
            finally:
                raise RuntimeError("broken")

    working = asyncio.create_task(work())
    await asyncio.sleep(0)
    wire.go()
    with pytest.raises(RuntimeError, match="broken"):
        await asyncio.wait_for(working, PATIENCE_S)
    assert not working.cancelling()
