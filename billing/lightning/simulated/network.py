"""The embedded network itself: nodes, invoices, payments and faults over one SQLite file.

Open it in process (tests, the oracle of property tests), or serve it to other processes with
`billing.lightning.simulated.server`. Only one process may have a data directory open. The state is
as durable as a node's: what was answered is on the disk, and HTLCs under way survive a kill -9.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, TextIO, TypeVar

from billing import bolt11_codec
from billing.bolt11_codec import DecodedInvoice
from billing.errors import BadInvoice, BillingError
from billing.lightning.simulated import faults, invoices, payments, wallets
from billing.lightning.simulated.faults import Fault, FaultKind, Taken
from billing.lightning.simulated.invoices import InvoiceRecord, Settled
from billing.lightning.simulated.payments import Departed, Ended, PaymentRecord
from billing.lightning.simulated.store import Store, Transaction
from billing.lightning.simulated.wallets import Audit, Refused, Wallet

T = TypeVar("T")
log = logging.getLogger(__name__)

DATABASE_NAME = "simulated-lightning.sqlite3"
NETWORK = "regtest"
PAGE = 200
_SCHEMA = wallets.WALLET_SCHEMA + invoices.INVOICE_SCHEMA + payments.PAYMENT_SCHEMA
_SCHEMA += faults.FAULT_SCHEMA


class NetworkInUse(BillingError):
    """Another process has this data directory open."""

    code = "simulated_network_in_use"


class ConnectionDropped(Exception):
    """A scripted fault: whoever carries the call must break its connection, without an answer."""


class Network:
    """Made by `Network.open`. Methods raise Refused, or ConnectionDropped where it is scripted.

    `clock` gives seconds since 1970. Timers run in real time; a test that moves a clock of its own
    calls `run_due` after it.
    """

    def __init__(self, lock: TextIO, latency_s: float, clock: Callable[[], float]) -> None:
        self._lock = lock
        self._latency_s = latency_s
        self._clock = clock
        self._settled: dict[str, asyncio.Event] = {}
        self._latest: dict[str, InvoiceRecord] = {}
        self._ended: dict[int, asyncio.Event] = {}
        self._departed = asyncio.Event()
        self._faults_scripted = False
        self._store: Store
        self._timer: asyncio.Task[None]

    @classmethod
    async def open(
        cls,
        data_dir: Path,
        *,
        network: str = NETWORK,
        latency_s: float = 0.0,
        clock: Callable[[], float] = time.time,
    ) -> Network:
        """Open the network in `data_dir`, made if it is new; `latency_s` is an HTLC's travel.

        Raises ValueError for any network but regtest, and NetworkInUse.
        """
        if network != NETWORK:
            raise ValueError(f"the simulated network is {NETWORK} only, never {network}")
        self = cls(_lock(data_dir), latency_s, clock)
        self._store = Store(data_dir / DATABASE_NAME, _SCHEMA, self._notice)
        await self._store.run(_make_nodes)
        self._faults_scripted = bool(await self._store.run(faults.scripted))
        self._timer = asyncio.create_task(self._run_timer())
        return self

    async def aclose(self) -> None:
        """Stop the clock and close the file; what is under way goes on at the next start."""
        self._timer.cancel()
        await asyncio.gather(self._timer, return_exceptions=True)
        await self._store.aclose()
        self._lock.close()

    # What a node does for its owner. Every call may meet a scripted fault.

    async def node(self, wallet: str, *, operation: str = "node_info") -> Wallet:
        """The node's key and balances."""
        return await self._call(wallet, operation, lambda tx: wallets.find(tx, wallet))

    async def create_invoice(
        self,
        wallet: str,
        *,
        amount_msat: int,
        description: str,
        expiry_s: int,
        idempotency_key: str | None = None,
        hash_description: bool = False,
        preimage: bytes | None = None,
    ) -> InvoiceRecord:
        def act(transaction: Transaction) -> InvoiceRecord:
            return invoices.create(
                transaction,
                wallet,
                amount_msat=amount_msat,
                description=description,
                expiry_s=expiry_s,
                idempotency_key=idempotency_key,
                now_s=self._clock(),
                hash_description=hash_description,
                preimage=preimage,
            )

        try:
            return await self._call(wallet, "create_invoice", act)
        except BadInvoice as error:
            raise Refused("malformed", str(error)) from None

    async def lookup_invoice(self, wallet: str, payment_hash: str) -> InvoiceRecord | None:
        def act(transaction: Transaction) -> InvoiceRecord | None:
            wallets.find(transaction, wallet)
            return invoices.lookup(transaction, wallet, payment_hash, now_s=self._clock())

        return await self._call(wallet, "lookup_invoice", act)

    async def cancel_invoice(self, wallet: str, payment_hash: str) -> bool:
        return await self._call(
            wallet, "cancel_invoice", lambda tx: invoices.cancel(tx, wallet, payment_hash)
        )

    async def pay_invoice(
        self,
        wallet: str,
        bolt11: str,
        *,
        max_fee_msat: int,
        timeout_s: float,
        max_cltv_blocks: int | None = None,
    ) -> PaymentRecord:
        """Pay, and wait up to `timeout_s` for the end. Whatever becomes of the caller, an HTLC
        that has left goes on."""
        try:
            invoice = bolt11_codec.decode(bolt11)
        except BadInvoice as error:
            raise Refused("malformed", str(error)) from None
        taken = await self._take(wallet, "pay_invoice", invoice)
        if taken.drop is FaultKind.DROP_BEFORE:
            raise ConnectionDropped

        def act(transaction: Transaction) -> PaymentRecord:
            return payments.begin(
                transaction,
                wallet,
                invoice,
                max_fee_msat=max_fee_msat,
                max_cltv_blocks=max_cltv_blocks,
                latency_s=self._latency_s,
                fault=taken.route,
                forget=taken.forget,
                now_s=self._clock(),
            )

        payment = await self._store.run(act)
        if taken.drop is FaultKind.DROP_AFTER:
            raise ConnectionDropped
        return await self._end_of(payment, timeout_s)

    async def lookup_payment(self, wallet: str, payment_hash: str) -> PaymentRecord | None:
        """None when the node has no record, or has lost it."""

        def act(transaction: Transaction) -> PaymentRecord | None:
            wallets.find(transaction, wallet)
            return payments.find(transaction, wallet, payment_hash)

        return await self._call(wallet, "lookup_payment", act)

    async def settlements(self, wallet: str, cursor: str | None) -> AsyncIterator[InvoiceRecord]:
        """What the wallet was paid after that cursor, then what it is paid, for ever."""
        taken = await self._take(wallet, "settlements", None)
        if taken.drop is FaultKind.DROP_BEFORE:
            raise ConnectionDropped
        if taken.route is not None:
            await _delay_or_refuse(taken.route)
        while True:
            # The event is taken before the look, so that nothing falls between the two.
            more = self._settled.setdefault(wallet, asyncio.Event())
            latest = self._latest.get(wallet)
            if latest is not None and invoices.follows(latest, cursor):
                found = [latest]
            else:
                found = await self._store.run(self._settled_after(wallet, cursor))
            for record in found:
                cursor = record.cursor
                yield record
                if taken.drop is FaultKind.DROP_AFTER:
                    raise ConnectionDropped
            if not found:
                await more.wait()

    async def list_received(
        self, wallet: str, *, since_s: float, after: str | None = None
    ) -> list[InvoiceRecord]:
        """A page of what the wallet was paid since then, after the one with that cursor."""
        return await self._call(
            wallet, "list_received", self._settled_after(wallet, after, limit=PAGE, since_s=since_s)
        )

    async def list_sent(
        self, wallet: str, *, since_s: float, after: int = 0
    ) -> list[PaymentRecord]:
        """A page of what left since then, after the one with that id, as the node lists it."""

        def act(transaction: Transaction) -> list[PaymentRecord]:
            return payments.listed_after(transaction, wallet, after, since_s=since_s, limit=PAGE)

        return await self._call(wallet, "list_sent", act)

    # What only the people who run the network do.

    async def ensure_wallet(self, name: str) -> None:
        """Make a wallet unless there is one. Raises Refused for a bad name, or one too many."""
        await self._store.run(lambda tx: wallets.ensure(tx, name))

    async def fund(self, wallet: str, amount_msat: int) -> None:
        """Give a wallet money from nowhere, or take some away."""
        await self._store.run(lambda tx: wallets.fund(tx, wallet, amount_msat))

    async def script(self, fault: Fault) -> None:
        """Let the next calls that match go wrong. Survives a restart."""
        await self._store.run(lambda tx: faults.script(tx, fault))
        self._faults_scripted = True

    async def scripted(self) -> list[Fault]:
        return await self._store.run(faults.scripted)

    async def clear_faults(self) -> None:
        await self._store.run(faults.clear)
        self._faults_scripted = False

    async def resolve(self, payment_hash: str, *, settle: bool) -> int:
        """End what hangs or travels for this hash; how many payments that were."""
        return await self._store.run(
            lambda tx: payments.resolve(tx, payment_hash, settle, now_s=self._clock())
        )

    async def forget(self, wallet: str, payment_hash: str) -> int:
        """Delete a node's history of a payment; how many attempts that were."""
        return await self._store.run(lambda tx: payments.forget(tx, wallet, payment_hash))

    async def wallets(self) -> list[Wallet]:
        return await self._store.run(lambda tx: [wallets.find(tx, n) for n in wallets.names(tx)])

    async def paid_out(self, wallet: str, *, limit: int = 1000) -> list[PaymentRecord]:
        """Every attempt to pay, newest first, those its node has forgotten too."""
        return await self._store.run(lambda tx: payments.history(tx, wallet, limit=limit))

    async def left_msat(self, wallet: str, payment_hash: str) -> int:
        """What a wallet has paid for that hash, fees not counted, whatever its node remembers."""
        return await self._store.run(lambda tx: payments.left_msat(tx, wallet, payment_hash))

    async def received(self, wallet: str, *, limit: int = 1000) -> list[InvoiceRecord]:
        """The first `limit` settlements."""
        return await self._store.run(self._settled_after(wallet, None, limit=limit))

    async def audit(self) -> Audit:
        return await self._store.run(wallets.audit)

    async def run_due(self) -> None:
        """Let HTLCs arrive whose time has come by the clock."""
        await self._store.run(lambda tx: payments.run_due(tx, self._clock()))

    def _settled_after(
        self, wallet: str, cursor: str | None, limit: int = 100, since_s: float = 0.0
    ) -> Callable[[Transaction], list[InvoiceRecord]]:
        def act(transaction: Transaction) -> list[InvoiceRecord]:
            index = invoices.index_of(transaction, wallet, cursor)
            return invoices.settled_after(
                transaction, wallet, index, now_s=self._clock(), limit=limit, since_s=since_s
            )

        return act

    async def _call(self, wallet: str, operation: str, act: Callable[[Transaction], T]) -> T:
        taken = await self._take(wallet, operation, None)
        if taken.drop is FaultKind.DROP_BEFORE:
            raise ConnectionDropped
        if taken.route is not None:
            await _delay_or_refuse(taken.route)
        result = await self._store.run(act)
        if taken.drop is FaultKind.DROP_AFTER:
            raise ConnectionDropped
        return result

    async def _take(self, wallet: str, operation: str, invoice: DecodedInvoice | None) -> Taken:
        if not self._faults_scripted:
            return faults.NOTHING

        def act(transaction: Transaction) -> Taken:
            payee = None if invoice is None else payments.payee_of(transaction, invoice)
            return faults.take(transaction, wallet, operation, payee)

        return await self._store.run(act)

    async def _end_of(self, payment: PaymentRecord, timeout_s: float) -> PaymentRecord:
        if payment.state != "in_flight":
            return payment
        ended = self._ended.setdefault(payment.payment_id, asyncio.Event())
        # It may have ended between the commit and now, before anybody listened.
        payment = await self._reread(payment)
        if payment.state == "in_flight":
            try:
                async with asyncio.timeout(timeout_s):
                    await ended.wait()
            except TimeoutError:
                return payment
            payment = await self._reread(payment)
        self._ended.pop(payment.payment_id, None)
        return payment

    async def _reread(self, payment: PaymentRecord) -> PaymentRecord:
        return await self._store.run(lambda tx: payments.get(tx, payment.payment_id))

    def _notice(self, notes: list[Any]) -> None:
        for note in notes:
            match note:
                case Settled(wallet, record):
                    self._latest[wallet] = record
                    if (event := self._settled.pop(wallet, None)) is not None:
                        event.set()
                case Ended(payment_id):
                    if (event := self._ended.pop(payment_id, None)) is not None:
                        event.set()
                case Departed():
                    self._departed.set()

    async def _run_timer(self) -> None:
        while True:
            self._departed.clear()
            try:
                await self.run_due()
                due_at_s = await self._store.run(payments.next_due_at_s)
            except sqlite3.Error:
                # A full disk, most likely. HTLCs stay in flight until there is room to end them.
                log.exception("the simulated network cannot write its file")
                due_at_s = self._clock() + 1.0
            try:
                async with asyncio.timeout(
                    None if due_at_s is None else max(0.0, due_at_s - self._clock())
                ):
                    await self._departed.wait()
            except TimeoutError:
                continue


def _make_nodes(transaction: Transaction) -> None:
    for name in (wallets.ROUTER, wallets.PAYER):
        wallets.ensure(transaction, name)


async def _delay_or_refuse(fault: Fault) -> None:
    if fault.kind is FaultKind.FAIL:
        raise Refused("refused", "a scripted fault of the simulated network")
    await asyncio.sleep(fault.delay_s)


def _lock(data_dir: Path) -> TextIO:
    """Held until the file is closed or the process is dead, however it died."""
    data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = (data_dir / f"{DATABASE_NAME}.lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise NetworkInUse(f"another process has {data_dir} open") from None
    return lock
