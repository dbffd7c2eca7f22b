"""A receipt is credited once, whoever tells of it, how often, in which order and through which crash.

The simulated network is the oracle: it knows what our node was paid (lightning.md 5.2, family 5).
`SATHERD_CHAOS_SEEDS=1000 pytest tests/test_settlement_chaos.py` for longer.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from datetime import datetime, timedelta
from typing import Any

import pytest

from billing import invoices, ledger
from billing.invoice_watcher import InvoiceWatcher
from billing.invoices import Credit, Purpose, State
from billing.ledger import Transfer
from billing.lightning import BackendError, InvoiceState, Settlement
from billing.lightning.simulated.backend import SimulatedBackend
from billing.lightning.simulated.faults import Fault, FaultKind
from billing.lightning.simulated.wallets import PAYER, ROUTER
from billing.reconciliation import Reconciler
from router.database import Database
from tests.payout_payees import CrashNow, Fuse
from tests.payout_world import World

SEEDS = int(os.environ.get("SATHERD_CHAOS_SEEDS", "6"))
PRICE_MSAT = 7_000


@pytest.fixture
async def world(database: Database) -> AsyncIterator[World]:
    async with World.open(database) as opened:
        yield opened


class Watching:
    """One process that watches for receipts. It dies where its fuse burns down: before a commit."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.fuse = Fuse()
        self.backend = SimulatedBackend.in_process(world.network)
        self.watcher = InvoiceWatcher(
            self.transaction, self.backend, self.start_what_was_bought, clock=world.tick
        )
        self.reconciler = Reconciler(self.transaction, self.backend, self.watcher, clock=world.tick)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Any]:
        async with self.world.database.transaction() as connection:
            yield connection
            self.fuse.spark()

    async def start_what_was_bought(self, connection: Any, credit: Credit) -> Callable[[], None]:
        """As the router does: in time and in full, the fee goes into escrow, in the same commit."""
        if credit.state is State.PAID:
            hold = Transfer(
                ledger.client(credit.account_id),
                ledger.escrow(credit.reference),
                PRICE_MSAT,
                "hold",
                credit.reference,
            )
            assert await ledger.post(connection, [hold]), "started before"
        return lambda: None


