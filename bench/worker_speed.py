"""What the llama.cpp engine adds to llama.cpp itself, for 1, 4, 8 and 16 answers at a time.

    python bench/worker_speed.py [MODEL.gguf] [--tokens 200] [--threads 1] [--rounds 5]

Three ways to write the same tokens, in turn in each round: `bare` is a loop of llama_decode and
llama.cpp's sampler chain, and nothing else; `decoder` is the worker's step loop, which also makes
text of tokens, looks for stop strings and ends; `engine` goes on through the engine's thread and the
event loop to a sink, as a session uses it. With one thread the figures are tokens per second of
processor time, which neighbours change little; with more they are of wall time. The ratio is the
median over the rounds. Last, how long a writer waits at most for a token while a long prompt of
somebody else is read beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import llama_cpp as lib

from worker import demo_model
from worker.engines.llama_cpp import LlamaCppEngine
from worker.engines.llama_decoder import Decoder
from worker.engines.llama_model import LlamaModel
from worker.engines.llama_pace import PromptPace, ThreadPace
from worker.engines.llama_prompt import Prompt, PromptMaker
from worker.engines.llama_sampling import make_chain
from worker.protocol import ChatSpec, Sampling

COUNTS = (1, 4, 8, 16)
CONTEXT = 1024
QUESTION = "Tell me a long story about a robot and a paper boat."


class Clock:
    """A Sink that only notes when text came."""

    def __init__(self) -> None:
        self.cancelled = False
        self.times: list[float] = []

    def write(
        self, text: str, *, tokens: int | None = None, delta: dict[str, Any] | None = None
    ) -> None:
        self.times.append(time.perf_counter())

    def on_cancel(self, call: Callable[[], object]) -> None:
        """Nobody cancels here."""


def job(model: LlamaModel, tokens: int, question: str = QUESTION) -> ChatSpec:
    """An answer of exactly `tokens`: the model may not end it."""
    biases = {str(token): -100.0 for token in range(model.vocab_size) if model.ends_text(token)}
    return ChatSpec(
        model="m",
        messages=[{"role": "user", "content": question}],
        max_tokens=tokens,
        sampling=Sampling(seed=1, logit_bias=biases),
    )


class Bare:
    """llama.cpp with nothing around it."""

    def __init__(self, model: LlamaModel, count: int, threads: int) -> None:
        params = lib.llama_context_default_params()
        params.n_ctx = count * CONTEXT
        params.n_batch = params.n_ubatch = 512
        params.n_seq_max = count
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = False
        self._model, self._count = model, count
        self._context = lib.llama_init_from_model(model.handle, params)
        assert self._context
        self._batch = lib.llama_batch_init(512, 0, 1)

    def close(self) -> None:
        lib.llama_batch_free(self._batch)
        if self._context:
            lib.llama_free(self._context)

    def write(self, prompt: Prompt, tokens: int) -> None:
        """`tokens` for each sequence."""
        context, batch, count = self._context, self._batch, self._count
        assert context
        memory = lib.llama_get_memory(context)
        assert memory is not None
        lib.llama_memory_clear(memory, True)
        chains = [make_chain(self._model, prompt.plan, max_tokens=tokens) for _ in range(count)]
        places = [
            (token, position, sequence)
            for sequence in range(count)
            for position, token in enumerate(prompt.tokens)
        ]
        last = [(i + 1) * len(prompt.tokens) - 1 for i in range(count)]
        for start in range(0, len(places), 512):
            part = places[start : start + 512]
            self._decode(part, [i - start for i in last if start <= i < start + 512])
        tokens_now = [prompt.tokens[-1]] * count
        position = len(prompt.tokens)
        for step in range(tokens):
            for i in range(count):
                batch.token[i] = tokens_now[i]
                batch.pos[i] = position + step
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = i
                batch.logits[i] = 1
            batch.n_tokens = count
            assert lib.llama_decode(context, batch) == 0
            for i in range(count):
                tokens_now[i] = lib.llama_sampler_sample(chains[i], context, i)
        for chain in chains:
            lib.llama_sampler_free(chain)

    def _decode(self, places: list[tuple[int, int, int]], wanted: list[int]) -> None:
        batch = self._batch
        for i, (token, position, sequence) in enumerate(places):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = i in wanted
        batch.n_tokens = len(places)
        assert self._context and lib.llama_decode(self._context, batch) == 0


class Stepped:
    """The worker's decoder."""

    def __init__(self, model: LlamaModel, count: int, threads: int) -> None:
        self._count = count
        self._decoder = Decoder(
            model,
            slots=count,
            context=CONTEXT,
            threads=ThreadPace([threads], threads),
            prompts=PromptPace(),
        )

    def close(self) -> None:
        self._decoder.close()

    def write(self, prompt: Prompt, tokens: int) -> None:
        # Nothing may be remembered: the bare loop reads the prompt every time.
        self._decoder.drop_all()
        for _ in range(self._count):
            self._decoder.add(prompt.tokens, prompt.plan, max_tokens=tokens, stops=(), sink=Clock())
        while self._decoder.active:
            self._decoder.step()


