"""What planning and sending share: the connections to the database, the node and the payees."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from billing.domain_breaker import DomainBreaker
from billing.lightning import LightningBackend, NodeBalance
from billing.lightning_address import LightningAddresses
from billing.payout_lease import PayoutLease
from billing.payout_settings import PayoutSettings, room_msat
from billing.payout_states import OPEN_PAYOUT, PayoutState

Clock = Callable[[], datetime]
Transaction = Callable[[], AbstractAsyncContextManager[Any]]

# After a failure that is not the payee's: soon, but not at once.
SOON = timedelta(minutes=1)
# Our own doing, or nobody's: no reason to leave an address alone for longer and longer.
NOT_THE_PAYEES_FAULT = frozenset({"busy", "too_many_lookups"})


@dataclass(slots=True)
class PayoutContext:
    """One runner's surroundings. `short_of_balance` is set by whoever finds the node too poor."""

    transaction: Transaction
    backend: LightningBackend
    addresses: LightningAddresses
    lease: PayoutLease
    settings: PayoutSettings
    clock: Clock
    jitter: Callable[[], float]
    breaker: DomainBreaker = field(default_factory=DomainBreaker)
    short_of_balance: bool = False

    @asynccontextmanager
    async def move(self) -> AsyncIterator[Any]:
        """A transaction in which this process is the one that pays. Raises LeaseLost."""
        async with self.transaction() as connection:
            await self.lease.check(connection)
            yield connection

    async def affords(
        self, connection: Any, balance: NodeBalance, amount_msat: int, payout_id: str
    ) -> bool:
        """Whether the node can part with `amount_msat` for this payout beside what is sent already.

        One payout at a time may be larger than the part that may be under way together: else it
        would never be sent.
        """
        if balance.spendable_msat < amount_msat:
            self.short_of_balance = True
            return False
        others_msat = await _sum_msat(connection, [PayoutState.SENDING], except_id=payout_id)
        return others_msat == 0 or amount_msat <= room_msat(balance, others_msat)

    async def room_msat(self, connection: Any, balance: NodeBalance) -> int:
        """What may be planned beside all that is planned or sent already."""
        return room_msat(balance, await _sum_msat(connection, list(OPEN_PAYOUT)))


def monotonic_s() -> float:
    """Seconds that pass even while the process is stopped by a signal, whatever the clock shows."""
    return asyncio.get_running_loop().time()


async def _sum_msat(connection: Any, states: list[PayoutState], except_id: str = "") -> int:
    return await connection.fetchval(
        "select coalesce(sum(amount_msat + fee_cap_msat), 0)::bigint from payouts"
        " where state = any($1::text[]) and id <> $2",
        states,
        except_id,
    )
