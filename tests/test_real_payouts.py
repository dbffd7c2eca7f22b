"""Payouts whose HTLC a payee keeps, on a real network: unresolved for as long as it takes, across
kill -9 of router and node, and right in the end, both ways."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from billing.payouts import PayoutRunner
from billing.trial_balance import trial_balance
from tests.balance_tools import CHAT, paid
from tests.regtest import regtest
from tests.regtest.electrum_rig import electrum_backend
from tests.regtest.lnurl_payee import lnurl_server
from tests.regtest.network import LightningNetwork, until
from tests.regtest.passing_time import pass_time
from tests.regtest.router_process import RouterProcess
from tests.regtest.router_rig import JOB_FEE_MSAT, RealRig, moved_msat, running_real_rig

pytestmark = regtest

# Short, but long enough to be paid at all.
INVOICE_EXPIRY_S = 150


@asynccontextmanager
async def in_the_mood(network: LightningNetwork, mood: str) -> AsyncIterator[None]:
    """What the workers' node does with what comes; a test that fails leaves it nothing to keep."""
    await network.worker.call("set_mood", mood=mood)
    try:
        yield
    except BaseException:
        for payment_hash in await network.worker.call("list_held"):
            await network.worker.resolve(payment_hash, settle=False)
        raise
    finally:
        await network.worker.call("set_mood", mood="take")


async def the_held(network: LightningNetwork) -> str:
    """Wait until the worker's node keeps an HTLC; its payment hash."""
    found: list[str] = []

    async def any_held() -> bool:
        found[:] = await network.worker.call("list_held")
        return bool(found)

    await until("an HTLC is held", any_held)
    [payment_hash] = found
    return payment_hash


@pytest.mark.parametrize("settle", [True, False], ids=["settled", "given back"])
async def test_a_held_payout_outlives_router_and_node(
    tmp_path: Path, database_url: str, lightning_on_disk: LightningNetwork, settle: bool
) -> None:
    network = lightning_on_disk
    await network.ready()
    before_msat = await moved_msat(network.router)
    router = RouterProcess(tmp_path, database_url, network)
    async with lnurl_server(network, network.worker, tmp_path) as host:
        await router.start()
        try:
            await router.fill(2_000_000)
            await router.worker("w", f"worker@{host}")
            async with in_the_mood(network, "hold"):
                await router.earn("w", 1_000_000)
                payment_hash = await the_held(network)
                await router.kill()
                network.router.kill()
                await network.router.revive()
                await router.revive()
                # The new process has asked the new node: still under way.
                await router.until_passing_time(
                    "select from payout_attempts where was_known and state = 'submitted'"
                )
            await network.ready()
            await network.worker.resolve(payment_hash, settle=settle)
            # Given back, the same invoice is tried again: never another beside it.
            [payout] = await router.until_passing_time(
                "select p.state, p.fee_msat, a.submissions, a.payment_hash from payouts p"
                " join payout_attempts a on a.payout_id = p.id where p.state = 'paid'"
            )
            assert payout["payment_hash"] == payment_hash
            assert (payout["submissions"] > 1) is not settle
            assert len(await router.connection.fetch("select from payout_attempts")) == 1
            assert await network.router.sent_msat(payment_hash) == 1_000_000
            assert await network.worker.received_msat(payment_hash) == 1_000_000
            books = await trial_balance(router.connection)
            assert books.in_order
            moved = await moved_msat(network.router) - before_msat
            assert books.lines["assets:lightning"] == moved == 1_000_000 - payout["fee_msat"]
        finally:
            await router.stop()


@pytest.fixture
async def rig(
    tmp_path: Path, database_url: str, lightning: LightningNetwork
) -> AsyncIterator[RealRig]:
    names = ("worker", *(f"w{n}" for n in range(4)))
    async with running_real_rig(
        tmp_path, database_url, lightning, names=names, invoice_expiry_s=INVOICE_EXPIRY_S
    ) as rig:
        # A payout is looked up when its own call has ended, which of a held one is at this time.
        rig.core.payouts.settings = replace(rig.core.payouts.settings, pay_timeout_s=1)
        yield rig


