"""Why a worker gets no job: what waits and is not for it, and what others were given (AH-27).

The reasons are those by which jobs are given, looked at when somebody asks: nothing is counted for
every worker and every job.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from billing.fees import format_multiplier
from router import demands
from router.lanes import ANY_MODEL, answer_limit
from router.queue_counts import Step
from router.workers import NEVER_MILLI, Worker
from worker.protocol import ModelKind

# How many of the jobs that were given last are remembered, and for how long they matter.
GIVEN_KEPT = 512
RECENT_S = 600.0


@dataclass(slots=True)
class Skip:
    """Jobs that wait and that a worker is not given, for one reason."""

    code: str
    count: int = 0
    facts: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {"code": self.code, "count": self.count, "facts": self.facts}


def skips(worker: Worker | None, steps: Iterable[Step]) -> list[Skip]:
    """Why the jobs that wait now are not given to a worker, the most frequent reason first. Pure.

    offline, draining, busy    it could have them, but is not there, or has its hands full
    cooling_down               it failed too often in a row; facts: for how long
    ask_too_high               facts: the multiplier that its ask comes to, and the highest that waits
    model_not_served           facts: the models
    demands_not_met            a gpu_filter, or a request larger than it takes
    pinned_elsewhere           they are for one other worker
    context_too_short          facts: the context needed by the longest class, and its own
    max_tokens_too_low         facts: the same for the answer
    """
    found: dict[str, Skip] = {}
    models: dict[str, int] = defaultdict(int)
    for step in steps:
        lane, code, facts = _skip(worker, step)
        if code is None:
            continue
        skip = found.setdefault(code, Skip(code))
        skip.count += step.jobs
        if code == "model_not_served":
            models[lane.split("/", 3)[3]] += step.jobs
        elif facts.get("needed", 0) > skip.facts.get("needed", 0) or not skip.facts:
            skip.facts = facts
    if models:
        wanted = sorted(models, key=lambda model: -models[model])
        found["model_not_served"].facts = {"models": wanted[:10]}
    return sorted(found.values(), key=lambda skip: (-skip.count, skip.code))


def _skip(worker: Worker | None, step: Step) -> tuple[str, str | None, dict[str, Any]]:
    """The lane that tells most, and why the worker gets nothing of it; None: it does."""
    whys = [(lane, *_skip_lane(worker, lane, step.multiplier_milli)) for lane in step.lanes]
    # A job that waits in several lanes is only skipped if it is in each, and "another model" is the
    # last thing to say of one that waits for its model, too.
    return min(whys, key=lambda why: (why[1] is not None, why[1] == "model_not_served"))


def _skip_lane(
    worker: Worker | None, lane: str, multiplier_milli: int
) -> tuple[str | None, dict[str, Any]]:
    if worker is None:
        return "offline", {}
    demand = demands.of_lane(lane)
    if not worker.traits.meet(demand):
        return "pinned_elsewhere" if demand.worker else "demands_not_met", {}
    kind, context, answer, model = demands.without(lane).split("/", 3)
    able = [m for m in worker.models if m.kind == kind and model in (m.id, ANY_MODEL)]
    unnamed = None if able else worker.serves(ModelKind(kind), model)
    able += [unnamed] if unnamed else []
    if not able:
        return "model_not_served", {}
    served = max(able, key=lambda m: (m.context_length, answer_limit(m)))
    if int(context) > served.context_length:
        return "context_too_short", {"needed": int(context), "yours": served.context_length}
    if int(answer) > answer_limit(served):
        return "max_tokens_too_low", {"needed": int(answer), "yours": answer_limit(served)}
    floor = worker.floor_milli(lane)
    if floor > multiplier_milli:
        asked = format_multiplier(floor) if floor < NEVER_MILLI else None
        return "ask_too_high", {"yours": asked, "offered": format_multiplier(multiplier_milli)}
    if worker.draining:
        return "draining", {}
    if worker.standing.rests_s:
        rest = {"seconds_left": round(worker.standing.rests_s)}
        return "cooling_down", rest | {"faults_in_a_row": worker.standing.in_a_row}
    return ("busy", {}) if worker.free_slots == 0 else (None, {})


@dataclass(frozen=True, slots=True)
class Given:
    """A job that was given to a worker; `at` is monotonic. Nothing of what was asked is kept."""

    at: float
    lanes: frozenset[str]
    worker_id: str
    tokens_per_s: float | None
    score: float


class GivenJobs:
    """The jobs that were given last, so that a worker can be told what went to others."""

    def __init__(self) -> None:
        self._given: deque[Given] = deque(maxlen=GIVEN_KEPT)

    def note(self, lanes: Iterable[str], model: str, worker: Worker) -> None:
        """A job that waited in these lanes goes to a worker."""
        speed = worker.speeds.get(model)
        now = worker.filled_at = time.monotonic()
        self._given.append(Given(now, frozenset(lanes), worker.id, speed, worker.standing.score))

    def to_others(self, worker: Worker) -> Skip | None:
        """What went to others while this worker could have had it; None: nothing."""
        since = max(worker.freed_at, worker.connected_at, time.monotonic() - RECENT_S)
        # Since its last job ended it has only filled up: it had room until it was full.
        until = time.monotonic() if worker.free_slots else worker.filled_at
        lost = [
            given
            for given in self._given
            if since <= given.at < until
            and given.worker_id != worker.id
            and any(worker.drains(lane) for lane in given.lanes)
        ]
        if not lost:
            return None
        speeds = [given.tokens_per_s for given in lost if given.tokens_per_s is not None]
        facts = {
            "others_tokens_per_s": round(max(speeds), 1) if speeds else None,
            "your_tokens_per_s": round(max(worker.speeds.values()), 1) if worker.speeds else None,
            "others_score": round(max(given.score for given in lost), 4),
            "your_score": round(worker.standing.score, 4),
        }
        code = "others_came_first" if worker.pulls else "others_were_better"
        return Skip(code, len(lost), facts)
