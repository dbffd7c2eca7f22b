"""Tokens that go straight to the client's connection: the same bytes as through `send`, in order."""

from __future__ import annotations

import asyncio
import json

import pytest

from router.api import direct_write
from router.serve import _DirectWrite
from tests.door_tools import CHAT
from tests.router_rig import PATIENCE_S, Rig

PATH = "/v1/chat/completions"
WORDS = [f"word{i} " for i in range(40)]


async def _answer(router: Rig, monkeypatch: pytest.MonkeyPatch) -> tuple[str, int, list[str]]:
    """The text of a streamed answer, how many of its parts went straight, and its comments."""
    straight = 0
    write = _DirectWrite.write

    def counted(self: _DirectWrite, body: bytes) -> None:
        nonlocal straight
        straight += 1
        write(self, body)

    monkeypatch.setattr(_DirectWrite, "write", counted)
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
    monkeypatch.setattr(_DirectWrite, "ready", lambda self: False)
    text, straight, _ = await _answer(router, monkeypatch)
    assert (text, straight) == ("".join(WORDS), 0)


async def test_a_connection_that_is_ready_only_at_times_keeps_the_order(
    router: Rig, monkeypatch: pytest.MonkeyPatch
):
    asked = 0

    def now_and_then(self: _DirectWrite) -> bool:
        nonlocal asked
        asked += 1
        return asked % 3 == 0

    monkeypatch.setattr(_DirectWrite, "ready", now_and_then)
    text, straight, _ = await _answer(router, monkeypatch)
    assert text == "".join(WORDS)
    assert straight > 0


async def test_a_server_that_offers_no_connection_serves_streams_as_well(
    router: Rig, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(direct_write, "of", lambda scope: None)
    text, straight, _ = await _answer(router, monkeypatch)
    assert (text, straight) == ("".join(WORDS), 0)
