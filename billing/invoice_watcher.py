"""Watching the node for what it is paid: by its stream, by polling, and by whoever knows more.

All of them end in `billing.invoices.record_settlement`, which credits once whoever comes first.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from billing.invoices import (
    Clock,
    Credit,
    LockStarted,
    Purpose,
    State,
    Transaction,
    record_settlement,
    utc_now,
)
from billing.lightning import BackendError, InvoiceState, LightningBackend, Settlement

log = logging.getLogger(__name__)

# Parts of a payment that came in time may be held for a minute before the set is complete.
EXPIRED_FOR = timedelta(minutes=2)
LATE_CHECKS = (timedelta(minutes=10), timedelta(hours=1), timedelta(hours=24), timedelta(days=7))


def next_check(
    now: datetime, created_at: datetime, expires_at: datetime, *, pushed: bool
) -> datetime | None:
    """When to ask the node about an unpaid invoice again; None: never.

    `pushed` says that the node reports settlements by itself, so that asking is a safety net.
    """
    if now < expires_at + LATE_CHECKS[0]:
        age = now - created_at
        if pushed:
            return now + timedelta(seconds=30)
        return now + timedelta(seconds=1 if age < timedelta(minutes=2) else 5)
    return next((expires_at + late for late in LATE_CHECKS if expires_at + late > now), None)


# What PostgreSQL refuses for the values it is given, whenever it is asked (classes of SQLSTATE).
_ALWAYS = frozenset({"22", "23", "42", "54"})


def _fails_always(error: Exception) -> bool:
    """Whether it is of no use to try again: not so when a connection broke, or two were in each other's
    way."""
    state = getattr(error, "sqlstate", None)
    if state is not None:
        return state[:2] in _ALWAYS
    return isinstance(error, ValueError | TypeError | LookupError | AssertionError | RecursionError)


@dataclass(frozen=True, slots=True)
class Receipt:
    """What our node says it was paid. `cursor`: where its stream goes on after this; None: it was not
    heard of by the stream."""

    payment_hash: str
    received_msat: int
    settled_at: datetime
    backend: str
    cursor: str | None


OnCredit = Callable[[Any, Credit], Awaitable[Callable[[], None] | None]]
AtOnce = Callable[[Receipt], Awaitable[Callable[[], None] | None]]


class InvoiceWatcher:
    """Follows the node's settlements, by stream and by poll, and credits them.

    `on_credit(connection, credit)` runs in the transaction of the credit, so that what a payment
    starts is started with it or not at all; what it returns is called after the commit.

    `at_once(receipt)` does the same for a quote that is paid in time and in full, in fewer steps and
    a transaction of its own. It returns what to call after that, or None when it has done nothing.

    `lock`: see `record_settlement`.
    """

    def __init__(
        self,
        transaction: Transaction,
        backend: LightningBackend,
        on_credit: OnCredit,
        *,
        at_once: AtOnce | None = None,
        lock: LockStarted | None = None,
        clock: Clock = utc_now,
    ) -> None:
        self._transaction = transaction
        self._backend = backend
        self._on_credit = on_credit
        self._at_once = at_once
        self._lock = lock
        self._clock = clock
        self._tasks: list[asyncio.Task] = []
        self._settling: set[asyncio.Task[bool]] = set()
        self._waiting: dict[str, set[asyncio.Future[None]]] = {}
        self.stream_alive = False
        # What the node was paid before it was used with these books is not booked: some nodes
        # replay all that they have ever been paid.
        self.joined_at: datetime | None = None

    @property
    def _cancels(self) -> bool:
        return self._backend.capabilities.cancel_invoice

    @property
    def pushed(self) -> bool:
        return self._backend.capabilities.push != "none"

    def first_check_at(self) -> datetime:
        return self._clock() + timedelta(seconds=10 if self.pushed else 1)

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._poll_for_ever(), name="invoice-poll")]
        if self.pushed:
            self._tasks.append(asyncio.create_task(self._stream_for_ever(), name="invoice-stream"))

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, *self._settling, return_exceptions=True)

    async def record(self, settlement: Settlement) -> bool:
        """Record what the node says it was paid, if it is not; whether that was news."""
        return await self._settle(
            settlement.payment_hash,
            settlement.amount_received_msat,
            settlement.settled_at,
            cursor=None,
        )

    async def check(self, payment_hash: str) -> None:
        """Ask the node about one invoice now, and credit it if it is settled.

        Whoever asks may go away: what is being credited is finished all the same.
        """
        status = await self._backend.lookup_invoice(payment_hash)
        if status.state is InvoiceState.SETTLED:
            settling = asyncio.create_task(
                self._settle(
                    payment_hash,
                    status.amount_received_msat,
                    status.settled_at or self._clock(),
                    cursor=None,
                )
            )
            self._settling.add(settling)
            settling.add_done_callback(self._settling.discard)
            await asyncio.shield(settling)

    async def hear(self, payment_hash: str, *, within_s: float) -> None:
        """Wait until this process has been told that the invoice is settled, and has recorded it.

        Whoever has paid is often back a moment before the node's stream has told us, and that costs
        less than asking the node. Without a stream it does not wait.
        """
        if not self.stream_alive:
            return
        told: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(payment_hash, set()).add(told)
        try:
            await asyncio.wait((told,), timeout=within_s)
        finally:
            waiting = self._waiting.get(payment_hash, set())
            waiting.discard(told)
            if not waiting:
                self._waiting.pop(payment_hash, None)

    async def poll_due(self, limit: int = 100) -> int:
        """Ask about the invoices whose time has come; returns how many were asked about."""
        async with self._transaction() as connection:
            due = await connection.fetch(
                "select payment_hash, created_at, expires_at from invoices"
                " where next_check_at <= $1 order by next_check_at limit $2",
                self._clock(),
                limit,
            )
        for row in due:
            dead = False
            try:
                await self.check(row["payment_hash"])
                dead = await self._sweep(row["payment_hash"], row["expires_at"])
            except BackendError as error:
                log.warning("invoice not checked payment_hash=%s: %s", row["payment_hash"], error)
            except Exception:
                # The others must not wait for it.
                log.exception("invoice not checked payment_hash=%s", row["payment_hash"])
            now = self._clock()
            again_at = next_check(now, row["created_at"], row["expires_at"], pushed=self.pushed)
            async with self._transaction() as connection:
                await connection.execute(
                    "update invoices set next_check_at = $2,"
                    " state = case when $3 < $4::timestamptz then 'expired' else state end"
                    " where payment_hash = $1 and state in ('open', 'expired')",
                    row["payment_hash"],
                    None if dead else again_at,
                    row["expires_at"] + timedelta(minutes=1),
                    now,
                )
        return len(due)

    async def _sweep(self, payment_hash: str, expires_at: datetime) -> bool:
        """Let the node give up an invoice that has expired; True: it can never settle any more, so
        nobody need ask again. Without this, those who ask for invoices and pay none would fill the
        node's list for ever."""
        if self._clock() < expires_at + EXPIRED_FOR or not self._cancels:
            return False
        return await self._backend.cancel_invoice(payment_hash)

    async def _settle(
        self, payment_hash: str, received_msat: int, settled_at: datetime, cursor: str | None
    ) -> bool:
        """Whether anything was booked by it."""
        receipt = Receipt(payment_hash, received_msat, settled_at, self._backend.name, cursor)
        news = await self._settle_at_once(receipt) or await self._settle_in_steps(receipt)
        for told in self._waiting.pop(payment_hash, ()):
            if not told.done():
                told.set_result(None)
        return news

    async def _settle_at_once(self, receipt: Receipt) -> bool:
        """Whether the short way has booked it; if not, nothing has happened."""
        if self._at_once is None:
            return False
        try:
            after = await self._at_once(receipt)
        except Exception as error:
            if not _fails_always(error):
                raise
            # Which part of it fails, and whose the money is, is found step by step.
            log.warning("a quote was not started at once, going step by step: %r", error)
            return False
        if after is None:
            return False
        _log_settled(receipt, State.PAID, Purpose.QUOTE)
        after()
        return True

    async def _settle_in_steps(self, receipt: Receipt) -> bool:
        after = None
        async with self._transaction() as connection:
            credit = await record_settlement(
                connection,
                payment_hash=receipt.payment_hash,
                received_msat=receipt.received_msat,
                settled_at=receipt.settled_at,
                joined_at=self.joined_at,
                lock=self._lock,
            )
            if isinstance(credit, Credit):
                after = await self._start(connection, credit)
            if receipt.cursor is not None:
                await connection.execute(
                    "insert into node_cursors (backend, cursor) values ($1, $2)"
                    " on conflict (backend) do update set cursor = excluded.cursor",
                    receipt.backend,
                    receipt.cursor,
                )
        if isinstance(credit, Credit):
            _log_settled(receipt, credit.state, credit.purpose)
        if after is not None:
            after()
        return credit is not None

    async def _start(self, connection: Any, credit: Credit) -> Callable[[], None] | None:
        """Start what a payment is for. What cannot be started, now or ever, leaves the money with its
        payer: an invoice that is never credited would hold up all that are settled after it."""
        try:
            async with connection.transaction():
                return await self._on_credit(connection, credit)
        except Exception as error:
            if not _fails_always(error):
                raise
            log.exception(
                "a payment is credited and starts nothing purpose=%s reference=%s",
                credit.purpose.value,
                credit.reference,
            )
            return None

    async def _stream_for_ever(self) -> None:
        pause_s = 0.1
        while True:
            try:
                async with self._transaction() as connection:
                    cursor = await connection.fetchval(
                        "select cursor from node_cursors where backend = $1", self._backend.name
                    )
                self.stream_alive = True
                async for settlement in self._backend.settlements(cursor):
                    pause_s = 0.1
                    await self._settle(
                        settlement.payment_hash,
                        settlement.amount_received_msat,
                        settlement.settled_at,
                        settlement.cursor,
                    )
            except Exception as error:
                # Whatever it was, money may still be coming in: go on from the stored cursor.
                log.warning("settlement stream broke, resuming: %r", error)
            self.stream_alive = False
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, 10)

    async def _poll_for_ever(self) -> None:
        while True:
            busy = 0
            try:
                busy = await self.poll_due()
            except Exception as error:
                log.warning("invoice poll failed, going on: %r", error)
            await asyncio.sleep(0.05 if busy else 1)


def _log_settled(receipt: Receipt, state: State, purpose: Purpose) -> None:
    log.info(
        "invoice settled payment_hash=%s state=%s received_msat=%d purpose=%s",
        receipt.payment_hash,
        state.value,
        receipt.received_msat,
        purpose.value,
    )