async def test_a_payout_given_back_after_days_is_paid_by_a_new_invoice_only_then(
    rig: RealRig,
) -> None:
    """An invoice's expiry ends nothing while its HTLC is out (lightning facts: lnd #7621)."""
    _, _, key = await paid(rig, 2 * JOB_FEE_MSAT)
    async with in_the_mood(rig.lightning, "hold"):
        await earn_by_a_job(rig, key)
        payment_hash = await the_held(rig.lightning)
    async with in_the_mood(rig.lightning, "refuse"):
        async with rig.core.database.connection() as connection:
            await pass_time(connection, timedelta(days=2))
        # A held payment that is old alarms the operator, and stays what it is.
        await until_payouts(rig, "select from payout_attempts where alert = 'in_flight_long'")
        assert [r["state"] for r in await attempts(rig)] == ["submitted"]

        await rig.lightning.worker.resolve(payment_hash, settle=False)

        # Two answers, a minute apart, that nothing is out: now it is certain.
        await until_payouts(rig, "select from payouts where state = 'failed'")
    assert await rig.lightning.router.sent_msat(payment_hash) == 0
    await until_payouts(rig, "select from payouts where state = 'paid'")
    first, second = await attempts(rig)
    assert (first["payment_hash"], first["state"]) == (payment_hash, "failed")
    assert second["state"] == "succeeded"
    assert await rig.lightning.worker.received_msat(second["payment_hash"]) > 0
    await rig.check_books()


async def test_two_runners_pay_a_payout_once(rig: RealRig) -> None:
    _, _, key = await paid(rig, 10 * JOB_FEE_MSAT)
    backend = electrum_backend(rig.lightning.router)
    other = PayoutRunner(
        rig.core.database.transaction,
        backend,
        rig.core.addresses,
        settings=rig.core.payouts.settings,
        clock=rig.clock,
    )
    other.start()
    try:
        for n in range(4):
            await earn_by_a_job(rig, key, f"w{n}")
        while not await rig.query(
            "select from payouts having count(*) filter (where state = 'paid') = 4"
        ):
            # Both at once, and the lease from one to the other in between: three times, and not on
            # and on, or invoices would expire of a node that is slow.
            rig.core.payouts.wake()
            other.wake()
            await asyncio.sleep(0.05)
            if rig.clock.ahead < timedelta(seconds=3 * rig.core.payouts.settings.lease_s):
                rig.clock.ahead += timedelta(seconds=2)
    finally:
        await other.stop()
        await backend.aclose()
    found = await attempts(rig)
    assert [row["state"] for row in found] == ["succeeded"] * 4
    for row in found:
        assert await rig.lightning.worker.received_msat(row["payment_hash"]) == 950_000
    await rig.check_books()


async def earn_by_a_job(rig: RealRig, key: dict[str, str], ln_url: str = "worker") -> None:
    async with rig.worker(ln_url=ln_url) as worker:
        asking = asyncio.create_task(
            rig.http.post("/v1/chat/completions", json=CHAT | {"user": ln_url}, headers=key)
        )
        await worker.serve()
        assert (await asking).status_code == 200
    rig.core.payouts.wake()


async def attempts(rig: RealRig) -> list[Any]:
    return await rig.query("select * from payout_attempts order by created_at")


async def until_payouts(rig: RealRig, sql: str) -> None:
    """Wait until the database has rows for it, while minutes go by for payouts."""
    async with asyncio.timeout(60):
        while not await rig.query(sql):
            async with rig.core.database.connection() as connection:
                await pass_time(connection, timedelta(minutes=2))
            rig.core.payouts.wake()
            await asyncio.sleep(0.5)
