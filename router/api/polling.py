"""What the doors share whose clients ask again and again: how far a purchase has come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from router.api.purchase import Style
from router.core import Core
from router.errors import NoSuchThing
from router.following import answer_text
from router.job_states import FINAL, State
from router.job_views import Outcome, outcome_of
from router.market import Place

POLLED = Style(apikey=True, polls=True)
WAITED_FOR = Style(apikey=True, polls=True, attached=True)


@dataclass(frozen=True, slots=True)
class Progress:
    """The jobs of a purchase, counted. `place`: of the first of them that waits."""

    rows: Sequence[Any]
    place: Place | None

    def _in(self, *states: State) -> int:
        return sum(1 for row in self.rows if State(row["state"]) in states)

    @property
    def waiting(self) -> int:
        return self._in(State.QUEUED, State.AWAITING_PAYMENT)

    @property
    def processing(self) -> int:
        return self._in(State.RUNNING)

    @property
    def finished(self) -> int:
        return self._in(*FINAL)

    @property
    def done(self) -> bool:
        return self.finished == len(self.rows)

    @property
    def restarted(self) -> int:
        """Tries beyond the first, over all jobs."""
        return sum(max(0, row["attempt"] - 1) for row in self.rows)

    @property
    def position(self) -> int:
        """0 when nothing of this purchase waits (AH-5)."""
        return self.place.position if self.place else 0

    @property
    def wait_s(self) -> int:
        return round(self.place.wait.p50) if self.place else 0

    def answers(self) -> list[tuple[Any, Outcome, str]]:
        """Row, outcome and text of each job that has something to show. An empty text is an answer
        (E3-33), unless it is what is left of a job that failed."""
        shown: list[tuple[Any, Outcome, str]] = []
        for row in self.rows:
            outcome = outcome_of(row)
            if outcome is None or outcome.result is None:
                continue
            text = answer_text(outcome)
            if text or outcome.state is State.SUCCEEDED:
                shown.append((row, outcome, text))
        return shown

    @property
    def charged_msat(self) -> int:
        return sum(row["charged_msat"] or 0 for row in self.rows)

    def headers(self) -> dict[str, str]:
        """What any client of ours may read beside its dialect: the jobs' own ids, and the place."""
        told = {"X-Satherd-Job": ",".join(row["id"] for row in self.rows)}
        if self.place is not None:
            told["X-Satherd-Position"] = str(self.place.position)
        return told


async def progress(core: Core, rows: Sequence[Any], *, say: str) -> Progress:
    """How far these jobs are; their answers are kept on for a while. Raises NoSuchThing with `say`
    when there are none, or none whose answer is still there."""
    if not rows or all(row["wiped"] for row in rows):
        raise NoSuchThing(say)
    ended = [row["id"] for row in rows if row["wipe_at"] is not None]
    if ended:
        await core.jobs.touch(*ended, wipe_after_s=core.settings.wipe_after_s)
    waiting = [row for row in rows if row["state"] == State.QUEUED]
    first = min(waiting, key=lambda row: (-row["multiplier_milli"], row["seq"]), default=None)
    return Progress(rows, await core.jobs.place(first) if first is not None else None)
