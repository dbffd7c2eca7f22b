"""The price of a place: positions, waiting times, the ladder of multipliers.

All of it is reckoned from a copy of the queue's order in memory (`router.queue_counts`) that follows
the database: what this router has changed is looked up when somebody asks, what others have, after a
moment. Nothing here slows down with the number of jobs that wait.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

from billing.fees import ONE_MILLI, format_multiplier
from router import demands, job_queue
from router.database import Database
from router.dear_memory import DearMemory
from router.models import Models, mean_service_s
from router.queue_counts import Drifted, QueueCounts
from router.workers import NEVER_MILLI, UNKNOWN_SERVICE_S, Worker
from worker.protocol import ModelKind

log = logging.getLogger(__name__)

# A look that was not cheap is good for this many times as long as it took: mostly the copy is as the
# database is, and on a database that is slow it costs a few per cent of a connection.
REUSE_FACTOR = 20
CHEAP_S = 0.03
OTHERS_S = 0.2
FRESH_MOST_S = 2.0
# How old it may be for a decision that need not be exact, such as "the queue is full".
ROUGHLY_S = 0.5
# A copy that has not followed for so long may have missed changes that are deleted by now; and one of
# that age is read anew in any case, so that nothing wrong in it could last.
FOLLOWS_S = job_queue.CHANGES_KEPT.total_seconds() / 2
COPY_LASTS_S = 3600.0
MAX_LADDER = 32


@dataclass(frozen=True, slots=True)
class Wait:
    """How long a job at some place waits, in seconds: half of them less, nine in ten less."""

    p50: float
    p90: float

    def as_json(self) -> dict[str, float]:
        return {"p50": self.p50, "p90": self.p90}


@dataclass(frozen=True, slots=True)
class Place:
    """A place in the queue. `servable`: some connected worker could take the job."""

    position: int
    wait: Wait
    to_be_next_milli: int
    servable: bool

    def as_json(self) -> dict:
        return {
            "position": self.position,
            "wait_s": self.wait.as_json(),
            "multiplier_to_be_next": format_multiplier(self.to_be_next_milli),
            "servable": self.servable,
        }


class Market:
    """What the queue of this market costs, now."""

    def __init__(self, database: Database, models: Models) -> None:
        self._database = database
        self._models = models
        self._counts = QueueCounts()
        self._snapshot: str | None = None
        self._copied_at = self._read_at = -math.inf
        self._fresh_s = 0.0
        self._changed = True
        self._supplies: DearMemory[Supply] = DearMemory()
        self._reading = asyncio.Lock()
        self.last_multiplier_milli: dict[str, int] = {}

    def touch(self) -> None:
        """This router has changed the queue, or who serves it."""
        self._changed = True

    async def refresh(self, *, max_age_s: float = 0.0) -> None:
        """Follow the queue if what we know is older than the caller and its cost allow."""
        if self._reading.locked() and self._snapshot is not None:
            return  # whoever comes meanwhile makes do with the last one
        async with self._reading:
            began = time.monotonic()
            # What other routers do is seen after a while; what this one does, at once.
            fresh_s = self._fresh_s if self._changed else OTHERS_S
            if began - self._read_at < max(max_age_s, fresh_s):
                return
            self._changed = False
            followed = await self._follow(began)
            self._read_at = time.monotonic()
            took_s = self._read_at - began if followed else 0.0
            self._fresh_s = min(FRESH_MOST_S, took_s * REUSE_FACTOR) if took_s > CHEAP_S else 0.0

    async def _follow(self, now: float) -> bool:
        """Take over what has changed; False when the whole queue had to be read instead."""
        lost = now - self._read_at > FOLLOWS_S or now - self._copied_at > COPY_LASTS_S
        if self._snapshot is not None and not lost:
            async with self._database.connection() as connection:
                snapshot, changes = await job_queue.read_changes(connection, self._snapshot)
            try:
                self._counts.apply(changes)
                self._snapshot = snapshot
                return True
            except Drifted:
                log.error("the copy of the queue does not fit its changes: it is read anew")
                self._snapshot = None
        await self._copy(now)
        return False

    async def _copy(self, now: float) -> None:
        async with self._database.transaction("repeatable_read") as connection:
            snapshot, everything = await job_queue.read_all(connection)
        counts = QueueCounts()
        counts.apply(everything)
        self._counts, self._snapshot, self._copied_at = counts, snapshot, now

    @property
    def counts(self) -> QueueCounts:
        """The queue as it was when it was looked at last."""
        return self._counts

    @property
    def queue_length(self) -> int:
        return self._counts.length

    def place(self, lanes: Sequence[str], multiplier_milli: int, model: str) -> Place:
        """Where a new job would stand; equal multipliers are ahead of it."""
        return self._place(lanes, multiplier_milli, None, model)

    async def place_of(
        self, lanes: Sequence[str], multiplier_milli: int, seq: int, model: str
    ) -> Place:
        """Where a waiting job stands."""
        await self.refresh()
        return self._place(lanes, multiplier_milli, seq, model)

    def _place(
        self, lanes: Sequence[str], multiplier_milli: int, seq: int | None, model: str
    ) -> Place:
        supply = self._supplies(
            (tuple(lanes), multiplier_milli, model),
            lambda: self._supply(lanes, multiplier_milli, model),
            cheap=self._models.fleet.is_small,
        )
        ahead = self._counts.ahead(supply.competing, multiplier_milli, seq)
        return Place(
            position=ahead + 1,
            wait=supply.wait(ahead),
            to_be_next_milli=max(self._to_be_next_milli(supply.competing), supply.least_ask_milli),
            servable=supply.slots > 0,
        )

    def _supply(self, lanes: Sequence[str], multiplier_milli: int, model: str) -> Supply:
        fleet = self._models.fleet
        able = [w for lane in lanes for w in fleet.draining_lane(lane, multiplier_milli)]
        workers = list({worker.id: worker for worker in able}.values())
        competing = frozenset(lanes).union(*{id(w.lanes): w.lanes for w in workers}.values())
        return Supply.of(
            workers,
            model,
            competing=competing | self._unlisted(workers),
            least_ask_milli=0 if workers else self._least_ask_milli(lanes),
        )

    def _unlisted(self, workers: Sequence[Worker]) -> set[str]:
        """Lanes that these workers drain though they list them nowhere: of jobs that demand more than
        a model, and of models that nobody named (decisions 9 and 10)."""
        open_ones = [worker for worker in workers if worker.offers is not None]
        found: set[str] = set()
        for lanes, _ in self._counts.in_lanes():
            for lane in lanes:
                able = workers if lane.startswith("@") else open_ones
                if any(worker.drains(lane) for worker in able):
                    found.add(lane)
        return found

    def _to_be_next_milli(self, lanes: AbstractSet[str]) -> int:
        dearest = self._counts.dearest(lanes, 1)
        return dearest[0][0] + 1 if dearest else ONE_MILLI

    def _least_ask_milli(self, lanes: Sequence[str]) -> int:
        """What a job in these lanes must offer to be taken by anybody; 0 where nobody could at all."""
        able = ((w, lane) for lane in lanes for w in self._models.fleet.draining_lane(lane))
        least = min((w.floor_milli(lane) for w, lane in able), default=0)
        return least if least < NEVER_MILLI else 0

    def model_queue(self, kind: ModelKind, model: str) -> dict:
        """Queue length, price to be next, waits and ladder of one model, for `/info`."""
        workers = self._models.fleet.serving(kind, model)
        own = {
            lane
            for lanes, _ in self._counts.in_lanes()
            for lane in lanes
            if demands.without(lane).startswith(f"{kind}/") and lane.endswith(f"/{model}")
        }
        lanes = own.union(*{worker.lanes for worker in workers}, self._unlisted(workers))
        total = self._counts.jobs(lanes)
        last = self.last_multiplier_milli.get(model, ONE_MILLI) if total else ONE_MILLI
        return {
            "queue_length": self._counts.jobs(own),
            "last_multiplier": format_multiplier(last),
            "multiplier_to_be_next": format_multiplier(self._to_be_next_milli(lanes)),
            "multiplier_to_reach_idle": _reach_idle(workers, model),
            "servable": bool(workers),
            "wait_s": wait(total, workers, model).as_json(),
            "ladder": self._ladder(lanes, workers, model),
        }

    def _ladder(self, lanes: AbstractSet[str], workers: list[Worker], model: str) -> list[dict]:
        if any(model in worker.floors for worker in workers):
            return self._ladder_with_asks(lanes, workers, model)
        ladder, ahead = [], 0
        for milli, jobs in self._counts.dearest(lanes, MAX_LADDER - 1):
            ladder.append(_rung(milli + 1, ahead, workers, model))
            ahead += jobs
        ladder.append(_rung(ONE_MILLI, self._counts.jobs(lanes), workers, model))
        return ladder

    def _ladder_with_asks(
        self, lanes: AbstractSet[str], workers: list[Worker], model: str
    ) -> list[dict]:
        """The same, where the higher steps reach workers that the lower ones do not."""
        dearest = self._counts.dearest(lanes, MAX_LADDER)
        steps = {milli + 1 for milli, _ in dearest}
        steps |= {max(ONE_MILLI, worker.floors.get(model, 0)) for worker in workers}
        ladder = []
        for milli in sorted(steps, reverse=True):
            able = [worker for worker in workers if worker.floors.get(model, 0) <= milli]
            if able and milli < NEVER_MILLI:
                theirs = frozenset[str]().union(*(worker.lanes for worker in able))
                ladder.append(_rung(milli, self._counts.ahead(theirs, milli), able, model))
        return ladder[-MAX_LADDER:]


def _reach_idle(workers: list[Worker], model: str) -> str | None:
    """The least multiplier at which one of the workers that are idle takes a job; None: none is."""
    floors = [worker.floors.get(model, 0) for worker in workers if worker.free_slots > 0]
    least = max(ONE_MILLI, min(floors, default=NEVER_MILLI))
    return format_multiplier(least) if least < NEVER_MILLI else None


def _rung(milli: int, ahead: int, workers: list[Worker], model: str) -> dict:
    return {
        "multiplier": format_multiplier(milli),
        "position": ahead + 1,
        "wait_s": wait(ahead, workers, model).as_json(),
    }


@dataclass(frozen=True, slots=True)
class Supply:
    """What workers can do together. `competing`: the lanes of all jobs that they might do instead;
    `least_ask_milli`: what must be offered before there are any; 0 where there are some.
    """

    free: int
    slots: int
    service_s: float
    competing: frozenset[str] = frozenset()
    least_ask_milli: int = 0

    @classmethod
    def of(cls, workers: Sequence[Worker], model: str, **more: Any) -> Supply:
        return cls(
            free=sum(worker.free_slots for worker in workers),
            slots=sum(worker.slots for worker in workers),
            service_s=mean_service_s(workers, model) or UNKNOWN_SERVICE_S,
            **more,
        )

    def wait(self, ahead: int) -> Wait:
        """The waiting time behind `ahead` jobs, when service times are taken to be exponential.

        The time until the k-th of them leaves is then gamma distributed; its quantiles are
        approximated by mean - 1/3 and mean + 1.28 standard deviations.
        """
        if ahead < self.free or not self.slots:
            return Wait(0.0, 0.0)
        each_s = self.service_s / self.slots
        turns = ahead - self.free + 1
        return Wait(
            round(each_s * max(turns - 1 / 3, 0), 2),
            round(each_s * (turns + 1.28 * math.sqrt(turns)), 2),
        )


def wait(ahead: int, workers: Sequence[Worker], model: str) -> Wait:
    """The waiting time behind `ahead` jobs of these workers."""
    return Supply.of(workers, model).wait(ahead)
