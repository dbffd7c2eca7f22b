"""Who is to blame when an attempt fails, and what follows for the worker.

    blame    whose doing                                      what follows
    worker   it failed, stalled, was lost, said nonsense      another worker; its reliability falls
    job      what was asked cannot be done (the payload)      the worker is none the worse for it
    client   it cancelled or went away                        settled as it stands
    router   we stopped, died or lost the lease               another worker
    nobody   it was gone before the job was sent, or left     another worker

**A second worker that fails at the same job shifts the blame to the job**, and the first one's fault
is taken back (peers.md D2-8): two workers that break over one prompt were both unlucky. The truth is
`attempts.blame`, changed in the transaction that records the second failure; each router looks there
for faults of its own workers that have been shifted by another router.

Everything is counted in memory. `keep` writes what was noted, and is called by maintenance.
"""

from __future__ import annotations

import json
import logging
import time
from collections import OrderedDict
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any

from router import judging
from router.database import Database
from router.job_records import Claimed
from router.job_store import SHIFT_BLAME as SHIFT
from router.judging import Note
from router.standing import Habit, Standing
from router.workers import Fleet, Worker

log = logging.getLogger(__name__)

STANDINGS_KEPT = 20_000
# A job that failed is tried again well within this time, or not at all.
MAY_BE_SHIFTED_S = 3600.0
# The same habit is noted again only after this long.
NOTED_AGAIN_S = 3600.0
EVENTS_KEPT = timedelta(days=30)


class Blame(StrEnum):
    WORKER = "worker"
    JOB = "job"
    CLIENT = "client"
    ROUTER = "router"
    NOBODY = "nobody"


@dataclass(frozen=True, slots=True)
class Event:
    """Something noted about a worker, as `worker_events` keeps it."""

    worker_id: str
    at: datetime
    code: str
    job_id: str | None
    facts: dict[str, Any]


