"""Workers: who is connected to this router, and the record of each in the database.

`Worker` is one connected worker as the router sees it; `Fleet` is all of them, with what they can
take. A worker is known by a hash: of its key, which never leaves this module in clear, or of what
else identifies it.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

from billing.accounts import new_id
from router import demands
from router.demands import Traits
from router.lanes import ANY_MODEL, BASE_EDGES, Edges, answer_limit, drained_by, holds, model_of
from router.queenbee_models import Offers
from router.room import Held, Room
from router.standing import Standing, average
from worker.protocol import ModelKind, ServedModel

# What is assumed of a worker that has not shown its speed yet, in tokens per second and seconds.
UNKNOWN_SPEED = 20.0
UNKNOWN_SERVICE_S = 5.0
# The floor of a worker that no multiplier pays what it asks.
NEVER_MILLI = 1 << 60
# Records that are read at the start, for the models in them.
MOST_READ = 20_000
# Beginnings of prompts that a worker is taken to have at hand, if it has fewer slots than that.
LEAST_REMEMBERED = 2


@dataclass(slots=True)
class Worker:
    """One connected worker. `busy` holds the jobs it has, by id.

    `draining`: it gets no more jobs, for whatever reason. `told_to_drain`: because its owner or an
    admin has said so. `resting`: it has said that it is busy with something else. `pulls`: it asks
    for its jobs itself, and is not handed any; `asks_elsewhere`: another router was the last that it
    asked, and counts it. `offers` tells whether it would also serve a model
    that it has not named. `traits`: what clients may demand of it. `met`: how prompts began that it
    was given last (`router.prompt_prefix`).
    `filled_at`, `freed_at`: when it was given a job last, and when one of its jobs ended last.
    `min_fees`: what it asks at least, by model; `floors`: the multipliers that this comes to now, where
    they are over one (`router.asks`).
    """

    id: str
    name: str | None
    models: list[ServedModel]
    slots: int
    payable: bool
    ln_url: str | None
    speeds: dict[str, float]
    draining: bool = False
    told_to_drain: bool = False
    pulls: bool = False
    asks_elsewhere: bool = False
    resting: bool = False
    offers: Offers | None = None
    traits: Traits = demands.ANYBODY
    stands_for: int = 1
    busy: set[str] = field(default_factory=set)
    lanes: frozenset[str] = frozenset()
    connected_at: float = field(default_factory=time.monotonic)
    filled_at: float = 0.0
    freed_at: float = 0.0
    service_s: dict[str, float] = field(default_factory=dict)
    met: dict[int, None] = field(default_factory=dict)
    standing: Standing = field(default_factory=Standing)
    min_fees: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    floors: dict[str, int] = field(default_factory=dict)
    done: int = 0
    failed: int = 0
    tokens: int = 0

    @property
    def free_slots(self) -> int:
        away = self.draining or self.resting or self.standing.rests_s
        return 0 if away else max(0, self.slots - len(self.busy))

    @property
    def idle_workers(self) -> int:
        """How many workers with room for a job it stands for."""
        return int(self.free_slots > 0)

    def has_tried(self, tried_by: frozenset[str]) -> bool:
        """Whether a job that these workers had is nothing new to it."""
        return self.id in tried_by

    @property
    def reliability(self) -> float:
        return self.standing.reliability

    def serves(self, kind: ModelKind, model: str) -> ServedModel | None:
        for served in self.models:
            if served.id == model and served.kind == kind:
                return served
        return self.offers(kind, model) if self.offers is not None else None

    def drains(self, lane: str) -> bool:
        """Whether every job in this lane fits, also one that only its name tells of."""
        if lane in self.lanes:
            return True
        if self.offers is None and not lane.startswith("@"):
            return False
        demand, plain = demands.of_lane(lane), demands.without(lane)
        if not self.traits.meet(demand):
            return False
        if plain in self.lanes or self.offers is None:
            return plain in self.lanes
        served = self.serves(ModelKind(plain.split("/", 1)[0]), model_of(plain))
        return served is not None and holds(served, plain)

    def model_for(self, lane: str) -> str:
        """Which of its models serves a job of this lane: the fastest, where any will do."""
        wanted = model_of(lane)
        if wanted != ANY_MODEL:
            return wanted
        fit = [served.id for served in self.models if holds(served, lane)]
        return max(fit, key=lambda model: self.speeds.get(model, UNKNOWN_SPEED), default=wanted)

    def floor_milli(self, lane: str) -> int:
        """The least multiplier at which it takes jobs of this lane, in thousandths."""
        if not self.floors:
            return 0
        wanted = model_of(lane)
        if wanted != ANY_MODEL:
            return self.floors.get(wanted, 0)
        fit = (self.floors.get(m.id, 0) for m in self.models if holds(m, lane))
        return min(fit, default=0)

    def merit(self, model: str) -> float:
        """How soon and how surely it will answer: speed times score, less what it is doing."""
        load = len(self.busy) / self.slots
        return self.speeds.get(model, UNKNOWN_SPEED) * self.standing.score**4 * (1 - load / 2)

    def remember(self, prefix: int | None) -> None:
        """Note what the prompt begins with that it was given; as much as its slots may still hold."""
        if prefix is not None:
            self.met.pop(prefix, None)
            self.met[prefix] = None
            if len(self.met) > max(LEAST_REMEMBERED, self.slots):
                del self.met[next(iter(self.met))]

    def succeeded(self, model: str, *, tokens: int, seconds: float) -> None:
        """Note an answer: `seconds` from claim to end, `tokens` produced."""
        self.done += 1
        self.tokens += tokens
        self.standing.good()
        self.service_s[model] = average(self.service_s.get(model), seconds)
        if tokens > 0 and seconds > 0:
            self.speeds[model] = average(self.speeds.get(model), tokens / seconds)

    def failed_by_own_fault(self, job_id: str, attempt: int, code: str) -> None:
        self.failed += 1
        self.standing.fault(job_id, attempt, code)


@dataclass(slots=True)
class FarWorkers(Worker):
    """The workers of another router that can take the same jobs, summed up: `stands_for` of them,
    with `slots` and `free` slots between them. They are given jobs there, and only counted here.
    `names` are their ids, if they are few.
    """

    router_id: str = ""
    free: int = 0
    idle: int = 0
    busy_workers: int = 0
    names: frozenset[str] = frozenset()

    @property
    def free_slots(self) -> int:
        return self.free

    @property
    def idle_workers(self) -> int:
        return self.idle

    def has_tried(self, tried_by: frozenset[str]) -> bool:
        return bool(self.names) and self.names <= tried_by


# A fleet that is gone through in some ten microseconds.
SMALL = 100
# What decides the lanes of a worker: kind, id, context and answer limits of its models.
_Limits = tuple[tuple[ModelKind, str, int, int], ...]


class Fleet:
    """The workers connected to this router; and, in sums, those of the others of this market.

    Work is given to the former only; prices, waits and what can be served go by all of them.
    """

    def __init__(self) -> None:
        self._workers: dict[str, Worker] = {}
        self._elsewhere: dict[str, list[FarWorkers]] = {}
        # By identity: two connections of one worker may look the same, and are not.
        self._left: dict[int, Worker] = {}
        self.on_change: Callable[[], None] = lambda: None
        # Lanes that no worker drains any more are forgotten with the last one.
        self._lanes: WeakValueDictionary[_Limits, frozenset[str]] = WeakValueDictionary()
        self._room = Room()
        self.edges = Edges()
        # When a job was last met here that demands more of its worker than a model.
        self.demanded_at = -math.inf

    def add(self, worker: Worker) -> None:
        """Take a worker in; the edges must hold its limits already."""
        before = self._workers.get(worker.id)
        if before is not None:
            self._room.take(before)
        self._workers[worker.id] = worker
        worker.lanes = self._lanes_of(worker)
        worker.busy = Held(worker.busy, partial(self._may_have_room, worker))
        self._may_have_room(worker)
        self.on_change()

    def remove(self, worker: Worker) -> None:
        if self._workers.get(worker.id) is worker:
            del self._workers[worker.id]
            self._room.take(worker)
            self.left(worker)
            self.on_change()

    def left(self, worker: Worker) -> None:
        """Keep what was observed of a worker that is gone until it is written. Twice is harmless."""
        if worker.done or worker.failed or worker.tokens:
            self._left[id(worker)] = worker

    def take_left(self) -> list[Worker]:
        """Workers that have gone since the last time, or of which something was learned since."""
        left, self._left = self._left, {}
        return list(left.values())

    def set_elsewhere(self, router_id: str, workers: list[FarWorkers]) -> None:
        """What another router's workers are now; none when it has gone."""
        for worker in workers:
            worker.lanes = self._lanes_of(worker)
        if workers:
            self._elsewhere[router_id] = workers
        else:
            self._elsewhere.pop(router_id, None)

    def elsewhere(self) -> list[FarWorkers]:
        return [worker for workers in self._elsewhere.values() for worker in workers]

    def routers_elsewhere(self) -> list[str]:
        """The other routers that have workers."""
        return list(self._elsewhere)

    def everywhere(self) -> list[Worker]:
        """All of the market's workers, each once; those of other routers in sums."""
        here = [worker for worker in self._workers.values() if not worker.asks_elsewhere]
        return [*here, *self.elsewhere()]

    def set_edges(self, edges: Edges) -> None:
        self.edges = edges
        self._lanes.clear()
        self._room = Room()
        for worker in [*self._workers.values(), *self.elsewhere()]:
            worker.lanes = self._lanes_of(worker)
        self.look_for_room()

    def _lanes_of(self, worker: Worker) -> frozenset[str]:
        """The lanes that a worker drains, shared by all whose models have the same limits.

        Thousands of workers serve the same few models: lanes of their own for each would be most
        of what one needs in memory.
        """
        limits = tuple((m.kind, m.id, m.context_length, answer_limit(m)) for m in worker.models)
        lanes = self._lanes.get(limits)
        if lanes is None:
            lanes = self._lanes[limits] = frozenset(drained_by(self.edges, worker.models))
        return lanes

    def get(self, worker_id: str) -> Worker | None:
        return self._workers.get(worker_id)

    def all(self) -> list[Worker]:
        return list(self._workers.values())

    @property
    def is_small(self) -> bool:
        """Whether going through all workers costs next to nothing."""
        return len(self._workers) <= SMALL

    def idle(self, most_each: int | None = None) -> list[Worker]:
        """Workers that can be handed a job now; those that pull come for theirs.

        `most_each`: not more than so many that are alike, and without going through all workers
        where they are more than that.
        """
        if most_each is not None and len(self._workers) > most_each:
            return self._room.idle(most_each)
        return [w for w in self._workers.values() if not w.pulls and w.free_slots > 0]

    def note_demands(self, waiting: Iterable[str]) -> None:
        """Jobs wait in these lanes: whether a worker here, idle or not, meets what one demands."""
        lanes = [lane for lane in waiting if lane.startswith("@")]
        if any(worker.drains(lane) for lane in lanes for worker in self._workers.values()):
            self.demanded_at = time.monotonic()

    def look_for_room(self) -> None:
        """Go through all workers: some may have room again for no reason that we were told."""
        for worker in self._workers.values():
            if worker.free_slots > 0:
                self._may_have_room(worker)

    def _may_have_room(self, worker: Worker) -> None:
        if not worker.pulls and self._workers.get(worker.id) is worker:
            self._room.put(worker)

    def serving(self, kind: ModelKind, model: str) -> list[Worker]:
        """Connected workers that serve a model and are not on their way out."""
        return [
            w for w in self.everywhere() if not w.draining and w.serves(kind, model) is not None
        ]

    def draining_lane(self, lane: str, multiplier_milli: int = NEVER_MILLI) -> list[Worker]:
        """Connected workers that a job in this lane fits, and that take it at this multiplier."""
        return [
            w
            for w in self.everywhere()
            if not w.draining and w.drains(lane) and w.floor_milli(lane) <= multiplier_milli
        ]

    def competing_lanes(self, lane: str, multiplier_milli: int = NEVER_MILLI) -> list[str]:
        """All lanes drained by workers that could take a job in `lane`: its competition."""
        lanes = {lane}
        for worker in self.draining_lane(lane, multiplier_milli):
            lanes |= worker.lanes
        return sorted(lanes)


