"""What a running job says, as it says it: publish, follow from a place, keep for later readers.

A stream lives in memory on the router whose worker runs the job. Output goes from the worker's frame
to the readers without waiting for a database; `router.maintenance` keeps what has been said for
readers that come later, and the whole answer is in the database before `done` is published.

The place of a reader is `seq`: the number of characters of the answer up to there (a delta that is
not text counts one), plus ATTEMPT_STEP for each attempt before this one. It can be had again from the
stored answer, so a reader may resume at any router, and a reader of a lost attempt is told to start
over and never shown a mixture of two answers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

from router.job_states import State
from router.job_views import Outcome

log = logging.getLogger(__name__)

ATTEMPT_STEP = 1_000_000_000

# Gives a waiting reader what has been said, at once; False when the reader must be woken to take it.
Tap = Callable[[], bool]


class Piece(NamedTuple):
    """A part of the answer that starts at `start`; exactly one of text and delta is given."""

    start: int
    text: str
    delta: dict[str, Any] | None

    @property
    def end(self) -> int:
        return self.start + (len(self.text) if self.delta is None else 1)


class JobStream:
    """The answer of one job so far, and those who wait for more of it."""

    __slots__ = (
        "_tell_later",
        "_untold",
        "_waiting",
        "attempt",
        "deltas",
        "ending_since",
        "job_id",
        "kept",
        "length",
        "outcome",
        "pieces",
        "readers",
        "reprices",
        "shown",
        "shown_kept",
        "spoke",
        "state",
        "utf8_bytes",
        "version",
    )

    def __init__(
        self,
        job_id: str,
        state: State,
        attempt: int,
        tell_later: Callable[[JobStream], None],
    ) -> None:
        self.job_id = job_id
        self.state = state
        self.attempt = attempt
        self.pieces: list[Piece] = []
        self.length = 0
        self.utf8_bytes = 0
        self.deltas = 0
        self.kept = 0  # how many pieces are in the database
        self.readers = 0
        self.reprices = 0  # how often its multiplier was raised while it waited
        self.shown = False  # whether anybody has been given output of this attempt
        self.shown_kept = False  # the same, as the database has it
        self.ending_since: float | None = None  # since when its ending waits for the database
        self.outcome: Outcome | None = None  # set once the job's ending is committed
        self.version = 0  # grows with every change of state
        self.spoke = False  # whether it has said something since the hub's last tick
        self._untold = False
        self._tell_later = tell_later
        self._waiting: list[tuple[asyncio.Future[None], Tap | None]] = []

    def restart(self, state: State, attempt: int) -> None:
        """A new attempt, or back in the queue: what was said before is void."""
        self.state = state
        self.attempt = attempt
        self.pieces = []
        self.length = self.utf8_bytes = self.deltas = self.kept = 0
        self.shown = self.shown_kept = False
        self.ending_since = None
        self.version += 1
        self.wake()

    def push(self, text: str, delta: dict[str, Any] | None = None) -> None:
        """Append output; the readers are told at the end of this turn of the loop, of all at once."""
        if delta is not None:
            self.pieces.append(Piece(self.length, "", delta))
            self.length += 1
            self.deltas += 1
            self.utf8_bytes += delta_bytes(delta)
        if text:
            self.pieces.append(Piece(self.length, text, None))
            self.length += len(text)
            self.utf8_bytes += len(text) if text.isascii() else len(text.encode())
        if not self._untold:
            self._untold = True
            self._tell_later(self)

    def end(self, outcome: Outcome) -> None:
        """The job has ended and its ending is committed."""
        self.state = outcome.state
        self.outcome = outcome
        self.version += 1
        self.wake()

    @property
    def has_news(self) -> bool:
        """Whether the database does not have it all."""
        return self.kept < len(self.pieces) or self.shown_kept != self.shown

    def keep(self, attempt: int, pieces: int, *, shown: bool) -> None:
        """So much of an attempt has been stored; nothing changes if it is not the present one."""
        if attempt == self.attempt and pieces <= len(self.pieces):
            self.kept, self.shown_kept = pieces, shown

    def tell(self) -> None:
        """Give new output to the readers: through their taps, or by waking them."""
        self._untold = False
        self.spoke = True
        waiting, self._waiting = self._waiting, []
        for future, tap in waiting:
            if future.done():
                continue
            if tap is not None and self._taken(tap):
                self._waiting.append((future, tap))
            else:
                future.set_result(None)

    def _taken(self, tap: Tap) -> bool:
        try:
            return tap()
        except Exception:
            # The reader itself meets whatever is wrong, and other streams go on.
            log.exception("output could not be passed on at once job=%s", self.job_id)
            return False

    def wake(self) -> None:
        for future, _ in self._waiting:
            if not future.done():
                future.set_result(None)
        self._waiting.clear()

    async def changed(self, tap: Tap | None = None) -> None:
        """Wait for the next change, or for the hub's tick. Output that `tap` takes wakes nobody."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((future, tap))
        await future

    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    def all_deltas(self) -> list[dict[str, Any]]:
        return [piece.delta for piece in self.pieces if piece.delta is not None]


