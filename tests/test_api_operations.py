"""Health and metrics: what is said while all is well, and while a part is away."""

from __future__ import annotations

import asyncio
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from prometheus_client.parser import text_string_to_metric_families

from billing import ledger
from billing.ledger import Transfer
from billing.lightning import BackendUnavailable, NodeInfo
from router.api import operations
from router.core import Core
from router.job_records import Ended, Ending
from router.job_states import Event, State
from router.metrics import Metrics
from router.tally import Tally
from tests.balance_tools import CHAT
from tests.router_rig import ADMIN_TOKEN, PATIENCE_S, Rig, running_rig

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)


async def metrics(router: Rig) -> dict[tuple[str, ...], float]:
    """(name, values of its labels in name order) -> value, by Prometheus' own parser; a fresh look."""
    text = (await Metrics(router.core, "1.2.3").text()).decode()
    return {
        (
            sample.name.removeprefix("satherd_"),
            *(value for _, value in sorted(sample.labels.items())),
        ): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_a_router_is_ready_when_all_that_a_sale_needs_is_there(router: Rig):
    assert (await router.http.get("/health/live")).json() == {"live": True}
    reply = await router.http.get("/health/ready")
    assert reply.status_code == 200
    assert reply.json() == {
        "ready": True,
        "degraded": False,
        "parts": {
            "database": "ok",
            "lightning": "ok",
            "settlements": "ok",
            "dispatcher": "ok",
            "bus": "ok",
            "router": "ok",
        },
        "network": "regtest",
        "simulated": True,
    }


async def test_a_router_without_its_node_says_so(router: Rig, monkeypatch: pytest.MonkeyPatch):
    async def away() -> Any:
        raise BackendUnavailable("simulated", "node_info", "no connection")

    monkeypatch.setattr(router.core.backend, "node_info", away)
    monkeypatch.setattr(router.core.backend, "balance", away)
    reply = await router.http.get("/health/ready")
    assert reply.status_code == 503 and int(reply.headers["Retry-After"]) > 0
    assert reply.json()["ready"] is False
    assert reply.json()["parts"]["lightning"] == "unavailable"
    assert reply.json()["parts"]["database"] == "ok"
    assert (await router.http.get("/health/live")).status_code == 200
    found = await metrics(router)
    assert found["node_up",] == 0 and found["database_up",] == 1
    assert ("node_spendable_msat",) not in found


async def test_each_part_that_is_away_is_named(router: Rig, monkeypatch: pytest.MonkeyPatch):
    core = router.core

    async def behind() -> NodeInfo:
        return NodeInfo(core.node.pubkey, "", "", "regtest", synced=False)

    monkeypatch.setattr(core.backend, "node_info", behind)
    await core.watcher.stop()
    await core.watcher.stop()  # or it may say in a moment that it is alive
    core.watcher.stream_alive = False
    await core.dispatcher.stop()
    found = await operations.parts(core)
    assert found == {
        "database": "ok",
        "lightning": "not_synced",
        "settlements": "stream_lost",
        "dispatcher": "stopped",
        "bus": "ok",
        "router": "ok",
    }
    core.draining = True
    reply = await router.http.get("/health/ready")
    assert reply.status_code == 503
    assert reply.json()["parts"]["router"] == "draining"


async def test_a_router_without_its_database_is_alive_and_not_ready(
    tmp_path: Path, database_url: str
):
    async with running_rig(tmp_path, database_url) as router:
        await close_database(router.core, database_url)
        try:
            async with asyncio.timeout(PATIENCE_S):
                while (reply := await router.http.get("/health/ready")).status_code == 200:
                    await asyncio.sleep(0.05)
            assert reply.json()["parts"]["database"] == "unavailable"
            assert (await router.http.get("/health/live")).status_code == 200
            found = await metrics(router)
            assert found["database_up",] == 0 and found["node_up",] == 1
            assert ("payouts_unresolved",) not in found
            assert (await router.http.get("/metrics")).status_code == 200
        finally:
            await open_database(database_url)
        async with asyncio.timeout(PATIENCE_S):
            while (await router.http.get("/health/ready")).status_code != 200:
                await asyncio.sleep(0.05)


async def close_database(core: Core, url: str) -> None:
    """As when PostgreSQL goes away: nobody may connect, and who is connected is thrown out."""
    name = url.partition("?")[0].rpartition("/")[2]
    async with core.database.connection() as connection:
        other = await connection.fetchval("select current_database()")
    assert other == name
    server = await _maintenance(url)
    await server.execute(f"alter database {name} with allow_connections false")
    await server.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity where datname = $1", name
    )
    await server.close()


async def open_database(url: str) -> None:
    server = await _maintenance(url)
    name = url.partition("?")[0].rpartition("/")[2]
    await server.execute(f"alter database {name} with allow_connections true")
    await server.close()


