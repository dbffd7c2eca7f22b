"""Reading a job while it happens, or after: events for streams, outcomes for those who just wait.

state     it moved; `attempt` tells a reader of a lost attempt to start over
position  its place in the queue has changed
chunk     output from `seq` on
done      it ended, and the ending is in the database
(None)    nothing new: a moment to keep the line open
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any, NamedTuple, Protocol

from router.database import DatabaseUnavailable
from router.errors import AnswerDelayed, JobWiped
from router.job_states import State
from router.job_stream import JobStream, Piece, pieces_after, place, seq_of
from router.job_views import Outcome, answer_calls, answer_text, outcome_of
from router.jobs import Jobs

PLACE_EVERY_S = 2.0
PLACE_LATER_S = 0.5
# How long a waiting reader believes what it has read of its job; a bump here is told at once, one at
# another router, or one that an invoice paid for, is seen after so long.
ROW_LASTS_S = 6.0
# How long a reader who has seen the whole answer waits for the database to take it.
COMMIT_PATIENCE_S = 30.0


class Event(NamedTuple):
    """One of the events above. `seq` is the reader's place after it."""

    kind: str
    seq: int
    data: dict[str, Any]
    outcome: Outcome | None = None


async def outcome(jobs: Jobs, job_id: str) -> Outcome:
    """Wait for a job's end. Raises JobWiped when its answer has been deleted, and AnswerDelayed."""
    stream = jobs.hub.get(job_id)
    if stream is None:
        stream, row = await _attach(jobs, job_id)
        if stream is None:
            return _readable(outcome_of(row))
    stream.readers += 1
    try:
        while stream.outcome is None:
            _refuse_long_wait(jobs, stream)
            await stream.changed()
        return stream.outcome
    finally:
        leave(jobs, stream)


async def find(jobs: Jobs, job_id: str) -> JobStream | Outcome:
    """The stream of a job that is alive, or how it ended. Raises NoSuchJob, JobWiped."""
    stream = jobs.hub.get(job_id)
    if stream is not None:
        return stream
    stream, row = await _attach(jobs, job_id)
    return _readable(outcome_of(row)) if stream is None else stream


def keep(stream: JobStream) -> JobStream:
    """Count as a reader of a stream, so that it stays in memory until `leave`."""
    stream.readers += 1
    return stream


async def until_output(jobs: Jobs, stream: JobStream, *, within_s: float) -> None:
    """Wait until a job has said something or has ended, but not for longer than this.

    Raises AnswerDelayed. What it has said does not count as shown: nobody has been given it.
    """
    loop = asyncio.get_running_loop()
    until = loop.time() + within_s
    # Cheaper than a time-out of asyncio's, which most of these waits would set up for nothing.
    timer = loop.call_at(until, stream.wake)
    try:
        while not stream.pieces and stream.outcome is None and loop.time() < until:
            _refuse_long_wait(jobs, stream)
            await stream.changed()
    finally:
        timer.cancel()


async def follow(
    jobs: Jobs, job_id: str, *, after_seq: int | None = None, place_at_once: bool = False
) -> AsyncGenerator[Event | None, None]:
    """The events of a job from a reader's place on, until `done`. Raises as `read` and `next` do."""
    reader = await read(jobs, job_id, after_seq=after_seq, place_at_once=place_at_once)
    try:
        while not reader.ended:
            for event in await reader.next():
                yield event
    finally:
        reader.close()


async def read(
    jobs: Jobs,
    job_id: str,
    *,
    after_seq: int | None = None,
    place_at_once: bool = False,
    wire: Wire | None = None,
) -> Reader:
    """A reader at a place in a job, counted until it is closed.

    `place_at_once`: the first `position` comes with the first event; otherwise only to a reader
    that has waited a moment, since most jobs never wait. Raises NoSuchJob, JobWiped.
    """
    attempt_had, characters_had = place(after_seq)
    stream = jobs.hub.get(job_id)
    stored: list[Event] = []
    if stream is None:
        stream, row = await _attach(jobs, job_id)
        if stream is None:
            stored = _stored(row, attempt_had, characters_had)
    return Reader(jobs, stream, stored, attempt_had, characters_had, place_at_once, wire)