@dataclass(frozen=True, slots=True)
class WorkerRecord:
    """What the database knows of a worker that registers."""

    id: str
    banned: bool
    ban_reason: str | None
    draining: bool
    reliability: float
    quality: float
    speeds: dict[str, float]


def hash_worker_key(key: str) -> bytes:
    return hashlib.sha256(b"satherd-worker\0" + key.encode()).digest()


def hash_identity(what: str, *parts: str) -> bytes:
    """What a worker without a worker key is known by: `what` says what the parts are."""
    return hashlib.sha256(json.dumps(["satherd-worker", what, *parts]).encode()).digest()


async def register(
    connection: Any,
    identity: bytes,
    *,
    name: str | None,
    models: Iterable[ServedModel],
    hardware: dict[str, Any],
    slots: int,
) -> WorkerRecord:
    """Store what a worker says of itself; a new identity makes a new worker."""
    row = await connection.fetchrow(
        "insert into workers (id, key_hash, name, models, hardware, slots)"
        " values ($1, $2, $3, $4, $5, $6) on conflict (key_hash) do update set name = excluded.name,"
        " models = excluded.models, hardware = excluded.hardware, slots = excluded.slots,"
        " last_seen_at = now() returning *",
        new_id(),
        identity,
        name,
        json.dumps([m.model_dump(mode="json") for m in models]),
        json.dumps(hardware),
        slots,
    )
    return _record(row)


