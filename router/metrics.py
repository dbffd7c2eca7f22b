"""What Prometheus reads: gauges measured when it asks, and this process's counters.

A part that cannot be asked is left out, and its `…_up` gauge is 0: a scrape never fails because the
database or the node is away, for that is when it is needed. No ids of jobs, payers or workers.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import asyncpg
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from billing import payout_control, payout_records
from billing.lightning import BackendError, NodeBalance
from billing.payout_control import ControlState
from billing.payout_records import Unresolved
from router.core import Core
from router.database import DatabaseUnavailable

FRESH_S = 1.0
# Models that have a series of their own; the rest together has no name.
MOST_MODELS = 100
PATIENCE_S = 3.0

_LIABILITIES = """
select split_part(account, ':', 2) as kind, sum(balance_msat)::bigint as balance_msat
from ledger_balances group by 1"""


@dataclass(frozen=True, slots=True)
class Books:
    """What the database says. `queue` is waiting jobs by model, `liabilities` msat by kind."""

    queue: dict[str, int]
    liabilities: dict[str, int]
    unresolved: Unresolved
    control: ControlState


@dataclass(frozen=True, slots=True)
class Reading:
    """One look at everything. None: that part could not be asked."""

    core: Core
    version: str
    books: Books | None
    node: NodeBalance | None


@dataclass(slots=True, eq=False)
class Metrics:
    """The metrics of one application, with a registry of their own."""

    core: Core
    version: str
    _registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    _text: bytes = b""
    _read_at: float = float("-inf")
    _reading: Reading | None = None

    def __post_init__(self) -> None:
        self._registry.register(self)

    async def text(self) -> bytes:
        """The metrics in Prometheus' text format, at most a second old."""
        async with self._lock:
            if time.monotonic() - self._read_at > FRESH_S:
                books, node = await asyncio.gather(_books(self.core), _node(self.core))
                self._reading = Reading(self.core, self.version, books, node)
                self._text = generate_latest(self._registry)
                self._read_at = time.monotonic()
            return self._text

    def collect(self) -> Iterator[Metric]:
        """The registry's view of the last reading."""
        if self._reading is not None:
            yield from _families(self._reading)


async def _books(core: Core) -> Books | None:
    try:
        async with asyncio.timeout(PATIENCE_S):
            await core.market.refresh()
        async with asyncio.timeout(PATIENCE_S), core.database.connection() as connection:
            rows = await connection.fetch(_LIABILITIES)
            return Books(
                queue=_by_model(core),
                liabilities={row["kind"]: row["balance_msat"] for row in rows},
                unresolved=await payout_records.unresolved(connection, now=core.clock()),
                control=await payout_control.control_state(connection),
            )
    except (DatabaseUnavailable, TimeoutError, asyncpg.PostgresError):
        return None


def _by_model(core: Core) -> dict[str, int]:
    queue: Counter[str] = Counter()
    for lanes, jobs in core.market.counts.in_lanes():
        # A job that waits for any of several models is counted once, at the first.
        queue[lanes[0].split("/", 3)[3]] += jobs
    # Clients may wait for models of any name: each would be a series for good.
    most = dict(queue.most_common(MOST_MODELS))
    rest = queue.total() - sum(most.values())
    return most | ({"": rest} if rest else {})


async def _node(core: Core) -> NodeBalance | None:
    try:
        async with asyncio.timeout(PATIENCE_S):
            return await core.backend.balance()
    except (BackendError, TimeoutError):
        return None


def _families(reading: Reading) -> Iterator[Metric]:
    core = reading.core
    info = GaugeMetricFamily(
        "satherd_info",
        "This router. Simulated money is nobody's money.",
        labels=["version", "network", "simulated"],
    )
    simulated = "true" if core.node.simulated else "false"
    info.add_metric([reading.version, core.node.network, simulated], 1)
    yield info
    yield from _work(core)
    yield from _process(core)
    yield from _others(core)
    yield _one("database_up", "Whether PostgreSQL answered.", int(reading.books is not None))
    if reading.books is not None:
        yield from _booked(core, reading.books)
    yield _one("node_up", "Whether the Lightning node answered.", int(reading.node is not None))
    if reading.node is not None:
        yield from _held(reading.node)
    yield from _compared(core)


def _held(node: NodeBalance) -> Iterator[Metric]:
    yield _one("node_held_msat", "All that is ours in the node.", node.held_msat)
    yield _one("node_spendable_msat", "What the node can send.", node.spendable_msat)
    yield _one("node_pending_msat", "What the node has in HTLCs.", node.pending_msat)
    yield _one("node_reserve_msat", "What is in reserves or away for now.", node.reserve_msat)
    if node.receivable_msat is not None:
        yield _one("node_receivable_msat", "What the node can be paid.", node.receivable_msat)


def _compared(core: Core) -> Iterator[Metric]:
    """What the last comparison of node and books has found; absent before the first."""
    yield _one("reconciled", "Whether there was one since the start.", int(core.reconciler.ready))
    last = core.reconciler.last
    if last is not None:
        age_s = (core.clock() - last.at).total_seconds()
        yield _one("reconciled_age_seconds", "Age of the last comparison.", age_s)
        yield _one(
            "books_difference_msat",
            "What the node held then beyond what is booked; below zero, money is missing.",
            last.difference_msat,
        )