class Wire(Protocol):
    """Where a reader's output can go at once, without waking the reader."""

    def ready(self) -> bool:
        """Whether it would take something now."""
        ...

    def write(self, pieces: Sequence[Piece]) -> None: ...


class Reader:
    """One reader's place in a job: in a stream in memory, or before the events of a stored answer.

    With a `wire`, output that comes while `next` waits is written there and is none of its events.
    """

    def __init__(
        self,
        jobs: Jobs,
        stream: JobStream | None,
        stored: list[Event],
        attempt: int,
        characters: int,
        place_at_once: bool,
        wire: Wire | None,
    ) -> None:
        self._jobs = jobs
        self._wire = wire
        self._stream = stream
        self._stored = stored
        self._attempt = attempt
        self._index = 0
        self._characters = characters
        self._version = -1
        self._place: dict[str, Any] | None = None
        self._row: Any = None
        self._row_until = 0.0
        self._reprices = 0
        self._look_at = time.monotonic() + (0 if place_at_once else PLACE_LATER_S)
        self.ended = False
        if stream is not None:
            stream.readers += 1
            if attempt != stream.attempt:
                self._characters = 0

    def close(self) -> None:
        """Be a reader no more. Twice is harmless."""
        stream, self._stream = self._stream, None
        if stream is not None:
            leave(self._jobs, stream)

    async def next(self) -> Sequence[Event | None]:
        """What has happened since the last time, at least one event; `ended` after the last.

        Raises AnswerDelayed in the place of `done`.
        """
        stream = self._stream
        if stream is None:
            self.ended = True
            return self._stored
        while True:
            if events := self._news(stream):
                return events
            if stream.state is State.QUEUED:
                event = await self._position(stream)
                if event is not None:
                    return [event]
                if self._has_news(stream):
                    continue
            _refuse_long_wait(self._jobs, stream)
            await stream.changed(self._pour if self._wire else None)
            if not self._has_news(stream):
                return _NOTHING

    def _pour(self) -> bool:
        """Write new output to the wire; False when there is more to say than output."""
        stream, wire = self._stream, self._wire
        if stream is None or wire is None or self._version != stream.version:
            return False
        if stream.outcome is not None or not wire.ready():
            return False
        if self._index < len(stream.pieces):
            index = self._index
            pieces = self._unread(stream)
            if pieces:
                try:
                    wire.write(pieces)
                except Exception:
                    # Nothing is left out: the reader itself says it, or meets what is wrong.
                    self._index = index
                    raise
                self._characters = pieces[-1].end
        return True

    def _news(self, stream: JobStream) -> list[Event]:
        events = []
        if self._version != stream.version:
            self._version = stream.version
            if self._attempt != stream.attempt:
                self._attempt, self._characters = stream.attempt, 0
            self._index = 0
            data = {"state": stream.state.value, "attempt": stream.attempt}
            events.append(Event("state", self._seq(), data))
        if self._index < len(stream.pieces):
            events += self._chunks(stream)
        if stream.outcome is not None:
            events.append(Event("done", self._seq(), {}, stream.outcome))
            self.ended = True
        return events

    def _has_news(self, stream: JobStream) -> bool:
        return (
            self._version != stream.version
            or self._index < len(stream.pieces)
            or stream.outcome is not None
        )

    def _seq(self) -> int:
        return seq_of(self._attempt, self._characters)

    def _chunks(self, stream: JobStream) -> list[Event]:
        return [self._event(piece) for piece in self._unread(stream)]

    def _unread(self, stream: JobStream) -> list[Piece]:
        new = pieces_after(stream.pieces[self._index :], self._characters)
        self._index = len(stream.pieces)
        # Only a stream that somebody reads has been shown: the charge of a lost job depends on it.
        stream.shown = True
        return _joined(new)

    def _event(self, piece: Piece) -> Event:
        self._characters = piece.end
        data = {"text": piece.text} if piece.delta is None else {"delta": piece.delta}
        return Event("chunk", self._seq(), data)

    async def _position(self, stream: JobStream) -> Event | None:
        now = time.monotonic()
        if now < self._look_at:
            return None
        self._look_at = now + PLACE_EVERY_S
        try:
            row = self._row
            # What a place depends on changes with a bump only, and thousands may be waiting.
            if row is None or now > self._row_until or self._reprices != stream.reprices:
                self._reprices = stream.reprices
                self._row = row = await self._jobs.row(stream.job_id)
                self._row_until = now + ROW_LASTS_S
            if row["state"] != State.QUEUED:
                self._row = None
                return None
            place_now = (await self._jobs.place(row)).as_json()
        except DatabaseUnavailable:
            return None
        if place_now == self._place:
            return None
        self._place = place_now
        return Event("position", self._seq(), place_now)


