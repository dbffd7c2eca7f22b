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
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Any

from router.database import DatabaseUnavailable
from router.errors import AnswerDelayed, JobWiped
from router.job_states import State
from router.job_stream import JobStream, Piece, pieces_after, place, seq_of
from router.job_views import Outcome, answer_calls, answer_text, outcome_of
from router.jobs import Jobs

PLACE_EVERY_S = 2.0
PLACE_LATER_S = 0.5
# How long a reader who has seen the whole answer waits for the database to take it.
COMMIT_PATIENCE_S = 30.0


@dataclass(frozen=True, slots=True)
class Event:
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
    try:
        async with asyncio.timeout(within_s):
            while not stream.pieces and stream.outcome is None:
                _refuse_long_wait(jobs, stream)
                await stream.changed()
    except TimeoutError:
        return


async def follow(
    jobs: Jobs, job_id: str, *, after_seq: int | None = None, place_at_once: bool = False
) -> AsyncGenerator[Event | None, None]:
    """The events of a job from a reader's place on, until `done`.

    `place_at_once`: the first `position` comes with the first event; otherwise only to a reader
    that has waited a moment, since most jobs never wait. Raises NoSuchJob, JobWiped before the
    first event, and AnswerDelayed in the place of `done`.
    """
    attempt_had, characters_had = place(after_seq)
    stream = jobs.hub.get(job_id)
    if stream is None:
        stream, row = await _attach(jobs, job_id)
        if stream is None:
            for event in _stored(row, attempt_had, characters_had):
                yield event
            return
    stream.readers += 1
    try:
        reader = _Reader(jobs, stream, attempt_had, characters_had, place_at_once)
        async for event in reader.events():
            yield event
    finally:
        leave(jobs, stream)


class _Reader:
    """One reader's place in a stream in memory."""

    def __init__(
        self, jobs: Jobs, stream: JobStream, attempt: int, characters: int, place_at_once: bool
    ) -> None:
        self._jobs = jobs
        self._stream = stream
        self._attempt = attempt
        self._index = 0
        self._characters = characters
        self._version = -1
        self._place: dict[str, Any] | None = None
        self._look_at = time.monotonic() + (0 if place_at_once else PLACE_LATER_S)
        if attempt != stream.attempt:
            self._characters = 0

    async def events(self) -> AsyncIterator[Event | None]:
        stream = self._stream
        while True:
            if self._version != stream.version:
                self._version = stream.version
                if self._attempt != stream.attempt:
                    self._attempt, self._characters = stream.attempt, 0
                self._index = 0
                data = {"state": stream.state.value, "attempt": stream.attempt}
                yield Event("state", self._seq(), data)
            for event in self._chunks():
                yield event
            if stream.outcome is not None:
                yield Event("done", self._seq(), {}, stream.outcome)
                return
            if stream.state is State.QUEUED:
                event = await self._position()
                if event is not None:
                    yield event
                    continue
            if self._has_news():
                continue
            _refuse_long_wait(self._jobs, stream)
            await stream.changed()
            if not self._has_news():
                yield None

    def _has_news(self) -> bool:
        stream = self._stream
        return (
            self._version != stream.version
            or self._index < len(stream.pieces)
            or stream.outcome is not None
        )

    def _seq(self) -> int:
        return seq_of(self._attempt, self._characters)

    def _chunks(self) -> list[Event]:
        pieces = self._stream.pieces
        if self._index >= len(pieces):
            return []
        new = pieces_after(pieces[self._index :], self._characters)
        self._index = len(pieces)
        # Only a stream that somebody reads has been shown: the charge of a lost job depends on it.
        self._stream.shown = True
        return [self._event(piece) for piece in _joined(new)]

    def _event(self, piece: Piece) -> Event:
        self._characters = piece.end
        data = {"text": piece.text} if piece.delta is None else {"delta": piece.delta}
        return Event("chunk", self._seq(), data)

    async def _position(self) -> Event | None:
        now = time.monotonic()
        if now < self._look_at:
            return None
        self._look_at = now + PLACE_EVERY_S
        try:
            row = await self._jobs.row(self._stream.job_id)
            if row["state"] != State.QUEUED:
                return None
            place_now = (await self._jobs.place(row)).as_json()
        except DatabaseUnavailable:
            return None
        if place_now == self._place:
            return None
        self._place = place_now
        return Event("position", self._seq(), place_now)


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
    stream = jobs.hub.open(job_id, State(row["state"]), row["attempt"])
    # It may have ended between our look and our opening: then nobody would ever tell this stream.
    row = await jobs.row(job_id)
    ended = outcome_of(row)
    if ended is not None and stream.outcome is None:
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
