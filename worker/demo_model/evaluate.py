"""How good a demo model is: its facts, whether it ends, and whether its words are words.

    python -m worker.demo_model.evaluate [MODEL.gguf]     half a minute; else the shipped file

Runs on the worker's own llama.cpp engine, so it measures what is served.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import time
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any

from worker import demo_model
from worker.demo_model.corpus import CAPITALS, DEFINITIONS, OPPOSITES, conversation
from worker.engines import Done
from worker.engines.llama_cpp import LlamaCppEngine
from worker.protocol import ChatSpec, FinishReason, Sampling

SLOTS = 8
PROMPTS = 150
VOCABULARY_CONVERSATIONS = 20_000
MAX_TOKENS = 400
WORD = re.compile(r"[A-Za-z']+")


class Text:
    """A Sink that keeps the text."""

    def __init__(self) -> None:
        self.text = ""
        self.cancelled = False

    def write(
        self, text: str, *, tokens: int | None = None, delta: dict[str, Any] | None = None
    ) -> None:
        self.text += text

    def on_cancel(self, call: object) -> None:
        """Nobody cancels here."""


async def ask(
    engine: LlamaCppEngine, questions: Iterable[str], sampling: Sampling
) -> list[tuple[str, Done]]:
    """The answers, in the order of the questions."""

    async def one(question: str) -> tuple[str, Done]:
        messages = [{"role": "user", "content": question}]
        job = ChatSpec(model="m", messages=messages, max_tokens=MAX_TOKENS, sampling=sampling)
        sink = Text()
        done = await engine.generate(job, sink)
        return sink.text, done

    return await asyncio.gather(*map(one, questions))


async def facts(engine: LlamaCppEngine) -> None:
    """Print how many questions of each kind get the right answer at temperature 0."""
    sums = [(a, b) for a in range(0, 13, 2) for b in range(1, 13, 2)]
    kinds = {
        "capitals": {f"What is the capital of {c}?": city for c, city in CAPITALS.items()},
        "opposites": {f"What is the opposite of {w}?": other for w, other in OPPOSITES.items()},
        "sums": {f"What is {a} plus {b}?": f"is {a + b}." for a, b in sums},
        "definitions": {f"What is {thing}?": text[:25] for thing, text in DEFINITIONS.items()},
    }
    for kind, expected in kinds.items():
        answers = await ask(engine, expected, Sampling(temperature=0))
        right = sum(
            wanted in text for wanted, (text, _) in zip(expected.values(), answers, strict=True)
        )
        print(f"{kind}: {right} of {len(expected)} right")


async def style(engine: LlamaCppEngine) -> None:
    """Print whether answers end by themselves, and whether they use words of the corpus."""
    rng = Random(99)
    vocabulary: set[str] = set()
    for _ in range(VOCABULARY_CONVERSATIONS):
        for message in conversation(rng):
            vocabulary.update(WORD.findall(message["content"].lower()))
    questions = [
        next(m["content"] for m in conversation(rng) if m["role"] == "user") for _ in range(PROMPTS)
    ]
    began = time.monotonic()
    answers = await ask(engine, questions, Sampling(temperature=0.7, seed=3))
    took_s = time.monotonic() - began
    words = [word for text, _ in answers for word in WORD.findall(text.lower())]
    strange = sum(word not in vocabulary for word in words)
    ended = sum(done.finish_reason is FinishReason.STOP for _, done in answers)
    tokens = sum(done.usage.completion_tokens for _, done in answers if done.usage)
    print(f"{ended} of {PROMPTS} answers ended by themselves")
    print(f"{strange} of {len(words)} words are in no text of the corpus")
    print(f"{tokens / took_s:.0f} tokens/s, {SLOTS} at a time")


async def evaluate(path: Path) -> None:
    engine = LlamaCppEngine(path, name="m", slots=SLOTS)
    await engine.start(lambda fraction, words: None)
    try:
        await facts(engine)
        await style(engine)
    finally:
        await engine.aclose()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measures a demo model.")
    parser.add_argument("model", type=Path, nargs="?", default=demo_model.PATH)
    asyncio.run(evaluate(parser.parse_args().model))
