"""Workers that ask for jobs and bring answers, over HTTP (KC-5…KC-7, AH-7…AH-10).

    pop ──▶ held ── submit ok ──▶ answered        an answer; "" is one (E3-33)
             │ ─── submit faulted ──▶ faulted      the job waits again, once (E3-34)
             │ ─── ttl over ──▶ aborted            the same; nothing came, as KoboldCpp does (KP-6)
             └ ─── cancelled by its payer          settled; the worker's answer is taken and not used

Each job that is handed out gets an id of its own, a secret like those of the doors' clients: whoever
submits by it must also be the owner of the worker. It says which router holds the job, for the others
(`router.pull_submits`). A worker without a sign of life for five minutes has
left (KC-8, AH-34).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from router.attempts import Attempts, RunningAttempt
from router.job_records import Claimed
from router.job_states import State
from router.workers import Worker
from worker.errors import JobError
from worker.kobold_prompt import ChatTemplate, chat_prompt
from worker.protocol import JOB_SPEC, ChatSpec, CompletionSpec, FinishReason, JobSpec

# AH-33, AH-34, KC-8.
STALE_S = 300.0
# How long an id is remembered that was answered or aborted, and how many.
REMEMBERED_S = 3600.0
MOST_REMEMBERED = 100_000
# As for every worker: more than this is no answer to what was asked.
_BYTES_PER_TOKEN, _BYTES_SPARE = 64, 65_536
# A worker that asks is idle, whatever it has: KoboldCpp drops what failed without a word (KP-6), and
# several of its threads may ask by one name. So many jobs beyond its threads is it given.
MORE_JOBS = 8
# How long a worker waits to hear what it has earned.
SETTLE_S = 10.0
# Of an id's 128 bits: 74 that nobody can guess (and what makes it a UUID), then those of its router.
_RANDOM_BYTES = 10


class End(StrEnum):
    """What became of a job that was handed out."""

    ANSWERED = "answered"
    FAULTED = "faulted"
    ABORTED = "aborted"


@dataclass(slots=True, eq=False)
class Held:
    """A job that a worker has. `unwanted`: it was cancelled meanwhile."""

    id: str
    session: PullSession
    running: RunningAttempt
    prompt: str
    stops: list[str]
    cut_at_stops: bool
    popped_at: float = field(default_factory=time.monotonic)
    unwanted: bool = False


class HandedOut:
    """All jobs that pull workers of this router have, and what became of those they had."""

    def __init__(self, router_id: str) -> None:
        self._mark = _mark(router_id)
        self._held: dict[str, Held] = {}
        self._ended: OrderedDict[str, tuple[float, End]] = OrderedDict()

    def new_id(self) -> str:
        """An id that this router can be found by; the rest of it is random."""
        return str(uuid.UUID(bytes=uuid.uuid4().bytes[:_RANDOM_BYTES] + self._mark))

    def add(self, held: Held) -> None:
        self._held[held.id] = held

    def get(self, given_id: str) -> Held | None:
        return self._held.get(given_id)

    def end(self, held: Held, end: End) -> bool:
        """Whoever ends it first does; False for all others (E3-34)."""
        if self._held.pop(held.id, None) is None:
            return False
        now = time.monotonic()
        self._ended[held.id] = (now, end)
        while self._ended and (
            len(self._ended) > MOST_REMEMBERED
            or next(iter(self._ended.values()))[0] < now - REMEMBERED_S
        ):
            self._ended.popitem(last=False)
        return True

    def ended(self, given_id: str) -> End | None:
        """How a job ended that was handed out by this id; None: no such id, or long ago."""
        known = self._ended.get(given_id)
        return known[1] if known else None


@dataclass(frozen=True, slots=True)
class Rendered:
    """A job as a prompt. `cut`: stop strings are not part of the answer, as everywhere but at the
    doors of these dialects, whose clients cut for themselves."""

    spec: CompletionSpec
    prompt: str
    stops: list[str]
    cut: bool


def rendered(spec: JobSpec) -> Rendered | None:
    """A job for a worker that takes nothing but a prompt; None for what cannot be said so."""
    if isinstance(spec, CompletionSpec):
        if not isinstance(spec.prompt, str) or spec.suffix or spec.echo:
            return None
        return Rendered(spec, spec.prompt, list(spec.stop), cut=spec.kobold is None)
    if not isinstance(spec, ChatSpec):
        return None
    if spec.tools or (spec.response_format or {}).get("type", "text") != "text":
        return None
    try:
        prompt, more = chat_prompt(spec.messages, ChatTemplate.ALPACA)
    except JobError:
        return None
    plain = CompletionSpec(
        model=spec.model,
        prompt=prompt,
        max_tokens=spec.max_tokens,
        stop=spec.stop,
        sampling=spec.sampling,
    )
    return Rendered(plain, prompt, [*spec.stop, *more], cut=True)


def context_asked(spec: JobSpec) -> int:
    """The context that a client of these dialects wants its worker to have; 0: it did not say."""
    carried = spec.kobold if isinstance(spec, CompletionSpec) else None
    return (carried or {}).get("max_context_length") or 0


class PullSession:
    """One worker that polls. `owner_hash` is of the secret that it shows each time."""

    def __init__(
        self,
        worker: Worker,
        attempts: Attempts,
        handed_out: HandedOut,
        *,
        owner_hash: bytes,
        ttl_s: float,
        on_idle: Callable[[], None],
        on_gone: Callable[[PullSession], None],
    ) -> None:
        self.worker = worker
        self.owner_hash = owner_hash
        self._attempts = attempts
        self._handed_out = handed_out
        self._ttl_s = ttl_s
        self._on_idle = on_idle
        self._on_gone = on_gone
        self._mine: dict[str, Held] = {}
        self.seen_at = time.monotonic()
        self.kept_at = float("-inf")
        self.offered: Any = None
        self.asked_too_much = 0
        self.closed = False
        self.is_new = True
        self.dropped_frames = 0

    def context_length(self) -> int:
        return max(model.context_length for model in self.worker.models)

    def make_room(self) -> None:
        """It asks for a job: it gets one although it has as many as it has threads."""
        has = len(self.worker.busy)
        self.worker.slots = max(
            self.offered.threads, min(has + 1, self.offered.threads + MORE_JOBS)
        )

    def suits(self, spec_json: str) -> bool:
        """Whether a job that fits its lanes can be given to it: one that can be said as a prompt,
        for a client that asked for no more context than it has (KC-6, E3-31)."""
        if not spec_json:
            return False
        spec = JOB_SPEC.validate_json(spec_json)
        if context_asked(spec) > self.context_length():
            self.asked_too_much += 1
            return False
        return rendered(spec) is not None

    def seen(self) -> None:
        self.seen_at = time.monotonic()

    def assign(self, claimed: Claimed) -> None:
        self.take(claimed)

    def take(self, claimed: Claimed) -> Held | None:
        """Begin a claimed job; None when it cannot be had, and then it waits again."""
        running = self._attempts.begin(claimed, self.worker, lambda: self._stop(claimed.job_id))
        job = rendered(JOB_SPEC.validate_json(claimed.spec))
        if self.closed or job is None:
            self.worker.busy.discard(claimed.job_id)
            self._attempts.fail(
                running, outcome="worker_lost", blame="nobody", error="gone before it was sent"
            )
            return None
        held = Held(self._handed_out.new_id(), self, running, job.prompt, job.stops, job.cut)
        self._mine[held.id] = held
        self._handed_out.add(held)
        return held

    def _stop(self, job_id: str) -> None:
        # It cannot be told. Its slot is free again when it has answered, or its time is over.
        for held in self._mine.values():
            if held.running.claimed.job_id == job_id:
                held.unwanted = True

    async def answered(self, held: Held, text: str) -> int | None:
        """The worker brings an answer; what it earned in msat, None for one that came too late.

        Returns when the answer is in the books, or after a while.
        """
        if not self._release(held, End.ANSWERED):
            return None
        running = held.running
        if held.unwanted or running.settled:
            return 0
        most_bytes = running.claimed.max_tokens * _BYTES_PER_TOKEN + _BYTES_SPARE
        if len(text.encode("utf-8", "replace")) > most_bytes:
            self._attempts.fail(
                running,
                outcome="too_much_output",
                blame="worker",
                error=f"more than {most_bytes} bytes",
            )
            return 0
        text = _cut(text, held.stops) if held.cut_at_stops else text
        if text:
            self._attempts.said(running, text, None, None)
        self._attempts.finish(running, FinishReason.STOP, None, None)
        return await self._earned_msat(running)

    async def _earned_msat(self, running: RunningAttempt) -> int:
        stream = running.stream
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SETTLE_S):
                # One without a word may be asked again, of somebody else.
                while stream.outcome is None and stream.state is State.RUNNING:
                    await stream.changed()
        if stream.outcome is None:
            return 0
        charged_msat = stream.outcome.charged_msat
        return charged_msat - charged_msat * running.claimed.commission_ppm // 1_000_000

    def faulted(self, held: Held, why: str) -> bool:
        """The worker says that it failed; the job waits again, once, whatever it says later."""
        if not self._release(held, End.FAULTED):
            return False
        self._attempts.fail(held.running, outcome="faulted", blame="worker", error=why)
        return True

    def _release(self, held: Held, end: End) -> bool:
        if not self._handed_out.end(held, end):
            return False
        self._mine.pop(held.id, None)
        self.worker.busy.discard(held.running.claimed.job_id)
        self.worker.slots = max(self.offered.threads, len(self.worker.busy))
        self._on_idle()
        return True

    def drain(self) -> None:
        self.worker.draining = True

    def check_progress(self, *, first_token_s: float, stall_s: float) -> None:
        """Take back what is over its time; leave when nothing was heard for long.

        Its own times hold here: it says nothing until it has the whole answer.
        """
        now = time.monotonic()
        for held in list(self._mine.values()):
            if now - held.popped_at > self._ttl_s and self._release(held, End.ABORTED):
                self._attempts.fail(
                    held.running,
                    outcome="ttl",
                    blame="worker",
                    error=f"no answer within {self._ttl_s:.0f} s",
                )
        if now - self.seen_at > STALE_S and not self._mine:
            self._on_gone(self)

    def cut(self, reason: str, *, blame: str = "worker") -> None:
        self.end("cut", blame=blame, error=reason)
        self._on_gone(self)

    def end(
        self,
        outcome: str = "worker_lost",
        *,
        blame: str = "worker",
        error: str = "the connection was lost",
    ) -> None:
        self.closed = True
        for held in list(self._mine.values()):
            if self._release(held, End.ABORTED):
                self._attempts.fail(held.running, outcome=outcome, blame=blame, error=error)


def _cut(text: str, stops: list[str]) -> str:
    ends = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text


def router_of(given_id: str, routers: Iterable[str]) -> str | None:
    """Which of these routers has handed a job out by this id; None: none of them, or it is no id."""
    try:
        mark = uuid.UUID(given_id).bytes[_RANDOM_BYTES:]
    except ValueError:
        return None
    return next((router_id for router_id in routers if _mark(router_id) == mark), None)


def _mark(router_id: str) -> bytes:
    return hashlib.sha256(b"satherd-router\0" + router_id.encode()).digest()[: 16 - _RANDOM_BYTES]


def storable(text: str) -> str:
    """Without what PostgreSQL and UTF-8 have no place for."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode()
