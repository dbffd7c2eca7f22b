"""Engines: what turns a job into tokens.

    llama_cpp      a GGUF file, decoded here, several sequences in one context
    openai         any server that speaks OpenAI's API (llama-server, vLLM, Ollama, LM Studio ...)
    koboldcpp      any server that speaks KoboldAI's API
    echo           repeats the prompt's words: for load tests, never for paying strangers

`open_engine` imports only the one that is asked for, so that a worker in front of a remote server
needs no native library.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

from worker.errors import EngineStartError
from worker.protocol import FinishReason, JobSpec, Picture, ServedModel, Usage
from worker.settings import EngineName, WorkerSettings

Progress = Callable[[float, str], None]
"""Called while an engine starts, with a fraction from 0 to 1 and a few words about what it does."""

ENGINE_MODULES: dict[EngineName, str] = {
    EngineName.LLAMA_CPP: "worker.engines.llama_cpp",
    EngineName.OPENAI: "worker.engines.openai_server",
    EngineName.KOBOLDCPP: "worker.engines.koboldcpp",
    EngineName.ECHO: "worker.engines.echo",
}


@dataclass(frozen=True, slots=True)
class Done:
    """How a job ended. `usage` None: the engine cannot count. `data`: one vector per input.

    `images`: the one picture of an image job.
    """

    finish_reason: FinishReason
    usage: Usage | None = None
    data: list[list[float]] | None = None
    images: list[Picture] | None = None


class Sink(Protocol):
    """Where the output of one attempt goes, and where a wish to stop comes from.

    Everything here belongs to the event loop's thread, but `cancelled` may be read from any.
    """

    @property
    def cancelled(self) -> bool:
        """True once nobody wants the rest. The engine then ends the job soon."""
        ...

    def write(
        self, text: str, *, tokens: int | None = None, delta: dict[str, Any] | None = None
    ) -> None:
        """Append to the answer. `tokens` is how many the model made for it; None: unknown.

        Never blocks. Writes of one turn of the event loop leave in one frame, so an engine that
        decodes many sequences together should deliver a step's output in one turn.
        """
        ...

    def on_cancel(self, call: Callable[[], object]) -> None:
        """`call` runs once when the job is cancelled; at once if it is already."""
        ...


class Engine(Protocol):
    """One source of tokens. `models` and `slots` are known once `start` has returned."""

    @property
    def models(self) -> Sequence[ServedModel]:
        """What it serves. One id may appear twice, as text and as embedding."""
        ...

    @property
    def slots(self) -> int:
        """How many jobs it runs at once without one waiting for another."""
        ...

    async def start(self, progress: Progress) -> None:
        """Load or find the model. Raises EngineStartError with a message for the operator."""
        ...

    async def generate(self, job: JobSpec, sink: Sink) -> Done:
        """Run one job to its end, writing to `sink` as it goes.

        Embeddings come back in `Done.data`, a picture in `Done.images`. A cancelled sink ends it
        with `CANCELLED` and the counts so far. Raises JobError.
        """
        ...

    async def check(self) -> bool:
        """Whether it can serve now, asked after a job failed for no fault of its own.

        False: not now, ask again. Raises EngineDied: never again in this process.
        """
        ...

    async def aclose(self) -> None:
        """Free everything. No job may be running. Twice is harmless."""
        ...


def open_engine(settings: WorkerSettings) -> Engine:
    """The engine that `settings.engine` names, not started. Raises EngineStartError."""
    module = ENGINE_MODULES[settings.engine]
    try:
        return import_module(module).from_settings(settings)
    except ModuleNotFoundError as error:
        if error.name != "llama_cpp":
            raise
        raise EngineStartError(
            "llama-cpp-python is not installed; `satherd install-engine` builds it in two to seven "
            "minutes (a C++ compiler is needed), or set SATHERD_ENGINE=openai to use a server that "
            "already runs"
        ) from error
