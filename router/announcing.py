"""Says to other routers that a job waits: to those that have room for it, and no more of them.

    a job is queued here ── an idle worker of ours fits ──────────▶ nothing is said
          │
          └── no worker ──▶ a few others with room for it, in turn ── none claims it ──▶ all others
                            none has room ──▶ nothing is said

A router that is told looks into the queue and takes the dearest job that fits, whose ever it is, so
who is told has no say in the order. What is known of others is as old as their last word, and our
own worker may be given a dearer job of somebody else's: so a job that nobody has claimed after
UNCLAIMED_S is told to all, if any of them seems to have room. And every router with an idle worker
looks once a second by itself (`router.dispatcher`): nothing waits longer for not being told of.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence

from router.bus import Bus
from router.dispatcher import MOST_ALIKE
from router.job_records import NewJob
from router.workers import Fleet

# What is queued within this time is told together.
EVERY_S = 0.005
UNCLAIMED_S = 0.25
# With no more others than that, all of them are told.
FEW = 3
# Those are told that have room for the jobs and for so many more, which may have come meanwhile.
SPARE = 2
# How long it is remembered who has room; each says so once a second.
ROOM_LASTS_S = 0.1

Lanes = tuple[str, ...]


class Announcer:
    """What is queued here and nobody has claimed yet. `tell_all` says that something waits."""

    def __init__(self, bus: Bus, fleet: Fleet, tell_all: Callable[[], None]) -> None:
        self._bus = bus
        self._fleet = fleet
        self._tell_all = tell_all
        self._unclaimed: dict[str, Lanes] = {}
        self._queued: deque[tuple[float, str]] = deque()
        self._new: list[str] = []
        self._told_at = 0.0
        self._turn = 0
        self._room: dict[Lanes, tuple[float, list[tuple[str, int]]]] = {}
        self._later: asyncio.TimerHandle | None = None
        self._check: asyncio.TimerHandle | None = None

    def stop(self) -> None:
        for handle in (self._later, self._check):
            if handle is not None:
                handle.cancel()

    def queued(self, jobs: Iterable[NewJob]) -> None:
        """These wait since now, and our own dispatcher knows."""
        if not self._fleet.routers_elsewhere():
            return
        now = time.monotonic()
        for job in jobs:
            self._unclaimed[job.id] = job.lanes
            self._queued.append((now, job.id))
            self._new.append(job.id)
        loop = asyncio.get_running_loop()
        if self._check is None:
            self._check = loop.call_later(UNCLAIMED_S, self._tell_of_unclaimed)
        if self._later is None:
            self._later = loop.call_later(max(0.0, self._told_at + EVERY_S - now), self._tell)

    def claimed(self, job_id: str) -> None:
        """Some router has claimed it."""
        self._unclaimed.pop(job_id, None)

    def _tell(self) -> None:
        self._later, self._told_at = None, time.monotonic()
        new, self._new = self._new, []
        # Many are claimed before their turn to be told of comes.
        waiting = Counter(self._unclaimed[job_id] for job_id in new if job_id in self._unclaimed)
        told: set[str] = set()
        for lanes, jobs in waiting.items():
            jobs -= self._own_room(lanes)
            if jobs > 0:
                told.update(self._chosen(lanes, jobs))
        if len(told) == len(self._fleet.routers_elsewhere()):
            self._tell_all()
            return
        for router_id in told:
            self._bus.send(router_id, ["work", []])

    def _own_room(self, lanes: Lanes) -> int:
        """Free slots of workers here that would take such jobs, whatever they pay."""
        return sum(
            worker.free_slots
            for worker in self._fleet.idle(MOST_ALIKE)
            if not worker.min_fees and any(worker.drains(lane) for lane in lanes)
        )

    def _chosen(self, lanes: Lanes, jobs: int) -> Sequence[str]:
        """Whom to tell that so many jobs wait in these lanes."""
        others = self._fleet.routers_elsewhere()
        if len(others) <= FEW:
            return others
        room = self._room_elsewhere(lanes)
        if not room:
            return ()
        self._turn = (self._turn + 1) % len(room)
        chosen: list[str] = []
        wanted = jobs + SPARE
        for router_id, free in room[self._turn :] + room[: self._turn]:
            if wanted <= 0:
                break
            chosen.append(router_id)
            wanted -= free
        return chosen

    def _room_elsewhere(self, lanes: Lanes) -> list[tuple[str, int]]:
        """Other routers that have said that they have free slots for such jobs, and how many."""
        now = time.monotonic()
        known = self._room.get(lanes)
        if known is not None and now - known[0] < ROOM_LASTS_S:
            return known[1]
        free: Counter[str] = Counter()
        for group in self._fleet.elsewhere():
            # Those that poll ask by themselves.
            if group.free > 0 and not group.pulls and any(group.drains(lane) for lane in lanes):
                free[group.router_id] += group.free
        if len(self._room) > 1000:
            self._room.clear()
        self._room[lanes] = now, list(free.items())
        return self._room[lanes][1]

    def _tell_of_unclaimed(self) -> None:
        self._check = None
        old = time.monotonic() - UNCLAIMED_S
        unclaimed: set[Lanes] = set()
        while self._queued and self._queued[0][0] <= old:
            lanes = self._unclaimed.pop(self._queued.popleft()[1], None)
            if lanes is not None:
                unclaimed.add(lanes)
        if any(self._room_elsewhere(lanes) for lanes in unclaimed):
            self._tell_all()
        while self._queued and self._queued[0][1] not in self._unclaimed:
            self._queued.popleft()
        if self._queued:
            self._check = asyncio.get_running_loop().call_later(
                UNCLAIMED_S, self._tell_of_unclaimed
            )
