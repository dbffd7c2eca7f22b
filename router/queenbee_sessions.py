"""The router's half of QueenBee's worker protocol (QB-P10…P18).

An answer carries no job id and a job cannot be cancelled, so a socket has one job at a time, and what
comes is that job's until its terminal frame:

    idle ── assign ─▶ working ── terminal frame ─▶ idle
                         │ timed out, cancelled, or ended by us
                         ▼
                      draining ── terminal frame ─▶ idle        frames are dropped and counted

Terminal is, of a stream, `{}` or an error, and otherwise the one frame there is (QB-P12, P13, P17).
Such a worker takes any frame for a job, and is sent nothing else (RC-5).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import orjson

from router.attempts import Attempts, RunningAttempt
from router.job_records import Claimed
from router.openai_calls import (
    BadAnswer,
    ServerError,
    error_of,
    pictures,
    piece,
    request_for,
    usage_of,
    vectors,
)
from router.queenbee import QueenBeeRegistration, own_name
from router.worker_sessions import BLAME, Connection, ProtocolViolation, answer_fault
from router.workers import Worker
from worker.protocol import (
    IMAGE_KINDS,
    JOB_SPEC,
    TEXT_KINDS,
    EmbeddingSpec,
    FailureCode,
    FinishReason,
    JobSpec,
    Usage,
)

log = logging.getLogger(__name__)

# `websockets` 11 closes on a frame of 1 MiB and more (QB-P2).
MOST_FRAME_BYTES = 1_000_000
# The first job on a model fetches and loads it, deaf meanwhile (QB-P21, QB-P23).
LOAD_S = 600.0
# No live worker is slower at an answer that comes in one piece.
SLOWEST_TOKENS_PER_S = 2.0
# After `finish_reason`: the `{}` follows at once, but web workers are not known to send it.
END_S = 5.0
# How long an answer that nobody wants may still be computed.
ABANDONED_S = 900.0
# A worker that answers "busy" is left alone for so long (QB-R10).
BUSY_S = 30.0
_BYTES_PER_TOKEN = 64
_BYTES_SPARE = 65_536


@dataclass(slots=True)
class _Job:
    """What the worker is doing, as far as it was told."""

    running: RunningAttempt
    spec: JobSpec
    sent_at: float
    reason: FinishReason | None = None
    usage: Usage | None = None
    ended_at: float | None = None
    left_at: float | None = None

    @property
    def id(self) -> str:
        return self.running.claimed.job_id


class QueenBeeSession:
    """One connected QueenBee worker."""

    def __init__(
        self,
        worker: Worker,
        connection: Connection,
        attempts: Attempts,
        registration: QueenBeeRegistration,
        *,
        image_s: float,
        on_idle: Callable[[], None],
    ) -> None:
        self.worker = worker
        self._image_s = image_s
        self._connection = connection
        self._attempts = attempts
        self._registration = registration
        self._on_idle = on_idle
        self._job: _Job | None = None
        self._tasks: set[asyncio.Task] = set()
        self._loaded: str | None = None
        self._rests_until: float | None = None
        # An end of stream that we did not wait for may still come (E1-7).
        self._end_owed = False
        self.closed = False
        self.dropped_frames = 0

    def assign(self, claimed: Claimed) -> None:
        """Give a claimed job to the worker."""
        running = self._attempts.begin(claimed, self.worker, lambda: self._leave(claimed.job_id))
        if self.closed or self._job is not None:
            # Not its slot any more: whatever holds the worker busy has another id.
            self.worker.busy.discard(claimed.job_id)
            self._attempts.fail(
                running, outcome="worker_lost", blame="nobody", error="gone before the job was sent"
            )
            return
        spec = JOB_SPEC.validate_json(claimed.spec)
        path, body = request_for(spec, own_name(self._registration, claimed.model))
        frame = orjson.dumps({"openai_url": path, "openai_req": body})
        if len(frame) >= MOST_FRAME_BYTES:
            self.worker.busy.discard(claimed.job_id)
            self._attempts.fail(
                running,
                outcome="too_large_for_worker",
                blame="nobody",
                error=f"a request of {len(frame)} bytes",
            )
            self._on_idle()
            return
        self._job = _Job(running, spec, time.monotonic())
        self._spawn(self._send(frame.decode()))

    async def _send(self, text: str) -> None:
        try:
            await self._connection.send_text(text)
        except Exception as error:
            # The reading side sees the same end, and cleans up.
            log.info("worker not reachable worker=%s: %r", self.worker.id, error)

    def _leave(self, job_id: str) -> None:
        """The job was cancelled or taken away: what still comes of it is for nobody."""
        if self._job is not None and self._job.id == job_id and self._job.left_at is None:
            self._job.left_at = time.monotonic()

    def drain(self) -> None:
        """Give it no more jobs; it cannot be told."""
        self.worker.draining = True

    def on_frame(self, text: str | bytes) -> None:
        """Handle a frame of the worker. Raises ProtocolViolation."""
        try:
            # Early workers ended a stream with an empty message.
            frame = orjson.loads(text) if text else {}
        except orjson.JSONDecodeError as error:
            raise ProtocolViolation("not JSON") from error
        if not isinstance(frame, dict):
            raise ProtocolViolation("not an object")
        job = self._job
        if frame.keys() == {"busy"}:
            self._rest(None if frame["busy"] else 0.0)
        elif job is None:
            self.dropped_frames += 1
            self._end_owed = self._end_owed and bool(frame)
        elif job.running.settled:
            self.dropped_frames += 1
            if not job.spec.stream or not frame or frame.get("error"):
                self._free(job)
        else:
            self._take(job, frame)

    def _take(self, job: _Job, frame: dict[str, Any]) -> None:
        error = error_of(frame)
        if error is not None:
            self._failed(job, error)
        elif not job.spec.stream:
            self._answer(job, frame)
        elif frame:
            self._chunk(job, frame)
        elif self._end_owed and job.running.chunks == 0 and job.ended_at is None:
            # The `{}` of the stream before, which took its time.
            self._end_owed = False
            self.dropped_frames += 1
        else:
            self._finish(job)

    def _failed(self, job: _Job, error: ServerError) -> None:
        code, blame = error.code, BLAME.get(error.code, "worker")
        if code is FailureCode.OVERLOADED:
            blame = "nobody"
            self._rest(BUSY_S)
        elif "gguf" in error.message.lower():
            # No such model, or several that fit the name: nobody else would find it (QB-R11, P23).
            code, blame = FailureCode.MODEL_NOT_SERVED, "job"
        self._attempts.fail(
            job.running,
            outcome=code.value,
            blame=blame,
            error=error.message.replace("\0", ""),
            retry=blame != "job",
        )
        self._free(job)

    def _answer(self, job: _Job, frame: dict[str, Any]) -> None:
        """The one frame of an answer that does not stream."""
        claimed = job.running.claimed
        self._loaded = claimed.model
        try:
            if claimed.kind in TEXT_KINDS:
                said = piece(frame)
                self._say(job, said.text, said.delta)
                job.reason, job.usage = said.finish_reason, said.usage
                self._finish(job)
                return
            data = vectors(frame) if isinstance(job.spec, EmbeddingSpec) else None
            images = pictures(frame) if claimed.kind in IMAGE_KINDS else []
            if fault := answer_fault(claimed, data, images):
                raise BadAnswer(fault)
        except BadAnswer as error:
            self._fail(job, "bad_answer", str(error))
        else:
            usage = usage_of(frame.get("usage"))
            self._attempts.finish(job.running, FinishReason.STOP, usage, data, images)
        self._free(job)

    def _chunk(self, job: _Job, frame: dict[str, Any]) -> None:
        try:
            said = piece(frame)
        except BadAnswer as error:
            self._fail(job, "bad_answer", str(error))
            return
        self._loaded = job.running.claimed.model
        job.usage = said.usage or job.usage
        if said.finish_reason is not None:
            job.reason, job.ended_at = said.finish_reason, time.monotonic()
        self._say(job, said.text, said.delta)

    def _say(self, job: _Job, text: str, delta: dict[str, Any] | None) -> None:
        if not text and not delta:
            # The role alone says nothing, but it says that the worker is at it.
            job.running.progress_at = time.monotonic()
            return
        # Workers give no counts in a stream: what is charged is counted here (E1-3).
        self._attempts.said(
            job.running, text.replace("\0", "\N{REPLACEMENT CHARACTER}"), delta, None
        )
        most = job.running.claimed.max_tokens * _BYTES_PER_TOKEN + _BYTES_SPARE
        if job.running.stream.utf8_bytes > most:
            self._fail(job, "too_much_output", f"more than {most} bytes")

    def _finish(self, job: _Job) -> None:
        self._attempts.finish(job.running, job.reason or FinishReason.STOP, job.usage, None)
        self._free(job)

    def _fail(self, job: _Job, outcome: str, error: str, *, blame: str = "worker") -> None:
        """Fail the attempt; the worker goes on with it, and is not free before it has ended."""
        self._attempts.fail(job.running, outcome=outcome, blame=blame, error=error)
        self._leave(job.id)

    def _free(self, job: _Job) -> None:
        self._job = None
        self.worker.busy.discard(job.id)
        self._on_idle()

    def _rest(self, for_s: float | None) -> None:
        """No jobs for a while; None: until it says that it is not busy any more (QB-P18)."""
        self.worker.resting = for_s != 0
        self._rests_until = time.monotonic() + for_s if for_s else None
        self._on_idle()

    def check_progress(self, *, first_token_s: float, stall_s: float) -> None:
        """Fail what has stalled, end what has ended without a sign, wake who has rested."""
        now = time.monotonic()
        if self._rests_until is not None and now > self._rests_until:
            self._rest(0.0)
        job = self._job
        if job is None:
            return
        if job.running.settled:
            job.left_at = job.left_at or now
            if now - job.left_at > ABANDONED_S:
                self.cut("does not end a job that was given up")
        elif job.ended_at is not None:
            if now - job.ended_at > END_S:
                self._end_owed = True
                self._finish(job)
        elif now - job.running.progress_at > (limit := self._patience(job, first_token_s, stall_s)):
            self._fail(job, "stalled", f"nothing for {limit:.0f} s")

    def _patience(self, job: _Job, first_token_s: float, stall_s: float) -> float:
        if job.running.chunks:
            return stall_s
        claimed = job.running.claimed
        if claimed.kind in IMAGE_KINDS:
            return max(LOAD_S, self._image_s)
        start_s = first_token_s if claimed.model == self._loaded else max(LOAD_S, first_token_s)
        return start_s if job.spec.stream else start_s + claimed.max_tokens / SLOWEST_TOKENS_PER_S

    def cut(self, reason: str, *, blame: str = "worker") -> None:
        """Close the connection from our side; what follows is in `end`."""
        if not self.closed:
            log.warning("worker cut off worker=%s: %s", self.worker.id, reason)
            self.end("cut", blame=blame, error=reason)
            self._spawn(self._connection.close(1008, reason))

    def end(
        self,
        outcome: str = "worker_lost",
        *,
        blame: str = "worker",
        error: str = "the connection was lost",
    ) -> None:
        """The connection is gone: give back or settle what the worker held. Twice is harmless."""
        self.closed = True
        job, self._job = self._job, None
        if job is not None:
            self._attempts.fail(job.running, outcome=outcome, blame=blame, error=error)
        self.worker.busy.clear()

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
