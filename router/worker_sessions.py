"""The router's half of the worker protocol: registration, frames in, frames out.

A session is one connected worker. It owns the jobs that the worker holds: when the connection ends,
by whatever cause, each of them is given back or settled, and the worker is out of the fleet.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Protocol

import orjson
from pydantic import ValidationError

from router.attempts import Attempts, RunningAttempt
from router.job_records import Claimed, Resumed
from router.workers import Worker
from worker.protocol import (
    IMAGE_KINDS,
    MOST_TOKENS,
    WORKER_FRAME,
    Cancel,
    Chunk,
    Chunks,
    Drain,
    Failed,
    FailureCode,
    Finished,
    FinishReason,
    Held,
    Kind,
    Picture,
    Ready,
)

log = logging.getLogger(__name__)

# A worker may say this much more than max_tokens would suggest before it is taken for broken.
_BYTES_PER_TOKEN = 64
_BYTES_SPARE = 65_536
_TOKENS_SPARE = 1024
# How long a worker may hold on to a job that it was told to stop.
STOP_GRACE_S = 30.0
_MOST_UNSENT = 10_000

_FRAMES = ("chunk", "chunks", "finished", "failed", "ready")

BLAME = {
    FailureCode.PROMPT_TOO_LONG: "job",
    FailureCode.BAD_REQUEST: "job",
    FailureCode.RETURNED: "nobody",
}


class Connection(Protocol):
    """What a session needs of a WebSocket; an in-memory pair serves as well."""

    async def send_text(self, text: str) -> None: ...

    async def close(self, code: int, reason: str) -> None: ...


class ProtocolViolation(Exception):
    """A frame that no correct worker sends; the connection is closed."""


class WorkerSession:
    """One connected worker that speaks `satherd/1`."""

    def __init__(
        self,
        worker: Worker,
        connection: Connection,
        attempts: Attempts,
        *,
        lease_s: int,
        image_s: float = 600.0,
        on_idle: Callable[[], None],
    ) -> None:
        self.worker = worker
        self._connection = connection
        self._attempts = attempts
        self._lease_s = lease_s
        self._image_s = image_s
        self._on_idle = on_idle
        self._held: dict[str, RunningAttempt] = {}
        self._stopping: dict[str, float] = {}
        self._unsent: list[str] = []
        self._sender: asyncio.Task | None = None
        self.closed = False
        self.dropped_frames = 0

    def send(self, text: str) -> None:
        """Queue a frame; a worker that reads too slowly is cut off."""
        if len(self._unsent) > _MOST_UNSENT:
            self.cut("too slow a reader")
            return
        self._unsent.append(text)
        # Only while there is something to send: thousands of workers have nothing to do, and a
        # task and a queue would be a tenth of what each needs.
        if self._sender is None and not self.closed:
            self._sender = asyncio.create_task(self._send_all(), name=f"worker-{self.worker.id}")

    async def _send_all(self) -> None:
        while self._unsent:
            texts, self._unsent = self._unsent, []
            for text in texts:
                try:
                    await self._connection.send_text(text)
                except Exception as error:
                    # The reading side sees the same end, and cleans up; nothing is sent any more.
                    log.info("worker not reachable worker=%s: %r", self.worker.id, error)
                    return
        self._sender = None

    def assign(self, claimed: Claimed) -> None:
        """Give a claimed job to the worker."""
        if self.closed:
            running = self._attempts.begin(claimed, self.worker, lambda: None)
            self._attempts.fail(
                running, outcome="worker_lost", blame="nobody", error="gone before the job was sent"
            )
            return
        running = self._attempts.begin(
            claimed, self.worker, lambda: self._stop(claimed.job_id, claimed.attempt)
        )
        self._held[claimed.job_id] = running
        # The spec is JSON already: it goes out as it was stored.
        self.send(
            f'{{"type":"assign","job_id":"{claimed.job_id}","attempt":{claimed.attempt},'
            f'"lease_s":{self._lease_s},"job":{claimed.spec}}}'
        )

    def resume(self, jobs: Iterable[Resumed]) -> None:
        """Go on with jobs that the worker had before its line broke: it says all of them again."""
        for resumed in jobs:
            job_id, attempt = resumed.claimed.job_id, resumed.claimed.attempt
            self._held[job_id] = self._attempts.resume(
                resumed, self.worker, partial(self._stop, job_id, attempt)
            )
            self.worker.busy.add(job_id)

    def held(self) -> list[Held]:
        """What it has in hand."""
        return [
            Held(job_id=job_id, attempt=running.claimed.attempt)
            for job_id, running in self._held.items()
        ]

    def _stop(self, job_id: str, attempt: int) -> None:
        if job_id in self._held and job_id not in self._stopping:
            self._stopping[job_id] = time.monotonic()
            self.send(Cancel(job_id=job_id, attempt=attempt).model_dump_json())

    def let_go(self) -> list[RunningAttempt]:
        """Close the line, so that the worker goes on at another router; what it may take along."""
        self.closed = True
        held, self._held = list(self._held.values()), {}
        self._closing = asyncio.create_task(self._connection.close(1001, "the router stops"))
        return held

    def drain(self) -> None:
        """Give it no more jobs; it finishes what it holds."""
        self.worker.draining = True
        self.send(Drain().model_dump_json())

    def on_frame(self, text: str | bytes) -> None:
        """Handle a frame of the worker. Raises ProtocolViolation."""
        try:
            raw = orjson.loads(text)
        except orjson.JSONDecodeError as error:
            raise ProtocolViolation("not JSON") from error
        if not isinstance(raw, dict):
            raise ProtocolViolation("not an object")
        # Output is nearly all there is: it is read without building a model of each frame.
        if raw.get("type") == "chunks":
            for item in _items(raw):
                self._chunk(*item)
            return
        try:
            frame = WORKER_FRAME.validate_python(raw)
        except ValidationError as error:
            # Only a word of ours is said again: this goes into the log.
            named = raw.get("type")
            kind = named if named in _FRAMES else "unknown type"
            raise ProtocolViolation(f"a malformed frame: {kind}") from error
        match frame:
            case Chunk():
                self._chunk(
                    frame.job_id, frame.attempt, frame.seq, frame.text, frame.tokens, frame.delta
                )
            case Finished():
                self._finished(frame)
            case Failed():
                self._failed(frame)
            case Ready():
                # No room where we count some: it is about to leave, and would give a job back.
                if frame.slots_free == 0 and self.worker.free_slots > 0:
                    self.worker.draining = True
                self._on_idle()
            case Chunks():
                self._on_idle()

    def _current(self, job_id: str, attempt: int) -> RunningAttempt | None:
        running = self._held.get(job_id)
        if running is None or running.claimed.attempt != attempt:
            self.dropped_frames += 1
            return None
        return running

    def _chunk(
        self,
        job_id: str,
        attempt: int,
        seq: int,
        text: str,
        tokens: int | None,
        delta: dict[str, Any] | None = None,
    ) -> None:
        running = self._current(job_id, attempt)
        if running is None or running.settled:
            return
        if "\0" in text:
            text = _storable(text)
        if seq != running.chunks:
            if seq > running.chunks:
                self._fail(running, "chunks_missing", f"chunk {seq} came as {running.chunks}")
            return
        self._attempts.said(running, text, delta, tokens)
        most = running.claimed.max_tokens
        most_bytes = most * _BYTES_PER_TOKEN + _BYTES_SPARE
        if running.stream.utf8_bytes > most_bytes or (delta and _size(delta) > _BYTES_SPARE):
            self._fail(running, "too_much_output", f"more than {most_bytes} bytes")
        elif max(running.worker_tokens, running.stream.deltas) > most + _TOKENS_SPARE:
            self._fail(running, "too_much_output", f"more than {most} tokens")

    def _fail(self, running: RunningAttempt, outcome: str, error: str) -> None:
        self._attempts.fail(running, outcome=outcome, blame="worker", error=error)
        running.stop()

    def _finished(self, frame: Finished) -> None:
        running = self._release(frame.job_id, frame.attempt)
        if running is None or running.settled:
            return
        fault = answer_fault(running.claimed, frame.data, frame.images)
        if fault is not None and frame.finish_reason is not FinishReason.CANCELLED:
            self._attempts.fail(running, outcome="bad_answer", blame="worker", error=fault)
        elif frame.finish_reason is FinishReason.CANCELLED:
            self._attempts.fail(
                running, outcome="stopped", blame="worker", error="stopped without being asked"
            )
        else:
            pictures = frame.images if running.claimed.kind in IMAGE_KINDS else None
            self._attempts.finish(
                running, frame.finish_reason, frame.usage, frame.data, pictures or ()
            )

    def _failed(self, frame: Failed) -> None:
        running = self._release(frame.job_id, frame.attempt)
        if running is None or running.settled:
            return
        blame = BLAME.get(frame.code, "worker")
        self._attempts.fail(
            running,
            outcome=frame.code.value,
            blame=blame,
            error=_storable(frame.message),
            retry=frame.retryable and blame != "job",
        )

    def _release(self, job_id: str, attempt: int) -> RunningAttempt | None:
        running = self._current(job_id, attempt)
        if running is not None:
            del self._held[job_id]
            self._stopping.pop(job_id, None)
            self.worker.busy.discard(job_id)
            self._on_idle()
        return running

    def check_progress(self, *, first_token_s: float, stall_s: float) -> None:
        """Fail attempts that have stalled; cut off a worker that does not stop when told."""
        now = time.monotonic()
        for running in list(self._held.values()):
            limit = stall_s if running.chunks else first_token_s
            if running.claimed.kind in IMAGE_KINDS:
                limit = self._image_s
            if not running.settled and now - running.progress_at > limit:
                self._fail(running, "stalled", f"nothing for {limit:.0f} s")
        if any(now - since > STOP_GRACE_S for since in self._stopping.values()):
            self.cut("does not stop jobs when told")

    def cut(self, reason: str, *, blame: str = "worker") -> None:
        """Close the connection from our side; what follows is in `end`."""
        if not self.closed:
            log.warning("worker cut off worker=%s: %s", self.worker.id, reason)
            self.end("cut", blame=blame, error=reason)
            self._closing = asyncio.create_task(self._connection.close(1008, reason))

    def end(
        self,
        outcome: str = "worker_lost",
        *,
        blame: str = "worker",
        error: str = "the connection was lost",
    ) -> None:
        """The connection is gone: give back or settle what the worker held. Twice is harmless."""
        self.closed = True
        if self._sender:
            self._sender.cancel()
        held, self._held = self._held, {}
        for running in held.values():
            self._attempts.fail(running, outcome=outcome, blame=blame, error=error)
        self.worker.busy.clear()


def _storable(text: str) -> str:
    """A worker's text without the one character that PostgreSQL has no place for."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}")


