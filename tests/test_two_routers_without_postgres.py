"""PostgreSQL away from two routers, the reader of a job at one and its worker at the other."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from router import following
from router.database import DatabaseUnavailable
from router.embedded_postgres import EmbeddedPostgres
from tests.nats_tools import nats_if_any
from tests.pair_rig import running_pair, worker_at
from tests.reading import CHAT, PATIENCE_S, Reader, until
from tests.router_rig import Rig

Homeless = tuple[Rig, Rig, EmbeddedPostgres]


@pytest.fixture
async def homeless(tmp_path: Path) -> AsyncIterator[Homeless]:
    """Routers A and B, whose PostgreSQL a test can take away, and give back."""
    async with (
        nats_if_any(tmp_path) as line,
        EmbeddedPostgres(tmp_path / "postgres") as server,
        running_pair(tmp_path, server.url, lines=(line, line), lease_s=5) as (a, b),
    ):
        yield a, b, server


async def said(parcels: list[bytes], text: str) -> bool:
    return any(text.encode() in parcel for parcel in parcels)


async def test_text_crosses_without_postgres_and_done_waits_for_the_commit(
    homeless: Homeless, monkeypatch: pytest.MonkeyPatch
):
    a, b, server = homeless
    key = await a.bearer()
    async with worker_at(b, known_at=a) as worker:
        reader = Reader(a.http, key)
        job = await worker.job()
        await worker.say(job, "before ")
        await reader.until_shown("before ")
        await server.stop()
        await worker.say(job, "and while ", seq=1)
        await reader.until_shown("before and while ")
        with monkeypatch.context() as patch:
            # What the bus loses meanwhile is asked for again, not looked up.
            lost: list[bytes] = []
            patch.setattr(a.core.relay.bus, "take", lost.append)
            await worker.say(job, "it is ", seq=2)
            await until(lambda: said(lost, "it is "))
        await worker.say(job, "away", seq=3)
        await reader.until_shown("before and while it is away")
        await worker.finish(job, tokens=6)
        for rig in (a, b):
            refused = await rig.http.post("/v1/chat/completions", json=CHAT, headers=key)
            assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0

        async def ending() -> bool:
            (stream,) = a.core.jobs.hub.all()
            return stream.ending_since is not None

        await until(ending)
        assert not reader.done and not reader.task.done()
        await server.start()
        await asyncio.wait_for(reader.task, PATIENCE_S)
        assert reader.done and not reader.errors
        (row,) = await a.query("select state, result from jobs")
        assert row["state"] == "succeeded"
        answer = json.loads(row["result"])["choices"][0]["message"]["content"]
        assert answer == reader.text == "before and while it is away"
    assert (await a.books()).in_order


async def test_who_waits_long_for_a_commit_elsewhere_is_told_where_the_answer_will_be(
    homeless: Homeless, monkeypatch: pytest.MonkeyPatch
):
    """30 s in real life. Any router gives the answer later."""
    monkeypatch.setattr(following, "COMMIT_PATIENCE_S", 1.0)
    a, b, server = homeless
    key = await a.bearer()
    async with worker_at(b, known_at=a) as worker:
        reader = Reader(a.http, key)
        job = await worker.job()
        await worker.say(job, "all of it")
        await reader.until_shown("all of it")
        await server.stop()
        await worker.finish(job, tokens=3)
        await asyncio.wait_for(reader.task, PATIENCE_S)
        (told,) = reader.errors
        assert not reader.done
        assert (told["code"], told["job"]) == ("answer_delayed", job["job_id"])
        await server.start()
        token = {"Authorization": f"Bearer {told['token']}"}

        async def fetched(rig: Rig) -> dict[str, Any] | None:
            view = await rig.http.get(told["status_url"], headers=token)
            return view.json() if view.status_code == 200 and "result" in view.json() else None

        for rig in (b, a):
            async with asyncio.timeout(PATIENCE_S):
                while (view := await fetched(rig)) is None:
                    await asyncio.sleep(0.02)
            assert view["state"] == "succeeded"
            assert view["result"]["choices"][0]["message"]["content"] == "all of it"
        (charged,) = await a.query("select count(*) from jobs where state = 'succeeded'")
        assert charged[0] == 1
    assert (await a.books()).in_order


class Away:
    """A database that cannot be reached."""

    def connection(self) -> Any:
        raise DatabaseUnavailable("away")


async def test_a_reader_whose_router_alone_misses_the_database_does_not_wait_for_ever(
    tmp_path: Path, database_url: str, monkeypatch: pytest.MonkeyPatch
):
    """The other router has committed and says so; how it ended is read in the database only."""
    monkeypatch.setattr(following, "COMMIT_PATIENCE_S", 0.5)
    async with running_pair(tmp_path, database_url, lines=(None, None)) as (a, b):
        key = await a.bearer()
        async with worker_at(b, known_at=a) as worker:
            send = b.core.relay.bus.send

            def lose_ending(to: str, message: list[Any]) -> None:
                if message[0] != "ending":
                    send(to, message)

            monkeypatch.setattr(b.core.relay.bus, "send", lose_ending)
            reader = Reader(a.http, key)
            job = await worker.job()
            await worker.say(job, "all of it")
            await reader.until_shown("all of it")
            monkeypatch.setattr(a.core.far_jobs, "_database", Away())
            await worker.finish(job, tokens=3)
            await asyncio.wait_for(reader.task, PATIENCE_S)
        (told,) = reader.errors
        assert (told["code"], told["job"]) == ("answer_delayed", job["job_id"])
        assert not reader.done
        token = {"Authorization": f"Bearer {told['token']}"}
        view = await b.http.get(told["status_url"], headers=token)
        assert view.json()["state"] == "succeeded"
        assert (await a.books()).in_order
