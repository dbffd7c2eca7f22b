"""The jobs that a worker works on, which outlive the connection they came by.

When the line to the router breaks, the engine goes on. The next registration, at that router or at
another of the same market, names what is held; what the router takes up again is said to it anew
from the beginning, and the rest is stopped. An attempt that has ended is held for a while too: its
last words may have been lost with the line.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable

from worker.attempts import Attempt
from worker.outbox import Outbox
from worker.protocol import Held

# For how long, and how many, attempts that have ended are remembered.
ENDED_S = 60.0
MOST_ENDED = 256


class Holding:
    """Attempts by (job, attempt). `on_end` belongs to the session of the moment."""

    def __init__(self) -> None:
        self.attempts: dict[tuple[str, int], Attempt] = {}
        self._tasks: dict[tuple[str, int], asyncio.Task[None]] = {}
        self.idle = asyncio.Event()
        self.idle.set()
        self.on_end: Callable[[Attempt, asyncio.Task[None]], None] = lambda attempt, task: None
        self._ended: dict[tuple[str, int], tuple[float, Attempt]] = {}

    def begin(self, attempt: Attempt, task: asyncio.Task[None]) -> None:
        """Hold an attempt until its task has ended."""
        self.attempts[attempt.key] = attempt
        self.idle.clear()
        self._tasks[attempt.key] = task
        task.add_done_callback(lambda ended: self._end(attempt, ended))

    def _end(self, attempt: Attempt, task: asyncio.Task[None]) -> None:
        self._tasks.pop(attempt.key, None)
        self.attempts.pop(attempt.key, None)
        self.on_end(attempt, task)
        if attempt.has_last_word:
            self._ended.pop(attempt.key, None)
            self._ended[attempt.key] = time.monotonic(), attempt
            if len(self._ended) > MOST_ENDED:
                del self._ended[next(iter(self._ended))]
        if not self.attempts:
            self.idle.set()

    def named(self) -> list[Held]:
        """What is held, for a registration."""
        oldest = time.monotonic() - ENDED_S
        self._ended = {k: (at, a) for k, (at, a) in self._ended.items() if at > oldest}
        return [Held(job_id=j, attempt=n) for j, n in (*self.attempts, *self._ended)]

    async def resume(self, wanted: Iterable[Held], outbox: Outbox, *, within_s: float) -> int:
        """Go on with these at the router that `outbox` goes to; how many they are. The others are
        stopped, and the engine given some time to let go of them."""
        keys = {(held.job_id, held.attempt) for held in wanted}
        again = [attempt for key, attempt in self.attempts.items() if key in keys]
        again += [attempt for key, (_, attempt) in self._ended.items() if key in keys]
        self._ended.clear()
        for attempt in again:
            attempt.repeat(outbox)
        await self._stop([key for key in self.attempts if key not in keys], within_s)
        return len(again)

    async def abandon(self, within_s: float) -> None:
        """Stop everything without a word."""
        self._ended.clear()
        await self._stop(list(self.attempts), within_s)

    async def _stop(self, keys: list[tuple[str, int]], within_s: float) -> None:
        tasks = [self._tasks[key] for key in keys]
        for key in keys:
            self.attempts[key].abandon()
        if tasks:
            _, stuck = await asyncio.wait(tasks, timeout=within_s)
            for task in stuck:
                task.cancel()