_NOTHING = (None,)


def _refuse_long_wait(jobs: Jobs, stream: JobStream) -> None:
    """Raises AnswerDelayed: the answer is whole, and its ending has waited long for the database."""
    since = stream.ending_since
    if since is not None and time.monotonic() - since > COMMIT_PATIENCE_S:
        raise AnswerDelayed(
            "the answer is complete but could not be recorded yet; fetch it a little later",
            job=stream.job_id,
            token=jobs.token(stream.job_id),
            status_url=f"/jobs/{stream.job_id}",
        )


async def _attach(jobs: Jobs, job_id: str) -> tuple[JobStream | None, Any]:
    """The stream of a job that is alive, or its row if it has ended."""
    row = await jobs.row(job_id)
    if outcome_of(row) is not None:
        return None, row
    opened_here = jobs.hub.get(job_id) is None
    stream = jobs.hub.open(job_id, State(row["state"]), row["attempt"])
    # Counted as read meanwhile: a stream without readers is dropped as soon as its job is heard of,
    # and whoever came to read it then would wait for ever.
    stream.readers += 1
    try:
        # It may have ended between our look and our opening: then nobody would ever tell this stream.
        row = await jobs.row(job_id)
    except BaseException:
        # Whoever came has gone, or the database: of a job that ended meanwhile nobody speaks any more.
        if opened_here and stream.readers == 1:
            jobs.forget_stream(job_id)
        raise
    finally:
        stream.readers -= 1
    if outcome_of(row) is not None and stream.outcome is None:
        if not stream.readers:
            jobs.hub.drop(job_id)
        return None, row
    jobs.found(row)
    return stream, row


def _stored(row: Any, attempt_had: int, characters_had: int) -> list[Event]:
    """The events of a job that has ended, from its stored answer."""
    ended = _readable(outcome_of(row))
    attempt = row["attempt"]
    had = characters_had if attempt_had == attempt else 0
    events = [
        Event("state", seq_of(attempt, had), {"state": ended.state.value, "attempt": attempt})
    ]
    text = answer_text(ended)
    if len(text) > had:
        events.append(Event("chunk", seq_of(attempt, len(text)), {"text": text[had:]}))
    calls, end = answer_calls(ended), len(text)
    if calls and had <= end:
        # How they were cut into deltas is not kept: a reader who has seen some finds them in `done`.
        end += 1
        events.append(Event("chunk", seq_of(attempt, end), {"delta": {"tool_calls": calls}}))
    events.append(Event("done", seq_of(attempt, max(had, end)), {}, ended))
    return events


def _readable(ended: Outcome | None) -> Outcome:
    assert ended is not None
    if ended.wiped:
        raise JobWiped("the answer has been deleted")
    return ended


def _joined(pieces: list[Piece]) -> list[Piece]:
    """Neighbouring texts as one piece: a reader that is behind catches up in one event."""
    if len(pieces) < 2:
        return pieces
    if all(piece.delta is None for piece in pieces):
        return [Piece(pieces[0].start, "".join(piece.text for piece in pieces), None)]
    return pieces


def leave(jobs: Jobs, stream: JobStream) -> None:
    """Be a reader no more."""
    stream.readers -= 1
    if stream.readers:
        return
    if stream.outcome is not None:
        jobs.hub.drop(stream.job_id)
    else:
        jobs.left(stream)
