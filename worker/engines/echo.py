"""An engine without a model: the answer is the prompt's own words, over and over.

For load tests and for tests of the router. It says what it is by its name, and must never be put
before paying strangers. A token is one word with the space after it; `max_tokens` of them are made,
unless a stop string comes first. The same job always gives the same answer.

    SATHERD_MODEL             the name it serves, `echo` unless set
    SATHERD_SLOTS             64 unless set
    SATHERD_ECHO_TOKEN_S      seconds per step; one step makes one token of every running job, as a
                              batched engine does. 0: a whole answer at once
    SATHERD_ECHO_FAULT        fail_before, fail_midway (after half of the tokens), stall (says
                              nothing after the first half until it is cancelled)
    SATHERD_ECHO_FAULT_EVERY  only every n-th job has the fault, the n-th first
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from worker.engines import Done, Progress, Sink
from worker.engines.text_stream import TextStream
from worker.errors import JobError
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
    ServedModel,
    Usage,
)
from worker.settings import EchoFault, WorkerSettings

CONTEXT = 32_768
SLOTS = 64
DIMENSIONS = 8


def from_settings(settings: WorkerSettings) -> EchoEngine:
    """The echo engine that these settings describe."""
    return EchoEngine(
        model=settings.model_name or settings.model or "echo",
        slots=settings.slots or SLOTS,
        context=settings.context or CONTEXT,
        max_tokens=settings.max_tokens,
        token_s=settings.echo_token_s,
        fault=settings.echo_fault,
        fault_every=settings.echo_fault_every,
    )


class EchoEngine:
    """See the top of this file. Lengths in tokens, which are words here."""

    def __init__(
        self,
        *,
        model: str = "echo",
        slots: int = SLOTS,
        context: int = CONTEXT,
        max_tokens: int | None = None,
        token_s: float = 0,
        fault: EchoFault = EchoFault.NONE,
        fault_every: int = 1,
    ) -> None:
        self._context = context
        self._slots = slots
        self._token_s = token_s
        self._fault = fault
        self._fault_every = fault_every
        self._jobs = 0
        self._waiting: list[asyncio.Future[None]] = []
        self._clock: asyncio.Task[None] | None = None
        self._models = [
            ServedModel(
                id=model, kind=kind, context_length=context, max_tokens=max_tokens or context
            )
            for kind in (ModelKind.TEXT, ModelKind.EMBEDDING)
        ]

    @property
    def models(self) -> Sequence[ServedModel]:
        return self._models

    @property
    def slots(self) -> int:
        return self._slots

    async def start(self, progress: Progress) -> None:
        progress(1, "the echo engine has no model to load")

    async def generate(self, job: JobSpec, sink: Sink) -> Done:
        self._jobs += 1
        faulty = self._jobs % self._fault_every == 0
        fault = self._fault if faulty else EchoFault.NONE
        if fault is EchoFault.FAIL_BEFORE:
            raise JobError(FailureCode.ENGINE_ERROR, "told to fail before the first token")
        if isinstance(job, EmbeddingSpec):
            return self._embed(job)
        if isinstance(job, ImageSpec | ImageEditSpec):
            raise JobError(FailureCode.MODEL_NOT_SERVED, "the echo engine makes no pictures")
        return await self._write(job, sink, fault)

    async def check(self) -> bool:
        return True

    async def aclose(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            await asyncio.gather(self._clock, return_exceptions=True)
            self._clock = None

    def _embed(self, job: EmbeddingSpec) -> Done:
        texts = [" ".join(words_of(entry)) for entry in job.input]
        tokens = sum(len(text.split()) for text in texts)
        return Done(FinishReason.STOP, Usage(prompt_tokens=tokens), [vector_of(t) for t in texts])

    async def _write(self, job: ChatSpec | CompletionSpec, sink: Sink, fault: EchoFault) -> Done:
        words = prompt_words(job)
        if not words:
            raise JobError(FailureCode.BAD_REQUEST, "the prompt holds no word")
        if len(words) >= self._context:
            raise JobError(FailureCode.PROMPT_TOO_LONG, f"the context is {self._context} words")
        most = min(job.max_tokens, self._context - len(words))
        breaks_at = None if fault is EchoFault.NONE else most // 2
        stream = TextStream(job.stop)
        if isinstance(job, CompletionSpec) and job.echo:
            sink.write(" ".join(words) + " ", tokens=0)
        made = unsent = 0
        for word in itertools.islice(itertools.cycle(words), most):
            if sink.cancelled:
                return Done(FinishReason.CANCELLED, self._usage(words, made))
            if made == breaks_at:
                if fault is EchoFault.FAIL_MIDWAY:
                    raise JobError(FailureCode.ENGINE_ERROR, "told to fail midway")
                await self._stall(sink)
                return Done(FinishReason.CANCELLED, self._usage(words, made))
            if self._token_s:
                await self._step()
            made += 1
            unsent += 1
            text = stream.feed(f"{word} ".encode())
            if text:
                sink.write(text, tokens=unsent)
                unsent = 0
            if stream.stopped:
                return Done(FinishReason.STOP, self._usage(words, made))
        if rest := stream.flush():
            sink.write(rest, tokens=unsent)
        return Done(FinishReason.LENGTH, self._usage(words, made))

    def _usage(self, words: Sequence[str], made: int) -> Usage:
        return Usage(prompt_tokens=len(words), completion_tokens=made)

    async def _stall(self, sink: Sink) -> None:
        nobody_cares = asyncio.Event()
        sink.on_cancel(nobody_cares.set)
        await nobody_cares.wait()

    async def _step(self) -> None:
        """Wait for the next beat of the one clock that all jobs share."""
        if self._clock is None or self._clock.done():
            self._clock = asyncio.create_task(self._beat())
        beat = asyncio.get_running_loop().create_future()
        self._waiting.append(beat)
        await beat

    async def _beat(self) -> None:
        while self._waiting:
            await asyncio.sleep(self._token_s)
            waiting, self._waiting = self._waiting, []
            for beat in waiting:
                if not beat.done():
                    beat.set_result(None)
            # Let the jobs make their token and wait again, before looking whether anybody does.
            await asyncio.sleep(0)


def prompt_words(job: ChatSpec | CompletionSpec) -> list[str]:
    """The words of a prompt, or of the last message that has any."""
    if isinstance(job, CompletionSpec):
        return words_of(job.prompt)
    for message in reversed(job.messages):
        if words := words_of(_text_of(message.get("content"))):
            return words
    return []


def words_of(entry: str | Iterable[int]) -> list[str]:
    """Words of a text; token ids count as one word each."""
    return entry.split() if isinstance(entry, str) else [str(token) for token in entry]


def vector_of(text: str) -> list[float]:
    """A vector of length 1 that only equal texts share."""
    digest = hashlib.sha256(text.encode()).digest()[:DIMENSIONS]
    values = [byte - 127.5 for byte in digest]
    length = sum(value * value for value in values) ** 0.5
    return [round(value / length, 7) for value in values]


def _text_of(content: Any) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return " ".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return ""
