"""A job while a worker has it, and every way in which a job ends.

    begin ─▶ said, said, … ─▶ finish                       succeeded, settled
                          └─▶ cancel                        cancelled, settled as it stands
                          └─▶ fail ─┬─▶ nothing shown: it waits again, in its old place
                                    └─▶ something shown, or too often: failed, the rest refunded

An ending goes one way: `end` writes it, with its transfers, through the batching writer, and only
after the commit tells the readers. While the database is away an ending waits for it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar

import orjson

from router import charging, results
from router.answer_hash import answer_hash
from router.charging import NOTHING, Charge, Delivered
from router.database import BatchingWriter, ConnectionBroke, Database, DatabaseUnavailable
from router.demands import conditions_of
from router.job_records import Claimed, Ended, Ending, GiveBack, NewJob, Resumed
from router.job_states import Event, State
from router.job_stream import JobStream, StreamHub
from router.job_views import Outcome, outcome_of
from router.market import Market
from router.models import Models
from router.reputation import Blame, Reputation
from router.skips import GivenJobs
from router.tally import Tally
from router.workers import Worker
from worker.protocol import TEXT_KINDS, Conditions, FinishReason, Kind, Picture, Usage

log = logging.getLogger(__name__)

T = TypeVar("T")

SETTLE_S = 15.0


@dataclass(slots=True, eq=False)
class RunningAttempt:
    """A job on a worker of this router. `stop` tells the worker to stop; twice is harmless.

    `settled` is set by whoever ends the attempt first; all others then leave it alone.
    """

    claimed: Claimed
    worker: Worker
    stream: JobStream
    stop: Callable[[], None]
    counted: bool = True
    worker_tokens: int = 0
    chunks: int = 0
    began_at: float = field(default_factory=time.monotonic)
    progress_at: float = field(default_factory=time.monotonic)
    first_token_at: datetime | None = None
    settled: bool = False
    conditions: Conditions | None = None

    @property
    def overdue(self) -> str | None:
        """Which of the client's own times is over: `timeout`, `slow`, or none."""
        now, limits = time.monotonic(), self.conditions
        if limits is None:
            return None
        if limits.timeout_s is not None and now - self.began_at > limits.timeout_s:
            return "timeout"
        late = limits.token_s is not None and now - self.progress_at > limits.token_s
        return "slow" if late else None

    def delivered(self, usage: Usage | None = None, *, images: int = 0) -> Delivered:
        """What has reached the router, with the worker's counts where it gave any."""
        bytes_here = self.stream.utf8_bytes
        if usage is not None:
            return Delivered(bytes_here, usage.completion_tokens, usage.prompt_tokens, images)
        counted = self.counted and self.chunks > 0
        return Delivered(bytes_here, self.worker_tokens if counted else None, images=images)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a job ends with: the result in OpenAI's shape, and its usage."""

    result: dict[str, Any]
    usage: dict[str, Any]


