"""Any server that speaks OpenAI's API: llama-server, vLLM, Ollama, LM Studio, or another provider.

Answers are always streamed from it. Counts come from `stream_options.include_usage`; a server that
does not know that option is asked again without it, and once only. What a stream holds besides text
(tool calls, reasoning) is passed on as `delta`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from worker.engines import Done, Progress, Sink, server_slots
from worker.engines.remote import Server, json_object, open_server
from worker.engines.server_pictures import draw
from worker.engines.stopping import unless_cancelled
from worker.errors import EngineStartError, JobError
from worker.protocol import (
    ChatSpec,
    CompletionSpec,
    EmbeddingSpec,
    FailureCode,
    FinishReason,
    ImageEditSpec,
    ImageSpec,
    JobSpec,
    ModelKind,
    Sampling,
    ServedModel,
    Usage,
)
from worker.settings import WorkerSettings

DEFAULT_URL = "http://127.0.0.1:8080"
# Where that is not measured.
SLOTS = 4
MEASURED_TOKENS = 16
CONTEXT = 4096
BUSY_TRIES = 5
_CANCELLED = Done(FinishReason.CANCELLED)
BUSY_PAUSE_S = 1.0

# What servers call the context in their list of models: vLLM, LM Studio, OpenRouter and others.
CONTEXT_FIELDS = ("max_model_len", "max_context_length", "loaded_context_length", "context_length")
EMBEDDING_SIGNS = ("embed", "bge-", "e5-", "gte-")

FINISH = {
    "length": FinishReason.LENGTH,
    "tool_calls": FinishReason.TOOL_CALLS,
    "function_call": FinishReason.TOOL_CALLS,
}


def from_settings(settings: WorkerSettings) -> OpenAIServerEngine:
    """The engine for SATHERD_ENGINE_URL; SATHERD_MODEL chooses among its models."""
    names = _names(settings.model)
    return OpenAIServerEngine(
        open_server(settings, DEFAULT_URL),
        names=names,
        shown_as=settings.model_name,
        slots=settings.slots,
        context=settings.context,
        max_tokens=settings.max_tokens,
        image_names=_names(settings.image_models),
        image_edit_names=_names(settings.image_edit_models),
    )


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


@dataclass(slots=True)
class _Answer:
    """What is known of an answer so far."""

    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    wrote: bool = False


class _Nowhere:
    """A sink for answers that nobody reads."""

    cancelled = False

    def write(
        self, text: str, *, tokens: int | None = None, delta: dict[str, Any] | None = None
    ) -> None:
        pass

    def on_cancel(self, call: Callable[[], object]) -> None:
        pass


class OpenAIServerEngine:
    """Passes jobs on to `server`. `names` empty: every model that it lists.

    `shown_as` renames the model, when there is only one. `context` overrides what the server says.
    `slots`: answers at once; None: measured at the start. `image_names` and `image_edit_names` are
    those of its models that make and change pictures.
    """

    def __init__(
        self,
        server: Server,
        *,
        names: Sequence[str] = (),
        shown_as: str | None = None,
        slots: int | None = SLOTS,
        context: int | None = None,
        max_tokens: int | None = None,
        busy_pause_s: float = BUSY_PAUSE_S,
        image_names: Sequence[str] = (),
        image_edit_names: Sequence[str] = (),
    ) -> None:
        self._server = server
        # Both `http://host` and `http://host/v1` are what people write.
        self._prefix = "" if server.url.endswith("/v1") else "/v1"
        self._names = list(names)
        self._shown_as = shown_as
        self._slots = slots
        self._context = context
        self._max_tokens = max_tokens
        self._busy_pause_s = busy_pause_s
        self._picture_kinds = {
            ModelKind.IMAGE: frozenset(image_names),
            ModelKind.IMAGE_EDIT: frozenset(image_edit_names),
        }
        self._asks_usage = True
        self._server_names: dict[str, str] = {}
        self._models: list[ServedModel] = []

    @property
    def models(self) -> Sequence[ServedModel]:
        return self._models

    @property
    def slots(self) -> int:
        return self._slots or SLOTS

    async def start(self, progress: Progress) -> None:
        progress(0, f"asking {self._server.url} for its models")
        listed = self._listed(await self._server.discover(f"{self._prefix}/models"))
        names = self._names or list(dict.fromkeys([*listed, *self._of_pictures()]))
        if not names:
            raise EngineStartError(f"{self._server.url} lists no models; set SATHERD_MODEL")
        # Servers that make pictures do not always list what makes them.
        missing = [n for n in names if listed and n not in listed and n not in self._of_pictures()]
        if missing:
            raise EngineStartError(
                f"{self._server.url} has no model {missing[0]}; it has: {', '.join(listed)}"
            )
        if self._shown_as and len(names) > 1:
            raise EngineStartError("SATHERD_MODEL_NAME needs SATHERD_MODEL to name one model")
        for name in names:
            shown = self._shown_as or name
            self._server_names[shown] = name
            self._models.extend(self._served(shown, name, listed.get(name, {})))
        if self._slots is None:
            await self._measure(progress)
        progress(1, f"serving {', '.join(self._server_names)}, {self.slots} answers at once")

    async def generate(self, job: JobSpec, sink: Sink) -> Done:
        if isinstance(job, EmbeddingSpec):
            done = await unless_cancelled(sink, self._embed(job))
            return done or _CANCELLED
        if isinstance(job, ImageSpec | ImageEditSpec):
            name = self._server_names.get(job.model, job.model)
            picture = await unless_cancelled(sink, draw(self._server, self._prefix, name, job))
            return Done(FinishReason.STOP, images=[picture]) if picture else _CANCELLED
        answer = _Answer()
        finished = await unless_cancelled(sink, self._stream_patiently(job, sink, answer))
        if finished is None:
            # The server was cut off before it could count.
            return Done(FinishReason.CANCELLED, answer.usage)
        return Done(answer.finish_reason or FinishReason.STOP, answer.usage)

    async def check(self) -> bool:
        return await self._server.answers(f"{self._prefix}/models")

    async def aclose(self) -> None:
        await self._server.aclose()

    async def _measure(self, progress: Progress) -> None:
        """Find out how many answers at once the server gives, of its first model of text."""
        found = (model.id for model in self._models if model.kind is ModelKind.TEXT)
        if (model := next(found, None)) is None:
            return
        progress(0.5, "measuring how many answers at once it gives (--slots says it)")

        async def ask(number: int) -> None:
            words = f"Count from {number} to {number + 9}."
            job = ChatSpec(
                model=model,
                messages=[{"role": "user", "content": words}],
                max_tokens=MEASURED_TOKENS,
            )
            await self._stream(job, _Nowhere(), _Answer())

        self._slots = await server_slots.measure(ask)
        if self._slots is None:
            progress(0.9, f"it did not answer, {SLOTS} are taken to be right")

    # --- models ----------------------------------------------------------------------------------

    def _listed(self, answer: Any) -> dict[str, dict[str, Any]]:
        entries = answer.get("data") if isinstance(answer, dict) else None
        if not isinstance(entries, list):
            raise EngineStartError(f"{self._server.url} does not list models as OpenAI does")
        return {
            entry["id"]: entry
            for entry in entries
            if isinstance(entry, dict) and isinstance(entry.get("id"), str)
        }

    def _of_pictures(self) -> list[str]:
        return [name for names in self._picture_kinds.values() for name in sorted(names)]

    def _served(self, shown: str, name: str, facts: dict[str, Any]) -> list[ServedModel]:
        context = self._context or _context_of(facts) or CONTEXT
        pictures = [kind for kind, names in self._picture_kinds.items() if name in names]
        if pictures:
            return [ServedModel(id=shown, kind=kind, context_length=context) for kind in pictures]
        return [self._served_text(shown, name, context, facts)]

    def _served_text(
        self, shown: str, name: str, context: int, facts: dict[str, Any]
    ) -> ServedModel:
        embeds = facts.get("type") == "embeddings" or any(
            sign in name.lower() for sign in EMBEDDING_SIGNS
        )
        return ServedModel(
            id=shown,
            kind=ModelKind.EMBEDDING if embeds else ModelKind.TEXT,
            context_length=context,
            max_tokens=0 if embeds else min(self._max_tokens or context, context),
        )

    # --- text ------------------------------------------------------------------------------------

    async def _stream_patiently(
        self, job: ChatSpec | CompletionSpec, sink: Sink, answer: _Answer
    ) -> bool:
        for tries_left in reversed(range(BUSY_TRIES)):
            try:
                await self._stream(job, sink, answer)
                return True
            except JobError as error:
                if error.code is not FailureCode.OVERLOADED or answer.wrote or not tries_left:
                    raise
            await asyncio.sleep(self._busy_pause_s)
        raise AssertionError("the last try returns or raises")

    async def _stream(self, job: ChatSpec | CompletionSpec, sink: Sink, answer: _Answer) -> None:
        body = request_body(job, self._server_names.get(job.model, job.model))
        path = "/chat/completions" if isinstance(job, ChatSpec) else "/completions"
        if self._asks_usage:
            try:
                asking = {**body, "stream_options": {"include_usage": True}}
                await self._read_stream(path, asking, sink, answer)
                return
            except JobError as error:
                if error.code is not FailureCode.BAD_REQUEST or answer.wrote:
                    raise
            # Perhaps it was the option. If it goes without, it was.
            await self._read_stream(path, body, sink, answer)
            self._asks_usage = False
            return
        await self._read_stream(path, body, sink, answer)

    async def _read_stream(
        self, path: str, body: dict[str, Any], sink: Sink, answer: _Answer
    ) -> None:
        async with aclosing(self._server.events(self._prefix + path, body)) as events:
            async for data in events:
                if data.strip() == b"[DONE]":
                    break
                self._take(json_object(data), sink, answer)
        if answer.finish_reason is None and not answer.wrote:
            raise JobError(FailureCode.ENGINE_ERROR, "the server's stream was empty")

    def _take(self, event: dict[str, Any], sink: Sink, answer: _Answer) -> None:
        if event.get("error"):
            raise JobError(FailureCode.ENGINE_ERROR, "the server broke its stream off by an error")
        answer.usage = _usage_of(event.get("usage")) or answer.usage
        choices = event.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            return
        choice = choices[0]
        if choice.get("finish_reason"):
            answer.finish_reason = FINISH.get(choice["finish_reason"], FinishReason.STOP)
        delta = choice.get("delta")
        if not isinstance(delta, dict):
            delta = {"content": choice.get("text")}
        text = delta.get("content")
        text = text if isinstance(text, str) else ""
        rest = {
            key: value
            for key, value in delta.items()
            if key not in ("content", "role") and value not in (None, "", [])
        }
        if text or rest:
            answer.wrote = True
            sink.write(text, delta=rest or None)

    # --- embeddings ------------------------------------------------------------------------------

    async def _embed(self, job: EmbeddingSpec) -> Done:
        body = {
            "model": self._server_names.get(job.model, job.model),
            "input": job.input,
            "encoding_format": "float",
        }
        answer = await self._server.post(f"{self._prefix}/embeddings", body)
        try:
            entries = sorted(answer["data"], key=lambda entry: entry["index"])
            vectors = [[float(number) for number in entry["embedding"]] for entry in entries]
        except (KeyError, TypeError, ValueError) as error:
            raise JobError(FailureCode.ENGINE_ERROR, "the server sent no embeddings") from error
        if len(vectors) != len(job.input):
            raise JobError(FailureCode.ENGINE_ERROR, "the server left embeddings out")
        return Done(FinishReason.STOP, _usage_of(answer.get("usage")), vectors)


def request_body(job: ChatSpec | CompletionSpec, model: str) -> dict[str, Any]:
    """The request for the server. What the job leaves open is left open."""
    body: dict[str, Any] = {"model": model, "max_tokens": job.max_tokens, "stream": True}
    if isinstance(job, ChatSpec):
        body["messages"] = job.messages
        for key in ("tools", "tool_choice", "response_format"):
            if (value := getattr(job, key)) is not None:
                body[key] = value
    else:
        body["prompt"] = job.prompt
        if job.suffix:
            body["suffix"] = job.suffix
        if job.echo:
            body["echo"] = True
    if job.stop:
        body["stop"] = job.stop
    return body | _sampling(job.sampling)


def _sampling(sampling: Sampling) -> dict[str, Any]:
    """`repeat_penalty` is llama.cpp's word, `repetition_penalty` vLLM's: both are sent."""
    values = sampling.model_dump(exclude_none=True)
    if sampling.repeat_penalty is not None:
        values["repetition_penalty"] = sampling.repeat_penalty
    return values


def _usage_of(value: Any) -> Usage | None:
    if not isinstance(value, dict):
        return None
    try:
        # Embeddings have no completion tokens.
        return Usage.model_validate({"completion_tokens": 0} | value, strict=True)
    except ValidationError:
        return None


def _context_of(facts: dict[str, Any]) -> int | None:
    meta = facts.get("meta")
    # llama-server tells what the model was trained for, which may be more than it runs with.
    found = [facts.get(field) for field in CONTEXT_FIELDS]
    if isinstance(meta, dict):
        found += [meta.get("n_ctx"), meta.get("n_ctx_train")]
    return next((value for value in found if isinstance(value, int) and value > 0), None)
