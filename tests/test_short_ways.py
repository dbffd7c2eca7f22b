"""Tokens on their short ways: the same bytes as through queues and `send`, in order."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from router.api import openai, worker_socket
from router.connections import DirectConnection, StraightFrames
from tests.door_tools import CHAT
from tests.router_rig import PATIENCE_S, Rig, ScriptedWorker

PATH = "/v1/chat/completions"
WORDS = [f"word{i} " for i in range(16)]


async def _answer(router: Rig, monkeypatch: pytest.MonkeyPatch) -> tuple[str, int, list[str]]:
    """The text of a streamed answer, how many of its parts went straight, and its comments."""
    straight = 0
    write = DirectConnection.write

    def counted(self: DirectConnection, body: bytes) -> None:
        nonlocal straight
        straight += 1
        write(self, body)

    monkeypatch.setattr(DirectConnection, "write", counted)
    payer = await router.bearer()
    body = CHAT | {"stream": True, "max_tokens": 1000}
    lines: list[str] = []
    spoken = asyncio.Event()

    async def read() -> None:
        async with router.http.stream("POST", PATH, json=body, headers=payer) as reply:
            async for line in reply.aiter_lines():
                lines.append(line)
                if line.startswith("data: {"):
                    spoken.set()

    async with router.worker() as worker:
        reading = asyncio.create_task(read())
        job = await worker.job()
        for seq, word in enumerate(WORDS):
            spoken.clear()
            await worker.say(job, word, seq=seq)
            await asyncio.wait_for(spoken.wait(), PATIENCE_S)
        await worker.finish(job, tokens=len(WORDS))
        await asyncio.wait_for(reading, PATIENCE_S)
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert lines[-2:] == ["data: [DONE]", ""]
    assert (await router.books()).in_order
    return text, straight, [line for line in lines if line.startswith(":")]


async def test_tokens_go_straight_to_the_client_and_all_arrive_in_order(
    router: Rig, monkeypatch: pytest.MonkeyPatch
):
    text, straight, comments = await _answer(router, monkeypatch)
    assert text == "".join(WORDS)
    # The first goes with the headers; of the others nearly all found their reader waiting.
    assert straight > len(WORDS) // 2
    assert comments == []


async def test_a_connection_that_takes_nothing_straight_gets_all_of_it_nevertheless(
    router: Rig, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(DirectConnection, "ready", lambda self: False)
    text, straight, _ = await _answer(router, monkeypatch)
    assert (text, straight) == ("".join(WORDS), 0)


async def test_a_connection_that_is_ready_only_at_times_keeps_the_order(
    router: Rig, monkeypatch: pytest.MonkeyPatch
):
    asked = 0

    def now_and_then(self: DirectConnection) -> bool:
        nonlocal asked
        asked += 1
        return asked % 3 == 0

    monkeypatch.setattr(DirectConnection, "ready", now_and_then)
    text, straight, _ = await _answer(router, monkeypatch)
    assert text == "".join(WORDS)
    assert straight > 0


async def test_what_could_not_be_written_straight_is_not_left_out(
    router: Rig, monkeypatch: pytest.MonkeyPatch
):
    asked = 0
    write = DirectConnection.write

    def fails_at_times(self: DirectConnection, body: bytes) -> None:
        nonlocal asked
        asked += 1
        if asked % 4 == 2:
            raise OSError("not now")
        write(self, body)

    monkeypatch.setattr(DirectConnection, "write", fails_at_times)
    text, straight, _ = await _answer(router, monkeypatch)
    assert asked >= 2 and straight > 0
    assert text == "".join(WORDS)


async def test_a_server_that_offers_no_connection_serves_streams_as_well(
    router: Rig, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(openai, "client_line", lambda scope: None)
    text, straight, _ = await _answer(router, monkeypatch)
    assert (text, straight) == ("".join(WORDS), 0)


@pytest.fixture(params=["straight", "as usual"])
def frames(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Both ways of a worker's frames; the frames that went straight to their session."""
    straight: list[str] = []
    hand_to = StraightFrames.hand_to

    def noted(self: StraightFrames, handler: Callable[[str], None] | None) -> None:
        def handle(frame: str) -> None:
            straight.append(frame)
            assert handler is not None
            handler(frame)

        hand_to(self, handler and handle)

    monkeypatch.setattr(StraightFrames, "hand_to", noted)
    if request.param == "as usual":
        monkeypatch.setattr(worker_socket, "frame_source", lambda scope: None)
    return straight


async def test_frames_of_a_worker_are_handled_in_order_either_way(
    router: Rig, frames: list[str], request: pytest.FixtureRequest
):
    payer = await router.bearer()
    async with router.worker(slots=2) as worker:
        asked = asyncio.create_task(router.http.post(PATH, json=CHAT, headers=payer))
        job = await worker.job()
        # Without waiting for one another: they are read together, several at a time.
        for seq, word in enumerate(WORDS):
            await worker.say(job, word, seq=seq)
        await worker.finish(job, tokens=len(WORDS))
        reply = await asyncio.wait_for(asked, PATIENCE_S)
    assert reply.json()["choices"][0]["message"]["content"] == "".join(WORDS)
    went_straight = "straight" in request.node.name
    assert bool(frames) == went_straight
    assert (await router.books()).in_order


@pytest.mark.parametrize("bad", ["not JSON", '{"type": "nonsense"}', b"\xff\xfe"])
async def test_a_worker_that_breaks_the_protocol_is_cut_either_way(
    router: Rig, frames: list[str], bad: str | bytes
):
    payer = await router.bearer()
    async with router.worker() as broken:
        asked = asyncio.create_task(router.http.post(PATH, json=CHAT, headers=payer))
        await broken.job()
        await broken.socket.send(bad, text=True)
        with pytest.raises(ConnectionClosed) as closed:
            await broken.receive()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code in (1007, 1008)
        # What it held goes to another.
        async with router.worker() as sound:
            await sound.serve("From another.")
            reply = await asyncio.wait_for(asked, PATIENCE_S)
    assert reply.json()["choices"][0]["message"]["content"] == "From another."


async def test_frames_sent_right_behind_the_registration_are_handled_after_it(
    router: Rig, frames: list[str]
):
    """They are read in one piece with it, before there is a session to give them to."""
    async with connect(router.url.replace("http", "ws") + "/worker") as socket:
        worker = ScriptedWorker(socket, router.lnurl_host)
        with pytest.raises(ConnectionClosed) as closed:
            registering = asyncio.create_task(worker.register())
            await asyncio.sleep(0)
            await socket.send('{"type": "nonsense"}')
            await registering
            await worker.receive()
    assert closed.value.rcvd is not None and closed.value.rcvd.code == 1008
