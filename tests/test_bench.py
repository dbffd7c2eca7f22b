"""Each bench runs in a tiny form and gives sane figures; how good they are is not a test's business."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import asyncpg
import orjson
import pytest
import pytest_asyncio

from bench import (
    claim,
    figures,
    idle_workers,
    l402_jobs,
    load,
    memory,
    overload,
    paid_jobs,
    peer_processes,
    peers,
    server_worker,
    settled_to_assigned,
    streamed_tokens,
)
from bench.figures import Options, Report
from bench.scene import Scene, passable, scene
from router.database import Database

Test = Callable[..., Awaitable[None]]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage() -> AsyncIterator[Scene]:
    async with scene(throw_away=True, pin=False) as made:
        yield made


def on_stage(test: Test) -> Test:
    """The scene is started once, and its clients belong to the loop it was started in."""
    return pytest.mark.xdist_group("stage")(pytest.mark.asyncio(loop_scope="module")(test))


@on_stage
@pytest.mark.parametrize("tokens", [1, 5])
async def test_paid_jobs_are_counted_and_the_books_balance(stage: Scene, tokens: int):
    row = await paid_jobs.paid_jobs(stage, 4, tokens, seconds=1.0, warm_up_s=0.3)
    assert row["jobs/s"] > 0 and row["router µs/job"] > 0 and row["PG µs/job"] > 0
    assert tokens * 0.5 < row["tokens/s"] / row["jobs/s"] < tokens * 1.5
    assert 0 < row["answer p50 ms"] <= row["answer p99 ms"]
    assert await stage.books_in_order()


@on_stage
async def test_paced_tokens_come_at_their_pace_and_unpaced_ones_faster(stage: Scene):
    paced = await streamed_tokens.streamed_tokens(stage, 4, 20, seconds=1.0, warm_up_s=0.5)
    assert 0 < paced["tokens/s"] <= 4 * 20 * 1.5
    assert 0 < paced["delay p50 ms"] <= paced["delay p99 ms"]
    unpaced = await streamed_tokens.streamed_tokens(stage, 4, None, seconds=1.0, warm_up_s=0.5)
    assert unpaced["tokens/s"] > paced["tokens/s"]
    assert unpaced["delay p50 ms"] is None


@on_stage
async def test_l402_jobs_are_bought_one_after_the_other(stage: Scene):
    row = await l402_jobs.l402_jobs(stage, 2, seconds=1.5, warm_up_s=0.5)
    assert row["jobs/s"] > 0 and row["402 to answer p50 ms"] > 0
    assert await stage.books_in_order()


@on_stage
async def test_the_way_from_a_settlement_to_the_worker_is_timed(stage: Scene):
    row = await settled_to_assigned.settled_to_assigned(stage, seconds=0.3, warm_up=0)
    assert row["payments"] >= 3 and 0 < row["p50 ms"] <= row["p90 ms"]
    assert row["one commit p50 ms"] > 0 and row["one round trip p50 ms"] > 0
    assert await stage.books_in_order()


@on_stage
async def test_buyers_lose_nothing_while_all_idle_workers_come_back_at_once(stage: Scene):
    row = await idle_workers.reconnect_storm(stage, 20, calm_s=0.3)
    assert row["workers"] == 20 and row["jobs/s in it"] > 0 and row["lost"] == 0
    assert await stage.books_in_order()


@on_stage
async def test_memory_is_looked_at_eight_times_on_the_way(stage: Scene):
    rows = await memory.memory(stage, 80)
    assert [row["jobs"] >= 10 * look for look, row in enumerate(rows, 1)] == [True] * 8
    assert all(row["MiB"] > 10 for row in rows) and rows[0]["growth"] is None


@on_stage
async def test_idle_workers_take_memory(stage: Scene):
    row = await idle_workers.idle_workers(stage, 20, rest_s=0.3)
    assert row["workers"] == 20 and row["registered/s"] > 0
    assert row["KiB each"] < 10_000


@pytest.mark.asyncio(loop_scope="function")
async def test_an_overload_loses_nothing_and_is_over_when_nobody_comes_any_more():
    """Slow readers and a silent worker are among them; `overload` raises when anything is lost."""
    async with scene(throw_away=True, pin=False, more_settings=overload.SETTINGS) as stage:
        row = await overload.overload(stage, seconds=3.0, max_wait_s=3)
    assert row["answered"] + row["refunded"] == row["asked"] > 300
    assert row["answered"] > 0 and row["refunded"] > 0 and row["saw their place"] > 0
    assert row["MiB most"] < 3 * row["MiB before"]
    assert row["/info p99 ms"] > 0 and row["admin p99 ms"] > 0


@pytest.mark.parametrize("by", [server_worker.by_worker, server_worker.by_project])
async def test_a_model_server_is_measured_behind_worker_and_router(by: server_worker.By):
    async with scene(throw_away=True, pin=False) as stage:
        row = await server_worker.server_worker(stage, by, streamed=True, seconds=1.0)
        assert await stage.books_in_order()
    assert row["tokens/s"] > 0 and row["first token p50 ms"] > 0 and row["CPU µs/token"] > 0
    assert (row["worker µs/token"] is None) is (by is server_worker.by_project)


async def test_the_instant_model_server_answers_whole_and_in_steps():
    """What other gateways are measured in front of, and what their figures are compared with."""
    async with peer_processes.upstream(0.005) as url:
        port = int(url.rpartition(":")[2])
        for streamed, tokens in ((False, 1), (True, 5)):
            body = orjson.dumps(load.chat_body(max_tokens=tokens, stream=streamed))
            request = load.http_request("/v1/chat/completions", body, {})
            async with load.closed_loop(port, [request], in_flight=3, over_s=0.02) as seen:
                async with asyncio.timeout(10):
                    while seen.answers <= 3 and not seen.failures:
                        await asyncio.sleep(0.02)
                assert not seen.failures
                assert abs(seen.tokens - tokens * seen.answers) <= 3 * tokens
                assert len(seen.first_s) >= seen.answers


async def test_a_gateway_in_front_of_it_passes_answers_on(tmp_path: Path):
    nginx = peer_processes.nginx()
    if nginx is None:
        pytest.skip("needs nginx on this system")
    async with (
        peer_processes.upstream(0.0) as url,
        peer_processes.running(nginx, passable(str(tmp_path)), url, None) as gateway,
    ):
        asked = [peers.request_for(streamed) for streamed in (False, True)]
        row = await peers.measured("nginx", gateway.port, asked[:1], False, 0.5)
        assert row["requests/s"] > 0 and gateway.cpu_s() > 0 and gateway.memory_bytes() > 0


async def test_claims_find_what_each_kind_of_worker_can_take(database_url: str):
    connection = await asyncpg.connect(database_url)
    try:
        edges = await claim.fill(connection, 1_000)
        waiting = await connection.fetchval("select count(*) from queue")
        assert 900 <= waiting <= 1_000
        rows = await claim.claim_costs(connection, 1_000, edges, samples=5)
        assert [row["lanes"] for row in rows] == sorted(
            (row["lanes"] for row in rows), reverse=True
        )
        assert all(row["heads p50"] > 0 and row["claim p50"] > 0 for row in rows)
        left = await connection.fetchval("select count(*) from queue")
        assert left == waiting - 3 * (5 + claim.WARM_UP)
        database = await Database.open(database_url)
        places = await claim.place_costs(database, 1_000, edges)
        await database.close()
        assert places["place of the last"] > 0 and places["look at changes"] > 0
    finally:
        await connection.close()


def test_figures_can_be_read_by_people_and_programs(tmp_path: Path, capsys):
    async def measure(options: Options) -> list[Report]:
        return [Report("things", [{"n": 1_000, "share": 0.5, "of": None}], ["a note"])]

    path = tmp_path / "figures.json"
    assert figures.run(measure, "about", ["--quick", "--json", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "1,000" in shown and "0.50" in shown and "a note" in shown
    body = json.loads(path.read_text())
    assert body["reports"][0]["rows"] == [{"n": 1_000, "share": 0.5, "of": None}]
    assert body["machine"]["cores"] >= 1 and 5 < body["machine"]["python_step_ns"] < 50_000


@pytest.mark.parametrize(
    "values, share, value",
    [([], 0.5, None), ([3.0], 0.99, 3.0), ([3.0, 1.0, 2.0], 0.5, 2.0), ([1.0, 2.0], 0.99, 2.0)],
)
def test_a_percentile_is_one_of_the_values(values: list[float], share: float, value: float | None):
    assert figures.percentile(values, share) == value
