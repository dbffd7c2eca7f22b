"""PostgreSQL that hangs: stopped, or behind a line that was cut without a word. Nothing is refused by
it and nothing answered, so that whoever waits for it waits for a minute."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from router import kept_connections
from router.embedded_postgres import EmbeddedPostgres
from tests.reading import CHAT, until
from tests.router_rig import Rig, running_rig

SILENT_S = 0.5
# A look at the database, and a moment until it is given up, with room for a slow machine.
SOON_S = 8.0


@asynccontextmanager
async def hanging(postgres: EmbeddedPostgres) -> AsyncIterator[None]:
    """All processes of a server stopped, and let go on in the end."""
    server = psutil.Process(postgres.pid)
    processes = [server, *server.children(recursive=True)]
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.suspend()
    try:
        yield
    finally:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()


async def seconds(router: Rig, path: str, status: int) -> float:
    began = time.monotonic()
    reply = await router.http.get(path)
    assert reply.status_code == status, reply.text
    return time.monotonic() - began


async def test_a_database_that_hangs_is_said_to_be_away_and_keeps_nobody_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(kept_connections, "SILENT_S", SILENT_S)
    async with (
        EmbeddedPostgres(tmp_path / "postgres", throw_away=True) as postgres,
        running_rig(tmp_path, postgres.url) as router,
        router.worker() as worker,
    ):
        key = await router.bearer()
        async with hanging(postgres):
            assert await seconds(router, "/health/ready", 503) < SOON_S
            assert await seconds(router, "/metrics", 200) < SOON_S
            await asyncio.sleep(SILENT_S)
            # One a second tries, and waits; the others hear at once that it is in vain.
            tries = [
                asyncio.create_task(
                    router.http.post("/jobs", json=CHAT | {"kind": "chat"}, headers=key, timeout=90)
                )
                for _ in range(6)
            ]
            done, waiting = await asyncio.wait(tries, timeout=SOON_S)
            refused = [task.result() for task in done]
            assert len(refused) >= 5, len(refused)
            for reply in refused:
                assert reply.status_code == 503
                assert reply.json()["error"]["code"] == "database_unavailable"
                assert int(reply.headers["Retry-After"]) > 0

        async def is_ready() -> bool:
            return (await router.http.get("/health/ready")).status_code == 200

        await until(is_ready)
        served = asyncio.create_task(worker.serve("Here again."))
        for task in waiting:
            await task
        made = await router.http.post("/jobs", json=CHAT | {"kind": "chat"}, headers=key)
        assert made.status_code == 202
        await served
