"""A server within our own event loop: it stops at once, answers what is under way, and not for ever."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from billing.guest_server import GuestServer

PATIENCE_S = 10.0


class Guest:
    """Its server answers "/" when `answer` is set; `asked` says that it was asked."""

    def __init__(self, graceful_s: int) -> None:
        self.asked, self.answer = asyncio.Event(), asyncio.Event()
        routes = [Route("/", self._answer)]
        config = uvicorn.Config(
            Starlette(routes=routes),
            host="127.0.0.1",
            port=0,
            lifespan="off",
            log_config=None,
            timeout_graceful_shutdown=graceful_s,
        )
        self.server = GuestServer(config)

    async def _answer(self, request: Request) -> Response:
        self.asked.set()
        await self.answer.wait()
        return PlainTextResponse("here")

    @asynccontextmanager
    async def running(self) -> AsyncIterator[tuple[httpx.AsyncClient, asyncio.Task[None]]]:
        serving = asyncio.create_task(self.server.serve())
        await asyncio.wait_for(self.server.listening.wait(), PATIENCE_S)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http:
            yield http, serving
        self.server.stop()
        await asyncio.wait_for(serving, PATIENCE_S)


async def test_an_idle_connection_does_not_hold_it_up() -> None:
    guest = Guest(graceful_s=3600)
    guest.answer.set()
    async with guest.running() as (http, serving):
        assert (await http.get("/")).text == "here"
        guest.server.stop()
        await asyncio.wait_for(serving, PATIENCE_S)
        with pytest.raises(httpx.ConnectError):
            await http.get("/")


async def test_what_is_under_way_is_answered_first() -> None:
    guest = Guest(graceful_s=3600)
    async with guest.running() as (http, serving):
        asking = asyncio.create_task(http.get("/"))
        await asyncio.wait_for(guest.asked.wait(), PATIENCE_S)
        guest.server.stop()
        done, _ = await asyncio.wait({serving}, timeout=0.2)
        assert not done
        guest.answer.set()
        assert (await asyncio.wait_for(asking, PATIENCE_S)).text == "here"
        await asyncio.wait_for(serving, PATIENCE_S)


async def test_what_takes_longer_than_grace_is_cut_off(caplog: pytest.LogCaptureFixture) -> None:
    guest = Guest(graceful_s=1)
    async with guest.running() as (http, serving):
        asking = asyncio.create_task(http.get("/"))
        await asyncio.wait_for(guest.asked.wait(), PATIENCE_S)
        guest.server.stop()
        await asyncio.wait_for(serving, PATIENCE_S)
        answer = await asyncio.wait_for(asking, PATIENCE_S)
        assert answer.status_code == 500
        assert "1 answers are cut off" in caplog.text


async def test_the_date_is_that_of_the_second(monkeypatch: pytest.MonkeyPatch) -> None:
    guest = Guest(graceful_s=1)
    guest.answer.set()
    monkeypatch.setattr("billing.guest_server._TICK_S", 0.01)
    async with guest.running() as (http, _):
        first = (await http.get("/")).headers["Date"]
        async with asyncio.timeout(PATIENCE_S):
            while (await http.get("/")).headers["Date"] == first:
                await asyncio.sleep(0.02)
