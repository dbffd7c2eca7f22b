"""Money and answers on their way when PostgreSQL begins to hang: told in time, and settled once."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from router import following
from router.embedded_postgres import EmbeddedPostgres
from tests.door_tools import balance_msat
from tests.reading import CHAT, Reader, until
from tests.router_rig import running_rig
from tests.test_hanging_database import SOON_S, hanging, hasty

__all__ = ["hasty"]


async def test_an_answer_flows_on_and_is_settled_once_when_the_database_is_there_again(
    tmp_path: Path, hasty: None, monkeypatch: pytest.MonkeyPatch
):
    """Its end waits for the commit, and after a while the client is told where the answer will be."""
    monkeypatch.setattr(following, "COMMIT_PATIENCE_S", 1.0)
    async with (
        EmbeddedPostgres(tmp_path / "postgres", throw_away=True) as postgres,
        running_rig(tmp_path, postgres.url) as router,
        router.worker(slots=2) as worker,
    ):
        key = await router.bearer()
        had_msat = await balance_msat(router, key)
        orders = [key | {"Idempotency-Key": f"order-{number}"} for number in range(3)]

        async def order(headers: dict[str, str]) -> Any:
            body = CHAT | {"kind": "chat"}
            return await router.http.post("/jobs", json=body, headers=headers, timeout=90)

        reader = Reader(router.http, key)
        job = await worker.job()
        await worker.say(job, "before, ")
        await reader.until_shown("before, ")
        async with hanging(postgres):
            ordering = [asyncio.create_task(order(headers)) for headers in orders]
            await worker.say(job, "while it hangs, ", seq=1)
            await reader.until_shown("before, while it hangs, ")
            await worker.say(job, "and on.", seq=2)
            whole = "before, while it hangs, and on."
            await reader.until_shown(whole)
            began = time.monotonic()
            await worker.finish(job, tokens=9)
            await asyncio.wait_for(reader.task, SOON_S)
            assert time.monotonic() - began >= 1.0 and not reader.done
            (error,) = reader.errors
            assert (error["code"], error["job"]) == ("answer_delayed", job["job_id"])
            for reply in await asyncio.wait_for(asyncio.gather(*ordering), 2 * SOON_S):
                assert reply.status_code == 503 and int(reply.headers["Retry-After"]) > 0

        async def has_ended() -> Any:
            token = {"Authorization": f"Bearer {error['token']}"}
            reply = await router.http.get(error["status_url"], headers=token)
            return reply.status_code == 200 and reply.json().get("result")

        result = await until(has_ended, timeout_s=2 * SOON_S)
        assert result["choices"][0]["message"]["content"] == whole

        async def serve_all() -> None:
            for _ in orders:
                await worker.serve()

        serving = asyncio.create_task(serve_all())
        links = []
        for headers in orders:
            for _ in range(2):
                reply = await order(headers)
                assert reply.status_code == 202, reply.text
                links.append(reply.json()["jobs"][0]["id"])
        assert links[::2] == links[1::2] and len(set(links)) == len(orders)
        await serving

        async def all_ended() -> bool:
            return not await router.query("select 1 from jobs where state <> 'succeeded'")

        await until(all_ended)
        rows = await router.query("select id, charged_msat from jobs")
        assert {row["id"] for row in rows} == {job["job_id"], *links}
        charged_msat = sum(row["charged_msat"] for row in rows)
        assert await balance_msat(router, key) == had_msat - charged_msat
        assert (await router.books()).in_order
