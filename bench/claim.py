"""What finding and claiming one job costs with 10^3 to 10^6 jobs waiting, and what a place costs.

    python -m bench.claim [--quick] [--full] [--json FILE]

The router's own statements (`job_queue.heads`, `job_store.claim_many`) and its own copy of the queue
(`router.market`, for positions and the price list) on a PostgreSQL that does not sync, so that it is
the engine's work that is measured and not the disk. 20 models; nearly all jobs belong to the busiest
ones and want a long context. Three workers: one that drains every lane; one whose only model few jobs
ask for, all of them at the tail of the queue; one with small limits, for which only a few jobs at the
tail are small enough. A flat line from left to right is what lanes are for. 10^6 only with `--full`.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg

from bench.figures import Options, Report, Row, milliseconds, percentile, run
from bench.scene import passable
from router import job_queue, job_store
from router.database import Database, migrate
from router.dispatcher import SPARE_HEADS
from router.embedded_postgres import EmbeddedPostgres
from router.job_records import Claim
from router.lanes import Edges, drained_by, lane
from router.market import Market
from router.models import Models
from router.workers import Fleet, Worker
from worker.protocol import ModelKind, ServedModel

SAMPLES = 60
WARM_UP = 10
MODELS = [f"model-{i:02d}" for i in range(20)]
RARE = "model-rare"
LONG, SHORT = 32_768, 512
# Jobs of the rare model, and small jobs of the busiest one: enough to claim SAMPLES of each.
FEW = 100

_FILL = """
insert into jobs (id, quote_id, index, account_id, kind, model, state, spec, rates, prompt_tokens,
    max_tokens, base_fee_msat, held_msat, multiplier_milli, max_wait_s, seq, queued_at, wait_ends_at)
select 'job-' || $1 || '-' || n, 'quote', n, 'account', 'chat', $2, 'queued', repeat('x', 1000), '{}',
    1000, 100, 1000, 1000, $3 + (n::bigint * 7919) % $4, 600, nextval('queue_seq'), now(),
    now() + interval '1 hour'
from generate_series(1, $5::int) n"""

_QUEUE = """
insert into queue (job_id, lane, multiplier_milli, seq)
select id, $2, multiplier_milli, seq from jobs where id like 'job-' || $1 || '-%'"""


@dataclass(frozen=True, slots=True)
class Server:
    """A kind of worker: the lanes that it drains."""

    name: str
    lanes: list[str]


async def measure(options: Options) -> Sequence[Report]:
    """One table of claims, one of places."""
    sizes = [1_000, 10_000] if options.quick else [1_000, 10_000, 100_000]
    if options.full:
        sizes.append(1_000_000)
    claims, places = Report("claim of one job, µs (median, 99 %)"), Report("places, µs (median)")
    with tempfile.TemporaryDirectory(prefix="satherd-bench-") as folder:
        async with EmbeddedPostgres(passable(folder) / "postgres", throw_away=True) as postgres:
            await asyncio.to_thread(migrate, postgres.url)
            for size in sizes:
                connection = await asyncpg.connect(postgres.url)
                try:
                    edges = await fill(connection, size)
                    claims.rows += await claim_costs(connection, size, edges)
                    database = await Database.open(postgres.url)
                    places.rows.append(await place_costs(database, size, edges))
                    await database.close()
                finally:
                    await connection.close()
    claims.notes.append(
        f"heads: the look for candidates; claim: the guarded claim of one, with its commit;"
        f" {SAMPLES} samples each, one client, no fsync"
    )
    return [claims, places]


async def fill(connection: Any, size: int) -> Edges:
    """Empty the tables and let `size` jobs wait; returns the lanes' edges."""
    edges = Edges().with_limits([_served(RARE, SHORT), _served(MODELS[0], LONG)])
    await connection.execute("truncate jobs, queue, attempts")
    # The busiest model has 60 of 100 jobs, the next 30, the others share the rest.
    shares = [0.6, 0.3, *[0.1 / (len(MODELS) - 2)] * (len(MODELS) - 2)]
    left = size - 2 * FEW
    for number, (model, share) in enumerate(zip(MODELS, shares, strict=True)):
        count = max(1, int(left * share))
        await _add(connection, edges, f"busy{number}", model, count, tokens=LONG - 200)
    # At the tail: the lowest multiplier, and the last to come.
    await _add(connection, edges, "rare", RARE, FEW, tokens=LONG - 200, spread=1)
    await _add(connection, edges, "small", MODELS[0], FEW, tokens=SHORT - 200, spread=1)
    await connection.execute("vacuum analyze jobs, queue")
    # What the filling has left to write is not the claims' work.
    await connection.execute("checkpoint")
    return edges


