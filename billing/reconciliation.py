"""The node's own history against the books, at each start and then daily.

    the node was paid, and no transfer of ours says so
        an invoice of ours    credited, as if the stream had told it
        none of ours          assets:lightning / liabilities:unassigned
    the node has paid, and no attempt of ours has asked it to
        billing.foreign_payments: nothing is paid out until an operator says whose it was
    the node has paid, and our own record of it is behind or wrong
        billing.payout_memory

The second is how a database that was restored from a backup gives itself away: it does not know the
payouts that were made since. So nothing is paid out before the first comparison since the start.

What a node did before it was first used with these books is none of their business.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, TypeVar

from billing import foreign_payments, ledger, payout_memory
from billing.invoice_watcher import InvoiceWatcher
from billing.invoices import Clock, Transaction, utc_now
from billing.lightning import (
    BackendRejected,
    LightningBackend,
    NodeInfo,
    PaymentState,
    SentPayment,
    Settlement,
)

log = logging.getLogger(__name__)

T = TypeVar("T")
EVERY_S = 86_400.0
RETRY_S = 30.0
# What was begun before the last comparison and has shown only since then; also clocks that differ.
OVERLAP = timedelta(hours=26)
_PAGE = 500
_JOINED = "node_joined:"
_RECONCILED = "node_reconciled:"


@dataclass(frozen=True, slots=True)
class Findings:
    """What one comparison has found. `receipts` were not booked before; `foreign` payments are new.

    `difference_msat` is what the node holds beyond what is booked as there: the operator's own
    money as far as it is not booked yet; below zero, money is missing. Payments that are moving at
    that moment may show in it.
    """

    at: datetime
    since: datetime
    receipts: int
    foreign: int
    held_msat: int
    booked_msat: int

    @property
    def difference_msat(self) -> int:
        return self.held_msat - self.booked_msat


async def joined_at(connection: Any, node_pubkey: str, *, now: datetime) -> datetime:
    """Since when this node has been used with these books: from the first call on. Books that were
    kept before any node was written down are of the first one."""
    began = await connection.fetchval(
        "select min(created_at) from ledger_transfers where not exists"
        " (select from billing_state where starts_with(key, $1))",
        _JOINED,
    )
    await _mark(connection, _JOINED + node_pubkey, min(began or now, now), again=False)
    return await _read(connection, _JOINED + node_pubkey)


async def reconciled_at(connection: Any, node_pubkey: str) -> datetime | None:
    """When this node was last compared with these books."""
    return await _read(connection, _RECONCILED + node_pubkey)


class Reconciler:
    """Compares, at its start and then daily; `on_done` is called after each comparison.

    `ready` says that there was one since the start, or that there can be none.
    """

    def __init__(
        self,
        transaction: Transaction,
        backend: LightningBackend,
        watcher: InvoiceWatcher,
        *,
        clock: Clock = utc_now,
        on_done: Callable[[], None] = lambda: None,
    ) -> None:
        self._transaction = transaction
        self._backend = backend
        self._watcher = watcher
        self._clock = clock
        self._on_done = on_done
        self._task: asyncio.Task[None] | None = None
        self._soon = asyncio.Event()
        self._doubts = 0
        self.ready = False
        self.last: Findings | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="reconciliation")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def doubt(self) -> None:
        """The books are others than they were, as after a backup was restored: compare them now."""
        log.error("the database is older than it was: nothing is paid out before it was compared")
        self.ready = False
        self._doubts += 1
        self._soon.set()

    async def run_once(self) -> Findings:
        """Compare now. Raises BackendError; what was written until then stands."""
        doubts = self._doubts
        node = await self._backend.node_info()
        now = self._clock()
        async with self._transaction() as connection:
            joined = await joined_at(connection, node.pubkey, now=now)
            before = await reconciled_at(connection, node.pubkey)
        # A clock that was ahead must not hide what was done since.
        since = max(joined, min(before or joined, now) - OVERLAP)
        receipts = await self._receipts(since)
        foreign = await self._payments(node, since, now)
        await self._ends()
        held_msat = (await self._backend.balance()).held_msat
        async with self._transaction() as connection:
            await foreign_payments.book_confirmed(connection, now=now)
            await _mark(connection, _RECONCILED + node.pubkey, now, again=True)
            booked_msat = await ledger.balance_msat(connection, ledger.LIGHTNING)
        self.ready = doubts == self._doubts
        self.last = Findings(now, since, receipts, foreign, held_msat, booked_msat)
        self._tell(self.last)
        self._on_done()
        return self.last

    async def _run(self) -> None:
        while True:
            wait_s = EVERY_S
            self._soon.clear()
            try:
                await self.run_once()
            except BackendRejected as error:
                # It will not be otherwise until the node is set up otherwise.
                log.warning(
                    "the node does not list what it did, so a restored database is not noticed: %s",
                    error,
                )
                self.ready = True
                self._on_done()
            except Exception as error:
                # Whatever it was, the node or the database: payouts wait, so try again soon.
                log.warning("node and books not compared, trying again: %r", error)
                wait_s = RETRY_S
            try:
                async with asyncio.timeout(wait_s):
                    await self._soon.wait()
            except TimeoutError:
                continue

    async def _receipts(self, since: datetime) -> int:
        """Record what is missing; how many receipts that were."""
        missing = 0
        async for page in _pages(self._backend.received_since(since)):
            page = [one for one in page if one.settled_at >= since]
            async with self._transaction() as connection:
                booked = await _booked(connection, page)
            for settlement in page:
                if settlement.payment_hash not in booked:
                    missing += await self._watcher.record(settlement)
        return missing

    async def _payments(self, node: NodeInfo, since: datetime, now: datetime) -> int:
        """Write down what no attempt of ours has asked for; how many are new."""
        new = 0
        async for page in _pages(self._backend.sent_since(since)):
            page = [one for one in page if one.sent_at >= since]
            # After the node's answer: whatever we ask a node for was committed before.
            async with self._transaction() as connection:
                await payout_memory.adopt(
                    connection,
                    page,
                    backend=self._backend.name,
                    node_pubkey=node.pubkey,
                    now=now,
                )
                for payment in await foreign_payments.unknown(connection, page):
                    new += await self._note(connection, payment, node, now)
                contradicted = await payout_memory.failed_here(connection, page)
            for row in contradicted:
                await payout_memory.put_right(self._transaction, self._backend, row, now=now)
        return new

    async def _note(
        self, connection: Any, payment: SentPayment, node: NodeInfo, now: datetime
    ) -> bool:
        is_new = await foreign_payments.note(connection, payment, node_pubkey=node.pubkey, now=now)
        if is_new:
            log.error(
                "the node has made a payment that these books do not know: nothing is paid out until"
                " an operator confirms it payment_hash=%s amount_msat=%d",
                payment.payment_hash,
                payment.amount_msat,
            )
        return is_new

    async def _ends(self) -> None:
        """Of those that were in flight: what became of them, though the list may begin later."""
        async with self._transaction() as connection:
            hashes = await foreign_payments.in_flight(connection)
        for payment_hash in hashes:
            status = await self._backend.lookup_payment(payment_hash)
            if status.state in (PaymentState.SUCCEEDED, PaymentState.FAILED):
                async with self._transaction() as connection:
                    await foreign_payments.ended(
                        connection, payment_hash, status.state, fee_msat=status.fee_msat
                    )

    def _tell(self, found: Findings) -> None:
        level = logging.WARNING if found.difference_msat < 0 else logging.INFO
        log.log(
            level,
            "node and books compared receipts=%d foreign=%d held_msat=%d booked_msat=%d",
            found.receipts,
            found.foreign,
            found.held_msat,
            found.booked_msat,
        )


async def _booked(connection: Any, settlements: list[Settlement]) -> set[str]:
    ids = {ledger.transfer_id(one.payment_hash, "received"): one for one in settlements}
    rows = await connection.fetch(
        "select id from ledger_transfers where id = any($1::text[])", list(ids)
    )
    return {ids[row["id"]].payment_hash for row in rows}


async def _pages(source: AsyncIterator[T]) -> AsyncIterator[list[T]]:
    page: list[T] = []
    async for one in source:
        page.append(one)
        if len(page) == _PAGE:
            yield page
            page = []
    if page:
        yield page


async def _read(connection: Any, key: str) -> Any:
    return await connection.fetchval("select set_at from billing_state where key = $1", key)


async def _mark(connection: Any, key: str, at: datetime, *, again: bool) -> None:
    await connection.execute(
        "insert into billing_state (key, value, set_at) values ($1, '', $2) on conflict (key)"
        + (" do update set set_at = excluded.set_at" if again else " do nothing"),
        key,
        at,
    )
