"""How a worker has done lately: its faults, the rest that they cost it, and its habits. Pure.

    reliability   moving average of its outcomes: 1 an answer, 0 a fault of its own
    rest          after faults at FAULTS_BEFORE_REST jobs in a row it is left alone, ever longer;
                  one that says it is overloaded is left alone at once, for a moment (QB-R10)
    habits        per model: bytes per token and tokens per answer, to be held against those of others

An answer ends any rest and forgets the row of faults. A fault whose blame is shifted to the job is
taken back as if it had never been: what it took from the average comes back with the weight that it
still has.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from dataclasses import dataclass, field

# Weight of the newest observation in moving averages.
NEWEST = 0.2
FAULTS_BEFORE_REST = 3
REST_S, LONGEST_REST_S = 30.0, 900.0
OVERLOADED_REST_S = 30.0
OVERLOADED = "overloaded"
FAULTS_KEPT = 100
# Records are written every few seconds: for so long what is in memory is newer than the database.
KNOWN_BETTER_S = 15.0


def average(old: float | None, new: float) -> float:
    """A moving average with one more observation; `old` None: it is the first."""
    return new if old is None else old + NEWEST * (new - old)


@dataclass(frozen=True, slots=True)
class Fault:
    """What a fault took from the reliability, after how many observations, and when."""

    attempt: int
    lost: float
    seen: int
    at: float


@dataclass(slots=True)
class Habit:
    """How the answers of one model look, over `answers` of them."""

    answers: int = 0
    bytes_per_token: float = 0.0
    tokens: float = 0.0

    def add(self, *, tokens: int, utf8_bytes: int) -> None:
        first = self.answers == 0
        self.answers += 1
        self.bytes_per_token = average(None if first else self.bytes_per_token, utf8_bytes / tokens)
        self.tokens = average(None if first else self.tokens, tokens)


@dataclass(slots=True)
class Standing:
    """Kept by this router for as long as it runs, also while the worker is away. Times are monotonic.

    `quality`: what the checks of its answers have found (`router.checks`), 1 before the first.
    """

    reliability: float = 1.0
    quality: float = 1.0
    at: float = -math.inf
    seen: int = 0
    failed_jobs: set[str] = field(default_factory=set)  # since its last answer
    rests_until: float = 0.0
    faults: OrderedDict[str, Fault] = field(default_factory=OrderedDict)
    habits: dict[str, Habit] = field(default_factory=dict)

    @property
    def score(self) -> float:
        """How far a worker can be trusted to answer, and to answer well: 0 to 1."""
        return self.reliability * self.quality

    @property
    def rests_s(self) -> float:
        """How long it is still left alone, in seconds."""
        return max(0.0, self.rests_until - time.monotonic()) if self.rests_until else 0.0

    def resume(self, reliability: float, quality: float) -> None:
        """The worker is back. What the database says counts; of its reliability, unless it was here a
        moment ago."""
        self.quality = quality
        if time.monotonic() - self.at > KNOWN_BETTER_S:
            self.reliability = reliability

    @property
    def in_a_row(self) -> int:
        """At how many jobs it has failed since its last answer."""
        return len(self.failed_jobs)

    def good(self) -> None:
        """It has answered."""
        self._see(1.0)
        self.failed_jobs.clear()
        self.rests_until = 0.0

    def fault(self, job_id: str, attempt: int, code: str) -> None:
        """It has failed by its own fault, as far as can be said now."""
        lost = NEWEST * self.reliability
        self._see(0.0)
        # One job that it fails at again and again may be the fault of that job.
        self.failed_jobs.add(job_id)
        self.faults[job_id] = Fault(attempt, lost, self.seen, self.at)
        while len(self.faults) > FAULTS_KEPT:
            self.faults.popitem(last=False)
        self.rests_until = max(self.rests_until, self.at + _rest_s(code, self.in_a_row))

    def half_fault(self, weight: float) -> None:
        """Its answer was not what it should have been: so much of a fault."""
        self.reliability -= NEWEST * weight * self.reliability

    def forgive(self, job_id: str) -> bool:
        """Take a fault back, since it was the job's; False when there is none."""
        fault = self.faults.pop(job_id, None)
        if fault is None:
            return False
        left = fault.lost * (1 - NEWEST) ** (self.seen - fault.seen)
        self.reliability = min(1.0, self.reliability + left)
        self.failed_jobs.discard(job_id)
        if self.in_a_row < FAULTS_BEFORE_REST:
            self.rests_until = 0.0
        return True

    def _see(self, outcome: float) -> None:
        self.seen += 1
        self.at = time.monotonic()
        self.reliability = average(self.reliability, outcome)


def _rest_s(code: str, in_a_row: int) -> float:
    if code == OVERLOADED:
        return OVERLOADED_REST_S
    over = in_a_row - FAULTS_BEFORE_REST
    return min(REST_S * 2**over, LONGEST_REST_S) if over >= 0 else 0.0