async def is_paid_at(connection: Any, identity: bytes, ln_url: str) -> bool:
    """Whether a worker has this address already, or will have it within the hour."""
    return await connection.fetchval(
        "select exists (select from workers w join payees p on p.id = w.id"
        " where w.key_hash = $1 and $2 in (p.ln_url, p.next_ln_url))",
        identity,
        ln_url,
    )


async def find_by_key(connection: Any, worker_key: str) -> WorkerRecord | None:
    """The worker that holds this key, if there is one."""
    row = await connection.fetchrow(
        "select * from workers where key_hash = $1", hash_worker_key(worker_key)
    )
    return _record(row) if row else None


def _record(row: Any) -> WorkerRecord:
    return WorkerRecord(
        id=row["id"],
        banned=row["banned_at"] is not None,
        ban_reason=row["ban_reason"],
        draining=row["draining"],
        reliability=row["reliability"],
        quality=row["quality"],
        speeds=json.loads(row["speeds"]),
    )


async def add_edges(connection: Any, models: Iterable[ServedModel]) -> Edges:
    """Make the limits of `models` edges for good, while there is room; returns all edges."""
    before = await load_edges(connection)
    wanted = before.with_limits(models)
    if wanted == before:
        return before
    await connection.execute(
        "insert into lane_edges (dimension, edge)"
        " select 'context', unnest($1::bigint[]) union all select 'answer', unnest($2::bigint[])"
        " on conflict do nothing",
        [edge for edge in wanted.context if edge not in before.context],
        [edge for edge in wanted.answer if edge not in before.answer],
    )
    return await load_edges(connection)


