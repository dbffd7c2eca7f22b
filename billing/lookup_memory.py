"""What look-ups by strangers have cost lately: how many each asked for, and which ones failed.

Both are bounded, and forget: a restart, or a flood of other keys, only costs a few more look-ups.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Generic, TypeVar

_Value = TypeVar("_Value")


class RecentCalls:
    """At most `most` calls per key in any `window_s` seconds."""

    def __init__(
        self, *, most: int, window_s: float, clock: Callable[[], float], keys_max: int = 10_000
    ) -> None:
        self._most = most
        self._window_s = window_s
        self._clock = clock
        self._keys_max = keys_max
        self._calls: OrderedDict[str, deque[float]] = OrderedDict()

    def admit(self, key: str) -> bool:
        """Whether `key` may make one more call now; if so it is counted."""
        now = self._clock()
        calls = self._calls.setdefault(key, deque())
        self._calls.move_to_end(key)
        while calls and calls[0] <= now - self._window_s:
            calls.popleft()
        admitted = len(calls) < self._most
        if admitted:
            calls.append(now)
        while len(self._calls) > self._keys_max:
            self._calls.popitem(last=False)
        return admitted


class RecentFailures(Generic[_Value]):
    """What went wrong with a key, for so many seconds."""

    def __init__(self, *, clock: Callable[[], float], keys_max: int = 10_000) -> None:
        self._clock = clock
        self._keys_max = keys_max
        self._failures: OrderedDict[str, tuple[float, _Value]] = OrderedDict()

    def get(self, key: str) -> _Value | None:
        ends_at, failure = self._failures.get(key, (0.0, None))
        return failure if self._clock() < ends_at else None

    def remember(self, key: str, failure: _Value, *, keep_s: float) -> None:
        self._failures[key] = (self._clock() + keep_s, failure)
        self._failures.move_to_end(key)
        while len(self._failures) > self._keys_max:
            self._failures.popitem(last=False)

    def forget(self, key: str) -> None:
        self._failures.pop(key, None)