class Chaos:
    def __init__(self, world: World, seed: int) -> None:
        self.world = world
        self.random = random.Random(seed)
        self.process = Watching(world)
        self.hashes: list[str] = []
        self.bolt11: dict[str, str] = {}
        self.foreign: list[str] = []
        self.told: list[Settlement] = []

    async def issue(self) -> None:
        """An invoice of ours, or sometimes one that another program has asked our node for."""
        await self.make(self.random.choice((60, 600)), ours=self.random.random() > 0.15)

    async def make(self, expiry_s: int, *, ours: bool) -> None:
        made = await self.world.network.create_invoice(
            ROUTER, amount_msat=PRICE_MSAT, description="prompt", expiry_s=expiry_s
        )
        self.bolt11[made.payment_hash] = made.bolt11
        if not ours:
            self.foreign.append(made.payment_hash)
            self.hashes.append(made.payment_hash)
            return
        number = len(self.hashes)
        async with self.world.database.transaction() as connection:
            await invoices.store_invoice(
                connection,
                payment_hash=made.payment_hash,
                bolt11=made.bolt11,
                amount_msat=PRICE_MSAT,
                account_id=f"c{number}",
                purpose=Purpose.QUOTE,
                reference=f"j{number}",
                expires_at=datetime.fromtimestamp(made.expires_at_s, self.world.now.tzinfo),
                first_check_at=self.world.now,
            )
        self.hashes.append(made.payment_hash)

    async def pay(self) -> None:
        if not self.hashes:
            return
        bolt11 = self.bolt11[self.random.choice(self.hashes)]
        # What the payer is refused is the payer's own affair.
        try:
            await self.world.network.pay_invoice(PAYER, bolt11, max_fee_msat=10**9, timeout_s=0.01)
        except Exception as error:
            assert "expired" in str(error) or "dropped" in repr(error).lower(), error

    async def stream(self) -> None:
        """Some settlements as the node streams them, from the cursor that is stored."""
        async with self.world.database.connection() as connection:
            cursor = await connection.fetchval("select cursor from node_cursors")
        wanted = self.random.randrange(1, 4)
        stream = self.process.backend.settlements(cursor)
        try:
            async with asyncio.timeout(0.05):
                async for settlement in stream:
                    self.told.append(settlement)
                    await self.record(settlement, settlement.cursor)
                    wanted -= 1
                    if not wanted:
                        break
        except TimeoutError:
            pass
        finally:
            await stream.aclose()  # type: ignore[attr-defined]

    async def record(self, told: Settlement, cursor: str | None) -> None:
        await self.process.watcher._settle(
            told.payment_hash, told.amount_received_msat, told.settled_at, cursor
        )

    async def tell_again(self) -> None:
        """What was told before, in any order, and at once."""
        again = self.random.choices(self.told, k=3) if self.told else []
        await asyncio.gather(*(self.record(one, None) for one in again))

    async def hint(self) -> None:
        """A webhook: somebody says that an invoice was paid; the node is asked, not believed."""
        if self.hashes:
            await self.process.watcher.check(self.random.choice(self.hashes))

    async def poll(self) -> None:
        await self.process.watcher.poll_due(limit=10)

    async def compare(self) -> None:
        await self.process.reconciler.run_once()

    async def wait(self) -> None:
        await self.world.pass_time(self.random.choice((0, 1, 10, 61, 700)))

    async def jump(self) -> None:
        self.world.skew = timedelta(seconds=self.random.choice((-3600, 0, 0, 3600)))

    async def trouble(self) -> None:
        operation = self.random.choice(("lookup_invoice", "list_received", "cancel_invoice"))
        kind = self.random.choice((FaultKind.DROP_BEFORE, FaultKind.DROP_AFTER))
        await self.world.network.script(Fault(kind, operation))

    async def step(self) -> None:
        acts = [
            (12, self.issue),
            (16, self.pay),
            (14, self.stream),
            (8, self.tell_again),
            (10, self.hint),
            (12, self.poll),
            (6, self.compare),
            (10, self.wait),
            (3, self.jump),
            (3, self.trouble),
        ]
        (act,) = self.random.choices([a for _, a in acts], [weight for weight, _ in acts])
        if self.process.fuse.dead:
            self.process = Watching(self.world)
        if self.random.random() < 0.25:
            fuse = self.process.fuse
            fuse.sparks_left = fuse.sparks + self.random.randrange(4)
        with suppress(BackendError, CrashNow):
            await act()
        self.process.fuse.sparks_left = None
        await self.world.check_books()

    async def end(self) -> None:
        await self.world.network.clear_faults()
        self.world.skew = timedelta()
        self.process = Watching(self.world)
        await self.process.reconciler.run_once()
        while await self.process.watcher.poll_due():
            await self.world.pass_time(11)

    async def check(self) -> None:
        """What the node was paid is booked, to the msat; and each payment once."""
        received = {one.payment_hash: one for one in await self.world.network.received(ROUTER)}
        async with self.world.database.connection() as connection:
            rows = await connection.fetch("select * from invoices")
            booked_msat = await ledger.balance_msat(connection, ledger.LIGHTNING)
            starts = await connection.fetchval(
                "select count(*) from ledger_transfers where code = 'hold'"
            )
            credits = await connection.fetch(
                "select reference, count(*) as n from ledger_transfers"
                " where code = 'received' group by reference"
            )
        assert {row["reference"] for row in credits} == received.keys()
        assert all(row["n"] == 1 for row in credits)
        assert booked_msat == sum(one.amount_received_msat for one in received.values())
        assert starts == sum(row["state"] == State.PAID for row in rows)
        for row in rows:
            paid = row["payment_hash"] in received
            assert paid == (row["state"] in (State.PAID, State.LATE)), row
        unassigned = [one for one in self.foreign if one in received]
        assert await self.world.balance_msat(ledger.UNASSIGNED) == PRICE_MSAT * len(unassigned)


@pytest.mark.parametrize("seed", range(SEEDS))
async def test_whoever_tells_of_a_receipt_and_however_often_it_is_credited_once(
    world: World, seed: int
):
    """[3, 5, 8] Stream, poll, webhook, comparison; in any order, at once, through crashes before any
    commit, lost connections and a clock that jumps an hour."""
    chaos = Chaos(world, seed)
    await chaos.process.reconciler.run_once()
    await world.pass_time(5)
    for _ in range(70):
        await chaos.step()
    await chaos.end()
    await chaos.check()


async def test_an_invoice_that_nobody_pays_is_given_up_by_the_node_and_not_asked_for_again(
    world: World,
):
    """Who asks for invoices and pays none leaves nothing behind: not here, and not in the node."""
    chaos = Chaos(world, 0)
    for _ in range(5):
        await chaos.make(600, ours=True)
    watcher, backend = chaos.process.watcher, chaos.process.backend
    await world.pass_time(600 + 30)
    await watcher.poll_due()
    for payment_hash in chaos.hashes:
        assert (await backend.lookup_invoice(payment_hash)).state is InvoiceState.EXPIRED
    await world.pass_time(120)
    await watcher.poll_due()
    for payment_hash in chaos.hashes:
        assert (await backend.lookup_invoice(payment_hash)).state is InvoiceState.CANCELED
    async with world.database.connection() as connection:
        left = await connection.fetch("select state, next_check_at from invoices")
    assert {(row["state"], row["next_check_at"]) for row in left} == {("expired", None)}