async def load_edges(connection: Any) -> Edges:
    rows = await connection.fetch("select dimension, edge from lane_edges")
    context = {row["edge"] for row in rows if row["dimension"] == "context"}
    answer = {row["edge"] for row in rows if row["dimension"] == "answer"}
    return Edges(tuple(sorted({*BASE_EDGES, *context})), tuple(sorted({*BASE_EDGES, *answer})))


@dataclass(frozen=True, slots=True)
class News:
    """What is new about a worker since its record was last written: counts are added, the rest
    replaces what was there."""

    worker_id: str
    done: int
    failed: int
    tokens: int
    reliability: float
    speeds: dict[str, float]


async def keep_records(connection: Any, news: Iterable[News]) -> None:
    """Write what was observed of workers; each may come once."""
    rows = [
        (n.worker_id, n.done, n.failed, n.tokens, n.reliability, json.dumps(n.speeds)) for n in news
    ]
    if not rows:
        return
    await connection.execute(
        "update workers w set jobs_done = w.jobs_done + t.done,"
        " jobs_failed = greatest(0, w.jobs_failed + t.failed), tokens = w.tokens + t.tokens,"
        " reliability = t.reliability, speeds = w.speeds || t.speeds::jsonb,"
        # One that pulls is seen when it asks, and stays in the fleet for a while after that.
        " last_seen_at = case when exists (select 1 from pull_workers p where p.worker_id = w.id)"
        " then w.last_seen_at else now() end"
        " from unnest($1::text[], $2::bigint[], $3::bigint[], $4::bigint[],"
        " $5::float8[], $6::text[])"
        " t(id, done, failed, tokens, reliability, speeds) where w.id = t.id",
        *(list(column) for column in zip(*rows, strict=True)),
    )


async def known_models(connection: Any) -> dict[tuple[ModelKind, str], ServedModel]:
    """The widest limits of each model that any worker not banned has registered, those seen last at
    the end; of the last so many workers."""
    widest: dict[tuple[ModelKind, str], ServedModel] = {}
    rows = await connection.fetch(
        "select models from workers where banned_at is null order by last_seen_at desc limit $1",
        MOST_READ,
    )
    for row in reversed(rows):
        for model in map(ServedModel.model_validate, json.loads(row["models"])):
            known = widest.pop((model.kind, model.id), None)
            if known is None or known.context_length < model.context_length:
                known = model
            widest[model.kind, model.id] = known
    return widest
