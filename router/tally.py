"""What this process has done since it started: jobs ended, tokens, money. For metrics only.

Counters of a process, as Prometheus wants them: the sum over routers is the market's. The books are
in the ledger.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

import orjson

from router.job_records import Ended, Ending
from router.job_states import MOVES
from router.job_views import outcome_of


class LastMinute:
    """How much there was of something in the last minute, second by second."""

    def __init__(self) -> None:
        self._seconds: deque[tuple[int, int]] = deque()

    def add(self, amount: int) -> None:
        second = int(time.monotonic())
        if self._seconds and self._seconds[-1][0] == second:
            amount += self._seconds.pop()[1]
        self._seconds.append((second, amount))
        self._forget(second)

    def total(self) -> int:
        self._forget(int(time.monotonic()))
        return sum(amount for _, amount in self._seconds)

    def _forget(self, second: int) -> None:
        while self._seconds and self._seconds[0][0] <= second - 60:
            self._seconds.popleft()


@dataclass(slots=True)
class Tally:
    """`ended` is by (state, reason); tokens are those charged."""

    ended: Counter[tuple[str, str]] = field(default_factory=Counter)
    prompt_tokens: int = 0
    output_tokens: int = 0
    charged_msat: int = 0
    refunded_msat: int = 0
    recent: LastMinute = field(default_factory=LastMinute)

    def count_found(self, ending: Ending, row: Any) -> None:
        """Count an ending of which it was not known whether it was written, if the job's row says that
        it was this one: each attempt ends once, at one router."""
        outcome = outcome_of(row)
        if (
            outcome is not None
            and ending.attempt is not None
            and ending.attempt == row["attempt"]
            and ending.router_id in (None, row["router_id"])
            and outcome.state is MOVES[ending.event][1]
            and outcome.end_reason == ending.end_reason
        ):
            money = outcome.held_msat, outcome.charged_msat, outcome.refunded_msat
            self.count(ending, Ended(row["id"], outcome.state, *money, row["ended_at"]))

    def count(self, ending: Ending, ended: Ended) -> None:
        """A job has ended: this is called once for each, after the commit."""
        self.ended[ended.state.value, ending.end_reason] += 1
        self.charged_msat += ended.charged_msat
        self.refunded_msat += ended.refunded_msat
        if ending.usage is not None:
            ours = orjson.loads(ending.usage)["satherd"]
            self.prompt_tokens += ours["prompt_tokens"]
            self.output_tokens += ours["completion_tokens"]
            self.recent.add(ours["completion_tokens"])
