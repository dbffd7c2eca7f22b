"""Jobs whose reader is at one router and whose worker at another.

    reader's router                            worker's router
        │ ◀── started: job, attempt ─────────── │   to all: it has claimed something
        │ ─── follow: job, attempt, have ─────▶ │   by whoever has that job's stream
        │ ◀── pieces: job, attempt, start, … ── │   as they come, many in one parcel
        │ ◀── ended: job ────────────────────── │   after the commit
        │ ─── shown, cancel ──────────────────▶ │

Here such a job has a `JobStream` like any other, which readers follow without knowing better. Its
places are characters (decision 4), so what is missing can be asked for again from any place, and
what nobody can say again is in the database: `router.far_jobs` looks there, for jobs of which the
bus says nothing. How a job ended is always read there.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

from router.attempts import Attempts, RunningAttempt
from router.bus import Bus, Message
from router.job_records import Claimed
from router.job_states import State
from router.job_stream import JobStream, Piece, StreamHub, pieces_after

log = logging.getLogger(__name__)

# Wake-ups within this time become one.
WAKE_EVERY_S = 0.005
# A text longer than this is sent in parts, so that a parcel stays within what a broker takes.
MOST_CHARACTERS = 50_000


class Relay:
    """This router's half of the exchange. `look_soon(job ids)` asks for a look into the database."""

    def __init__(self, bus: Bus, hub: StreamHub, attempts: Attempts, *, router_id: str) -> None:
        self.bus = bus
        self._hub = hub
        self._attempts = attempts
        self._router_id = router_id
        self._sending: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._followed: dict[str, str] = {}
        self._paid: list[str] = []
        self._woke_at = 0.0
        self._wake_later: asyncio.TimerHandle | None = None
        self.look_soon: Callable[[Iterable[str]], None] = lambda job_ids: None
        self.on_work: Callable[[], None] = lambda: None
        self.on_claimed: Callable[[str], None] = lambda job_id: None
        self.changed = asyncio.Event()
        self.on_come: Callable[[str], None] = lambda worker_id: None
        self.on_hello: Callable[[str, Message], None] = lambda sender, message: None
        self._handlers: dict[str, Callable[..., None]] = {
            "started": self._on_started,
            "work": self._on_work,
            "follow": self._on_follow,
            "leave": self._on_leave,
            "pieces": self._on_pieces,
            "back": self._on_back,
            "ending": self._on_ending,
            "ended": self._on_ended,
            "elsewhere": self._on_elsewhere,
            "shown": self._on_shown,
            "cancel": self._on_cancel,
            "come": self._on_come,
            "changed": self._on_changed,
        }
        bus.on_message = self._on_message
        bus.on_gap = self.ask_again
        attempts.on_started = self._tell_started

    def listen(self, kind: str, handler: Callable[..., None]) -> None:
        """Have messages of another kind handled: `handler(sender, *rest)`."""
        self._handlers[kind] = handler

    async def stop(self) -> None:
        tasks = list(self._sending.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def is_far(self, stream: JobStream) -> bool:
        """Whether a stream is of a job that is alive and does not run here."""
        return stream.outcome is None and stream.job_id not in self._attempts.running

    def follows(self, job_id: str) -> str | None:
        """The router that tells us of a job; None when nobody does."""
        return self._followed.get(job_id)

    @property
    def following(self) -> int:
        """How many jobs other routers tell us of."""
        return len(self._followed)

    @property
    def telling(self) -> int:
        """How many readers' routers we tell of jobs that run here."""
        return len(self._sending)

    # --- as the reader's router ------------------------------------------------------------------

    def follow(self, job_id: str, router_id: str, attempt: int) -> None:
        """Ask the router that runs a job for what we have not got of it. Twice is harmless."""
        stream = self._hub.get(job_id)
        if stream is None or not self.is_far(stream) or router_id == self._router_id:
            return
        if stream.attempt > attempt:
            return
        if stream.attempt != attempt or stream.state is not State.RUNNING:
            stream.restart(State.RUNNING, attempt)
        if self._followed.get(job_id) != router_id:
            # What another router waited for is not what this one does.
            stream.ending_since = None
        self._followed[job_id] = router_id
        self.bus.send(router_id, ["follow", job_id, attempt, stream.length, stream.shown])

    def ask_again(self, router_id: str) -> None:
        """Something that a router has told us was lost: ask it for all that we follow there."""
        for job_id, at in list(self._followed.items()):
            stream = self._hub.get(job_id)
            if at == router_id and stream is not None:
                self.follow(job_id, router_id, stream.attempt)

    def ask_all_again(self) -> None:
        """The bus was away: nobody knows what was said meanwhile."""
        for router_id in set(self._followed.values()):
            self.ask_again(router_id)

    def left(self, stream: JobStream) -> None:
        """Nobody reads this job here any more: of one that runs elsewhere nothing is kept."""
        if stream.state is State.RUNNING and self.is_far(stream):
            self._hub.drop(stream.job_id)
            router_id = self._followed.pop(stream.job_id, None)
            if router_id is not None:
                self.bus.send(router_id, ["leave", stream.job_id])

    def tell_shown(self, stream: JobStream) -> None:
        """Output of a job that runs elsewhere has been given to a reader: its charge depends on it."""
        router_id = self._followed.get(stream.job_id)
        if router_id is not None:
            self.bus.send(router_id, ["shown", stream.job_id, stream.attempt])

    def ask_cancel(self, job_id: str, router_id: str, reason: str) -> None:
        self.bus.send(router_id, ["cancel", job_id, reason])

    def _on_message(self, sender: str, message: Message) -> None:
        kind, *rest = message
        if kind == "hello":
            self.on_hello(sender, rest)
        elif (handler := self._handlers.get(kind)) is not None:
            handler(sender, *rest)
        # A newer router may know kinds that we do not.

    def _on_started(self, sender: str, jobs: list[list[Any]]) -> None:
        for job_id, attempt in jobs:
            self.on_claimed(job_id)
            # Ours no more, if its worker has taken it along.
            self._attempts.moved(job_id, attempt)
            stream = self._hub.get(job_id)
            if stream is None or not self.is_far(stream):
                continue
            if stream.readers:
                self.follow(job_id, sender, attempt)
            else:
                # Whoever comes later finds it in the database, and what it has said at its router.
                self._hub.drop(job_id)

    def _on_pieces(
        self, sender: str, job_id: str, attempt: int, start: int, said: list[Any]
    ) -> None:
        stream = self._hub.get(job_id)
        if stream is None or not self.is_far(stream):
            self._followed.pop(job_id, None)
            self.bus.send(sender, ["leave", job_id])
            return
        if attempt < stream.attempt:
            return
        if attempt > stream.attempt or stream.state is not State.RUNNING:
            stream.restart(State.RUNNING, attempt)
        self._followed[job_id] = sender
        if start > stream.length:
            self.follow(job_id, sender, attempt)
            return
        for piece in pieces_after(_pieces(start, said), stream.length):
            stream.push(piece.text, piece.delta)

    def _on_back(self, sender: str, job_id: str, attempt: int) -> None:
        stream = self._hub.get(job_id)
        if stream is not None and self.is_far(stream) and attempt >= stream.attempt:
            self._followed.pop(job_id, None)
            stream.restart(State.QUEUED, attempt)

    def _on_ending(self, sender: str, job_id: str, attempt: int) -> None:
        stream = self._hub.get(job_id)
        if stream is not None and stream.attempt == attempt and stream.ending_since is None:
            stream.ending_since = time.monotonic()

    def _on_ended(self, sender: str, job_id: str) -> None:
        self._followed.pop(job_id, None)
        stream = self._hub.get(job_id)
        if stream is not None and stream.outcome is None and stream.ending_since is None:
            # The database may be away from here alone: readers do not wait for it for ever.
            stream.ending_since = time.monotonic()
        self.look_soon([job_id])

    def _on_elsewhere(self, sender: str, job_id: str) -> None:
        if self._followed.get(job_id) == sender:
            del self._followed[job_id]
        self.look_soon([job_id])

    # --- as the worker's router ------------------------------------------------------------------

    def _tell_started(self, claimed: Claimed) -> None:
        self._followed.pop(claimed.job_id, None)
        self.on_claimed(claimed.job_id)
        self.bus.tell_all(["started", [[claimed.job_id, claimed.attempt]]])

    def _on_follow(self, sender: str, job_id: str, attempt: int, have: int, shown: bool) -> None:
        running = self._attempts.running.get(job_id)
        if running is None:
            self.bus.send(sender, ["elsewhere", job_id])
            return
        if running.claimed.attempt != attempt:
            have = 0
        elif shown:
            running.stream.shown = True
        self._stop_telling(sender, job_id)
        task = asyncio.create_task(self._tell(sender, running, have), name=f"relay-{job_id}")
        self._sending[sender, job_id] = task
        task.add_done_callback(lambda done: self._told(sender, job_id, done))

    def _on_leave(self, sender: str, job_id: str) -> None:
        self._stop_telling(sender, job_id)

    def _stop_telling(self, to: str, job_id: str) -> None:
        task = self._sending.pop((to, job_id), None)
        if task is not None:
            task.cancel()

    def _told(self, to: str, job_id: str, task: asyncio.Task[None]) -> None:
        if self._sending.get((to, job_id)) is task:
            del self._sending[to, job_id]
        if not task.cancelled() and task.exception() is not None:
            log.error("a job is not told any more job=%s", job_id, exc_info=task.exception())

    async def _tell(self, to: str, running: RunningAttempt, have: int) -> None:
        """Send an attempt's output from a place on, until it is over; then how that was."""
        stream, attempt = running.stream, running.claimed.attempt
        index, version, ending = 0, stream.version, False
        stream.readers += 1
        try:
            while stream.version == version:
                new = stream.pieces[index:]
                index += len(new)
                if have:
                    new = pieces_after(new, have)
                    have = 0 if new else have
                for start, said in _parts(new):
                    self.bus.send(to, ["pieces", stream.job_id, attempt, start, said])
                if stream.ending_since is not None and not ending:
                    ending = True
                    self.bus.send(to, ["ending", stream.job_id, attempt])
                await stream.changed()
        finally:
            stream.readers -= 1
            if stream.outcome is not None and not stream.readers:
                self._hub.drop(stream.job_id)
        if stream.outcome is not None:
            for start, said in _parts(pieces_after(stream.pieces[index:], have)):
                self.bus.send(to, ["pieces", stream.job_id, attempt, start, said])
            self.bus.send(to, ["ended", stream.job_id])
        elif stream.state is State.QUEUED:
            self.bus.send(to, ["back", stream.job_id, stream.attempt])

    def _on_shown(self, sender: str, job_id: str, attempt: int) -> None:
        running = self._attempts.running.get(job_id)
        if running is not None and running.claimed.attempt == attempt:
            running.stream.shown = True

    def tell_changed(self) -> None:
        """An admin has changed something, and it is in the database."""
        self.bus.tell_all(["changed"])

    def _on_changed(self, sender: str) -> None:
        self.changed.set()

    def tell_come(self, worker_id: str) -> None:
        """A worker has come: whoever still thinks to have it is mistaken."""
        self.bus.tell_all(["come", worker_id])

    def _on_come(self, sender: str, worker_id: str) -> None:
        self.on_come(worker_id)

    def _on_cancel(self, sender: str, job_id: str, reason: str) -> None:
        self._attempts.cancel_later(job_id, reason)

    # --- wake-ups --------------------------------------------------------------------------------

    def tell_paid(self, job_ids: Iterable[str]) -> None:
        """These waited for their payment; with the next `tell_work` the others hear of it."""
        self._paid.extend(job_ids)

    def tell_work(self) -> None:
        """Something may be waiting for a worker of another router."""
        if self._wake_later is not None:
            return
        wait_s = self._woke_at + WAKE_EVERY_S - time.monotonic()
        if wait_s <= 0:
            self._tell_work()
        else:
            self._wake_later = asyncio.get_running_loop().call_later(wait_s, self._tell_work)

    def _tell_work(self) -> None:
        self._wake_later = None
        self._woke_at = time.monotonic()
        paid, self._paid = self._paid, []
        self.bus.tell_all(["work", paid])

    def _on_work(self, sender: str, paid: list[str]) -> None:
        for job_id in paid:
            stream = self._hub.get(job_id)
            if stream is not None and stream.state is State.AWAITING_PAYMENT:
                stream.restart(State.QUEUED, 0)
        self.on_work()


def _pieces(start: int, said: list[Any]) -> list[Piece]:
    pieces = []
    for part in said:
        piece = Piece(start, part, None) if isinstance(part, str) else Piece(start, "", part)
        pieces.append(piece)
        start = piece.end
    return pieces


def _parts(pieces: list[Piece]) -> Iterable[tuple[int, list[Any]]]:
    """Pieces as (start, texts and deltas), neighbouring texts joined, none of them very long."""
    said: list[Any] = []
    start = length = 0
    for piece in pieces:
        for part in _short(piece):
            if length > MOST_CHARACTERS:
                yield start, said
                said, length = [], 0
            if not said:
                start = part.start
            if part.delta is None and said and isinstance(said[-1], str):
                said[-1] += part.text
            else:
                said.append(part.text if part.delta is None else part.delta)
            length += len(part.text) if part.delta is None else MOST_CHARACTERS // 4
    if said:
        yield start, said


def _short(piece: Piece) -> Iterable[Piece]:
    if piece.delta is not None or len(piece.text) <= MOST_CHARACTERS:
        yield piece
        return
    for at in range(0, len(piece.text), MOST_CHARACTERS):
        yield Piece(piece.start + at, piece.text[at : at + MOST_CHARACTERS], None)
