"""Readers who come to a job at another router in the very moment in which something happens to it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.pair_rig import running_pair, worker_at
from tests.reading import CHAT, PATIENCE_S
from tests.router_rig import Rig
from tests.test_two_routers import events

JOB = CHAT | {"kind": "chat"}


def before_second_look(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, do: Callable[[], Awaitable[Any]]
) -> asyncio.Event:
    """Have something happen while a reader who attaches makes sure that the job is still alive; set
    when that is done."""
    attached = asyncio.Event()
    jobs, looks = rig.core.jobs, 0
    row = jobs.row

    async def slowly(job_id: str) -> Any:
        nonlocal looks
        looks += 1
        # The first of all is whether the reader may read it.
        if looks == 3:
            await do()
        found = await row(job_id)
        if looks == 3:
            attached.set()
        return found

    monkeypatch.setattr(jobs, "row", slowly)
    return attached


async def test_a_job_that_starts_while_its_reader_comes_is_read_to_the_end(
    tmp_path: Path, database_url: str, monkeypatch: pytest.MonkeyPatch
):
    async with running_pair(tmp_path, database_url, lines=(None, None)) as (a, b):
        key = await a.bearer()
        async with worker_at(a, known_at=b) as worker:
            await a.http.post("/jobs", json=JOB, headers=key)
            first = await worker.job()
            made = await a.http.post("/jobs", json=JOB, headers=key)
            link = made.json()["jobs"][0]
            started: list[dict[str, Any]] = []

            async def starts() -> None:
                await worker.finish(first, tokens=1)
                started.append(await worker.job())
                await asyncio.sleep(0.2)

            attached = before_second_look(b, monkeypatch, starts)
            token = {"Authorization": f"Bearer {link['token']}"}
            reading = asyncio.create_task(events(b, link["events_url"], token, until_text=None))
            await asyncio.wait_for(attached.wait(), PATIENCE_S)
            await worker.say(started[0], "Read to the end.")
            await worker.finish(started[0], tokens=4)
            told = await asyncio.wait_for(reading, PATIENCE_S)
            assert "".join(event["text"] for event in told if "text" in event) == "Read to the end."
            assert told[-1]["job"]["state"] == "succeeded"
