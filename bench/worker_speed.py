"""How fast the llama.cpp engine writes: tokens per second for 1, 4 and 8 answers at a time.

    python bench/worker_speed.py [MODEL.gguf] [--tokens 200] [--threads 1]

Three figures a row. `decoder`: the step loop alone. `engine`: through the engine's thread and the
event loop to a sink, as a session uses it. `first token`: from a new prompt to its first text while
the other answers are being written, in milliseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from worker import demo_model
from worker.engines.llama_cpp import LlamaCppEngine
from worker.engines.llama_decoder import Decoder
from worker.engines.llama_model import LlamaModel
from worker.engines.llama_pace import PromptPace, ThreadPace
from worker.engines.llama_prompt import PromptMaker
from worker.protocol import ChatSpec, Sampling

COUNTS = (1, 4, 8)
REPEATS = 3
CONTEXT = 1024
QUESTION = [{"role": "user", "content": "Tell me a long story about a robot and a paper boat."}]


class Clock:
    """A Sink that only notes when the first text came."""

    def __init__(self) -> None:
        self.cancelled = False
        self.began = time.perf_counter()
        self.first_s: float | None = None

    def write(
        self, text: str, *, tokens: int | None = None, delta: dict[str, Any] | None = None
    ) -> None:
        if self.first_s is None:
            self.first_s = time.perf_counter() - self.began

    def on_cancel(self, call: Callable[[], object]) -> None:
        """Nobody cancels here."""


def job(model: LlamaModel, tokens: int) -> ChatSpec:
    """An answer of exactly `tokens`: the model may not end it."""
    biases = {str(token): -100.0 for token in range(model.vocab_size) if model.ends_text(token)}
    sampling = Sampling(seed=1, logit_bias=biases)
    return ChatSpec(model="m", messages=QUESTION, max_tokens=tokens, sampling=sampling)


def decoder_speed(model: LlamaModel, spec: ChatSpec, count: int, threads: int) -> float:
    """Tokens per second of the step loop."""
    decoder = Decoder(
        model,
        slots=count,
        context=CONTEXT,
        threads=ThreadPace([threads], threads),
        prompts=PromptPace(),
    )
    prompt = PromptMaker(model, context=CONTEXT).make(spec)
    best = 0.0
    for _ in range(REPEATS):
        for _ in range(count):
            decoder.add(
                prompt.tokens, prompt.plan, max_tokens=spec.max_tokens, stops=(), sink=Clock()
            )
        began = time.perf_counter()
        while decoder.active:
            decoder.step()
        best = max(best, count * spec.max_tokens / (time.perf_counter() - began))
    decoder.close()
    return best


async def engine_speed(path: Path, spec: ChatSpec, count: int, threads: int) -> tuple[float, float]:
    """Tokens per second through the engine, and the median time to the first text in seconds."""
    engine = LlamaCppEngine(path, name="m", slots=count, context=CONTEXT, threads=threads)
    await engine.start(lambda fraction, words: None)
    best = 0.0
    firsts: list[float] = []
    for _ in range(REPEATS):
        clocks = [Clock() for _ in range(count)]
        began = time.perf_counter()
        await asyncio.gather(*(engine.generate(spec, clock) for clock in clocks))
        best = max(best, count * spec.max_tokens / (time.perf_counter() - began))
        firsts += [clock.first_s for clock in clocks if clock.first_s is not None]
    await engine.aclose()
    return best, median(firsts)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures the llama.cpp engine.")
    parser.add_argument("model", type=Path, nargs="?", default=demo_model.PATH)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    model = LlamaModel(options.model, gpu_layers=-1, on_progress=lambda fraction: True)
    spec = job(model, options.tokens)
    print(f"{options.model.name}, {options.threads} threads, {options.tokens} tokens each")
    for count in COUNTS:
        alone = decoder_speed(model, spec, count, options.threads)
        through, first_s = asyncio.run(engine_speed(options.model, spec, count, options.threads))
        print(
            f"{count} at a time: decoder {alone:.0f} tokens/s, engine {through:.0f} tokens/s, "
            f"first token {first_s * 1000:.1f} ms"
        )
    model.close()


if __name__ == "__main__":
    main()