async def _maintenance(url: str) -> asyncpg.Connection:
    return await asyncpg.connect(re.sub(r"/[^/?]*(\?|$)", r"/postgres\1", url, count=1))


async def test_metrics_count_what_happens(router: Rig):
    async with router.worker(slots=3) as worker:
        key = await router.bearer(1_000_000)
        job = asyncio.create_task(router.http.post("/v1/chat/completions", json=CHAT, headers=key))
        taken = await worker.job()
        during = await metrics(router)
        await worker.say(taken, "Hello there", tokens=3)
        await worker.finish(taken, tokens=3)
        fee_msat = int((await job).headers["x-satherd-fee-msat"])
        after = await metrics(router)
    assert during["jobs_running",] == 1
    assert (during["workers", "connected"], during["workers", "busy"]) == (1, 1)
    assert (during["worker_slots", "all"], during["worker_slots", "busy"]) == (3, 1)
    assert during["liabilities_msat", "escrow"] > fee_msat
    assert after["jobs_ended_total", "stop", "succeeded"] == 1
    assert after["output_tokens_total",] == 3
    assert after["prompt_tokens_total",] == 3
    assert after["charged_msat_total",] == fee_msat
    assert after["refunded_msat_total",] == during["liabilities_msat", "escrow"] - fee_msat
    assert after["liabilities_msat", "client"] == 1_000_000 - fee_msat
    assert after["liabilities_msat", "worker"] == fee_msat - fee_msat * 50_000 // 1_000_000
    assert after["workers", "idle"] == 1
    assert after["node_spendable_msat",] >= 1_000_000
    assert after["settlements_alive",] == after["database_up",] == after["node_up",] == 1
    # The submission and the ending; a claim of a fresh job may do without the writer.
    assert after["writer_rows_total",] >= 2 and after["writer_turns_total",] >= 1
    assert after["payouts_unresolved",] == after["payouts_paused",] == after["paused",] == 0
    assert after["info", "regtest", "true", "1.2.3"] == 1


async def test_jobs_that_wait_are_counted_by_model(router: Rig):
    async with router.worker() as worker:
        key = await router.bearer()
        jobs = [
            asyncio.create_task(router.http.post("/v1/chat/completions", json=CHAT, headers=key))
            for _ in range(3)
        ]
        first = await worker.job()
        async with asyncio.timeout(PATIENCE_S):
            while (await metrics(router)).get(("queue_jobs", CHAT["model"])) != 2:
                await asyncio.sleep(0.02)
        await worker.finish(first, tokens=1)
        for _ in range(2):
            await worker.serve()
        await asyncio.gather(*jobs)


async def test_what_anybody_may_read_has_no_secrets_and_no_ids(router: Rig):
    async with router.worker() as worker:
        key = await router.bearer()
        job = asyncio.create_task(router.http.post("/v1/chat/completions", json=CHAT, headers=key))
        taken = await worker.serve()
        await job
        reply = await router.http.get("/metrics")
        ready = await router.http.get("/health/ready")
    assert reply.headers["content-type"].startswith("text/plain; version=")
    assert reply.headers["cache-control"] == "no-store"
    text = reply.text + ready.text
    accounts = await router.query("select id from accounts")
    for secret in (ADMIN_TOKEN, key["Authorization"][-22:], taken["job_id"], worker.id, worker.key):
        assert secret not in text
    assert accounts and all(row["id"] not in text for row in accounts)


async def test_each_application_has_metrics_of_its_own(
    router: Rig, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("router.metrics.FRESH_S", 60.0)
    async with router.core.database.transaction() as connection:
        await ledger.post(
            connection, [Transfer(ledger.LIGHTNING, ledger.client("a"), 7, "received", "x")]
        )
    first, second = Metrics(router.core, "1"), Metrics(router.core, "2")
    texts = [(await each.text()).decode() for each in (first, second)]
    assert all('satherd_liabilities_msat{kind="client"} 7.0' in text for text in texts)
    # A second look within a second, which is a minute here, costs nothing.
    assert await first.text() is await first.text()


def test_the_tally_counts_an_ending_once_with_what_was_charged():
    tally = Tally()
    usage = '{"satherd": {"prompt_tokens": 5, "completion_tokens": 8}}'
    for state, reason, charged in ((State.SUCCEEDED, "stop", 60), (State.EXPIRED, "max_wait", 0)):
        event = Event.FINISH if charged else Event.EXPIRE
        ending = Ending("j", event, reason, usage=usage if charged else None)
        tally.count(ending, Ended("j", state, 100, charged, 100 - charged, ended_at=NOW))
    assert dict(tally.ended) == {("succeeded", "stop"): 1, ("expired", "max_wait"): 1}
    assert (tally.prompt_tokens, tally.output_tokens) == (5, 8)
    assert (tally.charged_msat, tally.refunded_msat) == (60, 140)
