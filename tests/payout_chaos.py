"""A seeded schedule of everything that can happen to payouts, and its end."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta

from billing import foreign_payments, ledger, payees, payout_control
from billing.errors import BillingError
from billing.lightning import BackendError
from billing.lightning.simulated.faults import Fault, FaultKind
from billing.lightning.simulated.wallets import ROUTER
from billing.payout_states import PayoutState
from tests.payout_payees import CrashNow
from tests.payout_world import SETTINGS, Process, World

OWED_MSAT = 2_000_000


async def end_what_hangs(world: World, *, settle: bool) -> None:
    for payment in await world.network.paid_out(ROUTER):
        if payment.state == "in_flight":
            await world.network.resolve(payment.payment_hash, settle=settle)


class Chaos:
    """A seeded schedule of everything that can happen."""

    WAITS_S = (0, 1, 5, 20, 61, 130, 700, 4_000)
    FAULTS = (
        Fault(FaultKind.DELAY, delay_s=30),
        Fault(FaultKind.DELAY, delay_s=900),
        Fault(FaultKind.HANG),
        Fault(FaultKind.FAIL),
        Fault(FaultKind.FAIL_LATE, delay_s=100),
        Fault(FaultKind.DROP_BEFORE),
        Fault(FaultKind.DROP_AFTER),
        Fault(FaultKind.DROP_BEFORE, operation="lookup_payment", times=2),
        Fault(FaultKind.DROP_AFTER, operation="node_info"),
        Fault(FaultKind.FAIL, operation="balance"),
    )

    def __init__(self, world: World, seed: int) -> None:
        self.world = world
        self.random = random.Random(seed)
        self.processes = [world.process(), world.process()]
        self.orders: list[tuple[str, str]] = []

    async def begin(self) -> None:
        """One payment that succeeded: without any, a lost history could not be noticed. Before it the
        comparison of a first start: what the node does from now on is these books' business."""
        await self.processes[0].reconciler().run_once()
        await self.world.worker("w0", OWED_MSAT)
        await self.processes[0].turn()
        assert (await self.world.payout_of("w0")).state is PayoutState.PAID
        for n in range(1, 4):
            await self.world.worker(f"w{n}", self.random.randrange(1_000_000, 3_000_000))
        await self.world.deposit("c0", 5_000_000)

    async def step(self) -> None:
        acts: list[tuple[int, Callable]] = [
            (30, self.turn),
            (8, self.turn_both),
            (12, self.turn_and_die),
            (20, self.wait),
            (12, self.trouble),
            (6, self.resolve),
            (6, self.earn),
            (5, self.withdraw),
            (3, self.jump),
            (2, self.forget_all),
            (2, self.change_address),
            (2, self.break_server),
            (2, self.pause),
            (4, self.compare),
            (2, self.spend_elsewhere),
            (2, self.confirm),
        ]
        (act,) = self.random.choices([a for _, a in acts], [weight for weight, _ in acts])
        await act()
        await self.world.check_payments()

    def living(self) -> Process:
        """One of the two, begun anew if it is dead."""
        n = self.random.randrange(2)
        if self.processes[n].fuse.dead:
            self.processes[n] = self.world.process()
        return self.processes[n]

    async def turn(self) -> None:
        await self.living().turn()

    async def turn_both(self) -> None:
        await asyncio.gather(self.living().turn(), self.living().turn())

    async def turn_and_die(self) -> None:
        process = self.living()
        process.fuse.sparks_left = process.fuse.sparks + self.random.randrange(60)
        await process.turn()
        process.fuse.dead = True

    async def wait(self) -> None:
        await self.world.pass_time(self.random.choice(self.WAITS_S))

    async def trouble(self) -> None:
        await self.world.network.script(self.random.choice(self.FAULTS))

    async def resolve(self) -> None:
        in_flight = [p for p in await self.world.network.paid_out(ROUTER) if p.state == "in_flight"]
        if in_flight:
            chosen = self.random.choice(in_flight)
            await self.world.network.resolve(chosen.payment_hash, settle=self.random.random() < 0.5)

    async def earn(self) -> None:
        await self.world.earn(f"w{self.random.randrange(4)}", self.random.randrange(1, 2_000_000))

    async def withdraw(self) -> None:
        process = self.living()
        amount_msat = self.random.randrange(50_000, 900_000)
        try:
            if self.random.random() < 0.5:
                bolt11 = await self.world.invoice("purse", amount_msat)
                await process.withdrawals.by_invoice("c0", bolt11)
                await process.withdrawals.by_invoice("c0", bolt11)
            else:
                await process.withdrawals.by_address(
                    "c0", "purse@pay.example", amount_msat // 1000 * 1000
                )
        except BillingError:
            pass  # too little money, or a fault met on the way: nothing was ordered

    async def jump(self) -> None:
        self.world.skew = timedelta(seconds=self.random.choice((-3600, 0, 0, 3600)))

    async def forget_all(self) -> None:
        for payment in await self.world.network.paid_out(ROUTER):
            await self.world.network.forget(ROUTER, payment.payment_hash)

    async def change_address(self) -> None:
        worker_id = f"w{self.random.randrange(4)}"
        async with self.world.database.transaction() as connection:
            await payees.set_address(
                connection,
                worker_id,
                f"{worker_id}{self.random.choice('abc')}@pay.example",
                now=self.world.tick(),
            )

    async def break_server(self) -> None:
        wrong = self.random.choice(("unreachable", "error", "no_invoice"))
        self.world.servers.broken = (
            {} if self.world.servers.broken else {f"w{self.random.randrange(4)}": wrong}
        )

    async def pause(self) -> None:
        async with self.world.database.transaction() as connection:
            if await payout_control.is_paused(connection):
                await payout_control.resume(connection)
            else:
                await payout_control.pause(connection, "test", now=self.world.now)

    async def compare(self) -> None:
        """Node and books, in the midst of it all; sometimes its process dies in it."""
        process = self.living()
        if self.random.random() < 0.5:
            process.fuse.sparks_left = process.fuse.sparks + self.random.randrange(12)
        with suppress(BackendError, CrashNow):
            await process.reconciler().run_once()
        process.fuse.sparks_left = None

    async def spend_elsewhere(self) -> None:
        """The operator pays from the same node, by his own hand: nothing is paid out from then on."""
        await self.world.network.clear_faults()
        bolt11 = await self.world.invoice("baker", self.random.randrange(10_000, 90_000))
        await self.world.network.pay_invoice(ROUTER, bolt11, max_fee_msat=10**9, timeout_s=0.01)
        await self.world.process().reconciler().run_once()

    async def confirm(self) -> None:
        truth = await self.world.truth()
        async with self.world.database.transaction() as connection:
            for payment in await foreign_payments.listed(connection):
                if payment.confirmed_at is None:
                    # None of ours was ever taken for one of his.
                    assert truth[payment.payment_hash].payee == "baker"
                    await foreign_payments.confirm(
                        connection, payment.payment_hash, ledger.OPERATOR, now=self.world.now
                    )

    async def end(self) -> None:
        """All that was wrong is put right; then everything must come to its end."""
        world = self.world
        world.servers.broken = {}
        world.skew = timedelta()
        await world.network.clear_faults()
        await end_what_hangs(world, settle=self.random.random() < 0.5)
        async with world.database.transaction() as connection:
            await payout_control.resume(connection)
        await self.confirm()
        await world.pass_time(2 * 3600)
        process = world.process(replace(SETTINGS, interval_s=1, minimum_msat=1_000))
        for _ in range(60):
            await world.pass_time(700)
            await process.turn()
            await world.decide_by_truth()
            payouts = await world.payouts()
            owed = [await world.balance_msat(ledger.worker(f"w{n}")) for n in range(4)]
            is_open = [p for p in payouts if p.state in (PayoutState.PLANNED, PayoutState.SENDING)]
            if all(msat < 1_000 for msat in owed) and not is_open:
                return
        raise AssertionError("not all has ended")