class Reputation:
    """What this router knows of the conduct of the workers that were connected to it."""

    def __init__(self, database: Database, fleet: Fleet) -> None:
        self._database = database
        self._fleet = fleet
        self._standings: OrderedDict[str, Standing] = OrderedDict()
        self._blamed: dict[str, set[str]] = {}  # job -> workers whose fault may yet be shifted
        self._forgiven: dict[str, int] = {}
        self._events: list[Event] = []
        self._answered: set[tuple[str, str]] = (
            set()
        )  # (model, worker) with answers since the last look
        self._noted_at: dict[tuple[str, str, str], float] = {}

    def standing(self, worker_id: str) -> Standing:
        """A worker's standing; it outlasts its connections."""
        found = self._standings.setdefault(worker_id, Standing())
        self._standings.move_to_end(worker_id)
        while len(self._standings) > STANDINGS_KEPT:
            self._standings.popitem(last=False)
        return found

    async def shifted(self, claimed: Claimed) -> bool:
        """Whether another worker has failed at this job before, so that it is the job's fault.

        Raises DatabaseUnavailable.
        """
        if claimed.attempt == 1:
            return False
        async with self._database.connection() as connection:
            return await connection.fetchval(
                "select exists (select 1 from attempts where job_id = $1 and n < $2"
                " and worker_id <> $3 and blame in ('worker', 'job'))",
                claimed.job_id,
                claimed.attempt,
                claimed.worker_id,
            )

    def fault(self, worker: Worker, claimed: Claimed, code: str) -> None:
        """A worker has failed by its own fault, as far as can be said now."""
        worker.failed_by_own_fault(claimed.job_id, claimed.attempt, code)
        if self._fleet.get(worker.id) is not worker:
            # A worker is often lost together with its connection: its record is written all the same.
            self._fleet.left(worker)
        self._blamed.setdefault(claimed.job_id, set()).add(worker.id)

    def forgive(self, job_id: str) -> None:
        """It was the job's fault: take it back from all workers of this router that were blamed."""
        for worker_id in self._blamed.pop(job_id, ()):
            if self.standing(worker_id).forgive(job_id):
                self._forgiven[worker_id] = self._forgiven.get(worker_id, 0) + 1
                log.info("fault taken back worker=%s job=%s", worker_id, job_id)

    def take_forgiven(self) -> dict[str, int]:
        """How many faults were taken back from each worker since the last time."""
        forgiven, self._forgiven = self._forgiven, {}
        return forgiven

    async def shift(self, job_id: str) -> None:
        """Blame the job for what its workers were blamed for. Raises DatabaseUnavailable."""
        async with self._database.connection() as connection:
            await connection.execute(SHIFT, [job_id])
        self.forgive(job_id)

    def answered(
        self,
        worker: Worker,
        claimed: Claimed,
        *,
        reason: str,
        tokens: int | None,
        utf8_bytes: int,
        prompt_tokens: int,
        seconds: float,
    ) -> None:
        """Judge an answer of text. `tokens` None: the worker does not count them."""
        served = next((m for m in worker.models if m.id == claimed.model), None)
        notes = [
            judging.truncated(
                reason=reason,
                tokens=tokens,
                prompt_tokens=prompt_tokens,
                max_tokens=claimed.max_tokens,
                context_length=served.context_length if served else 0,
            ),
            judging.too_fast(claimed.model, tokens=tokens, seconds=seconds),
        ]
        for note in notes:
            if note is not None:
                self.note(worker.id, note, job_id=claimed.job_id)
                worker.standing.half_fault(note.weight)
        if tokens:
            habit = worker.standing.habits.setdefault(claimed.model, Habit())
            habit.add(tokens=tokens, utf8_bytes=utf8_bytes)
            self._answered.add((claimed.model, worker.id))

    def note(self, worker_id: str, note: Note, *, job_id: str | None = None) -> None:
        """Note something about a worker; written with the next `keep`."""
        log.info("worker noted worker=%s code=%s %s", worker_id, note.code, note.facts)
        self._events.append(Event(worker_id, datetime.now(UTC), note.code, job_id, note.facts))

    async def keep(self) -> None:
        """Look at habits, take back what other routers have shifted, and write what was noted."""
        self._look_at_habits()
        await self._follow_shifts()
        events, self._events = self._events, []
        if not events:
            return
        try:
            async with self._database.connection() as connection:
                await connection.execute(
                    "insert into worker_events (worker_id, at, code, job_id, facts)"
                    " select * from unnest($1::text[], $2::timestamptz[], $3::text[], $4::text[],"
                    " $5::jsonb[])",
                    [event.worker_id for event in events],
                    [event.at for event in events],
                    [event.code for event in events],
                    [event.job_id for event in events],
                    [json.dumps(event.facts) for event in events],
                )
        except BaseException:
            self._events = events + self._events
            raise

    async def prune(self, now: datetime) -> None:
        """Delete what was noted long ago."""
        async with self._database.connection() as connection:
            await connection.execute("delete from worker_events where at < $1", now - EVENTS_KEPT)

    def _look_at_habits(self) -> None:
        answered, self._answered = self._answered, set()
        now = time.monotonic()
        for model in {model for model, _ in answered}:
            all_habits = {
                worker.id: worker.standing.habits[model]
                for worker in self._fleet.all()
                if model in worker.standing.habits
            }
            for worker_id in {w for m, w in answered if m == model and w in all_habits}:
                for note in judging.habits(model, worker_id, all_habits):
                    key = (worker_id, model, note.code)
                    if now - self._noted_at.get(key, -NOTED_AGAIN_S) >= NOTED_AGAIN_S:
                        self._noted_at[key] = now
                        self.note(worker_id, note)

    async def _follow_shifts(self) -> None:
        """Forgive what has become the job's fault at another router."""
        self._forget_old_faults()
        if not self._blamed:
            return
        async with self._database.connection() as connection:
            rows = await connection.fetch(
                "select distinct job_id from attempts where job_id = any($1::text[])"
                " and blame = 'job'",
                list(self._blamed),
            )
        for row in rows:
            self.forgive(row["job_id"])

    def _forget_old_faults(self) -> None:
        old = time.monotonic() - MAY_BE_SHIFTED_S
        for job_id, workers in list(self._blamed.items()):
            faults = [self.standing(worker).faults.get(job_id) for worker in workers]
            if all(fault is None or fault.at < old for fault in faults):
                del self._blamed[job_id]
