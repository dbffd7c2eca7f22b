"""The Horde door's facts about the whole, at routers that share a market: the same at any of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.door_tools import post_job
from tests.pair_rig import running_pair, worker_at
from tests.reading import until
from tests.router_rig import Rig

Facts = dict[str, Any]


async def performance(rig: Rig) -> Facts:
    return (await rig.http.get("/api/v2/status/performance")).json()


async def until_both(rigs: tuple[Rig, Rig], wanted: Callable[[Facts], bool]) -> Facts:
    """What both show, once it is the same and what is wanted."""

    async def same() -> Facts | None:
        first, second = [await performance(rig) for rig in rigs]
        return first if first == second and wanted(first) else None

    return await until(same)


def model_of(name: str) -> list[Facts]:
    return [{"id": name, "kind": "text", "context_length": 2048, "max_tokens": 1024}]


async def test_performance_is_the_markets_at_any_router(tmp_path: Path, database_url: str):
    """AH-12: what the workers of each have written in the last minute counts at both."""
    async with running_pair(tmp_path, database_url, lines=(None, None)) as rigs:
        a, b = rigs
        payer = await a.bearer()
        async with (
            worker_at(a, known_at=b, models=model_of("model-a")) as at_a,
            worker_at(b, known_at=a, models=model_of("model-b"), slots=2) as at_b,
        ):
            for model, worker, tokens in (("model-a", at_a, 2), ("model-b", at_b, 5)):
                await post_job(a, payer, model=model)
                job = await worker.job()
                await worker.say(job, "some words", tokens=tokens)
                await worker.finish(job, tokens=tokens)
            facts = await until_both(rigs, lambda facts: facts["past_minute_tokens"] == 7)
            assert [rig.core.attempts.tally.recent.total() for rig in rigs] == [2, 5]
            assert (facts["text_worker_count"], facts["text_thread_count"]) == (2, 3)
        # Of one that has died, what it wrote counts until the minute is over.
        for died_s, counted in ((50, 8), (70, 7)):
            async with a.core.database.connection() as connection:
                await connection.execute(
                    "insert into routers (id, seen_at, minute_tokens)"
                    " values ('dead', now() - make_interval(secs => $1), 1)"
                    " on conflict (id) do update set seen_at = excluded.seen_at",
                    float(died_s),
                )
            assert await b.core.presence.minute_tokens() == counted


async def test_running_jobs_count_wherever_they_run(tmp_path: Path, database_url: str):
    """AH-16."""
    async with running_pair(tmp_path, database_url, lines=(None, None)) as rigs:
        a, b = rigs
        payer = await a.bearer()
        async with worker_at(b, known_at=a) as worker:
            await post_job(a, payer)
            job = await worker.job()
            for rig in rigs:
                beat = (await rig.http.get("/api/v2/status/heartbeat")).json()
                assert (beat["active_count"], beat["queue"]) == (1, 0)
            await worker.finish(job, tokens=1)
