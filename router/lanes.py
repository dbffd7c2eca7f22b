"""Which lane a job waits in, and which lanes a worker drains. Pure.

A lane is what a model must be able to do, its id, a context class and an answer class. A job's needs
are rounded up to the next edge, a worker's limits down, so that every job in a lane fits every worker
that drains it and a claim never has to skip rows: its cost does not grow with the queue. The limits of
registered workers are edges themselves, so that rounding strands no job that fits: the round ones, and
so many of the others. Anybody may register, with whatever limits, and lanes are edges times edges.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass

from router.demands import without
from worker.protocol import ModelKind, ServedModel

# In the place of a model's name: any model of the kind will do.
ANY_MODEL = "*"
# A few coarse classes: each one is a probe of every claim.
BASE_EDGES = (0, 512, 2048, 8192, 32768, 131072, 1 << 20, 1 << 40)
# Limits that are edges as soon as any worker has them.
ROUND_EDGES = frozenset({*BASE_EDGES, *(1 << bits for bits in range(10, 20))})
# Of all other limits, so many become edges of each dimension, those first that came first. A worker
# whose limit is none gets the jobs of the next smaller class.
MOST_ODD_EDGES = 24


@dataclass(frozen=True, slots=True)
class Edges:
    """The upper bounds of the classes, ascending, for context and for answer lengths in tokens."""

    context: tuple[int, ...] = BASE_EDGES
    answer: tuple[int, ...] = BASE_EDGES

    def with_limits(self, models: Iterable[ServedModel]) -> Edges:
        """These edges and the limits of `models`, as far as there is room for them."""
        served = list(models)
        return Edges(
            _with(self.context, (m.context_length for m in served)),
            _with(self.answer, (answer_limit(m) for m in served)),
        )


def _with(edges: tuple[int, ...], limits: Iterable[int]) -> tuple[int, ...]:
    found = set(edges)
    room = MOST_ODD_EDGES - len(found - ROUND_EDGES)
    for limit in limits:
        if limit in found:
            continue
        if limit not in ROUND_EDGES:
            if room <= 0:
                continue
            room -= 1
        found.add(limit)
    return tuple(sorted(found))


def answer_limit(model: ServedModel) -> int:
    """The longest answer in tokens: what the worker says, or else its whole context."""
    return model.max_tokens or model.context_length


def lane(edges: Edges, *, kind: ModelKind, model: str, prompt_tokens: int, max_tokens: int) -> str:
    """Where a job waits that reads `prompt_tokens` and may produce `max_tokens`."""
    context = edges.context[bisect_left(edges.context, prompt_tokens + max_tokens)]
    answer = edges.answer[bisect_left(edges.answer, max_tokens)]
    return _name(kind, model, context, min(answer, context))


def drained_by(edges: Edges, models: Iterable[ServedModel]) -> list[str]:
    """All lanes of which every job fits a worker that serves `models`."""
    return [
        _name(served.kind, name, context, answer)
        for served in models
        for name in _names(served)
        for context in edges.context[: bisect_right(edges.context, served.context_length)]
        for answer in _answers_within(edges, context, answer_limit(served))
    ]


def _answers_within(edges: Edges, context: int, limit: int) -> list[int]:
    # An answer is never longer than the context that holds it, so that the answer classes over a
    # context are one: the class of the context itself, which is no answer edge of its own.
    answers = edges.answer[: bisect_right(edges.answer, limit)]
    return sorted({min(answer, context) for answer in answers})


def _names(served: ServedModel) -> tuple[str, ...]:
    # Only doors of text have clients who do not care which model answers (KC-1, AH-1).
    return (served.id, ANY_MODEL) if served.kind is ModelKind.TEXT else (served.id,)


def model_of(lane: str) -> str:
    """The model that jobs in this lane want: its name, or ANY_MODEL."""
    return lane.split("/", 3)[3]


def holds(served: ServedModel, lane: str) -> bool:
    """Whether every job of a lane that any model may serve fits this one."""
    kind, context, answer, _ = without(lane).split("/", 3)
    return (
        served.kind == kind
        and int(context) <= served.context_length
        and int(answer) <= answer_limit(served)
    )


def _name(kind: ModelKind, model: str, context: int, answer: int) -> str:
    return f"{kind}/{context}/{answer}/{model}"
