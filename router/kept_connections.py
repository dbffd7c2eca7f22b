"""Connections to PostgreSQL that are at hand: taking one out of asyncpg's pool and giving it back costs
a process three times what asking something costs (docs/performance.md).

So those that were just used stay out of the pool, and the last used is the next to be used. Who finds
none takes one from the pool, and waits there if all are in use; then what comes back goes to the pool.

A server that hangs (stopped, cut off without a word) keeps whoever is waiting for it. So that not all
others wait behind them, nobody is given a connection while none of those in use has been answered for
SILENT_S, and for a second more nobody who came then; but for one a second who tries. Those who wait are
told by `router.hung_server`.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import asyncpg

# As long as the pool leaves a connection open that nobody uses.
IDLE_S = 300.0
# After this time one goes back to the pool, which makes it anew when it has done enough.
OUT_S = 3600.0
SILENT_S = 5.0
TRY_EVERY_S = 1.0
# How long what was broken off may take to stop at the server; then its connection is given up.
STOP_S = 1.0


class KeptConnections:
    """A pool, and what is out of it and idle. At least one connection is left to the pool itself."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self.pool = pool
        # (when it was last used, connection), the latest at the end.
        self._kept: list[tuple[float, Any]] = []
        # When each that is out of the pool was taken out of it.
        self._out_since: dict[Any, float] = {}
        self._most = pool.get_max_size() - 1
        # Since when each that is in use is, when one was last answered, since when its silence has been
        # noticed, and when it was last tried.
        self._used_since: dict[Any, float] = {}
        self._answered_at = self._tried_at = float("-inf")
        self._doubted_at: float | None = None
        self._waiting = 0
        self._closing = False
        # Set by who has found out; nobody is given a connection meanwhile.
        self.hung = False

    @property
    def silent_s(self) -> float:
        """How long none of the connections in use has been answered; 0 if none is in use."""
        if not self._used_since:
            return 0.0
        return time.monotonic() - max(self._answered_at, min(self._used_since.values()))

    def answered(self) -> None:
        """The server has shown that it is there."""
        self._answered_at, self._doubted_at = time.monotonic(), None

    @property
    def longest_use_s(self) -> float:
        """How long the one that was taken first, of those in use, has been."""
        return time.monotonic() - min(self._used_since.values()) if self._used_since else 0.0

    def in_use(self, for_s: float) -> dict[Any, tuple[int, float]]:
        """Those that have been in use for so long: the process that serves each, and how long."""
        now, found = time.monotonic(), {}
        for connection, since in self._used_since.items():
            if now - since >= for_s:
                with suppress(asyncpg.InterfaceError):
                    found[connection] = connection.get_server_pid(), now - since
        return found

    def give_up(self, after_s: float) -> list[int]:
        """Break those off that have been in use for so long; the processes that serve them."""
        given_up = self.in_use(after_s)
        for connection in given_up:
            self.break_off(connection)
        return [pid for pid, _ in given_up.values()]

    def break_off(self, connection: Any) -> None:
        """Whoever waits for it is told that it broke; harmless if it has come back meanwhile."""
        if connection in self._used_since:
            with suppress(asyncpg.InterfaceError):
                connection.terminate()

    @property
    def idle(self) -> int:
        """Open connections that nobody uses."""
        return self.pool.get_idle_size() + sum(_is_open(kept) for _, kept in self._kept)

    async def take(self, *, timeout_s: float) -> Any:
        """A connection, to be given back. Raises what asyncpg raises, and TimeoutError."""
        self._refuse_while_silent()
        connection = await self._take(timeout_s)
        self._used_since[connection] = time.monotonic()
        return connection

    def _refuse_while_silent(self) -> None:
        if self.hung:
            raise TimeoutError("the database does not answer")
        now = time.monotonic()
        # First what costs nothing: this is asked before every use.
        if now - self._answered_at < SILENT_S or (silent_s := self.silent_s) < SILENT_S:
            return
        if self._doubted_at is None:
            # Perhaps somebody has only asked for much: who comes within the next second finds out.
            self._doubted_at = now
        elif now - self._doubted_at >= TRY_EVERY_S:
            if now - self._tried_at < TRY_EVERY_S:
                raise TimeoutError(f"the database has not answered for {silent_s:.0f} s")
            self._tried_at = now

    async def _take(self, timeout_s: float) -> Any:
        while self._kept:
            used_at, connection = self._kept.pop()
            if time.monotonic() - used_at < IDLE_S and _is_open(connection):
                return connection
            await self._end(connection)
        self._waiting += 1
        try:
            connection = await self.pool.acquire(timeout=timeout_s)
        finally:
            self._waiting -= 1
        self._out_since[connection] = time.monotonic()
        return connection

    async def give_back(self, connection: Any, *, well: bool) -> None:
        """`well`: whoever used it came to the end, so that nothing is under way on it."""
        now = time.monotonic()
        self._used_since.pop(connection, None)
        if well:
            self.answered()
        wanted = not (self._closing or self._waiting or len(self._kept) >= self._most)
        wanted = wanted and now - self._out_since[connection] < OUT_S
        if well and wanted and _is_open(connection) and not connection.is_in_transaction():
            self._kept.append((now, connection))
        else:
            await self._release(connection)
        if self._kept and now - self._kept[0][0] > IDLE_S:
            await self._end(self._kept.pop(0)[1])

    async def close(self) -> None:
        """Close all connections, once those that are in use have come back."""
        self._closing = True
        while self._kept:
            await self._release(self._kept.pop()[1])
        await self.pool.close()

    async def _end(self, connection: Any) -> None:
        if _is_open(connection):
            connection.terminate()
        await self._release(connection)

    async def _release(self, connection: Any) -> None:
        """To the pool; harmless for one that it has taken back already, since it was closed."""
        self._out_since.pop(connection, None)
        # One that does not stop in time has been terminated.
        with suppress(TimeoutError):
            await self.pool.release(connection, timeout=STOP_S)


def _is_open(connection: Any) -> bool:
    try:
        return not connection.is_closed()
    except asyncpg.InterfaceError:
        # The pool has taken it back: it was closed.
        return False
