"""Remembers what was dear to find, for a time that is in proportion.

What a few workers offer is reckoned anew for everybody who asks; what ten thousand do takes some
milliseconds, and is then remembered for some hundred: so it costs a few per cent of the process at the
most, and nobody is told anything older than that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")

REUSE_FACTOR = 20
CHEAP_S = 0.0005
_MOST = 1_000


class DearMemory(Generic[T]):
    """Values by key, each good for REUSE_FACTOR times the processor time that it took to find."""

    def __init__(self) -> None:
        self._found: dict[Hashable, tuple[float, T]] = {}

    def __call__(self, key: Hashable, find: Callable[[], T], *, cheap: bool = False) -> T:
        """What is remembered under `key`, or what `find` finds now; at once where it is `cheap`, since
        to look at the clock of the processor would cost more."""
        if cheap:
            return find()
        found = self._found.get(key)
        if found is not None and time.monotonic() < found[0]:
            return found[1]
        # Not the time that passed: on a crowded machine that is no measure.
        began = time.thread_time()
        value = find()
        took_s = time.thread_time() - began
        if took_s > CHEAP_S:
            if len(self._found) >= _MOST:
                self._found.clear()
            self._found[key] = (time.monotonic() + took_s * REUSE_FACTOR, value)
        return value
