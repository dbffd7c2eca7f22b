"""Gives the dearest job that fits to each idle worker.

One task wakes when a job is queued or a slot becomes free, and once a second in case another router
queued something. It looks at the heads of the lanes that idle workers drain, matches them in memory,
and claims all matches in one batch; a claim that another router won is simply looked for again. Jobs
that are paid for at this router while a worker waits for such jobs start as they are bought, without a
look, if they are the first of all that their workers drain: the statement that buys them finds out.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime, timedelta
from typing import Any

from router.database import BatchingWriter, Database, DatabaseUnavailable
from router.job_queue import Candidate, heads, specs_of, waiting_lanes
from router.job_records import Bought, Buy, Claim, Claimed, Seat
from router.job_store import claim_many
from router.matching import able_to, match, may_take, overtaking_nobody
from router.workers import Fleet, Worker

log = logging.getLogger(__name__)

Claims = Sequence[Claimed | BaseException | None]
ClaimAll = Callable[[list[Claim]], Awaitable[Claims]]

POLL_S = 1.0
# Heads looked at beyond the number of free slots: some may fit nobody who is idle.
SPARE_HEADS = 16
# Idle workers that are alike and looked at in one turn; when they are busy, others are looked at.
MOST_ALIKE = 64
# Lanes that are looked into one by one. A worker may list hundreds of models and drain a thousand lanes
# with each: of more than this, only those are looked into in which something waits.
MOST_PROBES = 2_000
# Of more lanes than these no job is asked to be the first, and a batch of jobs not of more than
# MOST_PROBES together.
MOST_FIRST = 512
# For so long after a job that demands something, each dispatch looks for such jobs.
DEMANDED_S = 60.0


async def lanes_of(
    connection: Any, workers: Sequence[Worker], fleet: Fleet, *, demanding: bool
) -> list[str]:
    """All lanes that these workers drain, also those that only the queue can name: of models that
    nobody has listed, and, if `demanding`, of jobs that demand more of their worker than a model.

    Of the latter the fleet is told, if nothing was known of them.
    """
    # Workers that are alike share their set of lanes.
    sets = list({id(worker.lanes): worker.lanes for worker in workers}.values())
    able = workers if demanding else [worker for worker in workers if worker.offers is not None]
    many = sum(map(len, sets)) > MOST_PROBES
    waiting = await waiting_lanes(connection) if able or many else []
    if demanding and not _met_lately(fleet):
        fleet.note_demands(waiting)
    if many:
        lanes = {lane for lane in waiting if any(lane in drained for drained in sets)}
    else:
        lanes = set().union(*sets)
    lanes |= {
        lane
        for lane in waiting
        if lane not in lanes and any(worker.drains(lane) for worker in able)
    }
    return sorted(lanes)


def _met_lately(fleet: Fleet) -> bool:
    return time.monotonic() - fleet.demanded_at <= DEMANDED_S


def floors_of(lanes: Sequence[str], idle: Sequence[Worker]) -> list[int] | None:
    """Down to which multiplier each lane is drained by any of these; None: all to the end, and nobody
    asks for more than that."""
    if not any(worker.min_fees for worker in idle):
        return None
    return [min((w.floor_milli(lane) for w in idle if w.drains(lane)), default=0) for lane in lanes]


def _of_few_lanes(pairs: Sequence[tuple[Candidate, Worker]]) -> dict[str, Worker]:
    """The workers of jobs, by these; without those that would have the statement look into too many
    lanes. Workers that are alike share theirs."""
    few: dict[str, Worker] = {}
    counted: set[int] = set()
    left = MOST_PROBES
    for candidate, worker in pairs:
        more = 0 if id(worker.lanes) in counted else len(worker.lanes)
        if len(worker.lanes) <= MOST_FIRST and more <= left:
            counted.add(id(worker.lanes))
            left -= more
            few[candidate.job_id] = worker
    return few


class Dispatcher:
    """The loop that empties the queue into idle workers."""

    def __init__(
        self,
        database: Database,
        writer: BatchingWriter,
        fleet: Fleet,
        assign: Callable[[Claimed, Worker], None],
        *,
        router_id: str,
        lease_s: int,
        commission_ppm: Callable[[], int],
        clock: Callable[[], datetime],
    ) -> None:
        self._database = database
        self._writer = writer
        self._fleet = fleet
        self._assign = assign
        self._router_id = router_id
        self._lease = timedelta(seconds=lease_s)
        self._commission_ppm = commission_ppm
        self._clock = clock
        self._awake = asyncio.Event()
        self._task: asyncio.Task | None = None
        self._looked_at = -math.inf
        # In which lanes something was left at the last look.
        self._left: frozenset[str] = frozenset()
        self.paused = False

    def wake(self) -> None:
        """There may be something to do."""
        self._awake.set()

    @property
    def alive(self) -> bool:
        """Whether its loop runs; it goes on through errors, so it does from start to stop."""
        return self._task is not None and not self._task.done()

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="dispatcher")

    async def stop(self) -> None:
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        looked_at = 0.0
        while True:
            self._awake.clear()
            if time.monotonic() - looked_at >= POLL_S:
                looked_at = time.monotonic()
                self._fleet.look_for_room()
            try:
                while not self.paused and await self.dispatch_once():
                    pass
            except DatabaseUnavailable as error:
                log.warning("no dispatch while the database is away: %s", error)
                await asyncio.sleep(0.5)
            except Exception:
                log.exception("dispatch failed, going on")
                await asyncio.sleep(0.5)
            handle = asyncio.get_running_loop().call_later(POLL_S, self._awake.set)
            await self._awake.wait()
            handle.cancel()

    async def dispatch_once(self) -> bool:
        """Match and claim once; True when another look may find more."""
        idle = self._fleet.idle(MOST_ALIKE)
        if not idle:
            # Nobody is looked for: that is no look for demands either.
            return False
        if demanding := self._demanding():
            # Workers that are alike in their lanes may differ in what a job demands.
            idle = self._fleet.idle()
        most = sum(worker.free_slots for worker in idle) + SPARE_HEADS
        async with self._database.connection() as connection:
            lanes = await lanes_of(connection, idle, self._fleet, demanding=demanding)
            floors = floors_of(lanes, idle)
            candidates = await heads(connection, lanes, most=most, floors=floors)
        pairs = match(candidates, self._fleet, self._commission_ppm(), idle)
        given = {candidate.job_id for candidate, _ in pairs}
        self._left = frozenset(c.lane for c in candidates if c.job_id not in given)
        if not pairs:
            return False
        results = await self._claim(pairs, self._claim_alone)
        for (_, worker), result in zip(pairs, results, strict=True):
            if isinstance(result, Claimed):
                self._assign(result, worker)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        # Whoever lost all races looks again at once: the queue is not empty, only contested.
        return any(results) or len(candidates) >= most

    def _match_fresh(self, candidates: Sequence[Candidate]) -> list[tuple[Candidate, Worker]]:
        """Who would get jobs that nobody has seen in the queue, in its order. What the names of their
        lanes do not tell, and what others were seen to wait for, is left to a look at the queue."""
        idle = self._fleet.idle(MOST_ALIKE)
        if (
            self.paused
            or not idle
            or _met_lately(self._fleet)
            or any(worker.floors or worker.offers is not None for worker in idle)
        ):
            return []
        # Whoever serves one of several models is charged at its rates: such jobs have to be looked at.
        plain = [candidate for candidate in candidates if candidate.choices is None]
        pairs = match(plain, self._fleet, self._commission_ppm(), idle)
        return overtaking_nobody(candidates, _of_few_lanes(pairs), self._left)

    async def start_bought(
        self,
        jobs: Sequence[tuple[Bought, Sequence[str]]],
        buy: Buy,
    ) -> None:
        """Let jobs that are being bought, and would wait in these lanes, start at once where workers
        wait for such jobs.

        `buy` writes them in one statement that is a transaction of its own, and returns those that it
        has started; the seats of the others are free again.
        """
        fresh = [
            Candidate(
                job.id,
                lanes[0],
                job.multiplier_milli,
                0,
                frozenset(),
                job.prefix,
                job.rates,
                job.choices,
                tuple(lanes[1:]),
            )
            for job, lanes in jobs
        ]
        # The dearest choose first; sorting keeps the others in the order in which they came.
        fresh.sort(key=lambda candidate: -candidate.multiplier_milli)
        pairs = self._match_fresh(fresh)
        started: dict[str, Claimed] = {}

        async def claim(claims: list[Claim]) -> Claims:
            seats = [
                Seat(claim, worker.lanes) for claim, (_, worker) in zip(claims, pairs, strict=True)
            ]
            started.update({claimed.job_id: claimed for claimed in await buy(seats)})
            return [started.get(claim.job_id) for claim in claims]

        try:
            await self._claim(pairs, claim)
        finally:
            if len(started) < len(pairs):
                # Meanwhile others may have been told that there was no room.
                self.wake()
        for candidate, worker in pairs:
            if candidate.job_id in started:
                self._assign(started[candidate.job_id], worker)

    def _demanding(self) -> bool:
        """Whether to look for jobs that demand something: while this router has seen one not long
        ago, and otherwise once a second, for those that others have queued."""
        now = time.monotonic()
        if not _met_lately(self._fleet) and now - self._looked_at < POLL_S:
            return False
        self._looked_at = now
        return True

    async def claim_for(
        self, worker: Worker, *, suits: Callable[[str], bool] | None = None
    ) -> Claimed | None:
        """The dearest job that fits a worker which asks for one, claimed; None: there is none.

        `suits` looks at the spec of each, for what no lane says. The job's id is in `worker.busy`
        then, and the caller gives it to the worker's session. Raises DatabaseUnavailable.
        """
        while not self.paused and worker.free_slots > 0:
            async with self._database.connection() as connection:
                demanding = self._demanding()
                lanes = await lanes_of(connection, [worker], self._fleet, demanding=demanding)
                floors = floors_of(lanes, [worker])
                most = 1 + SPARE_HEADS * (4 if suits else 1)
                candidates = await heads(connection, lanes, most=most, floors=floors)
                specs = await specs_of(connection, candidates) if suits and candidates else {}
            fitting = [
                candidate
                for candidate in candidates
                if (able := able_to(candidate, self._fleet, self._commission_ppm()))
                and any(w is worker for w in able)
                and may_take(worker, candidate, able)
                and (suits is None or suits(specs.get(candidate.job_id, "")))
            ]
            if not fitting:
                return None
            for candidate in fitting:
                (result,) = await self._claim([(candidate, worker)], self._claim_with_others)
                if isinstance(result, BaseException):
                    raise result
                if result is not None:
                    return result
            # Others were faster at every one of these; there may be more.
        return None

    async def _claim(self, pairs: Sequence[tuple[Candidate, Worker]], claim: ClaimAll) -> Claims:
        """Claim each job for its worker by `claim`; None where somebody else was faster."""
        ends_at = self._clock() + self._lease
        claims = []
        for candidate, worker in pairs:
            worker.busy.add(candidate.job_id)
            claims.append(
                Claim(
                    candidate.job_id,
                    worker.id,
                    self._router_id,
                    self._commission_ppm(),
                    ends_at,
                    worker.model_for(candidate.lane),
                )
            )
        results: Claims = [None] * len(pairs)
        try:
            results = await claim(claims)
        finally:
            for (candidate, worker), result in zip(pairs, results, strict=True):
                if isinstance(result, Claimed):
                    worker.remember(candidate.prefix)
                else:
                    worker.busy.discard(candidate.job_id)
        return results

    async def _claim_with_others(self, claims: list[Claim]) -> Claims:
        return await self._writer.write_all("claim", claims)

    async def _claim_alone(self, claims: list[Claim]) -> Claims:
        """All matches of one look are one statement, which needs no transaction around it: that saves
        two of the round trips that a paid job waits for."""
        try:
            async with self._database.connection() as connection:
                return await claim_many(connection, claims)
        except DatabaseUnavailable:
            raise
        except Exception as error:
            # Nothing was claimed. One that cannot be must not keep the others from their workers.
            log.warning("%d claims failed together: %r", len(claims), error)
            return await self._claim_with_others(claims)
