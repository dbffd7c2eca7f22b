"""Time for a router whose clock a test cannot move: what it has written down becomes older."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import asyncpg

_TIMES = {
    "payouts": ("next_try_at",),
    "payout_attempts": ("submitted_at", "expires_at", "last_checked_at", "agreed_since"),
    "payees": ("next_try_at", "failing_since"),
    "billing_state": ("expires_at",),
}


# Shorter than PostgreSQL's deadlock_timeout: the router locks these rows in an order of its own, and
# where each waits for the other it must be the test that gives way.
_WAIT_MS = 300


async def pass_time(connection: Any, time: timedelta) -> None:
    """Payouts, payees and the lease of who pays: all as if `time` had gone by."""
    while True:
        try:
            await _pass_time(connection, time)
        except asyncpg.LockNotAvailableError:
            continue
        return


async def _pass_time(connection: Any, time: timedelta) -> None:
    async with connection.transaction():
        await connection.execute(f"set local lock_timeout = {_WAIT_MS}")
        for table, columns in _TIMES.items():
            older = ", ".join(f"{column} = {column} - $1::interval" for column in columns)
            await connection.execute(f"update {table} set {older}", time)
