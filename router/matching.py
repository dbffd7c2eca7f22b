"""Who gets which job: the dearest that fits to the best that is idle. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from router.asks import accepts
from router.job_queue import Candidate
from router.workers import Fleet, Worker

# How good a worker that knows the prompt must be beside the best: what it saves is reading.
WARM_ENOUGH = 0.7


def may_take(worker: Worker, candidate: Candidate, able: Sequence[Worker]) -> bool:
    """Whether a job may go to this one of the workers `able` to do it. Pure.

    A worker that had the job before gets it again only when nobody else could, and not while it
    still holds the attempt that was taken from it.
    """
    if candidate.job_id in worker.busy:
        return False
    tried_by = candidate.tried_by
    return not worker.has_tried(tried_by) or all(w.has_tried(tried_by) for w in able)


def able_to(candidate: Candidate, fleet: Fleet, commission_ppm: int) -> list[Worker]:
    """The workers that a job fits, and that it pays what they ask. Pure."""
    fit = fleet.draining_lane(candidate.lane, candidate.multiplier_milli)
    return [worker for worker in fit if accepts(worker, candidate, commission_ppm)]


def fits(worker: Worker, candidate: Candidate, commission_ppm: int) -> bool:
    """Whether a worker that is not on its way out can do a job, and is paid for it what it asks."""
    return (
        worker.drains(candidate.lane)
        and worker.floor_milli(candidate.lane) <= candidate.multiplier_milli
        and accepts(worker, candidate, commission_ppm)
    )


def match(
    candidates: Sequence[Candidate],
    fleet: Fleet,
    commission_ppm: int = 0,
    idle: Sequence[Worker] | None = None,
) -> list[tuple[Candidate, Worker]]:
    """Who gets which job, in the order of the queue; `idle` None: of all that are. Pure."""
    everyone = fleet.idle() if idle is None else idle
    free = {worker.id: worker.free_slots for worker in everyone}
    pairs = []
    given: set[str] = set()  # a job may wait in several lanes
    for candidate in candidates:
        if candidate.job_id in given:
            continue
        # Who else could do it matters only for a job that somebody has had.
        able = able_to(candidate, fleet, commission_ppm) if candidate.tried_by else ()
        those = [
            worker
            for worker in everyone
            if free[worker.id] > 0
            and fits(worker, candidate, commission_ppm)
            and may_take(worker, candidate, able)
        ]
        if those:
            best = max(those, key=lambda worker: _merit(worker, candidate))
            best = warm(candidate, best, those, candidates, free, everyone) or best
            free[best.id] -= 1
            given.add(candidate.job_id)
            pairs.append((candidate, best))
    return pairs


def overtaking_nobody(
    candidates: Sequence[Candidate], workers: Mapping[str, Worker], left: Iterable[str]
) -> list[tuple[Candidate, Worker]]:
    """Of jobs in the order of the queue, with the workers that they were matched with, those that may
    start before all others that wait are looked at. Pure.

    Not on a worker that drains a lane of `left`, or of a job before it that has to wait or may have to:
    a seat is lost where something dearer waits in the lanes of its worker, and one for a later job of
    the same batch is lost with it only if its worker drains all of these lanes, too.
    """
    waiting = set(left)
    seated: list[tuple[Candidate, Worker]] = []
    for candidate in candidates:
        worker = workers.get(candidate.job_id)
        if (
            worker is not None
            and not any(map(worker.drains, waiting))
            and all(
                other.lanes <= worker.lanes or not worker.drains(before.lane)
                for before, other in seated
                if other.lanes is not worker.lanes
            )
        ):
            seated.append((candidate, worker))
        else:
            waiting.update((candidate.lane, *candidate.more_lanes))
    return seated


def warm(
    candidate: Candidate,
    best: Worker,
    idle: Sequence[Worker],
    candidates: Sequence[Candidate],
    free: dict[str, int],
    everyone: Sequence[Worker],
) -> Worker | None:
    """One of `idle` that has met the beginning of this prompt, is nearly as good as the best, and is
    not the last slot for some other job that waits. Pure."""
    if candidate.prefix is None or candidate.prefix in best.met:
        return None
    enough = WARM_ENOUGH * _merit(best, candidate)
    met = [w for w in idle if candidate.prefix in w.met and _merit(w, candidate) >= enough]
    for worker in sorted(met, key=lambda w: _merit(w, candidate), reverse=True):
        if free[worker.id] > 1 or not any(
            other.job_id != candidate.job_id and _only_for(worker, other, free, everyone)
            for other in candidates
        ):
            return worker
    return None


def _merit(worker: Worker, candidate: Candidate) -> float:
    return worker.merit(worker.model_for(candidate.lane))


def _only_for(
    worker: Worker, candidate: Candidate, free: dict[str, int], everyone: Sequence[Worker]
) -> bool:
    return [w for w in everyone if free[w.id] > 0 and w.drains(candidate.lane)] == [worker]
