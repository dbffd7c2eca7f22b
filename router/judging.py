"""What an answer says about the worker that gave it. Pure.

    empty         not a word, though nothing in the request asks for none
    truncated     "the limit is reached", with much of the limit and of the context left
    too_fast      more tokens a second than a model of its size gives anywhere
    odd_bytes     over many answers, far more or fewer bytes per token than others with this model
    short         over many answers, far fewer tokens than others with this model

The first is a fault, if another worker has more to say (`router.attempts`). The second counts half. The
others prove nothing, since machines and prompts differ: they are noted, and the worker sees them. A
short answer that ends with `stop` is nothing at all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from router.standing import Habit

# An answer shorter than this says nothing about speed: its tokens may have come in one frame.
FAST_TOKENS = 64
# Billions of parameters at least -> tokens a second for one answer that no machine reaches today.
# AI Horde's limits (AH-35) are of another time, but the idea is sound.
FASTEST = ((60.0, 3_000.0), (13.0, 6_000.0), (0.0, 25_000.0))
_SIZE = re.compile(r"(?<![a-z0-9.])(\d{1,4}(?:\.\d+)?)b(?![a-z0-9])", re.IGNORECASE)
# How much of the limit, and of the context, an answer of "the limit is reached" may leave.
UNUSED = 0.1
# A habit is one after so many answers; others must be at least so many.
HABIT_ANSWERS, OTHERS = 20, 2
ODD_BYTES, SHORT = 2.5, 0.1


@dataclass(frozen=True, slots=True)
class Note:
    """Something to be noted about a worker; `weight` is how much of a fault it is."""

    code: str
    facts: dict[str, Any]
    weight: float = 0.0


def truncated(
    *, reason: str, tokens: int | None, prompt_tokens: int, max_tokens: int, context_length: int
) -> Note | None:
    """Whether a worker stopped at a limit that was not there. `tokens` None: it does not count."""
    if reason != "length" or tokens is None:
        return None
    used = max(tokens / max_tokens, (prompt_tokens + tokens) / max(context_length, 1))
    if used >= 1 - UNUSED:
        return None
    return Note("truncated", {"tokens": tokens, "max_tokens": max_tokens}, weight=0.5)


def too_fast(model: str, *, tokens: int | None, seconds: float) -> Note | None:
    """Whether so many tokens can have been generated in this time at all."""
    if tokens is None or tokens < FAST_TOKENS:
        return None
    per_s, most = tokens / max(seconds, 1e-6), fastest_tokens_per_s(model)
    if per_s <= most:
        return None
    return Note("too_fast", {"model": model, "tokens_per_s": round(per_s), "plausible": most})


def fastest_tokens_per_s(model: str) -> float:
    """What is plausible for a model, by the size that its name tells."""
    size = _SIZE.search(model)
    billions = float(size[1]) if size else 0.0
    return next(most for least, most in FASTEST if billions >= least)


def habits(model: str, worker_id: str, all_habits: Mapping[str, Habit]) -> list[Note]:
    """How a worker's answers differ from those of others with the same model, by worker id."""
    own = all_habits[worker_id]
    others = [
        habit
        for other, habit in all_habits.items()
        if other != worker_id and habit.answers >= HABIT_ANSWERS
    ]
    if own.answers < HABIT_ANSWERS or len(others) < OTHERS:
        return []
    notes = []
    usual = median(habit.bytes_per_token for habit in others)
    if usual > 0 and not 1 / ODD_BYTES < own.bytes_per_token / usual < ODD_BYTES:
        facts = {"bytes_per_token": round(own.bytes_per_token, 2), "others": round(usual, 2)}
        notes.append(Note("odd_bytes", {"model": model, **facts}))
    usual = median(habit.tokens for habit in others)
    if own.tokens < SHORT * usual:
        facts = {"tokens": round(own.tokens, 1), "others": round(usual, 1)}
        notes.append(Note("short", {"model": model, **facts}))
    return notes