class StreamHub:
    """The streams of this process, by job."""

    TICK_S = 1.0
    SLICES = 50

    def __init__(self) -> None:
        self._streams: dict[str, JobStream] = {}
        self._untold: list[JobStream] = []
        self._task: asyncio.Task | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._tick(), name="stream-tick")

    async def stop(self) -> None:
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def get(self, job_id: str) -> JobStream | None:
        return self._streams.get(job_id)

    def open(self, job_id: str, state: State, attempt: int = 0) -> JobStream:
        """The stream of a job that is alive; made when it is not there."""
        stream = self._streams.get(job_id)
        if stream is None:
            stream = self._streams[job_id] = JobStream(job_id, state, attempt, self._tell_later)
        return stream

    def drop(self, job_id: str) -> None:
        self._streams.pop(job_id, None)

    def all(self) -> list[JobStream]:
        return list(self._streams.values())

    def _tell_later(self, stream: JobStream) -> None:
        # Frames that came together are read in one turn, and what they say goes out together.
        if not self._untold:
            asyncio.get_running_loop().call_soon(self._tell)
        self._untold.append(stream)

    def _tell(self) -> None:
        streams, self._untold = self._untold, []
        for stream in streams:
            stream.tell()

    async def _tick(self) -> None:
        # One timer for all: readers use it to show positions and to keep their lines open, which
        # output does as well. Thousands may wait: woken all at once, they would make others wait.
        while True:
            streams = self.all()
            most = -(-len(streams) // self.SLICES) or 1
            for start in range(0, len(streams) or 1, most):
                for stream in streams[start : start + most]:
                    self._tick_one(stream)
                await asyncio.sleep(self.TICK_S * most / (len(streams) or 1))

    def _tick_one(self, stream: JobStream) -> None:
        if stream.outcome and not stream.readers:
            self.drop(stream.job_id)
        if not stream.spoke:
            stream.wake()
        stream.spoke = False


_NOT_SAID = frozenset({"id", "type", "role"})


def delta_bytes(value: Any, name: str = "") -> int:
    """UTF-8 bytes of what a model has said in a delta: names and arguments of calls, any text."""
    if isinstance(value, str):
        return 0 if name in _NOT_SAID else len(value.encode())
    if isinstance(value, dict):
        return sum(delta_bytes(inner, key) for key, inner in value.items())
    return sum(map(delta_bytes, value)) if isinstance(value, list) else 0


def place(seq: int | None) -> tuple[int, int]:
    """(attempt, characters) of a `seq` that a reader has; (0, 0) when it has none."""
    if not seq or seq < 0:
        return 0, 0
    return seq // ATTEMPT_STEP + 1, seq % ATTEMPT_STEP


def seq_of(attempt: int, characters: int) -> int:
    return max(0, attempt - 1) * ATTEMPT_STEP + characters


def pieces_after(pieces: list[Piece], characters: int) -> list[Piece]:
    """What comes after the first `characters`, with the first piece cut where it must be."""
    if pieces and pieces[0].start >= characters:
        return pieces
    rest = [piece for piece in pieces if piece.end > characters]
    if rest and rest[0].start < characters and rest[0].delta is None:
        cut = characters - rest[0].start
        rest[0] = Piece(characters, rest[0].text[cut:], None)
    return rest
