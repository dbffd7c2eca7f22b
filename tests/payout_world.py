"""A world for payouts: a database, the simulated network as oracle, payees' servers, one clock.

A `Process` is a payout runner that can be killed: its fuse is looked at before each commit, each
call of the node and each request to a payee. When it has burnt down, CrashNow goes off there, and
everywhere else in that process from then on. What was committed or sent stays. All else that a
process does can be seen by nobody, so these are all the moments at which its death makes a
difference: after the one, before the next.

After every commit of a process the books are checked, whatever it was doing.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, cast

from billing import ledger, payees, payout_control
from billing.invoice_watcher import InvoiceWatcher
from billing.invoices import Credit
from billing.ledger import LIGHTNING, Transfer
from billing.lightning import Capabilities, NodeInfo
from billing.lightning.simulated.backend import SimulatedBackend
from billing.lightning.simulated.network import Network
from billing.lightning.simulated.payments import PaymentRecord
from billing.lightning.simulated.wallets import ROUTER
from billing.lightning_address import LightningAddresses
from billing.outside_http import OutsideHttp
from billing.payout_records import PayoutRecord, list_payouts
from billing.payout_settings import PayoutSettings
from billing.payout_states import AttemptState, PayoutState
from billing.payouts import PayoutRunner
from billing.reconciliation import Reconciler
from billing.trial_balance import trial_balance
from billing.withdrawals import Withdrawals
from router.database import Database
from tests.memory_folder import memory_folder
from tests.payout_payees import CrashNow, Fuse, PayeeHttp, PayeeServers

START = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
SETTINGS = PayoutSettings(pay_timeout_s=0.05)


# `earned` is what is payable, on its way and paid, of each worker.
_CHECK = """
select
    (select coalesce(sum(amount_msat + case kind when 'withdrawal' then fee_cap_msat else 0 end), 0)
     from payouts where state in ('planned', 'sending'))::bigint as held_msat,
    (select coalesce(sum(balance_msat), 0) from ledger_balances
     where account = 'liabilities:payouts_sending')::bigint as sending_msat,
    (select json_object_agg(id, earned_msat) from (
        select replace(account, $1, '') as id, sum(amount_msat)::bigint as earned_msat from (
            select account, balance_msat as amount_msat from ledger_balances
            union all
            select account, amount_msat from payouts where state <> 'failed') t
        where starts_with(account, $1) group by 1) e) as earned,
    exists (select from payout_attempts where state in ('invoiced', 'submitted')
            group by payout_id having count(*) > 1) as crowded"""


class _Backend:
    """A process's connection to the router's node. `info` and `capabilities` may be overruled."""

    def __init__(self, inner: SimulatedBackend, fuse: Fuse) -> None:
        self._inner = inner
        self._fuse = fuse
        self.name = inner.name
        self.capabilities: Capabilities = inner.capabilities
        self.worst_case_msat: int | None = None
        self.info: NodeInfo | None = None
        self.error: Exception | None = None
        self.pays = 0
        # Overrules the next answers to pay_invoice or lookup_payment.
        self.answer: Callable[[str, Callable[[], Awaitable[Any]]], Awaitable[Any]] | None = None

    async def _call(self, operation: str, call: Callable[[], Awaitable[Any]]) -> Any:
        self._fuse.spark()
        if self.error is not None:
            raise self.error
        return await (self.answer(operation, call) if self.answer else call())

    async def node_info(self) -> NodeInfo:
        info = await self._call("node_info", self._inner.node_info)
        return self.info or info

    async def balance(self) -> Any:
        return await self._call("balance", self._inner.balance)

    async def worst_case_fee_msat(self, amount_msat: int) -> int | None:
        return self.worst_case_msat

    async def pay_invoice(self, bolt11: str, **limits: Any) -> Any:
        self.pays += 1
        return await self._call("pay_invoice", lambda: self._inner.pay_invoice(bolt11, **limits))

    async def lookup_payment(self, payment_hash: str) -> Any:
        return await self._call("lookup_payment", lambda: self._inner.lookup_payment(payment_hash))

    async def received_since(self, since: datetime) -> AsyncIterator[Any]:
        self._fuse.spark()
        async for settlement in self._inner.received_since(since):
            yield settlement

    async def sent_since(self, since: datetime) -> AsyncIterator[Any]:
        self._fuse.spark()
        async for payment in self._inner.sent_since(since):
            yield payment


class Process:
    """One process with a runner. `sparks_left`: how many places it lives through."""

    def __init__(self, world: World, settings: PayoutSettings, sparks_left: int | None) -> None:
        self.world = world
        self.fuse = Fuse(sparks_left)
        self.backend = _Backend(SimulatedBackend.in_process(world.network), self.fuse)
        self.addresses = LightningAddresses(
            cast(OutsideHttp, PayeeHttp(world.servers, self.fuse)),
            network="regtest",
            own_pubkey=world.pubkey,
            now=world.tick,
        )
        self.runner = PayoutRunner(
            self.transaction,
            cast(Any, self.backend),
            self.addresses,
            settings=settings,
            clock=world.tick,
            jitter=lambda: 0.5,
        )
        self.withdrawals = Withdrawals(
            self.transaction,
            cast(Any, self.backend),
            self.addresses,
            settings=settings,
            clock=world.tick,
            on_planned=self.runner.wake,
        )

    def reconciler(self) -> Reconciler:
        async def nothing(connection: Any, credit: Credit) -> None:
            return None

        backend = cast(Any, self.backend)
        watcher = InvoiceWatcher(self.transaction, backend, nothing, clock=self.world.tick)
        return Reconciler(self.transaction, backend, watcher, clock=self.world.tick)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Any]:
        opened = self.world.database.transaction()
        connection = await opened.__aenter__()
        try:
            yield connection
            self.fuse.spark()
        except BaseException:
            await opened.__aexit__(*sys.exc_info())
            raise
        # One commit at a time, so that what is checked is what this one has left.
        async with self.world.committing:
            await opened.__aexit__(None, None, None)
            await self.world.check_books()

    async def turn(self) -> bool:
        """One turn; False when it was killed in it."""
        before = asyncio.all_tasks()
        try:
            await self.runner.run_once()
        except CrashNow:
            left = [t for t in asyncio.all_tasks() - before if (t.get_name()).startswith("payout-")]
            await asyncio.gather(*left, return_exceptions=True)
            return False
        return not self.fuse.dead


class World:
    """`now` is the time of the network and, but for `skew`, of the processes."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.now = START
        self.skew = timedelta()
        self.network: Network
        self.servers: PayeeServers
        self.pubkey = ""
        self.earned_msat: dict[str, int] = defaultdict(int)
        self.committing = asyncio.Lock()
        self.checker: Any = None
        self._count = 0

    @classmethod
    @asynccontextmanager
    async def open(cls, database: Database) -> AsyncIterator[World]:
        self = cls(database)
        with memory_folder() as folder:
            self.network = await Network.open(folder, clock=lambda: self.now.timestamp())
            self.servers = PayeeServers(self.network)
            self.pubkey = (await self.network.node(ROUTER)).pubkey
            try:
                async with database.connection() as self.checker:
                    yield self
            finally:
                await self.network.aclose()

    def process(
        self, settings: PayoutSettings = SETTINGS, *, sparks_left: int | None = None
    ) -> Process:
        return Process(self, settings, sparks_left)

    def tick(self) -> datetime:
        """The clock of the processes. It moves on a little whenever it is read, as clocks do."""
        self.now += timedelta(microseconds=1)
        return self.now + self.skew

    async def pass_time(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)
        await self.network.run_due()

    async def earn(self, worker_id: str, amount_msat: int) -> None:
        self._count += 1
        self.earned_msat[worker_id] += amount_msat
        await self._receive(ledger.worker(worker_id), amount_msat)

    async def deposit(self, account_id: str, amount_msat: int) -> None:
        self._count += 1
        await self._receive(ledger.client(account_id), amount_msat)

    async def _receive(self, account: str, amount_msat: int) -> None:
        async with self.database.transaction() as connection:
            await ledger.post(
                connection,
                [Transfer(LIGHTNING, account, amount_msat, "received", f"r{self._count}")],
            )

    async def worker(
        self, worker_id: str, owed_msat: int = 2_000_000, *, host: str = "pay.example"
    ) -> None:
        """A worker with an address, and with money owed to it."""
        async with self.database.transaction() as connection:
            await payees.set_address(connection, worker_id, f"{worker_id}@{host}", now=self.now)
        await self.earn(worker_id, owed_msat)

    async def invoice(self, user: str, amount_msat: int, *, expiry_s: int = 600) -> str:
        await self.network.ensure_wallet(user)
        made = await self.network.create_invoice(
            user, amount_msat=amount_msat, description="cash out", expiry_s=expiry_s
        )
        return made.bolt11

    async def payouts(self, account: str | None = None) -> list[PayoutRecord]:
        """Newest first."""
        async with self.database.connection() as connection:
            return (await list_payouts(connection, account=account, limit=500)).payouts

    async def payout_of(self, worker_id: str) -> PayoutRecord:
        """The latest of a worker."""
        return (await self.payouts(ledger.worker(worker_id)))[0]

    async def balance_msat(self, account: str) -> int:
        async with self.database.connection() as connection:
            return await ledger.balance_msat(connection, account)

    async def received_msat(self, wallet: str) -> int:
        await self.network.ensure_wallet(wallet)
        return sum(r.amount_received_msat for r in await self.network.received(wallet))

    async def sent_msat(self, payout_id: str) -> int:
        """What has left the router's node for a payout, or is leaving it, routing fees included."""
        hashes = await self.hashes(payout_id)
        return sum(
            p.amount_msat + p.fee_msat
            for p in await self.network.paid_out(ROUTER)
            if p.payment_hash in hashes and p.state != "failed"
        )

    async def truth(self) -> dict[str, PaymentRecord]:
        """What became of each hash: paid if any HTLC was taken, else in flight if any is."""
        order = ("failed", "in_flight", "succeeded")
        return {
            payment.payment_hash: payment
            for payment in sorted(
                await self.network.paid_out(ROUTER), key=lambda p: order.index(p.state)
            )
        }

    async def hashes(self, payout_id: str) -> set[str]:
        async with self.database.connection() as connection:
            rows = await connection.fetch(
                "select payment_hash from payout_attempts"
                " where payout_id = $1 and payment_hash is not null",
                payout_id,
            )
        return {row["payment_hash"] for row in rows}

    async def live_hash(self, payout_id: str) -> str:
        async with self.database.connection() as connection:
            return await connection.fetchval(
                "select payment_hash from payout_attempts"
                " where payout_id = $1 and state = 'submitted'",
                payout_id,
            )

    async def check_books(self) -> None:
        """What must hold at every commit (families 2, 3)."""
        books = await trial_balance(self.checker)
        assert books.in_order, books
        row = await self.checker.fetchrow(_CHECK, ledger.worker(""))
        assert row["held_msat"] == row["sending_msat"]
        assert json.loads(row["earned"] or "{}") == self.earned_msat
        assert not row["crowded"], "two live hashes for one payout"

    async def check_payments(self) -> None:
        """What must hold between the books and the truth of the network (families 1, 6, 7)."""
        truth = await self.truth()
        async with self.database.connection() as connection:
            attempts = await connection.fetch(
                "select payout_id, payment_hash, state from payout_attempts"
                " where payment_hash is not null"
            )
        for payout in await self.payouts():
            sent = await self.sent_msat(payout.id)
            assert sent <= payout.amount_msat + payout.fee_cap_msat, payout
            if payout.kind.value == "worker":
                assert payout.amount_msat % 1000 == 0
            if payout.state is PayoutState.FAILED:
                assert sent == 0, f"counted as failed, and sent: {payout}"
            if payout.state is PayoutState.PAID:
                assert payout.fee_msat is not None
                assert sent == payout.amount_msat + payout.fee_msat
        for attempt in attempts:
            payment = truth.get(attempt["payment_hash"])
            succeeded = payment is not None and payment.state == "succeeded"
            if attempt["state"] == AttemptState.SUCCEEDED:
                assert succeeded
            elif attempt["state"] in (AttemptState.FAILED, AttemptState.ABANDONED):
                assert not succeeded

    async def check_node(self) -> None:
        """When nothing is under way: the books say of the node what the node says (family 3)."""
        async with self.database.connection() as connection:
            left_msat = await connection.fetchval(
                "select coalesce(sum(amount_msat), 0)::bigint from ledger_transfers"
                " where credit = 'assets:lightning'"
            )
        truly_left_msat = sum(
            p.amount_msat + p.fee_msat
            for p in await self.network.paid_out(ROUTER)
            if p.state == "succeeded"
        )
        assert left_msat == truly_left_msat
        assert (await self.network.audit()).balances

    async def decide_by_truth(self) -> int:
        """An operator who looks at the network itself decides what the runner cannot."""
        decided = 0
        truth = await self.truth()
        for payout in await self.payouts():
            if payout.alert not in ("node_forgot", "maybe_paid"):
                continue
            payment = truth.get(payout.payment_hash or "")
            if payment is not None and payment.state == "in_flight":
                continue
            paid = payment is not None and payment.state == "succeeded"
            async with self.database.transaction() as connection:
                await payout_control.decide(
                    connection,
                    payout.id,
                    preimage=payment.preimage if paid and payment else None,
                    fee_msat=payment.fee_msat if paid and payment else 0,
                    now=self.now,
                )
            decided += 1
        return decided
