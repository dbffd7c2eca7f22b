"""A PostgreSQL that hangs: told from one that is slow, given up, and cleaned up after.

    no statement answered for SILENT_S ── a new connection is answered ──> slow: wait on
                  └── nor a new one within PROBE_S ──> hung: who waits is told

    a connection in use for SILENT_S ── its session works ──> slow: wait on
                  └── its session has waited for SILENT_S, too ──> the line is dead: who waits is told

They are told that it is not known what became of their statements. A server that comes to itself may
still do them, after those who asked have looked in the database whether it had. So nobody uses it again
before the sessions that were given up are ended, and gone: then what is there is what there will be.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import asyncpg

from router.kept_connections import SILENT_S, KeptConnections

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
PROBE_S = 5.0
# Whoever has used a connection for so long waits for the server. If that waits for him, between two
# statements or in the middle of one, what one end says does not reach the other, as when something on
# the way has forgotten the connection.
_DEAD = """
select used.pid from unnest($1::int[], $2::float8[]) used(pid, for_s)
join pg_stat_activity a using (pid)
where a.usename = session_user and a.wait_event = 'ClientRead'
    and a.state_change < clock_timestamp() - make_interval(secs => $3)
    and a.backend_start < clock_timestamp() - make_interval(secs => used.for_s - 1)"""

# An id of a process may be another's by now: only sessions that are older than our giving up.
_END = """
select a.pid, pg_terminate_backend(a.pid)
from unnest($1::int[], $2::float8[]) given_up(pid, ago_s)
join pg_stat_activity a using (pid)
where a.usename = session_user and a.backend_start < clock_timestamp() - make_interval(secs => ago_s)"""


class HungServer:
    """The look at one server. `connect` makes a connection that is nobody else's."""

    def __init__(
        self, connections: KeptConnections, connect: Callable[[], Awaitable[asyncpg.Connection]]
    ) -> None:
        self._connections = connections
        self._connect = connect
        # The server's process of each session that was given up, and when.
        self._given_up: dict[int, float] = {}
        self._looked_at = float("-inf")
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="hung-server")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            silent = self._connections.hung or self._connections.silent_s >= SILENT_S
            if silent or self._is_one_slow():
                self._looked_at = time.monotonic()
                await self._look()

    def _is_one_slow(self) -> bool:
        slow = self._connections.longest_use_s >= SILENT_S
        return slow and time.monotonic() - self._looked_at >= SILENT_S

    async def _look(self) -> None:
        try:
            async with asyncio.timeout(PROBE_S):
                await self._settle()
        except (OSError, asyncpg.PostgresConnectionError, asyncpg.InterfaceError):
            # TimeoutError is an OSError. Whoever waits for a server that is not there has been told.
            self._give_up()
        except asyncpg.InsufficientPrivilegeError as error:
            await self._go_on(error)
        except Exception as error:
            # It answers, if only by a refusal.
            log.debug("the database was not looked at: %s", type(error).__name__)
        else:
            self._is_well()

    def _is_well(self) -> None:
        if self._connections.hung:
            log.warning("the database answers again")
        self._connections.hung = False
        self._connections.answered()

    async def _go_on(self, error: Exception) -> None:
        """It answers, and lets nobody see or end sessions. They come to their ends by themselves, if
        not so surely before somebody looks, and we must not stay away for ever."""
        if self._given_up:
            log.error(
                "statements that were given up may be done in a moment: the database's user may not end"
                " its own sessions (%s)",
                error,
            )
            await asyncio.sleep(SILENT_S)
            self._given_up.clear()
        self._is_well()

    def _give_up(self) -> None:
        silent_s = self._connections.silent_s
        if silent_s < SILENT_S:
            return  # It was answered meanwhile.
        if not self._connections.hung:
            log.warning("the database hangs: no answer for %.0f s, who waits is told", silent_s)
        self._connections.hung = True
        now = time.monotonic()
        for pid in self._connections.give_up(SILENT_S):
            self._given_up[pid] = now

    async def _settle(self) -> None:
        """End what was given up, and wait until it is gone. Returns only if the server answers."""
        connection = await self._connect()
        try:
            dead = await self._dead_lines(connection)
            while True:
                now = time.monotonic()
                ago_s = [now - at for at in self._given_up.values()]
                if not await connection.fetch(_END, list(self._given_up), ago_s):
                    break
                await asyncio.sleep(0.02)
            self._given_up.clear()
            for line in dead:
                self._connections.break_off(line)
        finally:
            with suppress(Exception):
                connection.terminate()

    async def _dead_lines(self, connection: asyncpg.Connection) -> list[Any]:
        """Those in use of which neither end hears the other; they are given up."""
        used = self._connections.in_use(SILENT_S)
        if not used:
            return []
        pids, for_s = zip(*used.values(), strict=True)
        dead = {row["pid"] for row in await connection.fetch(_DEAD, pids, for_s, SILENT_S)}
        # An answer may have come while we asked: then it is another's by now, or nobody's.
        now_used = self._connections.in_use(SILENT_S)
        lines = [line for line, (pid, _) in now_used.items() if pid in dead and line in used]
        if lines:
            log.warning(
                "connections to the database that hear nothing are given up: %d", len(lines)
            )
        for line in lines:
            self._given_up[now_used[line][0]] = time.monotonic()
        return lines
