"""How many answers at once a model server is found to give."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.worker_stand_ins import http_server
from worker.engines import open_engine, server_slots
from worker.engines.openai_server import SLOTS
from worker.engines.server_slots import AT_ONCE_S, MOST, measure
from worker.errors import JobError
from worker.protocol import FailureCode
from worker.settings import EngineName, WorkerSettings

# Longer than what counts as at once.
ANSWER_S = 2 * AT_ONCE_S


class _Skipping(selectors.DefaultSelector):
    """Waits for nothing: what time it would take is added to `now`."""

    now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        found = super().select(0)
        if not found:
            self.now += timeout or 0
        return found


def found(measuring: Coroutine[Any, Any, int | None]) -> int | None:
    """What is measured, in a time that passes only by waiting, however busy the machine is."""
    selector = _Skipping()
    loop = asyncio.SelectorEventLoop(selector)
    loop.time = lambda: selector.now
    try:
        return loop.run_until_complete(measuring)
    finally:
        loop.close()


def server_of(width: int, answer_s: float) -> Callable[[int], Awaitable[None]]:
    """Gives `width` answers at once, and has others wait."""
    room = asyncio.Semaphore(width)

    async def ask(number: int) -> None:
        async with room:
            await asyncio.sleep(answer_s)

    return ask


@pytest.mark.parametrize("width", [1, 4])
def test_as_many_as_a_server_gives_at_once(width: int):
    assert found(measure(server_of(width, ANSWER_S))) == width


def test_of_a_server_that_is_always_as_fast_no_more_than_the_most():
    assert found(measure(server_of(10_000, 0.01))) == MOST


def test_one_that_refuses_more_is_asked_for_no_more():
    at_once = 0

    async def ask(number: int) -> None:
        nonlocal at_once
        at_once += 1
        try:
            await asyncio.sleep(0)
            if at_once > 8:
                raise JobError(FailureCode.OVERLOADED, "the server is busy")
        finally:
            at_once -= 1

    assert found(measure(ask)) == 8


def test_a_moment_in_which_the_machine_was_busy_does_not_count():
    rounds: list[int] = []
    steady = server_of(4, ANSWER_S)

    async def ask(number: int) -> None:
        rounds.append(number)
        if number == 3:  # the first of two at once
            await asyncio.sleep(2 * ANSWER_S)
        await steady(number)

    assert found(measure(ask)) == 4
    assert rounds == list(range(1, len(rounds) + 1)), "each is another one"


def test_one_that_does_not_answer_tells_nothing():
    async def ask(number: int) -> None:
        raise JobError(FailureCode.ENGINE_ERROR, "lost the server")

    assert found(measure(ask)) is None


def test_nothing_larger_is_begun_when_it_has_taken_too_long():
    assert found(measure(server_of(10_000, 0.01), patience_s=0)) == 1


def test_what_is_no_answer_of_a_server_is_not_hidden():
    async def ask(number: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        found(measure(ask))


class StandIn:
    """An OpenAI server of one model; `refuses`: answers nothing."""

    def __init__(self, *, model: str = "tiny", refuses: bool = False) -> None:
        self.model, self.refuses = model, refuses
        self.prompts: list[str] = []

    def routes(self) -> list[Route]:
        return [
            Route("/v1/models", self.list_models),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
        ]

    async def list_models(self, request: Request) -> Response:
        return JSONResponse({"data": [{"id": self.model}]})

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        assert body["stream"] and 0 < body["max_tokens"] <= 16
        self.prompts.append(body["messages"][0]["content"])
        if self.refuses:
            return JSONResponse({"error": "no"}, 500)
        return StreamingResponse(self._say(), media_type="text/event-stream")

    async def _say(self) -> AsyncIterator[str]:
        yield 'data: {"choices": [{"delta": {"content": "1"}, "finish_reason": "stop"}]}\n\n'
        yield "data: [DONE]\n\n"


@pytest.mark.parametrize(
    ("server", "given", "slots", "asked"),
    [
        (StandIn(), None, 8, 2 + 2 + 4 + 8),
        (StandIn(), 3, 3, 0),
        (StandIn(refuses=True), None, SLOTS, 1),
        (StandIn(model="nomic-embed-text"), None, SLOTS, 0),
    ],
)
async def test_a_worker_measures_what_it_was_not_told(
    server: StandIn, given: int | None, slots: int, asked: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(server_slots, "MOST", 8)
    monkeypatch.setattr(server_slots, "AT_ONCE_S", 30.0)
    async with http_server(*server.routes()) as url:
        values = {"engine": EngineName.OPENAI, "engine_url": url, "slots": given}
        engine = open_engine(WorkerSettings(_env_file=None, **values))  # pyright: ignore[reportCallIssue]
        told: list[str] = []
        await engine.start(lambda fraction, words: told.append(words))
        await engine.aclose()
    assert engine.slots == slots and f"{slots} answers at once" in told[-1]
    assert len(server.prompts) == asked == len(set(server.prompts))
    assert any("--slots" in words for words in told) == (asked > 0)
