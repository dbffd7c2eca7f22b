"""The price of a place: positions, waiting times, the ladder of multipliers.

A snapshot of the queue (jobs by lane and multiplier) serves all who ask for a while; the exact
position of one waiting job is a query of its own.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from billing.fees import ONE_MILLI, format_multiplier
from router import job_queue
from router.database import Database
from router.job_queue import Step
from router.models import Models, mean_service_s
from router.workers import UNKNOWN_SERVICE_S, Worker
from worker.protocol import ModelKind

# A snapshot that was not cheap is used for this many times as long as it took to read: a short queue
# is shown as it is, a long one costs a few per cent of a connection.
REUSE_FACTOR = 20
CHEAP_S = 0.03
OTHERS_S = 0.2
FRESH_MOST_S = 2.0
# How old it may be for a decision that need not be exact, such as "the queue is full".
ROUGHLY_S = 0.5
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
        self._steps: list[Step] = []
        self._read_at = -math.inf
        self._fresh_s = 0.0
        self._changed = True
        self.last_multiplier_milli: dict[str, int] = {}

    def touch(self) -> None:
        """This router has changed the queue, or who serves it."""
        self._changed = True

    async def refresh(self, *, max_age_s: float = 0.0) -> None:
        """Read the queue again if the snapshot is older than the caller and its cost allow."""
        began = time.monotonic()
        age_s = began - self._read_at
        # What other routers do is seen after a while; what this one does, at once.
        if age_s < max(max_age_s, self._fresh_s if self._changed else OTHERS_S):
            return
        self._read_at = began  # whoever comes meanwhile makes do with the last one
        self._changed = False
        async with self._database.connection() as connection:
            self._steps = await job_queue.steps(connection)
        self._read_at = time.monotonic()
        took_s = self._read_at - began
        self._fresh_s = min(FRESH_MOST_S, took_s * REUSE_FACTOR) if took_s > CHEAP_S else 0.0

    @property
    def steps(self) -> list[Step]:
        """The queue as it was read last."""
        return self._steps

    @property
    def queue_length(self) -> int:
        return sum(step.jobs for step in self._steps)

    def place(self, lanes: Sequence[str], multiplier_milli: int, model: str) -> Place:
        """Where a new job would stand; equal multipliers are ahead of it."""
        steps = self._competition(lanes)
        ahead = sum(jobs for milli, jobs in steps.items() if milli >= multiplier_milli)
        return self._place(lanes, ahead, steps, model)

    async def place_of(
        self, lanes: Sequence[str], multiplier_milli: int, seq: int, model: str
    ) -> Place:
        """Where a waiting job stands."""
        await self.refresh()
        async with self._database.connection() as connection:
            ahead = await job_queue.ahead(
                connection,
                sorted(self._competing(lanes)),
                multiplier_milli=multiplier_milli,
                seq=seq,
            )
        return self._place(lanes, ahead, self._competition(lanes), model)

    def _place(self, lanes: Sequence[str], ahead: int, steps: dict[int, int], model: str) -> Place:
        fleet = self._models.fleet
        workers = list({w.id: w for lane in lanes for w in fleet.draining_lane(lane)}.values())
        return Place(
            position=ahead + 1,
            wait=wait(ahead, workers, model),
            to_be_next_milli=max(steps) + 1 if steps else ONE_MILLI,
            servable=bool(workers),
        )

    def _competition(self, lanes: Iterable[str]) -> dict[int, int]:
        """Jobs by multiplier in all lanes that compete with `lanes`."""
        competing = self._competing(lanes)
        counts: dict[int, int] = defaultdict(int)
        for step in self._steps:
            if step.lane in competing:
                counts[step.multiplier_milli] += step.jobs
        return counts

    def _competing(self, lanes: Iterable[str]) -> set[str]:
        return {c for lane in lanes for c in self._models.fleet.competing_lanes(lane)}

    def model_queue(self, kind: ModelKind, model: str) -> dict:
        """Queue length, price to be next, waits and ladder of one model, for `/info`."""
        workers = self._models.fleet.serving(kind, model)
        lanes = {lane for worker in workers for lane in worker.lanes}
        own = [
            s for s in self._steps if s.lane.startswith(f"{kind}/") and s.lane.endswith(f"/{model}")
        ]
        counts: dict[int, int] = defaultdict(int)
        for step in self._steps:
            if step.lane in lanes or step in own:
                counts[step.multiplier_milli] += step.jobs
        total = sum(counts.values())
        queued = sum(step.jobs for step in own)
        last = self.last_multiplier_milli.get(model, ONE_MILLI) if total else ONE_MILLI
        return {
            "queue_length": queued,
            "last_multiplier": format_multiplier(last),
            "multiplier_to_be_next": format_multiplier(max(counts) + 1 if counts else ONE_MILLI),
            "servable": bool(workers),
            "wait_s": wait(total, workers, model).as_json(),
            "ladder": self._ladder(counts, workers, model),
        }

    def _ladder(self, counts: dict[int, int], workers: list[Worker], model: str) -> list[dict]:
        ladder, ahead = [], 0
        for milli in sorted(counts, reverse=True)[: MAX_LADDER - 1]:
            ladder.append(_rung(milli + 1, ahead, workers, model))
            ahead += counts[milli]
        if not counts or min(counts) + 1 > ONE_MILLI:
            ladder.append(_rung(ONE_MILLI, sum(counts.values()), workers, model))
        return ladder


def _rung(milli: int, ahead: int, workers: list[Worker], model: str) -> dict:
    return {
        "multiplier": format_multiplier(milli),
        "position": ahead + 1,
        "wait_s": wait(ahead, workers, model).as_json(),
    }


def wait(ahead: int, workers: list[Worker], model: str) -> Wait:
    """The waiting time behind `ahead` jobs, when service times are taken to be exponential.

    The time until the k-th of them leaves is then gamma distributed; its quantiles are approximated
    by mean - 1/3 and mean + 1.28 standard deviations.
    """
    free = sum(worker.free_slots for worker in workers)
    if ahead < free or not workers:
        return Wait(0.0, 0.0)
    slots = sum(worker.slots for worker in workers)
    each_s = (mean_service_s(workers, model) or UNKNOWN_SERVICE_S) / slots
    turns = ahead - free + 1
    return Wait(
        round(each_s * max(turns - 1 / 3, 0), 2),
        round(each_s * (turns + 1.28 * math.sqrt(turns)), 2),
    )