class Attempts:
    """The jobs that run on workers of this router."""

    def __init__(
        self,
        database: Database,
        writer: BatchingWriter,
        models: Models,
        market: Market,
        hub: StreamHub,
        *,
        reputation: Reputation,
        max_attempts: int,
        router_id: str,
    ) -> None:
        self._router_id = router_id
        self._database = database
        self._writer = writer
        self._models = models
        self._market = market
        self._hub = hub
        self._max_attempts = max_attempts
        self.reputation = reputation
        self._endings: set[asyncio.Task] = set()
        self.running: dict[str, RunningAttempt] = {}
        self.on_work: Callable[[], None] = lambda: None
        self.on_queued: Callable[[Sequence[NewJob]], None] = lambda jobs: None
        self.on_started: Callable[[Claimed], None] = lambda claimed: None
        self.tally = Tally()
        self.given = GivenJobs()

    def begin(self, claimed: Claimed, worker: Worker, stop: Callable[[], None]) -> RunningAttempt:
        """A claimed job goes to a worker."""
        self._supersede(claimed.job_id)
        stream = self._hub.open(claimed.job_id, State.QUEUED)
        stream.restart(State.RUNNING, claimed.attempt)
        conditions = conditions_of(claimed.spec)
        running = RunningAttempt(claimed, worker, stream, stop, conditions=conditions)
        self.running[claimed.job_id] = running
        self.given.note(self._models.lanes_of(claimed), claimed.model, worker)
        self._market.last_multiplier_milli[claimed.model] = claimed.multiplier_milli
        self._market.touch()
        self.on_started(claimed)
        log.debug(
            "job started job=%s attempt=%d worker=%s", claimed.job_id, claimed.attempt, worker.id
        )
        return running

    def resume(self, resumed: Resumed, worker: Worker, stop: Callable[[], None]) -> RunningAttempt:
        """A worker goes on here with a job that it had; it says again what it has said."""
        claimed = resumed.claimed
        stream = self._hub.get(claimed.job_id)
        seen = stream is not None and stream.attempt == claimed.attempt and stream.shown
        running = self.begin(claimed, worker, stop)
        running.stream.shown = seen or resumed.shown
        running.first_token_at = resumed.first_token_at
        return running

    def moved(self, job_id: str, attempt: int) -> None:
        """The worker of an attempt has gone on with it at another router: here it is over."""
        running = self.running.get(job_id)
        if running is not None and running.claimed.attempt <= attempt:
            self._supersede(job_id)

    def _supersede(self, job_id: str) -> None:
        """The job has ended, or was claimed anew: what still runs of it here runs for nobody."""
        running = self.running.pop(job_id, None)
        if running is not None and not running.settled:
            running.settled = True
            running.stop()

    def said(
        self, running: RunningAttempt, text: str, delta: dict[str, Any] | None, tokens: int | None
    ) -> None:
        """Output of a worker; it goes to the readers at once."""
        if text or delta or tokens:
            # Frames that say nothing do not keep a job alive.
            running.progress_at = time.monotonic()
        running.chunks += 1
        if tokens is None:
            running.counted = False
        else:
            running.worker_tokens += tokens
        if running.first_token_at is None:
            running.first_token_at = datetime.now(UTC)
        running.stream.push(text, delta)

    def finish(
        self,
        running: RunningAttempt,
        reason: FinishReason,
        usage: Usage | None,
        data: list[list[float]] | None,
        images: Sequence[Picture] = (),
    ) -> None:
        """The worker is done; the job's ending is written in the background."""
        if not running.settled:
            running.settled = True
            self._background(self._finish(running, reason, usage, data, images))

    def fail(
        self, running: RunningAttempt, *, outcome: str, blame: str, error: str, retry: bool = True
    ) -> None:
        """The attempt has failed or its worker is lost: the job waits again, or ends.

        `blame` is one of `router.reputation.Blame`; `outcome` and `error` go into the record. A worker
        that is not the first to fail at this job is not blamed: then it was the job.
        """
        if not running.settled:
            running.settled = True
            self._background(self._fail(running, outcome, blame, error, retry))

    def check_deadlines(self) -> None:
        """Called once a second: end what takes longer than its client is ready to wait.

        Over the whole time (`timeout`), the job ends; too long for a token (`ft_timeout`), another
        worker may try (QB-R11). Either was the client's wish, and is no fault of the worker.
        """
        for running in list(self.running.values()):
            overdue = None if running.settled else running.overdue
            if overdue is None:
                continue
            self.fail(
                running,
                outcome=overdue,
                blame="client",
                error="slower than the client was ready to wait",
                retry=overdue == "slow",
            )
            running.stop()

    async def cancel(self, job_id: str, reason: str) -> bool:
        """Stop a job that runs here and settle it as it stands. False: it does not run here."""
        running = self.running.get(job_id)
        if running is None:
            return False
        if running.settled:
            # Somebody else is writing its ending; that one counts.
            while self.running.get(job_id) is running:
                await running.stream.changed()
            return True
        running.settled = True
        running.stop()
        delivered = running.delivered()
        charged = charging.charge(running.claimed, delivered, with_prompt_fee=True)
        answer = self._answer(running, "stop", delivered, charged, None)
        await self._end_running(
            running, Event.CANCEL, reason, charged, answer, "cancelled", Blame.CLIENT
        )
        return True

    def cancel_later(self, job_id: str, reason: str) -> None:
        """Stop a job if it runs here, for somebody who learns of it from the database."""
        if job_id in self.running:
            self._background(self._cancel(job_id, reason))

    async def _cancel(self, job_id: str, reason: str) -> None:
        await self.cancel(job_id, reason)

    async def _finish(
        self,
        running: RunningAttempt,
        reason: FinishReason,
        usage: Usage | None,
        data: list[list[float]] | None,
        images: Sequence[Picture],
    ) -> None:
        delivered = running.delivered(usage, images=len(images))
        if self._may_be_broken(running, delivered):
            await self._fail(running, "empty", Blame.WORKER, "an answer without a word", True)
            return
        charged = charging.charge(running.claimed, delivered, with_prompt_fee=True)
        answer = self._answer(running, reason.value, delivered, charged, data, images)
        seconds = time.monotonic() - running.began_at
        await self._end_running(running, Event.FINISH, reason.value, charged, answer, "succeeded")
        running.worker.succeeded(
            running.claimed.model,
            tokens=delivered.worker_tokens or charged.output_tokens,
            seconds=seconds,
        )
        if running.claimed.kind in TEXT_KINDS:
            await self._judge(running, reason, delivered, seconds)

    def _may_be_broken(self, running: RunningAttempt, delivered: Delivered) -> bool:
        """Whether an answer without a word is to be asked for again, of somebody else.

        Models do say nothing at times: it is believed when nobody else could be asked, when another
        said nothing either, and where a stop string may have cut off the first word.
        """
        claimed = running.claimed
        if claimed.kind not in TEXT_KINDS or delivered.utf8_bytes or claimed.attempt > 1:
            return False
        others = any(
            worker.id != running.worker.id
            for lane in self._models.lanes_of(claimed)
            for worker in self._models.fleet.draining_lane(lane)
        )
        return others and not orjson.loads(claimed.spec).get("stop")

    async def _judge(
        self, running: RunningAttempt, reason: FinishReason, delivered: Delivered, seconds: float
    ) -> None:
        claimed = running.claimed
        if not delivered.utf8_bytes and claimed.attempt > 1:
            # The second to say nothing: so there is nothing to be said.
            await self._after_outage(self.reputation.shift, claimed.job_id)
        self.reputation.answered(
            running.worker,
            claimed,
            reason=reason.value,
            tokens=delivered.worker_tokens,
            utf8_bytes=delivered.utf8_bytes,
            prompt_tokens=delivered.worker_prompt_tokens or claimed.prompt_tokens,
            seconds=seconds,
        )

    async def _fail(
        self, running: RunningAttempt, outcome: str, blame: str, error: str, retry: bool
    ) -> None:
        claimed = running.claimed
        log.warning(
            "attempt failed job=%s attempt=%d worker=%s outcome=%s blame=%s",
            claimed.job_id,
            claimed.attempt,
            claimed.worker_id,
            outcome,
            blame,
        )
        of_the_job = blame == Blame.JOB
        if blame == Blame.WORKER and await self._after_outage(self.reputation.shifted, claimed):
            blame = Blame.JOB
        if blame == Blame.WORKER:
            self.reputation.fault(running.worker, claimed, outcome)
        shown = running.stream.shown and running.stream.length > 0
        if shown:
            delivered = running.delivered()
            charged = charging.charge(claimed, delivered, with_prompt_fee=False)
            answer = self._answer(running, None, delivered, charged, None)
            reason = outcome if outcome == "timeout" else "worker_lost"
            await self._end_running(
                running, Event.FAIL, reason, charged, answer, outcome, blame, error
            )
        elif retry and claimed.attempt < self._max_attempts:
            await self._give_back(running, outcome, blame, error)
        else:
            last = claimed.attempt >= self._max_attempts
            failed = "attempts_exhausted" if last else "worker_failed"
            ends_it = of_the_job or outcome == "timeout"
            reason = outcome if ends_it else failed
            await self._end_running(
                running, Event.FAIL, reason, NOTHING, None, outcome, blame, error
            )
        if blame == Blame.JOB:
            self.reputation.forgive(claimed.job_id)

    def _answer(
        self,
        running: RunningAttempt,
        finish_reason: str | None,
        delivered: Delivered,
        charged: Charge,
        data: list[list[float]] | None,
        images: Sequence[Picture] = (),
    ) -> Answer:
        claimed = running.claimed
        usage = charging.usage(claimed, delivered, charged)
        result = results.result(
            Kind(claimed.kind),
            job_id=claimed.job_id,
            model=claimed.model,
            created_s=int(claimed.started_at.timestamp()),
            text=running.stream.text(),
            deltas=running.stream.all_deltas(),
            data=data,
            images=[_shown_as_asked(claimed, picture) for picture in images],
            finish_reason=finish_reason,
            usage=usage,
        )
        return Answer(result, usage)

    async def _end_running(
        self,
        running: RunningAttempt,
        event: Event,
        reason: str,
        charged: Charge,
        answer: Answer | None,
        outcome: str,
        blame: str | None = None,
        error: str | None = None,
    ) -> None:
        ending = Ending(
            running.claimed.job_id,
            event,
            reason,
            attempt=running.claimed.attempt,
            charge_msat=charged.charge_msat,
            payee=running.worker.id if running.worker.payable else None,
            result=orjson.dumps(answer.result).decode() if answer else None,
            usage=orjson.dumps(answer.usage).decode() if answer else None,
            answer_hash=answer_hash(answer.result) if answer else None,
            first_token_at=running.first_token_at,
            outcome=outcome,
            blame=blame,
            error=error,
            tokens=running.worker_tokens,
            had_chunks=running.stream.kept > 0,
            router_id=self._router_id,
            claimed=running.claimed,
        )
        running.stream.ending_since = time.monotonic()
        await self.end(ending, running, answer)

    async def _give_back(
        self, running: RunningAttempt, outcome: str, blame: str, error: str
    ) -> None:
        await self.give_back(running.claimed, outcome, blame, error, at=self._router_id)
        self._forget(running)
        self.on_work()

    async def give_back(
        self, claimed: Claimed, outcome: str, blame: str, error: str, *, at: str
    ) -> None:
        """Let a job wait again whose attempt came to nothing; it keeps its place. `at`: the router
        that ran it."""
        lane, *more = self._models.lanes_of(claimed)
        back = GiveBack(
            claimed.job_id,
            claimed.attempt,
            lane,
            outcome,
            blame,
            error,
            more_lanes=tuple(more),
            router_id=at,
        )
        if await self._certainly("give_back", back):
            stream = self._hub.get(claimed.job_id)
            if stream is not None and stream.outcome is None:
                stream.restart(State.QUEUED, claimed.attempt)

    async def end(
        self,
        ending: Ending,
        running: RunningAttempt | None = None,
        answer: Answer | None = None,
    ) -> None:
        """Write an ending and tell the readers; nothing happens to a job that is not in a state
        for it, except that its readers are told how it ended before."""
        kind = "cancel" if ending.attempt is None else "end"
        try:
            ended, unsure = await self._written(kind, ending)
            if ended is not None:
                self.tally.count(ending, ended)
                self.tell_ended(ending.job_id, _outcome(ending, ended, running, answer))
                return
            row = await self._row(ending.job_id)
            before = outcome_of(row) if row is not None else None
            if before is not None:
                if unsure:
                    self.tally.count_found(ending, row)
                self.tell_ended(ending.job_id, before)
        finally:
            # Whatever happened, its lease is not renewed any more: what is not ended will be lost.
            if running is not None:
                self._forget(running)
                running.stream.wake()

    def tell_ended(self, job_id: str, outcome: Outcome) -> None:
        """Give a committed outcome to whoever reads this job here."""
        self._supersede(job_id)
        self._market.touch()
        log.info(
            "job ended job=%s state=%s reason=%s worker=%s charged_msat=%d refunded_msat=%d",
            job_id,
            outcome.state.value,
            outcome.end_reason,
            outcome.worker_id,
            outcome.charged_msat,
            outcome.refunded_msat,
        )
        stream = self._hub.get(job_id)
        if stream is not None and stream.outcome is None:
            stream.end(outcome)
            if not stream.readers:
                self._hub.drop(job_id)

    def tell_unpaid(self, job_id: str) -> None:
        """Tell the readers of a job that its quote was not paid in time; the caller has committed."""
        self.tell_ended(job_id, Outcome(State.EXPIRED, "quote_expired", 0, 0))

    async def settle_all(self, *, timeout_s: float = SETTLE_S) -> None:
        """Wait until all endings under way are written, but not for ever for a database: what is not
        written is lost with this process, and taken back at the next start."""
        until = time.monotonic() + timeout_s
        while self._endings and (left_s := until - time.monotonic()) > 0:
            await asyncio.wait(set(self._endings), timeout=left_s)

    def _background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._endings.add(task)
        task.add_done_callback(self._ending_done)

    def _ending_done(self, task: asyncio.Task) -> None:
        self._endings.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("an ending could not be written", exc_info=task.exception())

    async def _row(self, job_id: str) -> Any:
        async def read() -> Any:
            async with self._database.connection() as connection:
                return await connection.fetchrow("select * from jobs where id = $1", job_id)

        return await self._after_outage(read)

    async def _after_outage(self, ask: Callable[..., Awaitable[T]], *about: Any) -> T:
        """What the database answers, however long it is away."""
        while True:
            try:
                return await ask(*about)
            except DatabaseUnavailable:
                await asyncio.sleep(0.5)

    async def _certainly(self, kind: str, row: Any) -> Any:
        """Write until it is known to be written; the guards make a second time harmless."""
        result, _ = await self._written(kind, row)
        return result

    async def _written(self, kind: str, row: Any) -> tuple[Any, bool]:
        """The same, and whether a time before the last may have been the one that did it."""
        pause_s, unsure = 0.05, False
        while True:
            try:
                return await self._writer.write(kind, row), unsure
            except DatabaseUnavailable as error:
                unsure = unsure or isinstance(error, ConnectionBroke)
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, 2)

    def _forget(self, running: RunningAttempt) -> None:
        running.worker.freed_at = time.monotonic()
        if self.running.get(running.claimed.job_id) is running:
            del self.running[running.claimed.job_id]


def _shown_as_asked(claimed: Claimed, picture: Picture) -> dict[str, Any]:
    """A picture with the URL that was asked for: nothing is kept here for anybody to fetch, so one
    that came as data goes out as a data URL."""
    shown = picture.model_dump()
    if orjson.loads(claimed.spec).get("response_format") == "url":
        shown["url"] = picture.url or f"data:{_media_type(picture)};base64,{picture.b64_json}"
        shown["b64_json"] = None
    return shown


def _media_type(picture: Picture) -> str:
    # The first bytes of the three formats that engines write, in base64.
    head = picture.b64_json or ""
    if head.startswith("/9j/"):
        return "image/jpeg"
    return "image/webp" if head.startswith("UklGR") else "image/png"


def _outcome(
    ending: Ending, ended: Ended, running: RunningAttempt | None, answer: Answer | None
) -> Outcome:
    return Outcome(
        state=ended.state,
        end_reason=ending.end_reason,
        held_msat=ended.held_msat,
        charged_msat=ended.charged_msat,
        worker_id=running.claimed.worker_id if running else None,
        usage=answer.usage if answer else None,
        result=answer.result if answer else None,
    )
