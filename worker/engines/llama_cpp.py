"""The llama.cpp engine: GGUF files, decoded in this process.

    event loop                               engine thread (owns every context)
    generate() ── prompt, in a pool thread
               ── inbox ───────────────────> add to the decoder
                                             step, step, step: one llama_decode for all jobs
               <── call_soon_threadsafe ──── a delivery for all jobs, every few milliseconds
    sink.write() for each, in one turn of the loop: one frame to the router

The thread computes without holding the interpreter's lock, so the loop stays free. A cancelled sink
is seen between two steps.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from worker import demo_model
from worker.engines import Done, Progress, Sink
from worker.engines.llama_computer import Computer, Delivery, Work
from worker.engines.llama_decoder import Decoder
from worker.engines.llama_embedder import Embedder
from worker.engines.llama_measuring import Measured, measure, thread_options
from worker.engines.llama_model import LlamaModel
from worker.engines.llama_pace import PromptPace, ThreadPace
from worker.engines.llama_prompt import PromptMaker
from worker.errors import EngineDied, EngineStartError, JobError
from worker.hardware import physical_cores
from worker.protocol import (
    EmbeddingSpec,
    FailureCode,
    ImageEditSpec,
    ImageSpec,
    JobSpec,
    ModelKind,
    ServedModel,
)
from worker.settings import WorkerSettings

log = logging.getLogger("worker")

CONTEXT = 4096
LONGEST_EMBEDDING = 2048


def from_settings(settings: WorkerSettings) -> LlamaCppEngine:
    """The engine for the file that SATHERD_MODEL names, or for the demo model."""
    path = Path(settings.model).expanduser() if settings.model else demo_model.PATH
    shipped = path.resolve() == demo_model.PATH.resolve()
    return LlamaCppEngine(
        path,
        name=settings.model_name or (demo_model.NAME if shipped else path.stem),
        slots=settings.slots,
        context=settings.context,
        max_tokens=settings.max_tokens,
        threads=settings.threads,
        gpu_layers=settings.gpu_layers,
    )


class LlamaCppEngine:
    """Serves one GGUF file, as a text and as an embedding model of the same name.

    `context` is in tokens, for each slot; None: what the model was trained for, at most 4096.
    `slots` and `threads` None: what a short measurement at the start finds best.
    """

    def __init__(
        self,
        path: Path,
        *,
        name: str,
        slots: int | None = None,
        context: int | None = None,
        max_tokens: int | None = None,
        threads: int | None = None,
        gpu_layers: int = -1,
    ) -> None:
        self._path = path
        self._name = name
        self._wanted_slots = slots
        self._slots = slots or 1
        self._wanted_context = context
        self._max_tokens = max_tokens
        self._wanted_threads = threads
        self._gpu_layers = gpu_layers
        self._models: list[ServedModel] = []
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._started: asyncio.Future[None] | None = None
        self._stopping = False
        self._computer: Computer | None = None
        self._prompts: PromptMaker | None = None
        self._longest_embedding = LONGEST_EMBEDDING
        self._working: set[Work] = set()

    @property
    def models(self) -> Sequence[ServedModel]:
        return self._models

    @property
    def slots(self) -> int:
        return self._slots

    async def start(self, progress: Progress) -> None:
        self._loop = asyncio.get_running_loop()
        self._started = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, args=(progress,), name="llama.cpp")
        self._thread.start()
        try:
            await self._started
        except asyncio.CancelledError:
            self._stopping = True
            raise

    async def generate(self, job: JobSpec, sink: Sink) -> Done:
        assert self._prompts is not None and self._loop is not None, "not started"
        ended: asyncio.Future[Done] = self._loop.create_future()
        if isinstance(job, EmbeddingSpec):
            texts = await asyncio.to_thread(self._texts, self._prompts, job)
            work = Work(sink, ended, sum(map(len, texts)), texts=texts)
        elif isinstance(job, ImageSpec | ImageEditSpec):
            raise JobError(FailureCode.MODEL_NOT_SERVED, "llama.cpp makes no pictures")
        else:
            prompt = await asyncio.to_thread(self._prompts.make, job)
            work = Work(sink, ended, len(prompt.tokens), prompt)
            if prompt.echo:
                sink.write(prompt.echo, tokens=0)
        if self._computer is None:
            raise JobError(FailureCode.ENGINE_ERROR, "the engine has stopped")
        self._working.add(work)
        self._computer.put(work)
        try:
            return await ended
        finally:
            self._working.discard(work)

    async def check(self) -> bool:
        if self._computer is None:
            raise EngineDied("llama.cpp has stopped")
        return True

    async def aclose(self) -> None:
        self._stopping = True
        if self._computer is not None:
            self._computer.stop()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
            self._thread = None

    def _texts(self, prompts: PromptMaker, job: EmbeddingSpec) -> list[list[int]]:
        if not job.input:
            raise JobError(FailureCode.BAD_REQUEST, "there is nothing to embed")
        return [prompts.tokens_of(entry, longest=self._longest_embedding) for entry in job.input]

    # --- the engine thread -----------------------------------------------------------------------

    def _run(self, progress: Progress) -> None:
        model = computer = None
        # Told if a bug ends this thread: nobody may wait for it for ever.
        error: EngineStartError | None = EngineStartError("the llama.cpp engine broke; see above")
        try:
            model = self._load(progress)
            computer = self._prepare(model, progress)
            error = None
        except EngineStartError as refusal:
            error = refusal
        finally:
            self._call(self._is_started, error)
            if model is not None and computer is None:
                model.close()
        if model is None or computer is None:
            return
        try:
            computer.run()
        finally:
            self._call(self._fail_all)
            computer.close()
            model.close()

    def _load(self, progress: Progress) -> LlamaModel:
        shown = -1

        def on_progress(fraction: float) -> bool:
            nonlocal shown
            percent = int(fraction * 100)
            if percent > shown:
                shown = percent
                self._call(progress, fraction, f"loading {self._path.name}")
            return not self._stopping

        return LlamaModel(self._path, gpu_layers=self._gpu_layers, on_progress=on_progress)

    def _prepare(self, model: LlamaModel, progress: Progress) -> Computer:
        context = self._wanted_context or min(model.train_context, CONTEXT)
        self._prompts = PromptMaker(model, context=context)
        measured = self._measure(model, progress)
        decoder = None
        if model.writes_text:
            decoder = self._make_decoder(model, measured, context)
        longest = self._longest_embedding = min(context, LONGEST_EMBEDDING)
        self._models = self._served(writes_text=model.writes_text, context=context)
        self._computer = Computer(
            decoder,
            lambda: Embedder(model, longest=longest, threads=measured.threads),
            lambda deliveries: self._call(self._deliver, deliveries),
        )
        return self._computer

    def _measure(self, model: LlamaModel, progress: Progress) -> Measured:
        """Threads and slots as set, and what is not set as measured."""
        threads, slots = self._wanted_threads, self._wanted_slots
        cores = physical_cores()
        if not model.writes_text:
            # Texts to embed fill a batch by themselves: there is nothing to write side by side.
            return Measured(threads or max(1, cores - 1), slots or 1)
        if threads is not None and slots is not None:
            return Measured(threads, slots)
        measured = measure(
            model,
            threads=threads,
            slots=slots,
            cores=cores,
            progress=lambda words: self._call(progress, 1.0, words),
        )
        log.info("measured: %s", measured)
        return measured

    def _make_decoder(self, model: LlamaModel, measured: Measured, context: int) -> Decoder:
        fixed = self._wanted_threads is not None
        options = [measured.threads] if fixed else thread_options(physical_cores())
        slots = measured.slots
        while True:
            try:
                decoder = Decoder(
                    model,
                    slots=slots,
                    context=context,
                    threads=ThreadPace(options, measured.threads),
                    prompts=PromptPace(measured.prompt_token_s),
                )
            except EngineStartError:
                if self._wanted_slots is not None or slots == 1:
                    raise
                slots //= 2
                log.warning("not enough memory for more than %d slots", slots)
            else:
                self._slots = slots
                return decoder

    def _served(self, *, writes_text: bool, context: int) -> list[ServedModel]:
        text = ServedModel(
            id=self._name,
            kind=ModelKind.TEXT,
            context_length=context,
            max_tokens=min(self._max_tokens or context, context),
        )
        embedding = ServedModel(
            id=self._name,
            kind=ModelKind.EMBEDDING,
            context_length=self._longest_embedding,
            max_tokens=0,
        )
        return [text, embedding] if writes_text else [embedding]

    def _call(self, function: Callable[..., object], *args: Any) -> None:
        """Run something in the event loop, soon; nothing when the loop has been closed."""
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *args)

    # --- back in the event loop ------------------------------------------------------------------

    def _is_started(self, error: EngineStartError | None) -> None:
        if self._started is None or self._started.done():
            return
        if error is None:
            self._started.set_result(None)
        else:
            self._started.set_exception(error)

    def _deliver(self, deliveries: list[Delivery]) -> None:
        for delivery in deliveries:
            if delivery.text:
                delivery.work.sink.write(delivery.text, tokens=delivery.tokens)
            ended = delivery.work.ended
            if delivery.end is None or ended.done():
                continue
            if isinstance(delivery.end, Done):
                ended.set_result(delivery.end)
            else:
                ended.set_exception(delivery.end)

    def _fail_all(self) -> None:
        self._computer = None
        for work in self._working:
            if not work.ended.done():
                work.ended.set_exception(
                    JobError(FailureCode.ENGINE_ERROR, "the engine has stopped")
                )
