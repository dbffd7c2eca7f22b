"""How many answers at once a model server gives, found out by asking it for short ones.

Servers do not say it: one goes on with 256 answers in a step, another reads one prompt after the other.
So they are asked for twice as many at once, again and again, as long as that takes little longer. A
worker that promised more than its server can do would have jobs wait there that others would serve.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Awaitable, Callable

from worker.errors import JobError

MOST = 64
# Twice as many have to come within this many times the time.
WORTH = 1.6
# Within this time, in seconds, so many are none too many, whatever fewer take.
AT_ONCE_S = 0.25
PATIENCE_S = 30.0

Ask = Callable[[int], Awaitable[None]]


async def measure(ask: Ask, *, patience_s: float = PATIENCE_S) -> int | None:
    """The number of answers at once; None: the server gave none at all.

    `ask` has one short answer made, and raises JobError; its number is another each time, so that no
    answer is one that the server has kept. Nothing larger is begun after `patience_s`, in seconds.
    """
    numbers, now = itertools.count(1), asyncio.get_running_loop().time

    async def seconds(at_once: int, limit_s: float | None) -> float:
        """How long so many take; infinite when one fails, or when they take longer than the limit."""
        began = now()
        try:
            async with asyncio.timeout(limit_s):
                answers = (ask(next(numbers)) for _ in range(at_once))
                found = await asyncio.gather(*answers, return_exceptions=True)
        except TimeoutError:
            return math.inf
        for error in found:
            if isinstance(error, BaseException) and not isinstance(error, JobError):
                raise error
        return math.inf if any(found) else now() - began

    # The first may have to wait for the model to be loaded.
    if await seconds(1, None) == math.inf:
        return None
    until = now() + patience_s
    slots, took_s = 1, await seconds(1, None)
    while slots < MOST and now() < until:
        limit_s = max(WORTH * took_s, AT_ONCE_S)
        for _ in range(2):
            # Once more: something else may have kept the machine busy.
            more_s = await seconds(2 * slots, limit_s)
            if more_s <= limit_s:
                break
        else:
            break
        slots, took_s = 2 * slots, more_s
    return slots
