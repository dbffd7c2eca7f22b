"""Electrum 4.3.4 itself, over real channels: the conformance suite's rules, as far as time that
cannot be made to pass allows, and what a real node does beyond it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from billing.lightning import (
    BackendAuthError,
    BackendRejected,
    BackendUnavailable,
    InvoiceState,
    OutcomeUnknown,
    PaymentState,
    Settlement,
)
from billing.lightning.electrum import from_settings
from billing.lightning.simulated.faults import FaultKind
from cli.lightning import examine
from tests import test_lightning_backends as suite
from tests import test_lightning_wallets as wallets
from tests.lightning_rig import SOON_S, answers, ask, hash_of, pay, until
from tests.regtest import regtest
from tests.regtest.electrum_rig import ElectrumRig
from tests.regtest.network import LightningNetwork

pytestmark = regtest

for rules, names in (
    (
        suite,
        (
            "it_says_what_it_is",
            "impossible_terms_are_rejected",
            "a_paid_invoice_is_settled",
            "an_unknown_invoice_is_not_found",
            "an_invoice_is_paid_once",
            "a_canceled_invoice_can_never_settle",
            "a_settled_invoice_cannot_be_canceled",
            "a_payment_succeeds_with_a_preimage_that_proves_it",
            "a_payment_never_asked_for_is_not_found",
            "the_same_invoice_is_paid_once",
            "twenty_at_once_pay_the_same_invoice_once",
            "a_payment_that_fails_late_is_in_flight_until_then",
            "a_slow_payment_is_waited_for",
            "a_held_payment_is_in_flight_and_ends_either_way",
            "whoever_waits_for_a_held_payment_learns_its_end",
            "a_connection_lost_before_the_node_acts_leaves_it_unknown",
            "a_connection_lost_after_the_node_acted_leaves_it_unknown",
            "a_caller_who_goes_away_does_not_stop_the_payment",
            "an_invoice_of_another_network_is_not_paid",
            "a_broken_invoice_is_not_paid",
            "a_payee_whom_nobody_knows_cannot_be_reached",
            "routing_above_the_limit_is_refused",
            "a_route_with_too_many_blocks_is_refused",
            "a_node_does_not_pay_itself",
        ),
    ),
    (
        wallets,
        (
            "an_invoice_says_what_was_asked_for",
            "the_same_key_gives_another_invoice",
            "an_invoice_lost_on_its_way_is_unknown",
            "a_failed_payment_costs_nothing",
        ),
    ),
):
    globals().update({f"test_{name}": getattr(rules, f"test_{name}") for name in names})


@pytest.fixture
async def rig(lightning: LightningNetwork) -> AsyncIterator[ElectrumRig]:
    rig = ElectrumRig(lightning)
    await rig.start()
    yield rig
    await rig.stop()


async def test_a_wrong_password_is_the_operators_business(rig: ElectrumRig) -> None:
    node = rig.network.router
    stranger = from_settings(url=node.url, user=node.rpc.user, password="wrong")
    with pytest.raises(BackendAuthError):
        await stranger.node_info()
    await stranger.aclose()


async def test_the_check_says_that_no_fee_limit_is_kept(rig: ElectrumRig) -> None:
    """4.3.4 pays what a route costs, by a rule of its own: an operator has to know."""
    report = await examine(rig.backend)
    assert not report.blocking
    facts = dict(report.facts)
    assert facts["network"] == "regtest" and "4.3.4" in facts["version"]
    assert "sets its own routing fee" in facts["can"]
    assert rig.backend.capabilities.fee_limit is False


async def test_an_invoice_expires_unpaid(rig: ElectrumRig) -> None:
    invoice = await ask(rig, expiry_s=1)

    async def expired() -> bool:
        status = await rig.backend.lookup_invoice(invoice.payment_hash)
        return status.state is InvoiceState.EXPIRED

    async with asyncio.timeout(SOON_S):
        while not await expired():
            await asyncio.sleep(0.1)
    with pytest.raises(BackendRejected):
        await rig.pay_us(invoice.bolt11)


async def test_an_expired_invoice_is_not_paid(rig: ElectrumRig) -> None:
    bolt11 = await rig.their_invoice(50_000, expiry_s=1)
    await asyncio.sleep(1.2)
    with pytest.raises(BackendRejected) as refusal:
        await pay(rig, bolt11)
    assert refusal.value.reason == "expired"


async def test_more_than_the_channels_hold_is_refused(rig: ElectrumRig) -> None:
    most_msat = (await rig.backend.balance()).spendable_msat
    bolt11 = await rig.their_invoice(most_msat + 1_000)
    with pytest.raises(BackendRejected) as refusal:
        await rig.backend.pay_invoice(
            bolt11, max_fee_msat=most_msat, timeout_s=SOON_S, max_cltv_blocks=None
        )
    assert refusal.value.reason == "insufficient_funds"


async def test_more_than_a_route_can_carry_fails(rig: ElectrumRig) -> None:
    """Our node has enough and the hop has not: nothing has left, and nothing is concluded at once."""
    before = await rig.backend.balance()
    bolt11 = await rig.their_invoice(12_000_000_000)
    failed = await rig.backend.pay_invoice(
        bolt11, max_fee_msat=10**9, timeout_s=SOON_S, max_cltv_blocks=None
    )
    assert failed.state is PaymentState.UNKNOWN
    assert (await rig.backend.lookup_payment(hash_of(bolt11))).state is PaymentState.FAILED
    assert await rig.backend.balance() == before
    await rig.network.router.forgive()


async def test_settlements_are_streamed_and_streamed_again(rig: ElectrumRig) -> None:
    invoices = [await ask(rig, 1_000 * n) for n in (1, 2, 3)]
    await ask(rig)
    for invoice in invoices[:2]:
        await rig.pay_us(invoice.bolt11)
    seen: list[Settlement] = []

    async def listen() -> None:
        async for settlement in rig.backend.settlements(None):
            seen.append(settlement)
            if settlement.payment_hash == invoices[1].payment_hash:
                # It is paid while one listens.
                await rig.pay_us(invoices[2].bolt11)
            if settlement.payment_hash == invoices[2].payment_hash:
                return

    async with asyncio.timeout(SOON_S):
        await listen()
    ours = [s for s in seen if s.payment_hash in {i.payment_hash for i in invoices}]
    assert [s.amount_received_msat for s in ours] == [1_000, 2_000, 3_000]
    assert [s.payment_hash for s in ours] == [i.payment_hash for i in invoices]


async def test_a_broken_stream_says_so(rig: ElectrumRig) -> None:
    await rig.go_wrong(FaultKind.DROP_AFTER, "settlements")
    with pytest.raises((OutcomeUnknown, BackendUnavailable)):
        async with asyncio.timeout(SOON_S):
            async for _ in rig.backend.settlements(None):
                pass


async def test_payments_do_not_wait_for_one_that_is_held(rig: ElectrumRig) -> None:
    """Electrum answers a pay call when the payment has ended: each call has its own connection."""
    held = await rig.their_invoice(50_000)
    await rig.go_wrong(FaultKind.HANG, "pay_invoice")
    waiting = asyncio.create_task(pay(rig, held, timeout_s=60))
    await rig.network.worker.until_held(hash_of(held))
    others = [await rig.their_invoice(20_000) for _ in range(4)]
    paid = await asyncio.gather(*(pay(rig, bolt11) for bolt11 in others))
    assert {status.state for status in paid} == {PaymentState.SUCCEEDED}
    assert (await rig.backend.balance()).pending_msat >= 50_000
    await rig.network.worker.resolve(hash_of(held), settle=True)
    assert (await waiting).state is PaymentState.SUCCEEDED


@pytest.mark.parametrize("settle", [True, False])
async def test_a_node_killed_while_it_pays_ends_the_payment_right(
    lightning_on_disk: LightningNetwork, settle: bool
) -> None:
    rig = ElectrumRig(lightning_on_disk)
    await rig.start()
    node = rig.network.router
    paid, held = await rig.their_invoice(50_000), await rig.their_invoice(60_000)
    received, still_open = await ask(rig), await ask(rig)
    succeeded = await pay(rig, paid)
    await rig.pay_us(received.bolt11)
    info = await rig.backend.node_info()
    await rig.go_wrong(FaultKind.HANG, "pay_invoice")
    waiting = asyncio.create_task(pay(rig, held, timeout_s=60))
    await rig.network.worker.until_held(hash_of(held))

    node.kill()

    with pytest.raises((OutcomeUnknown, BackendUnavailable)):
        await waiting
    with pytest.raises((OutcomeUnknown, BackendUnavailable)):
        await rig.backend.lookup_payment(hash_of(held))
    await node.revive()
    # At once, and while its peers are not back yet.
    status = await rig.backend.lookup_payment(hash_of(held))
    assert status.state is PaymentState.IN_FLIGHT
    await rig.network.ready()
    assert await rig.backend.node_info() == info
    assert await rig.backend.lookup_payment(hash_of(paid)) == succeeded
    states = [
        (await rig.backend.lookup_invoice(i.payment_hash)).state for i in (received, still_open)
    ]
    assert states == [InvoiceState.SETTLED, InvoiceState.OPEN]
    # The same invoice again is no second payment.
    assert (await pay(rig, held, timeout_s=0.5)).state is PaymentState.IN_FLIGHT
    await rig.resolve(hash_of(held), settle=settle)
    ended = PaymentState.SUCCEEDED if settle else PaymentState.FAILED
    status = await until(lambda: rig.backend.lookup_payment(hash_of(held)), ended)
    assert answers(status.preimage, hash_of(held)) is settle
    assert await rig.left_msat(hash_of(held)) == (60_000 if settle else 0)
    await rig.stop()
