"""A NATS server that hangs: it takes connections and bytes, and nothing comes of it.

One that is gone, or to which a line is cut, is in tests/test_two_routers.py.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from router.bus import Message, Parcels
from router.nats_bus import LOOK_S, SILENT_S, NatsBus
from tests.nats_tools import NatsServer
from tests.pair_rig import joined, parted, running_pair, worker_at
from tests.reading import CHAT, PATIENCE_S, Reader, until
from tests.router_rig import Rig

# Until it counts as away, and the database has been looked into; with room for a slow machine.
SOON_S = SILENT_S + 8.0


@pytest.fixture
async def nats(tmp_path: Path) -> AsyncIterator[NatsServer]:
    server = NatsServer(tmp_path)
    await server.start()
    yield server
    await server.kill()


@asynccontextmanager
async def two_ends(url: str) -> AsyncIterator[tuple[NatsBus, NatsBus, list[Message]]]:
    """A sender and a receiver, and what the receiver hears."""
    sender, receiver = NatsBus("a", url, market="m"), NatsBus("b", url, market="m")
    heard: list[Message] = []
    receiver.on_message = lambda sender, message: heard.append(message)
    for end in (sender, receiver):
        end.start()
    try:
        await until(lambda: both_up(sender, receiver))
        yield sender, receiver, heard
    finally:
        for end in (sender, receiver):
            await end.stop()


async def both_up(*ends: NatsBus) -> bool:
    return all(end.up for end in ends)


async def test_a_stream_is_held_up_for_a_moment_and_not_a_character_is_lost_or_repeated(
    nats: NatsServer, tmp_path: Path, database_url: str
):
    async with running_pair(tmp_path, database_url, lines=(nats.url, nats.url)) as (a, b):
        key = await a.bearer()
        async with worker_at(b, known_at=a) as worker:
            reader = Reader(a.http, key)
            job = await worker.job()
            await worker.say(job, "before, ")
            await reader.until_shown(said := "before, ")
            for seq in range(1, 3):
                with nats.hanging():
                    began = time.monotonic()
                    await worker.say(job, f"hanging {seq}, ", seq=2 * seq - 1)
                    said += f"hanging {seq}, "
                    await reader.until_shown(said)
                    assert time.monotonic() - began < SOON_S
                    await nobody_is_held_up(a, key)
                    # The text may have come by the database before the silence was noticed.
                    await until(lambda: parted([a, b]))
                await until(lambda: joined([a, b]))
                await worker.say(job, f"and after {seq}, ", seq=2 * seq)
                said += f"and after {seq}, "
                await reader.until_shown(said)
            await worker.finish(job, tokens=9)
            await asyncio.wait_for(reader.task, PATIENCE_S)
            assert reader.done and reader.text == said and not reader.errors
        assert (await a.books()).in_order


async def nobody_is_held_up(router: Rig, key: dict[str, str]) -> None:
    for asked in (
        router.http.get("/info"),
        router.http.post("/jobs", json=CHAT | {"kind": "chat"}, headers=key),
    ):
        began = time.monotonic()
        assert (await asked).status_code in (200, 202)
        assert time.monotonic() - began < SOON_S


async def test_one_that_is_slow_to_answer_is_not_away(nats: NatsServer):
    async with two_ends(nats.url) as (sender, receiver, heard):
        clients = sender._client, receiver._client
        for number in range(4):
            with nats.hanging():
                sender.send("b", ["said", number])
                await asyncio.sleep(2 * LOOK_S)
            await until(lambda n=number: has(heard, n + 1))
        assert (sender._client, receiver._client) == clients


async def test_a_process_that_was_busy_itself_does_not_think_that_the_server_was(nats: NatsServer):
    async with two_ends(nats.url) as (sender, receiver, heard):
        clients = sender._client, receiver._client
        for number in range(3):
            time.sleep(SILENT_S * 1.5)  # noqa: ASYNC251 - that is the point
            sender.send("b", ["said", number])
            await until(lambda n=number: has(heard, n + 1))
        assert (sender._client, receiver._client) == clients


async def has(heard: list[Message], count: int) -> bool:
    return len(heard) == count


async def test_what_a_hanging_server_did_not_read_does_not_keep_the_bus_from_coming_back(
    nats: NatsServer,
):
    """More than the system takes for a reader who does not read, so that closing would wait."""
    async with two_ends(nats.url) as (sender, receiver, heard):

        async def away() -> bool:
            return not sender.up

        with nats.hanging():
            for _ in range(100):
                sender.send("b", ["said", "x" * 400_000])
            await until(away)
        await until(lambda: both_up(sender, receiver))
        sender.send("b", ["said", "again"])

        async def arrived() -> bool:
            return heard[-1:] == [["said", "again"]]

        await until(arrived)
        assert sender.sent == 101


async def test_what_comes_late_by_another_way_counts_as_lost():
    """What a server that hung had taken before is heard after what was said since."""
    sender, receiver = Parcels("a"), Parcels("b")
    heard: list[Message] = []
    missed: list[str] = []
    receiver.on_message = lambda sender, message: heard.append(message)
    receiver.on_gap = missed.append
    parcels = []
    for number in range(5):
        sender.send("b", ["said", number])
        parcels += await sender.parcels()
    for at in (0, 3, 1, 2, 4):
        receiver.take(parcels[at][1])
    assert heard == [["said", number] for number in (0, 3, 4)]
    assert missed == ["a"]
