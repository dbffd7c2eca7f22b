"""Which process pays, and what keeps it from paying: the node, an admin, another process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta

import pytest

from billing import ledger, payees, payout_control
from billing.lightning import (
    BackendAuthError,
    BackendUnavailable,
    NodeInfo,
)
from billing.lightning.simulated.backend import SimulatedBackend
from billing.lightning.simulated.faults import Fault, FaultKind
from billing.lightning.simulated.serving import NetworkServer
from billing.lightning.simulated.wallets import ROUTER
from billing.lightning_address import LightningAddresses
from billing.outside_http import OutsideHttp
from billing.outside_url import OutsideRules
from billing.payout_control import Blocked
from billing.payout_lease import PayoutLease
from billing.payout_states import Alert, AttemptState, PayoutState
from billing.payouts import PayoutRunner
from router.database import Database
from tests.payout_world import SETTINGS, World


@pytest.fixture
async def world(database: Database) -> AsyncIterator[World]:
    async with World.open(database) as opened:
        yield opened
        await opened.check_books()
        await opened.check_payments()


async def test_a_node_that_is_too_poor_pauses_payouts_and_burns_no_attempt(world: World):
    start_msat = (await world.network.node(ROUTER)).balance_msat
    await world.network.fund(ROUTER, 10_000 - start_msat)
    await world.worker("w1")
    process = world.process()
    for _ in range(3):
        await process.runner.run_once()
    assert await world.payouts() == []
    async with world.database.connection() as connection:
        state = await payout_control.control_state(connection)
        address = await payees.get_address(connection, "w1", now=world.now)
    assert state.blocked is Blocked.INSUFFICIENT_BALANCE
    assert address is not None and address.failure_code is None
    await world.network.fund(ROUTER, 100_000_000)
    await process.runner.run_once()
    await process.runner.run_once()
    assert (await world.payout_of("w1")).state is PayoutState.PAID
    async with world.database.connection() as connection:
        assert (await payout_control.control_state(connection)).blocked is None


async def test_a_node_that_is_poor_only_when_asked_gets_the_same_invoice_later(world: World):
    await world.worker("w1")
    process = world.process()

    async def poor(operation: str, call):
        balance_msat = (await world.network.node(ROUTER)).balance_msat
        if operation == "pay_invoice":
            await world.network.fund(ROUTER, -balance_msat)
        try:
            return await call()
        finally:
            if operation == "pay_invoice":
                await world.network.fund(ROUTER, balance_msat)

    process.backend.answer = poor
    await process.runner.run_once()
    payout = await world.payout_of("w1")
    assert (payout.state, payout.attempt_state) == (PayoutState.PLANNED, AttemptState.INVOICED)
    process.backend.answer = None
    await world.pass_time(10)
    await process.runner.run_once()
    again = await world.payout_of("w1")
    assert again.state is PayoutState.PAID
    assert again.payment_hash == payout.payment_hash
    assert len(world.servers.amounts_msat) == 1


@pytest.mark.parametrize(
    ("error", "blocked"),
    [
        (BackendUnavailable("test", "any", "refused"), Blocked.NODE_UNREACHABLE),
        (BackendAuthError("test", "any", "wrong key"), Blocked.NODE_REFUSES_KEY),
    ],
)
async def test_a_node_that_cannot_be_used_pauses_payouts(world: World, error, blocked: Blocked):
    await world.worker("w1")
    process = world.process()
    process.backend.error = error
    assert await process.runner.run_once() == 0
    async with world.database.connection() as connection:
        assert (await payout_control.control_state(connection)).blocked is blocked
    process.backend.error = None
    await process.runner.run_once()
    assert (await world.payout_of("w1")).state is PayoutState.PAID


async def test_nothing_new_is_sent_by_a_node_that_is_not_synced(world: World):
    await world.worker("w1")
    process = world.process()
    process.backend.info = NodeInfo(world.pubkey, "router", "1", "regtest", synced=False)
    await process.runner.run_once()
    assert await world.payouts() == []
    process.backend.info = None
    await process.runner.run_once()
    assert (await world.payout_of("w1")).state is PayoutState.PAID


async def test_another_node_pays_nothing_while_a_payout_is_unresolved_at_the_first(world: World):
    await world.network.script(Fault(FaultKind.HANG))
    await world.worker("w1")
    process = world.process()
    await process.runner.run_once()
    await world.worker("w2")
    other = NodeInfo("02" + "ab" * 32, "other", "1", "regtest", synced=True)
    process.backend.info = other
    await world.pass_time(30)
    await process.runner.run_once()
    assert len(await world.payouts()) == 1
    assert (await world.payout_of("w1")).alert is Alert.NODE_CHANGED
    async with world.database.connection() as connection:
        assert (await payout_control.control_state(connection)).blocked is Blocked.NODE_CHANGED
    process.backend.info = None
    await world.network.resolve(
        await world.live_hash((await world.payout_of("w1")).id), settle=True
    )
    await world.pass_time(60)
    for _ in range(2):
        await process.runner.run_once()
    assert {p.state for p in await world.payouts()} == {PayoutState.PAID}


async def test_a_paused_runner_sends_nothing_and_still_finds_out(world: World):
    await world.network.script(Fault(FaultKind.HANG))
    await world.worker("w1")
    process = world.process()
    await process.runner.run_once()
    async with world.database.transaction() as connection:
        await payout_control.pause(connection, "the operator said so", now=world.now)
        await payout_control.pause(connection, "and again", now=world.now)
    await world.worker("w2")
    await world.network.resolve(
        await world.live_hash((await world.payout_of("w1")).id), settle=True
    )
    await world.pass_time(60)
    for _ in range(2):
        await process.runner.run_once()
    assert (await world.payout_of("w1")).state is PayoutState.PAID
    assert await world.payouts(ledger.worker("w2")) == []
    async with world.database.transaction() as connection:
        assert (await payout_control.control_state(connection)).paused_why == "the operator said so"
        await payout_control.resume(connection)
    await process.runner.run_once()
    assert (await world.payout_of("w2")).state is PayoutState.PAID


async def test_two_runners_on_one_database_pay_once(world: World):
    """Issue 3: two routers, one payout: one payment."""
    for n in range(6):
        await world.worker(f"w{n}")
    one, two = world.process(), world.process()
    await asyncio.gather(*(p.runner.run_once() for p in (one, two, one, two)))
    assert one.runner.is_the_one != two.runner.is_the_one
    assert one.backend.pays + two.backend.pays == 6
    assert len(await world.network.paid_out(ROUTER)) == 6


@pytest.mark.parametrize("behind_s", [0.001, SETTINGS.lease_s / 2, 3600])
async def test_a_clock_that_is_a_little_behind_takes_no_lease_and_one_that_is_far_behind_does(
    world: World, behind_s: float
):
    one, two = world.process(), world.process()
    await one.runner.run_once()
    world.skew = timedelta(seconds=-behind_s)
    await two.runner.run_once()
    assert two.runner.is_the_one == (behind_s > SETTINGS.lease_s)


async def test_a_runner_that_lost_its_lease_writes_nothing_and_the_next_finds_out(world: World):
    await world.worker("w1")
    settings = replace(SETTINGS, lease_s=30)
    old, new = world.process(settings), world.process(settings)
    gate, asked = asyncio.Event(), asyncio.Event()

    async def slow(operation: str, call):
        if operation == "pay_invoice":
            asked.set()
            await gate.wait()
        return await call()

    old.backend.answer = slow
    turn = asyncio.create_task(old.runner.run_once())
    await asyncio.wait_for(asked.wait(), 20)
    await world.pass_time(31)
    await new.runner.run_once()
    assert new.runner.is_the_one
    assert new.backend.pays == 0, "the first one's request may still be on its way"
    gate.set()
    await asyncio.wait_for(turn, 20)
    assert (await world.payout_of("w1")).state is PayoutState.SENDING, "the loser wrote nothing"
    await world.pass_time(30)
    await new.runner.run_once()
    assert (await world.payout_of("w1")).state is PayoutState.PAID
    assert len(await world.network.paid_out(ROUTER)) == 1
    await old.runner.run_once()
    assert not old.runner.is_the_one


async def test_the_loop_pays_by_itself_and_hands_the_lease_on_when_it_stops(world: World):
    await world.worker("w1")
    one, two = world.process(), world.process()
    one.runner.start()
    async with asyncio.timeout(10):
        while not (found := await world.payouts()) or found[0].state is not PayoutState.PAID:
            await asyncio.sleep(0.01)
    await one.runner.stop()
    await world.worker("w2")
    await two.runner.run_once()
    assert (await world.payout_of("w2")).state is PayoutState.PAID, "no lease to wait for"


async def test_a_lease_that_is_let_go_does_not_look_like_a_restored_backup(world: World):
    """The end that the others have seen comes sooner, and not because the database is an older one."""
    doubts: list[str] = []
    one = PayoutLease(world.database.transaction, world.tick)
    two = PayoutLease(
        world.database.transaction, world.tick, on_older=lambda: doubts.append("older")
    )
    assert await one.hold(30) and not await two.hold(30)
    await one.release()
    assert await two.hold(30) and doubts == []
    await one.release()  # It was let go before, and is another's.
    assert await two.hold(30) and not await one.hold(30)


async def test_waking_the_loop_makes_it_look_at_once(world: World):
    process = world.process(replace(SETTINGS, idle_s=3600))
    process.runner.start()
    async with asyncio.timeout(10):
        while not process.runner.is_the_one:
            await asyncio.sleep(0.01)
        await world.worker("w1")
        process.runner.wake()
        while not (found := await world.payouts()) or found[0].state is not PayoutState.PAID:
            await asyncio.sleep(0.01)
    await process.runner.stop()


async def test_over_http_a_worker_is_paid_at_its_lnurl_pay_address(world: World):
    """The node and the payee's server as separate processes would see them; nothing stands in."""
    server = NetworkServer(world.network, port=0)
    await server.start()
    host = server.url.removeprefix("http://")
    await world.worker("w1", host=host)
    backend = SimulatedBackend.over_http(server.url)
    addresses = LightningAddresses(
        OutsideHttp(OutsideRules(allow_private=True)),
        network="regtest",
        own_pubkey=world.pubkey,
        now=world.tick,
    )
    runner = PayoutRunner(world.database.transaction, backend, addresses, clock=world.tick)
    try:
        await runner.run_once()
        payout = await world.payout_of("w1")
        assert (payout.state, payout.target) == (PayoutState.PAID, f"w1@{host}")
        assert await world.received_msat("w1") == 2_000_000
    finally:
        await runner.stop()
        await backend.aclose()
        await server.stop()
