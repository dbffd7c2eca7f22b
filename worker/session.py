"""One connection to the router, from registration to goodbye.

    connected ── registration ──> registered ── drain, or shutdown ──> draining ──> closed
                     └── refused (closed)          a broken line: closed from anywhere

While registered, every `assign` becomes an `Attempt` that the engine works on. When the line
breaks, the engine goes on, and the next session asks whether that is still wanted
(`worker.holding`). When the worker shuts down, it finishes what it can within the grace time and
returns the rest. The same when its engine has gone: no worker is better than one that fails every
job.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import traceback
from collections.abc import Callable, Coroutine
from typing import Any

from pydantic import BaseModel, ValidationError

from worker.attempts import Attempt
from worker.connection import Connection, ConnectionLost
from worker.engines import Engine
from worker.errors import EngineAway, EngineDied, JobError, RegistrationRefused
from worker.holding import Holding
from worker.outbox import Outbox
from worker.protocol import (
    MODEL_KIND,
    ROUTER_FRAME,
    Assign,
    Cancel,
    Drain,
    FailureCode,
    Refused,
    Registered,
    Registration,
)
from worker.shutdown import Shutdown

log = logging.getLogger("worker.session")

ANSWER_TIMEOUT_S = 30
FLUSH_TIMEOUT_S = 5
SHOWN_OF_AN_ID = 8


class _JobHead(BaseModel):
    """What can be read of an assignment whose job cannot."""

    job_id: str
    attempt: int


class Session:
    """Serves one connection. Make a new one for the next."""

    def __init__(
        self,
        engine: Engine,
        registration: Registration,
        shutdown: Shutdown,
        *,
        holding: Holding,
        grace_s: float,
        on_registered: Callable[[Registered], object],
    ) -> None:
        self._engine = engine
        self._registration = registration
        self._holding = holding
        self._shutdown = shutdown
        self._grace_s = grace_s
        self._on_registered = on_registered
        self._outbox = Outbox()
        self._draining = False
        self._engine_suspected = asyncio.Event()

    async def run(self, connection: Connection) -> None:
        """Register and serve until shutdown.

        Raises ConnectionLost, RegistrationRefused, and EngineAway or EngineDied: a worker whose
        engine has gone hangs up, so that no more jobs come to it only to fail.
        """
        try:
            answer = await self._register(connection)
            self._holding.on_end = self._end
            resumed = await self._holding.resume(
                answer.resume, self._outbox, within_s=FLUSH_TIMEOUT_S
            )
            if resumed:
                log.info("going on with %d jobs", resumed)
            self._on_registered(answer)
            self._say_ready()
            await self._serve(connection)
        finally:
            with contextlib.suppress(ConnectionLost, TimeoutError):
                await asyncio.wait_for(connection.close(), FLUSH_TIMEOUT_S)

    async def _serve(self, connection: Connection) -> None:
        parts = [
            asyncio.ensure_future(part)
            for part in (
                self._read(connection),
                self._write(connection),
                self._leave(),
                self._watch_engine(),
            )
        ]
        try:
            done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            for part in done:
                part.result()
        finally:
            for part in parts:
                part.cancel()
            await asyncio.gather(*parts, return_exceptions=True)

    async def _register(self, connection: Connection) -> Registered:
        asking = self._registration.model_copy(update={"holding": self._holding.named()})
        await connection.send(asking.model_dump_json(exclude_none=True).encode())
        try:
            answer = ROUTER_FRAME.validate_json(
                await asyncio.wait_for(connection.receive(), ANSWER_TIMEOUT_S)
            )
        except TimeoutError as error:
            raise ConnectionLost("no answer to the registration") from error
        except ValidationError as error:
            raise ConnectionLost("the answer to the registration is not one") from error
        match answer:
            case Registered():
                return answer
            case Refused(retryable=False):
                raise RegistrationRefused(answer.code, answer.message)
            case Refused():
                raise ConnectionLost(f"refused for now ({answer.code}): {answer.message}")
            case _:
                raise ConnectionLost("the router's first frame is no answer to the registration")

    # --- reading ---------------------------------------------------------------------------------

    async def _read(self, connection: Connection) -> None:
        while True:
            text = await connection.receive()
            try:
                frame = ROUTER_FRAME.validate_json(text)
            except ValidationError:
                self._refuse_unreadable(text)
                continue
            match frame:
                case Assign():
                    self._assign(frame)
                case Cancel():
                    attempt = self._holding.attempts.get((frame.job_id, frame.attempt))
                    if attempt is not None:
                        attempt.cancel()
                case Drain():
                    # For as long as this connection lasts: a router that wants the worker back
                    # closes it, and gets a fresh one.
                    log.info("draining: the router wants no more jobs taken")
                    self._draining = True
                    self._say_ready()
                case Registered() | Refused():
                    log.warning("a second %s frame was ignored", frame.type)

    def _assign(self, assign: Assign) -> None:
        attempt = Attempt(assign, self._outbox)
        if attempt.key in self._holding.attempts:
            return
        refusal = self._refusal(assign)
        if refusal is not None:
            attempt.fail(refusal)
            return
        self._holding.begin(attempt, asyncio.create_task(self._work(assign, attempt)))

    def _refusal(self, assign: Assign) -> JobError | None:
        if self._draining:
            return JobError(FailureCode.RETURNED, "the worker takes no more jobs")
        if len(self._holding.attempts) >= self._registration.slots:
            return JobError(FailureCode.OVERLOADED, "all slots are taken")
        kind = MODEL_KIND[assign.job.kind]
        served = ((model.id, model.kind) for model in self._registration.models)
        if (assign.job.model, kind) not in served:
            return JobError(FailureCode.MODEL_NOT_SERVED, f"no {kind} model of that name here")
        return None

    def _refuse_unreadable(self, text: str | bytes) -> None:
        """A job that this version cannot read goes back; any other unknown frame is passed over."""
        try:
            head = _JobHead.model_validate_json(text)
        except ValidationError:
            log.warning("a frame that this version does not know was ignored")
            return
        if (head.job_id, head.attempt) in self._holding.attempts:
            return
        attempt = Attempt(Assign.model_construct(**dict(head)), self._outbox)
        attempt.fail(JobError(FailureCode.BAD_REQUEST, "this worker cannot read the job"))

    # --- working ---------------------------------------------------------------------------------

    async def _work(self, assign: Assign, attempt: Attempt) -> None:
        try:
            done = await self._engine.generate(assign.job, attempt)
        except JobError as error:
            attempt.fail(error)
            if error.code is FailureCode.ENGINE_ERROR:
                self._engine_suspected.set()
            log.warning("job %s failed: %s", attempt.job_id[:SHOWN_OF_AN_ID], error.code)
            return
        attempt.finish(done)
        took_s = time.monotonic() - attempt.started_at
        tokens = done.usage.completion_tokens if done.usage else attempt.tokens
        log.info(
            "job %s ended: %s, %d tokens in %.2f s",
            attempt.job_id[:SHOWN_OF_AN_ID],
            done.finish_reason,
            tokens,
            took_s,
        )

    def _end(self, attempt: Attempt, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (bug := task.exception()) is not None:
            # Not an error that an engine knows: a mistake of ours. The job must not hang for it.
            # Where, and not what: the words of an exception may quote a prompt.
            where = "".join(traceback.format_tb(bug.__traceback__))
            log.error("the engine broke: %s\n%s", type(bug).__name__, where)
            attempt.fail(JobError(FailureCode.ENGINE_ERROR, type(bug).__name__))
            self._engine_suspected.set()
        self._say_ready()

    def _say_ready(self) -> None:
        free = 0 if self._draining else self._registration.slots - len(self._holding.attempts)
        self._outbox.set_ready(free)

    # --- writing and leaving ---------------------------------------------------------------------

    async def _write(self, connection: Connection) -> None:
        while True:
            for frame in await self._outbox.take():
                await connection.send(frame)

    async def _leave(self) -> None:
        """Waits for shutdown, then until nothing is held or unsent. Its end ends the session."""
        await self._shutdown.asked.wait()
        await self._let_go(self._grace_s)

    async def _watch_engine(self) -> None:
        """Looks at the engine whenever a job failed for its sake. Never returns."""
        while True:
            await self._engine_suspected.wait()
            self._engine_suspected.clear()
            try:
                if await self._engine.check():
                    continue
            except EngineDied:
                await self._let_go(FLUSH_TIMEOUT_S)
                raise
            await self._let_go(FLUSH_TIMEOUT_S)
            raise EngineAway("the engine does not answer")

    async def _let_go(self, grace_s: float) -> None:
        """Take no more, finish what ends within the grace time, return the rest, send it all."""
        self._draining = True
        self._say_ready()
        if self._holding.attempts:
            log.info("finishing %d jobs, at most %g s", len(self._holding.attempts), grace_s)
        await _first_of(self._holding.idle.wait(), self._shutdown.hurried.wait(), timeout_s=grace_s)
        for attempt in list(self._holding.attempts.values()):
            attempt.give_back()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._outbox.all_sent(), FLUSH_TIMEOUT_S)


async def _first_of(*waits: Coroutine[Any, Any, object], timeout_s: float) -> None:
    """Return when one of `waits` has, or after `timeout_s`; the others are cancelled."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
