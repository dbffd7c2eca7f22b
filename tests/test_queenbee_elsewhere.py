"""A QueenBee worker of one router, asked for at another: also for models that nobody has listed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.door_tools import CHAT
from tests.nats_tools import nats_if_any
from tests.reading import until
from tests.router_rig import Rig
from tests.test_two_routers import running_pair
from tests.workerbee import LARGE, SMALL, registered, registration_031, workerbee


@pytest.fixture
async def pair(tmp_path: Path, database_url: str) -> AsyncIterator[tuple[Rig, Rig]]:
    async with (
        nats_if_any(tmp_path) as line,
        running_pair(tmp_path, database_url, lines=(line, line)) as rigs,
    ):
        yield rigs


async def test_what_nobody_listed_is_quoted_and_queued_at_any_router(pair):
    a, b = pair
    payer = await a.bearer()
    ask: dict[str, Any] = CHAT | {"model": SMALL}

    async def quoted() -> bool:
        return (await a.http.post("/quotes", json=ask | {"kind": "chat"})).status_code == 201

    async with workerbee(b) as bee:
        await registered(b)
        await until(quoted)
        assert (await a.http.post("/v1/chat/completions", json=ask | {"model": LARGE})).json()[
            "error"
        ]["code"] == "unknown_model"
        asked = asyncio.create_task(a.http.post("/v1/chat/completions", json=ask, headers=payer))
        _, body = await bee.job()
        assert body["model"] == SMALL
        # A second one waits behind it: its place is known, and so is the wait.
        second = await a.http.post("/jobs", json=ask | {"kind": "chat"}, headers=payer)
        assert second.status_code == 202
        await bee.answer("Hello from afar.")
        reply = await asked
        assert reply.json()["choices"][0]["message"]["content"] == "Hello from afar."
        await bee.job()
        await bee.answer("And again.")

    async def unknown() -> bool:
        return not a.core.fleet.elsewhere()

    await until(unknown)
    assert not await quoted()
    assert (await a.books()).in_order


async def test_a_picture_that_nobody_listed_is_asked_of_a_painter_elsewhere(pair):
    """And a worker that cannot paint is offered no pictures by others either."""
    a, b = pair
    ask = {"model": "gputopia/sdxl", "prompt": "a rabbit"}

    async def known() -> bool:
        return bool(a.core.fleet.elsewhere())

    async def quoted() -> bool:
        return (await a.http.post("/v1/images/generations", json=ask)).status_code == 402

    async with workerbee(b):
        await until(known)
        assert not await quoted()
    async with workerbee(b, registration_031(capabilities=["llama-infer", "sdxl"])):
        await until(quoted)
