"""Which process pays: a lease in the database, with a fencing token.

The token grows with each new holder, and when one lets go. Whoever pays checks it in the transaction
that writes, so that a process that was stopped for a while, and lost the lease, writes nothing more.

Token and end only ever grow, so they also tell when the database has gone back in time under a process
that runs on: a backup was restored, and payouts that were made since are forgotten.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from datetime import datetime, timedelta
from typing import Any

_KEY = "payout_lease"

# An end further away than two leases last was written by a clock that has been set back since. One
# that is further away than one was renewed a moment ago, by a process whose clock is a little ahead or
# that was quicker to write down what it read there.
_TAKE = """
insert into billing_state (key, value, expires_at) values ($1, '1', $3)
on conflict (key) do update
    set value = (billing_state.value::bigint + 1)::text, expires_at = excluded.expires_at
    where billing_state.expires_at <= $2 or billing_state.expires_at > $4
returning value::bigint"""

_RENEW = """
update billing_state set expires_at = $3 where key = $1 and value = $2::bigint::text
returning value::bigint"""

# Given back before its end, it ends sooner than it would have; the token grows, so that the lease does.
_RELEASE = """
update billing_state set value = (value::bigint + 1)::text, expires_at = $3
where key = $1 and value = $2::bigint::text"""

_READ = "select value::bigint as token, expires_at from billing_state where key = $1"


class LeaseLost(Exception):
    """Another process pays now. Undo this transaction and do nothing more."""


class PayoutLease:
    """One process's claim to be the one that pays. `token` is None while it is not."""

    def __init__(
        self,
        transaction: Callable[[], AbstractAsyncContextManager[Any]],
        clock: Callable[[], datetime],
        *,
        on_older: Callable[[], None] = lambda: None,
    ) -> None:
        self._transaction = transaction
        self._clock = clock
        self._on_older = on_older
        self._seen: tuple[int, datetime] | None = None
        self.token: int | None = None

    async def hold(self, lease_s: float) -> bool:
        """Take the lease, or renew it; whether it is held now."""
        now = self._clock()
        lasts = timedelta(seconds=lease_s)
        ends_at = now + lasts
        async with self._transaction() as connection:
            self._look(await connection.fetchrow(_READ, _KEY))
            token = self.token
            if token is not None:
                token = await connection.fetchval(_RENEW, _KEY, token, ends_at)
            if token is None:
                self.token = None
                token = await connection.fetchval(_TAKE, _KEY, now, ends_at, ends_at + lasts)
        self.token = token
        if token is not None:
            self._seen = token, ends_at
        return token is not None

    def _look(self, row: Any) -> bool:
        """Whether the database is older than it was; a clock that was set back may look the same,
        and then nothing comes of it but another look at the node."""
        now = None if row is None else (row["token"], row["expires_at"])
        older = self._seen is not None and (now is None or now < self._seen)
        self._seen = now
        if older:
            self._on_older()
        return older

    async def check(self, connection: Any) -> None:
        """Make sure, until the caller's transaction ends, that the lease is held. Raises LeaseLost.

        It locks: of two transactions that check, the second waits for the first.
        """
        row = await connection.fetchrow(f"{_READ} for update", _KEY)
        if self.token is None or row is None or row["token"] != self.token:
            raise LeaseLost
        if self._look(row):
            raise LeaseLost

    async def release(self) -> None:
        """Let the next process take it at once."""
        if self.token is None:
            return
        async with self._transaction() as connection:
            await connection.execute(_RELEASE, _KEY, self.token, self._clock())
        self.token = self._seen = None


async def lease_ends_at(connection: Any) -> datetime | None:
    """When the lease runs out that some process holds, or held; None when none ever did."""
    return await connection.fetchval("select expires_at from billing_state where key = $1", _KEY)