def _items(raw: dict[str, Any]) -> list[tuple[str, int, int, str, int | None]]:
    items = raw.get("items")
    if not isinstance(items, list):
        raise ProtocolViolation("chunks without items")
    for item in items:
        if (
            not isinstance(item, list)
            or len(item) != 5
            or not isinstance(item[0], str)
            or not isinstance(item[1], int)
            or not isinstance(item[2], int)
            or not isinstance(item[3], str)
            or not (item[4] is None or (isinstance(item[4], int) and 0 <= item[4] <= MOST_TOKENS))
        ):
            raise ProtocolViolation("a malformed chunk")
    return items


def answer_fault(
    claimed: Claimed, data: list[list[float]] | None, images: list[Picture] | None
) -> str | None:
    """What is missing from an answer that is not text; None when nothing is."""
    if claimed.kind == Kind.EMBEDDING:
        inputs = len(orjson.loads(claimed.spec)["input"])
        return None if _are_vectors(data, inputs) else "not a vector for each input"
    if claimed.kind in IMAGE_KINDS:
        if not images:
            return "no picture"
        wanted = orjson.loads(claimed.spec).get("response_format")
        if wanted == "b64_json" and images[0].b64_json is None:
            return "where the picture lies, in place of the picture"
    return None


def _are_vectors(data: list[list[float]] | None, count: int) -> bool:
    """Whether an answer has a vector for each input, all of one length."""
    lengths = {len(vector) for vector in data or ()}
    return len(data or ()) == count and len(lengths) == 1 and 0 not in lengths


def _size(delta: dict[str, Any]) -> int:
    return len(orjson.dumps(delta))
