"""Time for a router whose clock a test cannot move: what it has written down becomes older."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

_TIMES = {
    "payouts": ("next_try_at",),
    "payout_attempts": ("submitted_at", "expires_at", "last_checked_at", "agreed_since"),
    "payees": ("next_try_at", "failing_since"),
    "billing_state": ("expires_at",),
}


async def pass_time(connection: Any, time: timedelta) -> None:
    """Payouts, payees and the lease of who pays: all as if `time` had gone by."""
    async with connection.transaction():
        for table, columns in _TIMES.items():
            older = ", ".join(f"{column} = {column} - $1::interval" for column in columns)
            await connection.execute(f"update {table} set {older}", time)