async def _add(
    connection: Any,
    edges: Edges,
    group: str,
    model: str,
    count: int,
    *,
    tokens: int,
    spread: int = 2_000,
) -> None:
    name = lane(edges, kind=ModelKind.TEXT, model=model, prompt_tokens=tokens, max_tokens=100)
    lowest = 1_000 if spread == 1 else 1_001
    await connection.execute(_FILL, group, model, lowest, spread, count)
    await connection.execute(_QUEUE, group, name)


def _served(model: str, context_length: int) -> ServedModel:
    return ServedModel(id=model, context_length=context_length, max_tokens=context_length)


def servers(edges: Edges) -> list[Server]:
    """The three kinds of workers."""
    everything = [_served(model, LONG) for model in [*MODELS, RARE]]
    return [
        Server("serves all", drained_by(edges, everything)),
        Server("rare model, at the tail", drained_by(edges, [_served(RARE, LONG)])),
        Server("small limits, at the tail", drained_by(edges, [_served(MODELS[0], SHORT)])),
    ]


async def claim_costs(
    connection: Any, size: int, edges: Edges, *, samples: int = SAMPLES
) -> list[Row]:
    """A row for each kind of worker: look and claim, `samples` times."""
    rows = []
    for server in servers(edges):
        looks_s, claims_s = [], []
        # The first ones plan their statements and fetch the pages.
        for turn in range(-WARM_UP, samples):
            began = time.perf_counter()
            found = await job_queue.heads(connection, server.lanes, most=1 + SPARE_HEADS)
            looked = time.perf_counter()
            async with connection.transaction():
                claimed = await job_store.claim_many(connection, [_claim(found[0].job_id)])
            if turn >= 0:
                claims_s.append(time.perf_counter() - looked)
                looks_s.append(looked - began)
            assert claimed[0] is not None
        rows.append(
            {
                "waiting": size,
                "worker": server.name,
                "lanes": len(server.lanes),
                "heads p50": _micro(percentile(looks_s, 0.5)),
                "heads p99": _micro(percentile(looks_s, 0.99)),
                "claim p50": _micro(percentile(claims_s, 0.5)),
                "claim p99": _micro(percentile(claims_s, 0.99)),
            }
        )
    return rows


def _claim(job_id: str) -> Claim:
    ends_at = datetime.now(UTC) + timedelta(minutes=1)
    return Claim(job_id, "worker", "router", commission_ppm=50_000, lease_ends_at=ends_at)


async def place_costs(database: Database, size: int, edges: Edges) -> Row:
    """What a router pays to know its places: once at its start, then for each look and each asker.

    A look here finds one job that came and one that was claimed since the last, all others have
    waited since the start.
    """
    fleet = Fleet()
    fleet.edges = edges
    everything = [_served(model, LONG) for model in [*MODELS, RARE]]
    fleet.add(Worker("w", None, everything, 1, True, None, {}))
    market = Market(database, Models(fleet))
    began = time.perf_counter()
    await market.refresh()
    copied_s = time.perf_counter() - began
    long_lane = _a_lane(edges)

    async def look() -> None:
        async with database.transaction() as connection:
            await job_queue.add(connection, [("new", long_lane, 1_500, 0)])
        async with database.transaction() as connection:
            await job_queue.remove(connection, ["new"])
        market.touch()

    looks_s = []
    for _ in range(SAMPLES):
        await look()
        began = time.perf_counter()
        await market.refresh()
        looks_s.append(time.perf_counter() - began)
    return {
        "waiting": size,
        "copy at the start, ms": milliseconds(copied_s),
        "look at changes": _micro(percentile(looks_s, 0.5)),
        "place of the last": _median_us(lambda: market.place([long_lane], 1_000, MODELS[0])),
        "place of a dear one": _median_us(lambda: market.place([long_lane], 2_990, MODELS[0])),
        "one model of the price list": _median_us(
            lambda: market.model_queue(ModelKind.TEXT, MODELS[0])
        ),
    }


def _a_lane(edges: Edges) -> str:
    return lane(
        edges, kind=ModelKind.TEXT, model=MODELS[0], prompt_tokens=LONG - 200, max_tokens=100
    )


def _median_us(reckon: Callable[[], object]) -> float | None:
    times_s = []
    for _ in range(SAMPLES):
        began = time.perf_counter()
        reckon()
        times_s.append(time.perf_counter() - began)
    return _micro(percentile(times_s, 0.5))


def _micro(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e6


if __name__ == "__main__":
    sys.exit(run(measure, __doc__))
