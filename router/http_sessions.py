"""A worker that is a server: each job is a request to its OpenAI-compatible API.

Projects of the DecentralGPT door are such (DG-6, DG-8). Several requests run at once, up to its slots;
a job that is cancelled is a connection closed. While the server does not answer, it gets no jobs, and
is looked at again after 1, 2, 4 … 60 s.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import aiohttp

from billing.outside_url import OutsideUrl
from router.attempts import Attempts, RunningAttempt
from router.http_answers import Health, as_object, read_events, read_object
from router.http_endpoints import Endpoints, Unreachable
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
from router.worker_sessions import BLAME, answer_fault
from router.workers import Worker
from worker.protocol import (
    IMAGE_KINDS,
    JOB_SPEC,
    MODEL_KIND,
    TEXT_KINDS,
    EmbeddingSpec,
    FailureCode,
    FinishReason,
    JobSpec,
    ModelKind,
    ServedModel,
    Usage,
)

log = logging.getLogger(__name__)

PROBE_S = 5.0
# No live server is slower at an answer that comes in one piece.
SLOWEST_TOKENS_PER_S = 2.0
_BYTES_PER_TOKEN = 64
_BYTES_SPARE = 65_536


@dataclass(frozen=True, slots=True)
class HttpModel:
    """A model at a URL. `api` may be the server, its `/v1`, or one of the paths below; `name` is
    what the server calls it, where that differs."""

    id: str
    api: str
    kind: ModelKind = ModelKind.TEXT
    context_length: int = 4096
    max_tokens: int = 0
    name: str | None = None

    def served(self) -> ServedModel:
        return ServedModel(
            id=self.id,
            kind=self.kind,
            context_length=self.context_length,
            max_tokens=self.max_tokens,
        )


@dataclass(frozen=True, slots=True)
class HttpWorker:
    """Servers that are registered as one worker. `identity`: see `router.sessions.Applicant`."""

    identity: bytes
    models: tuple[HttpModel, ...]
    name: str | None = None
    slots: int = 1
    ln_url: str | None = None


@dataclass(slots=True, eq=False)
class _Job:
    """A request under way."""

    running: RunningAttempt
    spec: JobSpec
    model: HttpModel
    url: OutsideUrl
    task: asyncio.Task[None] | None = None
    reason: FinishReason | None = None
    usage: Usage | None = None
    said: bool = False


class _Failed(Exception):
    """What a server answered in place of an answer."""

    def __init__(self, error: ServerError, *, down: bool = False) -> None:
        super().__init__(error.message)
        self.error = error
        self.down = down


class HttpSession:
    """One registered server. It leaves by itself when it is cut."""

    def __init__(
        self,
        worker: Worker,
        attempts: Attempts,
        described: HttpWorker,
        endpoints: Endpoints,
        urls: dict[tuple[ModelKind, str], OutsideUrl],
        *,
        image_s: float,
        on_idle: Callable[[], None],
        on_end: Callable[[HttpSession], None],
    ) -> None:
        self.worker = worker
        self.described = described
        self._attempts = attempts
        self._endpoints = endpoints
        self._urls = urls
        self._models = {(m.kind, m.id): m for m in described.models}
        self._image_s = image_s
        self._on_idle = on_idle
        self._on_end = on_end
        self._jobs: dict[str, _Job] = {}
        self._health = Health()
        self.closed = False
        self.dropped_frames = 0

    def assign(self, claimed: Claimed) -> None:
        """Send a claimed job to the server."""
        running = self._attempts.begin(claimed, self.worker, lambda: self._stop(claimed.job_id))
        spec = JOB_SPEC.validate_json(claimed.spec)
        model = self._models.get((MODEL_KIND[spec.kind], claimed.model))
        if self.closed or model is None:
            self.worker.busy.discard(claimed.job_id)
            self._attempts.fail(
                running, outcome="worker_lost", blame="nobody", error="gone before the job was sent"
            )
            return
        job = _Job(running, spec, model, self._urls[model.kind, model.id])
        self._jobs[claimed.job_id] = job
        job.task = asyncio.create_task(self._serve(job), name=f"http-worker-{self.worker.id}")

    def _stop(self, job_id: str) -> None:
        job = self._jobs.get(job_id)
        if job is not None and job.task is not None:
            job.task.cancel()

    async def _serve(self, job: _Job) -> None:
        try:
            await self._ask(job)
            self._health.is_well()
        except _Failed as failed:
            self._failed(job, failed)
        except BadAnswer as error:
            self._fail(job, "bad_answer", str(error))
        except (Unreachable, aiohttp.ClientError) as error:
            self._health.fell_ill(self.worker)
            self._fail(job, "worker_lost", f"the server was lost: {type(error).__name__}")
        except Exception:
            log.exception("a job of an HTTP worker went wrong worker=%s", self.worker.id)
            self._attempts.fail(
                job.running, outcome="router_error", blame="router", error="a fault of the router"
            )
        finally:
            if self._jobs.pop(job.running.claimed.job_id, None) is not None:
                self.worker.busy.discard(job.running.claimed.job_id)
                self._on_idle()

    def _failed(self, job: _Job, failed: _Failed) -> None:
        error, blame = failed.error, BLAME.get(failed.error.code, "worker")
        if error.code is FailureCode.OVERLOADED:
            blame = "nobody"
        if failed.down or blame == "nobody":
            self._health.fell_ill(self.worker)
        self._attempts.fail(
            job.running,
            outcome=error.code.value,
            blame=blame,
            error=error.message.replace("\0", ""),
            retry=blame != "job",
        )

    def _fail(self, job: _Job, outcome: str, error: str) -> None:
        self._attempts.fail(job.running, outcome=outcome, blame="worker", error=error)

    async def _ask(self, job: _Job) -> None:
        path, body = request_for(job.spec, job.model.name or job.model.id)
        path = path.removeprefix("/v1")
        if job.spec.stream and job.running.claimed.kind in TEXT_KINDS:
            try:
                await self._stream(job, path, body | {"stream_options": {"include_usage": True}})
            except _Failed as failed:
                if failed.error.code is not FailureCode.BAD_REQUEST or job.said:
                    raise
                # Perhaps it was the option that the server did not like.
                await self._stream(job, path, body)
            self._attempts.finish(job.running, job.reason or FinishReason.STOP, job.usage, None)
            return
        async with self._endpoints.call(job.url, "POST", path, body) as response:
            answer = await read_object(response)
        _raise_error(answer, response.status)
        self._answer(job, answer)

    async def _stream(self, job: _Job, path: str, body: dict[str, Any]) -> None:
        async with self._endpoints.call(job.url, "POST", path, body) as response:
            if response.status != 200:
                answer = await read_object(response)
                _raise_error(answer, response.status)
            async for data in read_events(response):
                event = as_object(data)
                _raise_error(event, None)
                said = piece(event)
                job.reason, job.usage = said.finish_reason or job.reason, said.usage or job.usage
                self._say(job, said.text, said.delta)
        if job.reason is None and not job.said:
            raise BadAnswer("an empty stream")

    def _say(self, job: _Job, text: str, delta: dict[str, Any] | None) -> None:
        if not text and not delta:
            return
        job.said = True
        text = text.replace("\0", "\N{REPLACEMENT CHARACTER}")
        self._attempts.said(job.running, text, delta, None)
        most = job.running.claimed.max_tokens * _BYTES_PER_TOKEN + _BYTES_SPARE
        if job.running.stream.utf8_bytes > most:
            raise BadAnswer(f"more than {most} bytes")

    def _answer(self, job: _Job, answer: dict[str, Any]) -> None:
        claimed = job.running.claimed
        if claimed.kind in TEXT_KINDS:
            said = piece(answer)
            self._say(job, said.text, said.delta)
            self._attempts.finish(
                job.running, said.finish_reason or FinishReason.STOP, said.usage, None
            )
            return
        data = vectors(answer) if isinstance(job.spec, EmbeddingSpec) else None
        images = pictures(answer) if claimed.kind in IMAGE_KINDS else []
        if fault := answer_fault(claimed, data, images):
            raise BadAnswer(fault)
        usage = usage_of(answer.get("usage"))
        self._attempts.finish(job.running, FinishReason.STOP, usage, data, images)

    def drain(self) -> None:
        """Give it no more jobs; it cannot be told."""
        self.worker.draining = True

    def check_progress(self, *, first_token_s: float, stall_s: float) -> None:
        """Fail what has stalled; look at a server that was ill."""
        now = time.monotonic()
        for job in list(self._jobs.values()):
            limit = stall_s if job.running.chunks else self._patience(job, first_token_s)
            if not job.running.settled and now - job.running.progress_at > limit:
                self._fail(job, "stalled", f"nothing for {limit:.0f} s")
                self._stop(job.running.claimed.job_id)
        if self._health.is_due(now):
            self._health.task = asyncio.create_task(self._probe())

    def _patience(self, job: _Job, first_token_s: float) -> float:
        claimed = job.running.claimed
        if claimed.kind in IMAGE_KINDS:
            return self._image_s
        whole_s = 0.0 if job.spec.stream else claimed.max_tokens / SLOWEST_TOKENS_PER_S
        return first_token_s + whole_s

    async def _probe(self) -> None:
        """Any answer that is no failure of its own shows that the server is there again."""
        url = next(iter(self._urls.values()))
        try:
            async with (
                asyncio.timeout(PROBE_S),
                self._endpoints.call(url, "GET", "/models") as response,
            ):
                well = response.status < 500
        except (Unreachable, aiohttp.ClientError, TimeoutError):
            well = False
        if well:
            self._health.may_try(self.worker)
            self._on_idle()
        else:
            self._health.fell_ill(self.worker)

    def cut(self, reason: str, *, blame: str = "worker") -> None:
        """End it from our side; what follows is in `end`."""
        if not self.closed:
            log.warning("worker cut off worker=%s: %s", self.worker.id, reason)
            self.end("cut", blame=blame, error=reason)

    def end(
        self,
        outcome: str = "worker_lost",
        *,
        blame: str = "worker",
        error: str = "the worker was taken out",
    ) -> None:
        """Give back or settle what the server is at, and leave. Twice is harmless."""
        if self.closed:
            return
        self.closed = True
        jobs, self._jobs = self._jobs, {}
        for job in jobs.values():
            self._attempts.fail(job.running, outcome=outcome, blame=blame, error=error)
            if job.task is not None:
                job.task.cancel()
        if self._health.task is not None:
            self._health.task.cancel()
        self.worker.busy.clear()
        self._on_end(self)


def _raise_error(answer: dict[str, Any], status: int | None) -> None:
    error = error_of(answer, status)
    if error is not None:
        raise _Failed(error, down=status is not None and status >= 500)