def _work(core: Core) -> Iterator[Metric]:
    workers = core.fleet.all()
    states = {
        "connected": len(workers),
        "idle": sum(1 for w in workers if not w.busy and not w.draining),
        "busy": sum(1 for w in workers if w.busy),
        "draining": sum(1 for w in workers if w.draining),
    }
    yield _by("workers", "Workers connected to this router.", "state", states)
    slots = {
        "all": sum(w.slots for w in workers),
        "busy": sum(len(w.busy) for w in workers),
    }
    yield _by("worker_slots", "Jobs that connected workers can hold, and hold.", "state", slots)
    yield _one(
        "jobs_running", "Jobs that run on workers of this router.", len(core.attempts.running)
    )
    tally = core.attempts.tally
    ended = CounterMetricFamily(
        "satherd_jobs_ended", "Jobs that ended here.", labels=["state", "reason"]
    )
    for (state, reason), count in sorted(tally.ended.items()):
        ended.add_metric([state, reason], count)
    yield ended
    yield _counter("prompt_tokens", "Prompt tokens of ended jobs, as charged.", tally.prompt_tokens)
    yield _counter("output_tokens", "Tokens of answers, as charged.", tally.output_tokens)
    yield _counter("charged_msat", "Fees charged for ended jobs.", tally.charged_msat)
    yield _counter("refunded_msat", "What was held and not charged.", tally.refunded_msat)


def _process(core: Core) -> Iterator[Metric]:
    pool, idle = core.database.pool, core.database.idle
    connections = {
        "idle": idle,
        "used": pool.get_size() - idle,
        "most": pool.get_max_size(),
    }
    yield _by("database_connections", "Connections of the pool.", "state", connections)
    yield _counter("writer_turns", "Transactions of the batching writer.", core.writer.turns)
    yield _counter("writer_rows", "Writes that the batching writer has done.", core.writer.rows)
    alive = int(core.watcher.stream_alive or not core.watcher.pushed)
    yield _one("settlements_alive", "Whether settlements are followed.", alive)
    paused = int(core.runtime.paused is not None)
    yield _one("paused", "Whether the operator has paused new work.", paused)
    yield _one("draining", "Whether this router is shutting down.", int(core.draining))


def _others(core: Core) -> Iterator[Metric]:
    bus = core.relay.bus
    yield _one("bus_up", "Whether the bus between routers takes messages.", int(bus.up))
    yield _counter("bus_sent", "Messages sent to other routers.", bus.sent)
    yield _counter("bus_received", "Messages of other routers.", bus.received)
    yield _counter("bus_gaps", "Parcels of other routers that were missed.", bus.gaps)
    yield _one("routers_others", "Other routers that are alive.", core.presence.others)
    yield _one(
        "far_workers",
        "Workers connected to other routers.",
        sum(worker.stands_for for worker in core.fleet.elsewhere()),
    )
    jobs = {"read_here": core.relay.following, "read_elsewhere": core.relay.telling}
    yield _by("far_jobs", "Jobs that run at one router and are read at another.", "how", jobs)


def _booked(core: Core, books: Books) -> Iterator[Metric]:
    yield _by("queue_jobs", "Jobs that wait in the queue.", "model", books.queue)
    yield _by("liabilities_msat", "What is owed, by kind.", "kind", books.liabilities)
    open_ones = books.unresolved
    yield _one("payouts_unresolved", "Payments without an answer yet.", open_ones.count)
    yield _one("payouts_unresolved_msat", "What they come to.", open_ones.amount_msat)
    yield _one(
        "payouts_unresolved_age_seconds", "Age of the oldest of them.", open_ones.oldest_age_s
    )
    alerts = {alert.value: count for alert, count in open_ones.alerts.items()}
    yield _by("payout_alerts", "Payouts that wait for a person.", "alert", alerts)
    paused = int(books.control.paused_why is not None)
    yield _one("payouts_paused", "Whether nothing is paid out until an admin says so.", paused)
    yield _one(
        "payouts_unknown_payments",
        "Payments of the node that wait for an operator's word; nothing is paid out meanwhile.",
        books.control.unknown_payments,
    )
    yield _one("payouts_unknown_msat", "What they come to.", books.control.unknown_msat)
    blocked = books.control.blocked
    yield _by(
        "payouts_blocked",
        "What keeps payouts waiting.",
        "by",
        {blocked.value: 1} if blocked else {},
    )
    lease = books.control.lease_ends_at
    payer = int(lease is not None and lease > core.clock())
    yield _one("payouts_runner_alive", "Whether some router pays.", payer)


def _one(name: str, words: str, value: float) -> Metric:
    return GaugeMetricFamily(f"satherd_{name}", words, value=value)


def _counter(name: str, words: str, value: float) -> Metric:
    return CounterMetricFamily(f"satherd_{name}", words, value=value)


def _by(name: str, words: str, label: str, values: dict[str, Any]) -> Metric:
    family = GaugeMetricFamily(f"satherd_{name}", words, labels=[label])
    for key, value in sorted(values.items()):
        family.add_metric([key], value)
    return family
