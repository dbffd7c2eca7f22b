"""What workers ask at least, and which multipliers that comes to. Pure but for `Asks`, which remembers.

A worker may state minimum rates for its models (`min_fees` in its registration). It takes a job if
each rate of the job, times its multiplier, less the router's commission, reaches what is asked. So a
worker with an ask drains its lanes down to a floor only: since lanes are ordered by multiplier, that is
a bound of the search and not a filter. Prices do not change by asks: quotes are as they were, and
`/info` says with which multiplier an idle worker can be had (`multiplier_to_reach_idle`).
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterable, Mapping
from functools import lru_cache

from billing.fee_schedule import FeeSchedule
from billing.fees import ONE_MILLI, Rates
from billing.msat import ceil_div
from router import demands
from router.job_queue import Candidate
from router.lanes import ANY_MODEL
from router.workers import NEVER_MILLI, Worker
from worker.protocol import ModelKind

PPM = 1_000_000
HIGHEST_ASK_MSAT = 10**15
# Jobs may wait at rates that were in force when they were quoted: for so long those count, too.
RATES_COUNT_S = 3600.0

_TEXT = ("prompt_fee_msat", "input_msat_per_mtok", "output_msat_per_mtok")
_PICTURES = ("prompt_fee_msat", "input_msat_per_mtok", "image_fee_msat")
# The rates that jobs of a kind are charged by: an ask for another one means nothing.
_CHARGED = {
    ModelKind.TEXT: _TEXT,
    ModelKind.EMBEDDING: ("prompt_fee_msat", "input_msat_per_mtok"),
}
NAMES = frozenset((*_TEXT, *_PICTURES))


def fault_of(min_fees: Mapping[str, Mapping[str, int]]) -> str | None:
    """What is wrong with the asks of a registration; None: nothing."""
    for model, ask in min_fees.items():
        for name, msat in ask.items():
            if name not in NAMES:
                return f"{model}: there is no rate {name!r}; there are {', '.join(sorted(NAMES))}"
            if not 0 <= msat <= HIGHEST_ASK_MSAT:
                return f"{model}: {name} is out of bounds"
    return None


def needed_milli(
    ask: Mapping[str, int], rates: Rates, *, kind: ModelKind, commission_ppm: int
) -> int:
    """The least multiplier, in thousandths, at which these rates pay what is asked."""
    needed = 0
    for name in _CHARGED.get(kind, _PICTURES):
        asked, left = ask.get(name, 0), getattr(rates, name) * (PPM - commission_ppm)
        if asked > 0:
            needed = max(needed, ceil_div(asked * ONE_MILLI * PPM, left) if left else NEVER_MILLI)
    return min(needed, NEVER_MILLI)


def accepts(worker: Worker, candidate: Candidate, commission_ppm: int) -> bool:
    """Whether a job pays a worker what it asks, at the rates that the job was quoted."""
    if not worker.min_fees or candidate.rates is None:
        return True
    model = worker.model_for(candidate.lane)
    ask = worker.min_fees.get(model)
    plain = demands.without(candidate.lane)
    kind = next(
        (m.kind for m in worker.models if m.id == model and plain.startswith(f"{m.kind}/")), None
    )
    if ask is None or kind is None:
        return True
    rates = _rates_for(candidate.choices, candidate.rates, model)
    needed = needed_milli(ask, rates, kind=kind, commission_ppm=commission_ppm)
    return candidate.multiplier_milli >= needed


@lru_cache(maxsize=1_000)
def _rates_for(choices: str | None, rates: str, model: str) -> Rates:
    if choices is not None:
        of_models = json.loads(choices)
        rates = of_models.get(model) or of_models.get(ANY_MODEL) or rates
    return Rates(**json.loads(rates))


class Asks:
    """Keeps the floors of workers in step with the rates in force."""

    def __init__(self) -> None:
        self._schedules: deque[tuple[float, FeeSchedule]] = deque()
        self._commission_ppm = 0

    def update(self, schedule: FeeSchedule, commission_ppm: int, workers: Iterable[Worker]) -> bool:
        """These rates are in force now. Returns whether any worker's floor has changed."""
        now = time.monotonic()
        if not self._schedules or self._schedules[-1][1] != schedule:
            self._schedules.append((now, schedule))
        # One that was followed by another so long ago has no jobs waiting any more.
        while len(self._schedules) > 1 and now - self._schedules[1][0] > RATES_COUNT_S:
            self._schedules.popleft()
        self._commission_ppm = commission_ppm
        return any([self.set_floors(worker) for worker in workers if worker.min_fees])

    def set_floors(self, worker: Worker) -> bool:
        """Reckon a worker's floors anew; whether they have changed."""
        floors = {
            served.id: floor
            for served in worker.models
            if (ask := worker.min_fees.get(served.id))
            and (floor := self._floor_milli(ask, served.id, served.kind)) > ONE_MILLI
        }
        changed = floors != worker.floors
        worker.floors = floors
        return changed

    def _floor_milli(self, ask: Mapping[str, int], model: str, kind: ModelKind) -> int:
        return min(
            (
                needed_milli(
                    ask, schedule.rates(model), kind=kind, commission_ppm=self._commission_ppm
                )
                for _, schedule in self._schedules
            ),
            default=0,
        )