def spent(threads: int) -> float:
    return time.process_time() if threads == 1 else time.perf_counter()


async def compare(path: Path, model: LlamaModel, count: int, options: argparse.Namespace) -> str:
    """One row: rates, and ratios to the bare loop."""
    spec = job(model, options.tokens)
    prompt = PromptMaker(model, context=CONTEXT).make(spec)
    bare = Bare(model, count, options.threads)
    stepped = Stepped(model, count, options.threads)
    engine = LlamaCppEngine(path, name="m", slots=count, context=CONTEXT, threads=options.threads)
    await engine.start(lambda fraction, words: None)
    rates: dict[str, list[float]] = {"bare": [], "decoder": [], "engine": []}
    for number in range(options.rounds + 1):
        # Another question each time, so that the engine has nothing to remember either.
        own = job(model, options.tokens, f"{number}. {QUESTION}")
        for name in rates:
            began = spent(options.threads)
            if name == "bare":
                bare.write(prompt, options.tokens)
            elif name == "decoder":
                stepped.write(prompt, options.tokens)
            else:
                await asyncio.gather(*(engine.generate(own, Clock()) for _ in range(count)))
            if number:  # the first round only warms up
                rates[name].append(count * options.tokens / (spent(options.threads) - began))
    await engine.aclose()
    bare.close()
    stepped.close()
    ratios = {
        name: median(a / b for a, b in zip(rates[name], rates["bare"], strict=True))
        for name in ("decoder", "engine")
    }
    return (
        f"| {count} | {median(rates['bare']):.0f} | {median(rates['decoder']):.0f} |"
        f" {ratios['decoder']:.2f} | {median(rates['engine']):.0f} | {ratios['engine']:.2f} |"
    )


async def longest_wait_s(path: Path, model: LlamaModel, threads: int) -> tuple[float, float]:
    """The longest pause between two texts of a writer, alone and beside prompts of 900 tokens."""
    engine = LlamaCppEngine(path, name="m", slots=4, context=CONTEXT, threads=threads)
    await engine.start(lambda fraction, words: None)
    waits = []
    for prompts in (0, 3):
        clock = Clock()
        writing = asyncio.create_task(engine.generate(job(model, 600), clock))
        while not clock.times:
            await asyncio.sleep(0.001)
        long = [job(model, 8, f"{i} " + "story " * 450) for i in range(prompts)]
        await asyncio.gather(*(engine.generate(spec, Clock()) for spec in long))
        await writing
        gaps = [b - a for a, b in zip(clock.times, clock.times[1:], strict=False)]
        waits.append(max(gaps))
    await engine.aclose()
    return waits[0], waits[1]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures the llama.cpp engine.")
    parser.add_argument("model", type=Path, nargs="?", default=demo_model.PATH)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    model = LlamaModel(options.model, gpu_layers=-1, on_progress=lambda fraction: True)
    kind = "processor" if options.threads == 1 else "wall"
    print(f"{options.model.name}, threads {options.threads}, {options.tokens} tokens an answer,")
    print(f"tokens per second of {kind} time; ratios to the bare loop, median of the rounds\n")
    print("| answers | bare | decoder | ratio | engine | ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    for count in COUNTS:
        print(asyncio.run(compare(options.model, model, count, options)), flush=True)
    alone, beside = asyncio.run(longest_wait_s(options.model, model, options.threads))
    print(f"\nlongest wait for a token: alone {alone * 1000:.0f} ms, ", end="")
    print(f"beside three prompts of 900 tokens {beside * 1000:.0f} ms")
    model.close()


if __name__ == "__main__":
    main()
