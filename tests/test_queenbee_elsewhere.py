"""A QueenBee worker of one router, asked for at another: also for models that nobody has listed."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from coincurve import PrivateKey

from tests.door_tools import CHAT
from tests.reading import PATIENCE_S, until
from tests.router_rig import Rig
from tests.workerbee import LARGE, SMALL, registered, registration_031, workerbee


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


async def test_a_worker_of_absurd_hardware_does_not_take_its_router_from_the_market(pair):
    a, b = pair

    async def counted() -> bool:
        return sum(group.stands_for for group in a.core.fleet.elsewhere()) == 2

    async with workerbee(b, registration_031(vram=4e-322)):
        await registered(b)
        async with b.worker():
            await until(counted)


async def test_the_list_of_workers_is_the_markets(pair):
    """QB-R18. A worker of another router as its record says; nobody who has gone."""
    a, b = pair
    key = PrivateKey()
    can = ["llama-infer", "sdxl"]
    registration = registration_031(key=key, capabilities=can)

    async def listed(rig: Rig, count: int, **query: str) -> list[dict[str, Any]] | None:
        shown = (await rig.http.get("/worker/detail", params=query)).json()
        return shown if len(shown) == count else None

    async with a.worker() as native, workerbee(b, registration) as bee:
        shown = [await until(partial(listed, rig, 2)) for rig in pair]
        by_capabilities = partial(sorted, key=lambda one: one["capabilities"])
        assert by_capabilities(shown[0]) == by_capabilities(shown[1])
        # Not in what a client may know of it.
        assert native.id not in str(shown) and registration["pubkey"] not in str(shown)
        for rig in pair:
            (one,) = await until(partial(listed, rig, 1, query=registration["pubkey"]))
            assert (one["worker_version"], one["capabilities"], one["gpu_cnt"]) == ("0.3.1", can, 1)
            (one,) = await until(partial(listed, rig, 1, query=native.id))
            assert one["capabilities"] == ["llama-infer"]
        payer = await a.bearer()
        asked = asyncio.create_task(
            a.http.post("/v1/chat/completions", json=CHAT | {"model": SMALL}, headers=payer)
        )
        await bee.job()
        (one,) = (
            await a.http.get("/worker/detail", params={"query": registration["pubkey"]})
        ).json()
        assert one["busy"]
        await bee.answer("Done.")
        assert (await asked).status_code == 200
    for rig in pair:
        async with asyncio.timeout(PATIENCE_S):
            while await listed(rig, 0) is None:
                await asyncio.sleep(0.02)
