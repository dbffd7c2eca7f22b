"""Which process pays: a lease in the database, with a fencing token.

The token grows by one with each new holder. Whoever pays checks it in the transaction that
writes, so that a process that was stopped for a while, and lost the lease, writes nothing more.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from datetime import datetime, timedelta
from typing import Any

_KEY = "payout_lease"

# An end further away than any lease lasts was written by a clock that has been set back since.
_TAKE = """
insert into billing_state (key, value, expires_at) values ($1, '1', $3)
on conflict (key) do update
    set value = (billing_state.value::bigint + 1)::text, expires_at = excluded.expires_at
    where billing_state.expires_at <= $2 or billing_state.expires_at > $3
returning value::bigint"""

_RENEW = """
update billing_state set expires_at = $3 where key = $1 and value = $2::bigint::text
returning 1"""


class LeaseLost(Exception):
    """Another process pays now. Undo this transaction and do nothing more."""


class PayoutLease:
    """One process's claim to be the one that pays. `token` is None while it is not."""

    def __init__(
        self,
        transaction: Callable[[], AbstractAsyncContextManager[Any]],
        clock: Callable[[], datetime],
    ) -> None:
        self._transaction = transaction
        self._clock = clock
        self.token: int | None = None

    async def hold(self, lease_s: float) -> bool:
        """Take the lease, or renew it; whether it is held now."""
        now = self._clock()
        ends_at = now + timedelta(seconds=lease_s)
        async with self._transaction() as connection:
            if self.token is not None:
                renewed = await connection.fetchval(_RENEW, _KEY, self.token, ends_at)
                if renewed is not None:
                    return True
                self.token = None
            token = await connection.fetchval(_TAKE, _KEY, now, ends_at)
        self.token = token
        return token is not None

    async def check(self, connection: Any) -> None:
        """Make sure, until the caller's transaction ends, that the lease is held. Raises LeaseLost.

        It locks: of two transactions that check, the second waits for the first.
        """
        token = await connection.fetchval(
            "select value::bigint from billing_state where key = $1 for update", _KEY
        )
        if self.token is None or token != self.token:
            raise LeaseLost

    async def release(self) -> None:
        """Let the next process take it at once."""
        if self.token is None:
            return
        async with self._transaction() as connection:
            await connection.fetchval(_RENEW, _KEY, self.token, self._clock())
        self.token = None


async def lease_ends_at(connection: Any) -> datetime | None:
    """When the lease runs out that some process holds, or held; None when none ever did."""
    return await connection.fetchval("select expires_at from billing_state where key = $1", _KEY)
