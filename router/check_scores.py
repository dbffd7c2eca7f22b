"""How good the answer of a check is, and what many of them say about a worker. Pure.

Never by equality of one text: the same model with the same seed answers differently in a batch and
alone, since sums are rounded in another order. So a canary's answer is asked whether what must be in it
is there, and a duplicate's how many words it shares with answers of other workers, measured by how many
those share with one another.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from statistics import mean, median

# How much two honest answers to one prompt may differ, where too few are known to measure it.
USUAL_OVERLAP = 0.3
OTHERS_KEPT = 30
# What is said of a worker is said of so many checks at least, and of the latest at most.
LEAST_CHECKS, MOST_CHECKS = 5, 50
# The mean score that an honest worker reaches with room to spare.
GOOD_MEAN = 0.7
# Below this quality its money waits.
HELD_BELOW = 0.8
FAILED_BELOW = 0.5

_WORD = re.compile(r"\w+")


def canary_score(text: str, expected: Sequence[str]) -> float:
    """The share of what is expected that is there, whatever its case and spacing."""
    plain = " ".join(_WORD.findall(text.casefold()))
    found = [" ".join(_WORD.findall(part.casefold())) in plain for part in expected]
    return sum(found) / len(found)


def duplicate_score(text: str, others: Sequence[str]) -> float | None:
    """How well a text agrees with those of others, 0 to 1; None: there are none to compare with."""
    if not others:
        return None
    own = median(overlap(text, other) for other in others[:OTHERS_KEPT])
    among = [overlap(a, b) for a, b in combinations(others[:OTHERS_KEPT], 2)]
    usual = max(median(among), 0.05) if len(among) >= 3 else USUAL_OVERLAP
    return min(1.0, own / usual)


def overlap(one: str, other: str) -> float:
    """The words that two texts share, as F1: 1 for the same bag of words, 0 for none in common."""
    a, b = (Counter(_WORD.findall(text.casefold())) for text in (one, other))
    total = a.total() + b.total()
    return 2 * (a & b).total() / total if total else 1.0


def quality(scores: Sequence[float]) -> float:
    """What a worker's latest scores come to; 1 until there are enough to say anything."""
    if len(scores) < LEAST_CHECKS:
        return 1.0
    return min(1.0, mean(scores[:MOST_CHECKS]) / GOOD_MEAN)
