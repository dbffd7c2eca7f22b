"""Any server that speaks KoboldAI's API: KoboldCpp, or KoboldAI United (KC-13, KP-8).

It takes a prompt and gives text: chat is written out by one of a few templates first. Three things
differ from server to server and are found out at the start or on the way: streaming
(`/api/extra/generate/stream`), a tokenizer to count with (`/api/extra/tokencount`), and whether the
API answers under `/api/v1` or `/api/latest`. A 503 means busy, and the same job is sent again.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Sequence
from typing import Any

from worker.engines import Done, Progress, Sink
from worker.engines.remote import Server, json_object, open_server
from worker.engines.stopping import unless_cancelled
from worker.engines.text_stream import TextStream
from worker.errors import EngineStartError, JobError
from worker.kobold_prompt import chat_prompt
from worker.protocol import (
    ChatSpec,
    CompletionSpec,
    FailureCode,
    FinishReason,
    JobSpec,
    ModelKind,
    Sampling,
    ServedModel,
    Usage,
)
from worker.settings import ChatTemplate, WorkerSettings

DEFAULT_URL = "http://127.0.0.1:5001"
ROOTS = ("/api/v1", "/api/latest")
BUSY_PAUSE_S = 1.0
BUSY_TIMES = 120
ABORT_TIMEOUT_S = 5
NO_MODEL = {"", "inactive", "ReadOnly"}

# Our names, and KoboldAI's.
SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repeat_penalty": "rep_pen",
    "presence_penalty": "presence_penalty",
    "seed": "sampler_seed",
}


def from_settings(settings: WorkerSettings) -> KoboldCppEngine:
    """The engine for SATHERD_ENGINE_URL."""
    return KoboldCppEngine(
        open_server(settings, DEFAULT_URL),
        shown_as=settings.model_name or settings.model,
        slots=settings.slots or 1,
        context=settings.context,
        max_tokens=settings.max_tokens,
        template=settings.chat_template,
    )


class KoboldCppEngine:
    """Passes jobs on to `server`, one at a time unless it is known to take more."""

    def __init__(
        self,
        server: Server,
        *,
        shown_as: str | None = None,
        slots: int = 1,
        context: int | None = None,
        max_tokens: int | None = None,
        template: ChatTemplate = ChatTemplate.ALPACA,
        busy_pause_s: float = BUSY_PAUSE_S,
    ) -> None:
        self._server = server
        self._shown_as = shown_as
        self._slots = slots
        self._context_set = context
        self._max_tokens_set = max_tokens
        self._template = template
        self._busy_pause_s = busy_pause_s
        self._root = ROOTS[0]
        self._streams = True
        self._counts = True
        self._context = 0
        self._models: list[ServedModel] = []

    @property
    def models(self) -> Sequence[ServedModel]:
        return self._models

    @property
    def slots(self) -> int:
        return self._slots

    async def start(self, progress: Progress) -> None:
        progress(0, f"asking {self._server.url} for its model")
        name = await self._find_model()
        self._context = self._context_set or await self._config("max_context_length")
        longest = min(self._max_tokens_set or await self._config("max_length"), self._context)
        self._models = [
            ServedModel(
                id=self._shown_as or name,
                kind=ModelKind.TEXT,
                context_length=self._context,
                max_tokens=longest,
            )
        ]
        progress(1, f"serving {self._models[0].id}")

    async def generate(self, job: JobSpec, sink: Sink) -> Done:
        if not isinstance(job, ChatSpec | CompletionSpec):
            raise JobError(FailureCode.MODEL_NOT_SERVED, "a KoboldAI server makes nothing but text")
        prompt, stops = self._prompt_of(job)
        prompt_tokens = await self._fitting(prompt, sink)
        key = f"KCPP{secrets.randbelow(10**8):08d}"
        body = self._body(job, prompt, stops, key)
        text = _Text(sink, stops)
        if isinstance(job, CompletionSpec) and job.echo:
            sink.write(prompt, tokens=0)
        reason = await unless_cancelled(sink, self._generate_patiently(body, text))
        if reason is None:
            await self._abort(key)
            reason = FinishReason.CANCELLED
        text.end()
        return Done(reason, await self._usage(prompt_tokens, text.whole))

    async def check(self) -> bool:
        return await self._server.answers(f"{self._root}/model")

    async def aclose(self) -> None:
        await self._server.aclose()

    # --- what the server is ----------------------------------------------------------------------

    async def _find_model(self) -> str:
        try:
            answer = await self._server.discover(f"{ROOTS[0]}/model")
        except EngineStartError:
            # KoboldAI United knows it by this name only.
            answer = await self._server.discover(f"{ROOTS[1]}/model")
            self._root = ROOTS[1]
        name = answer.get("result") if isinstance(answer, dict) else None
        if not isinstance(name, str) or name in NO_MODEL:
            raise EngineStartError(f"{self._server.url} has no model loaded")
        return name

    async def _config(self, what: str) -> int:
        # The true one: what a person set in KoboldCpp's page may be more than the model takes.
        if what == "max_context_length":
            with contextlib.suppress(EngineStartError):
                answer = await self._server.discover("/api/extra/true_max_context_length")
                if isinstance(answer, dict) and isinstance(answer.get("value"), int):
                    return answer["value"]
        answer = await self._server.discover(f"{self._root}/config/{what}")
        value = answer.get("value") if isinstance(answer, dict) else None
        if not isinstance(value, int) or value < 1:
            raise EngineStartError(f"{self._server.url} does not tell its {what}")
        return value

    # --- the prompt ------------------------------------------------------------------------------

    def _prompt_of(self, job: ChatSpec | CompletionSpec) -> tuple[str, list[str]]:
        if isinstance(job, ChatSpec):
            if job.tools or (job.response_format or {}).get("type", "text") != "text":
                raise JobError(FailureCode.BAD_REQUEST, "no tools and no JSON mode here")
            prompt, more_stops = chat_prompt(job.messages, self._template)
            return prompt, [*job.stop, *more_stops]
        if not isinstance(job.prompt, str):
            raise JobError(FailureCode.BAD_REQUEST, "a KoboldAI server takes no token ids")
        if job.suffix:
            raise JobError(FailureCode.BAD_REQUEST, "a KoboldAI server takes no suffix")
        if not job.prompt:
            raise JobError(FailureCode.BAD_REQUEST, "the prompt is empty")
        return job.prompt, list(job.stop)

    async def _fitting(self, prompt: str, sink: Sink) -> int | None:
        """The prompt's length in tokens; None when the server cannot count. Raises JobError.

        Asked first, since KoboldAI silently cuts off what does not fit.
        """
        count = await unless_cancelled(sink, self._count(prompt))
        if count is not None and count >= self._context:
            raise JobError(FailureCode.PROMPT_TOO_LONG, f"the context is {self._context} tokens")
        return count

    def _body(
        self, job: ChatSpec | CompletionSpec, prompt: str, stops: list[str], key: str
    ) -> dict[str, Any]:
        body: dict[str, Any] = {
            "prompt": prompt,
            "max_context_length": self._context,
            "max_length": min(job.max_tokens, self._models[0].max_tokens),
            "genkey": key,
            "quiet": True,
        }
        if stops:
            body["stop_sequence"] = stops
        carried = (job.kobold if isinstance(job, CompletionSpec) else None) or {}
        return carried | body | _sampling(job.sampling)

    # --- the answer ------------------------------------------------------------------------------

    async def _generate_patiently(self, body: dict[str, Any], text: _Text) -> FinishReason:
        for _ in range(BUSY_TIMES):
            try:
                return await self._generate(body, text)
            except JobError as error:
                if error.code is not FailureCode.OVERLOADED or text.whole:
                    raise
            await asyncio.sleep(self._busy_pause_s)
        raise JobError(FailureCode.OVERLOADED, "the server stays busy")

    async def _generate(self, body: dict[str, Any], text: _Text) -> FinishReason:
        if self._streams:
            try:
                return await self._stream(body, text)
            except JobError as error:
                if error.code is not FailureCode.MODEL_NOT_SERVED:
                    raise
            # 404: an older server, which answers all at once.
            self._streams = False
        answer = await self._server.post(f"{self._root}/generate", body)
        try:
            result = answer["results"][0]
            text.add(result["text"])
        except (LookupError, TypeError) as error:
            raise JobError(FailureCode.ENGINE_ERROR, "the server sent no text") from error
        return _finish_reason(result.get("finish_reason"), text)

    async def _stream(self, body: dict[str, Any], text: _Text) -> FinishReason:
        reason = None
        async with contextlib.aclosing(
            self._server.events("/api/extra/generate/stream", body)
        ) as events:
            async for data in events:
                event = json_object(data)
                text.add(str(event.get("token", "")))
                reason = event.get("finish_reason") or reason
        return _finish_reason(reason, text)

    async def _abort(self, key: str) -> None:
        """Ask the server to stop; it may be one that cannot, or be gone."""
        with contextlib.suppress(JobError):
            await self._server.post("/api/extra/abort", {"genkey": key}, timeout_s=ABORT_TIMEOUT_S)

    # --- counting --------------------------------------------------------------------------------

    async def _usage(self, prompt_tokens: int | None, answer: str) -> Usage | None:
        if prompt_tokens is None:
            return None
        made = await self._count(answer) if answer else 0
        if made is None:
            return None
        return Usage(prompt_tokens=prompt_tokens, completion_tokens=made)

    async def _count(self, text: str) -> int | None:
        if not self._counts:
            return None
        try:
            answer = await self._server.post("/api/extra/tokencount", {"prompt": text})
        except JobError as error:
            # Only a server without that path: a broken line may be whole again next time.
            self._counts = error.code is not FailureCode.MODEL_NOT_SERVED
            return None
        value = answer.get("value")
        return value if isinstance(value, int) and value >= 0 else None


class _Text:
    """The answer so far; a stop string that the server leaves in it is taken out."""

    def __init__(self, sink: Sink, stops: Sequence[str]) -> None:
        self._sink = sink
        self._stream = TextStream(stops)
        self.whole = ""

    @property
    def stopped(self) -> bool:
        return self._stream.stopped

    def add(self, text: str) -> None:
        self._write(self._stream.feed(text.encode("utf-8", "replace")))

    def end(self) -> None:
        self._write(self._stream.flush())

    def _write(self, text: str) -> None:
        if text:
            self.whole += text
            self._sink.write(text)


def _finish_reason(reason: object, text: _Text) -> FinishReason:
    if reason == "length" and not text.stopped:
        return FinishReason.LENGTH
    return FinishReason.STOP


def _sampling(sampling: Sampling) -> dict[str, Any]:
    values = sampling.model_dump(exclude_none=True)
    return {SAMPLING[key]: value for key, value in values.items() if key in SAMPLING}
