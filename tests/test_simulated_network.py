"""The simulated network in process: its money, faults, wallets, clock and limits. What it shares
with real nodes is in test_lightning_backends."""

from __future__ import annotations

import asyncio
import contextlib
import random
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from coincurve import PrivateKey

from billing import bolt11_codec
from billing.lightning.connect import UnknownBackend, connect
from billing.lightning.simulated import wallets
from billing.lightning.simulated.faults import Fault, FaultKind
from billing.lightning.simulated.network import (
    DATABASE_NAME,
    ConnectionDropped,
    Network,
    NetworkInUse,
)
from billing.lightning.simulated.payments import PaymentRecord, routing_fee_msat
from billing.lightning.simulated.wallets import Refused

SOON_S = 10.0


class Clock:
    """Seconds since 1970, moved by hand."""

    def __init__(self) -> None:
        self.now_s = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def network(tmp_path: Path, clock: Clock) -> AsyncIterator[Network]:
    network = await Network.open(tmp_path, clock=clock)
    await network.ensure_wallet("worker")
    yield network
    assert (await network.audit()).balances
    await network.aclose()


async def invoice_of(network: Network, wallet: str = "worker", amount_msat: int = 50_000) -> str:
    record = await network.create_invoice(
        wallet, amount_msat=amount_msat, description="test", expiry_s=600
    )
    return record.bolt11


async def pay(
    network: Network, bolt11: str, *, wallet: str = "router", timeout_s: float = 0.0
) -> PaymentRecord:
    return await network.pay_invoice(wallet, bolt11, max_fee_msat=10**9, timeout_s=timeout_s)


async def balance_msat(network: Network, name: str) -> int:
    return {wallet.name: wallet.balance_msat for wallet in await network.wallets()}[name]


# Money


async def test_amount_and_routing_fee_leave_and_only_the_amount_arrives(network: Network) -> None:
    before = await balance_msat(network, "router")
    payment = await pay(network, await invoice_of(network, amount_msat=50_001))
    assert payment.state == "succeeded"
    assert payment.fee_msat == 1_000 + 51  # 1 sat, and 0.1 % rounded up
    assert await balance_msat(network, "worker") == 50_001
    assert await balance_msat(network, "router") == before - 50_001 - 1_051
    assert (await network.audit()).fees_msat == 1_051


async def test_money_under_way_is_in_the_audit(network: Network) -> None:
    await network.script(Fault(FaultKind.HANG))
    await pay(network, await invoice_of(network))
    audit = await network.audit()
    assert audit.in_flight_msat == 50_000 + routing_fee_msat(50_000)
    assert audit.balances


async def test_a_wallet_pays_no_more_than_it_holds(network: Network) -> None:
    bolt11 = await invoice_of(network, "router", 10_000)
    await network.fund("worker", 11_009)
    with pytest.raises(Refused) as refusal:
        await pay(network, bolt11, wallet="worker")
    assert refusal.value.reason == "insufficient_funds"
    await network.fund("worker", 1)
    assert (await pay(network, bolt11, wallet="worker")).state == "succeeded"
    assert await balance_msat(network, "worker") == 0


async def test_money_that_is_not_there_cannot_be_taken_away(network: Network) -> None:
    with pytest.raises(Refused):
        await network.fund("worker", -1)


@pytest.mark.parametrize("seed", range(4))
async def test_whatever_happens_no_money_appears_or_disappears(
    tmp_path: Path, clock: Clock, seed: int
) -> None:
    """The oracle of other tests has to be right itself: at random, with faults and restarts."""
    choose = random.Random(seed)
    network = await Network.open(tmp_path, clock=clock)
    await network.ensure_wallet("worker")
    asked: list[str] = []
    for _ in range(150):
        known = choose.choice(asked) if asked else await invoice_of(network)
        payment_hash = bolt11_codec.decode(known).payment_hash
        match choose.randrange(8):
            case 0 | 1:
                asked.append(await invoice_of(network, "worker", choose.randrange(1, 10**6)))
            case 2 | 3:
                if choose.random() < 0.7:
                    kind = choose.choice(list(FaultKind))
                    await network.script(Fault(kind, delay_s=choose.choice([5, 500, 1000])))
                with contextlib.suppress(Refused, ConnectionDropped):
                    await pay(network, known, wallet=choose.choice(["router", "router", "payer"]))
            case 4:
                await network.resolve(payment_hash, settle=choose.random() < 0.5)
            case 5:
                await network.forget("router", payment_hash)
            case 6:
                clock.now_s += choose.choice([1, 10, 300])
                await network.run_due()
            case 7:
                await network.cancel_invoice("worker", payment_hash)
                await network.aclose()
                network = await Network.open(tmp_path, clock=clock)
        assert (await network.audit()).balances
    received = {record.payment_hash: record for record in await network.received("worker")}
    for bolt11 in asked:
        invoice = bolt11_codec.decode(bolt11)
        left_msat = [
            await network.left_msat(wallet, invoice.payment_hash) for wallet in ("router", "payer")
        ]
        if invoice.payment_hash in received:
            assert sorted(left_msat) == [0, invoice.amount_msat]
        else:
            assert left_msat == [0, 0]
    assert len(received) > 5
    await network.aclose()


# Invoices


async def test_keys_and_preimages_are_random(network: Network, tmp_path_factory: Any) -> None:
    other = await Network.open(tmp_path_factory.mktemp("other"))
    keys = {wallet.pubkey for wallet in [*await network.wallets(), *await other.wallets()]}
    assert len(keys) == 5
    await other.aclose()


async def test_an_invoice_of_another_key_over_the_same_hash_is_not_paid(network: Network) -> None:
    """Somebody who knows a hash cannot have it paid at a price of their own."""
    genuine = bolt11_codec.decode(await invoice_of(network))
    forged = bolt11_codec.sign(
        PrivateKey(),
        prefix="bcrt",
        amount_msat=1_000_000,
        payment_hash=bytes.fromhex(genuine.payment_hash),
        payment_secret=b"\x01" * 32,
        created_at_s=int(genuine.created_at.timestamp()),
        expiry_s=600,
        description="forged",
    )
    payment = await pay(network, forged)
    assert (payment.state, payment.failure_code) == ("failed", "no_route")


async def test_an_htlc_that_arrives_after_the_expiry_is_refused(
    network: Network, clock: Clock
) -> None:
    await network.script(Fault(FaultKind.DELAY, delay_s=700))
    bolt11 = await invoice_of(network)
    assert (await pay(network, bolt11)).state == "in_flight"
    clock.now_s += 701
    await network.run_due()
    payment = await network.lookup_payment("router", bolt11_codec.decode(bolt11).payment_hash)
    assert payment is not None
    assert (payment.state, payment.failure_code) == ("failed", "incorrect_payment_details")


# Faults


async def test_a_fault_happens_as_often_as_it_was_scripted(network: Network) -> None:
    await network.script(Fault(FaultKind.FAIL, times=2))
    states = [(await pay(network, await invoice_of(network))).state for _ in range(3)]
    assert states == ["failed", "failed", "succeeded"]
    assert await network.scripted() == []


async def test_a_fault_may_be_for_one_payee(network: Network) -> None:
    await network.ensure_wallet("other")
    await network.script(Fault(FaultKind.FAIL, payee="other"))
    assert (await pay(network, await invoice_of(network, "worker"))).state == "succeeded"
    assert (await pay(network, await invoice_of(network, "other"))).state == "failed"


async def test_faults_of_different_kinds_meet_in_one_call(network: Network, clock: Clock) -> None:
    for kind in (FaultKind.DROP_AFTER, FaultKind.FORGET, FaultKind.DELAY):
        await network.script(Fault(kind, delay_s=50))
    bolt11 = await invoice_of(network)
    with pytest.raises(ConnectionDropped):
        await pay(network, bolt11)
    assert await balance_msat(network, "worker") == 0
    clock.now_s += 51
    await network.run_due()
    assert await network.lookup_payment("router", bolt11_codec.decode(bolt11).payment_hash) is None
    assert await balance_msat(network, "worker") == 50_000


async def test_faults_can_be_called_off(network: Network) -> None:
    await network.script(Fault(FaultKind.FAIL, times=100))
    await network.clear_faults()
    assert (await pay(network, await invoice_of(network))).state == "succeeded"


async def test_another_wallet_is_spared(network: Network) -> None:
    await network.script(Fault(FaultKind.FAIL, wallet="router"))
    payment = await pay(network, await invoice_of(network), wallet="payer")
    assert payment.state == "succeeded"


@pytest.mark.parametrize(
    "fault",
    [
        {"kind": FaultKind.HANG, "operation": "balance"},
        {"kind": FaultKind.FORGET, "operation": "create_invoice"},
        {"kind": FaultKind.FAIL, "operation": "dance"},
        {"kind": FaultKind.FAIL, "times": 0},
        {"kind": FaultKind.DELAY, "delay_s": -1.0},
        {"kind": FaultKind.DELAY, "delay_s": float("nan")},
    ],
)
def test_a_fault_that_makes_no_sense_is_refused(fault: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Fault(**fault)


async def test_a_held_htlc_keeps_others_from_the_same_invoice(network: Network) -> None:
    await network.script(Fault(FaultKind.HANG))
    bolt11 = await invoice_of(network)
    payment_hash = bolt11_codec.decode(bolt11).payment_hash
    assert (await pay(network, bolt11)).state == "in_flight"
    other = await pay(network, bolt11, wallet="payer")
    assert (other.state, other.failure_code) == ("failed", "incorrect_payment_details")
    assert not await network.cancel_invoice("worker", payment_hash)
    assert await network.resolve(payment_hash, settle=False) == 1
    assert (await pay(network, bolt11, wallet="payer")).state == "succeeded"


async def test_what_nobody_sent_cannot_be_resolved(network: Network) -> None:
    assert await network.resolve("00" * 32, settle=True) == 0


# Wallets


async def test_wallets_are_made_up_to_a_limit(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wallets, "WALLETS_MAX", 4)
    await network.ensure_wallet("one.more+tag")
    await network.ensure_wallet("one.more+tag")
    with pytest.raises(Refused) as refusal:
        await network.ensure_wallet("too-many")
    assert refusal.value.reason == "quota"


@pytest.mark.parametrize("name", ["", "UPPER", "a b", "../x", "a" * 65, "é", ".hidden", "a\n"])
async def test_a_wallet_has_a_name_that_an_address_may_have(network: Network, name: str) -> None:
    with pytest.raises(Refused):
        await network.ensure_wallet(name)


# Opening


@pytest.mark.parametrize("name", ["mainnet", "bitcoin", "testnet", "signet"])
async def test_it_opens_for_no_network_but_regtest(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="regtest only"):
        await Network.open(tmp_path, network=name)
    assert not (tmp_path / DATABASE_NAME).exists()


async def test_one_directory_is_open_once(network: Network, tmp_path: Path) -> None:
    with pytest.raises(NetworkInUse):
        await Network.open(tmp_path)


async def test_an_htlc_under_way_arrives_after_a_restart(tmp_path: Path, clock: Clock) -> None:
    first = await Network.open(tmp_path, clock=clock)
    await first.ensure_wallet("worker")
    await first.script(Fault(FaultKind.DELAY, delay_s=100))
    await first.script(Fault(FaultKind.FAIL))
    bolt11 = await invoice_of(first)
    assert (await pay(first, bolt11)).state == "in_flight"
    await first.aclose()

    clock.now_s += 101
    second = await Network.open(tmp_path, clock=clock)
    payment_hash = bolt11_codec.decode(bolt11).payment_hash
    async with asyncio.timeout(SOON_S):
        while (payment := await second.lookup_payment("router", payment_hash)) is None or (
            payment.state == "in_flight"
        ):
            await asyncio.sleep(0.01)
    assert payment.state == "succeeded"
    # The script survives as well.
    assert (await pay(second, await invoice_of(second))).state == "failed"
    await second.aclose()


def test_a_back_end_is_found_by_name() -> None:
    backend = connect("simulated", url="http://127.0.0.1:9740")
    assert backend.name == "simulated"
    assert backend.capabilities.push == "cursor"


def test_asking_for_connect_imports_no_back_end() -> None:
    """An operator with one node needs the dependencies of that one only."""
    script = (
        "import sys, billing.lightning.connect\n"
        "print([name for name in sys.modules if name.startswith('billing.lightning.')])"
    )
    output = subprocess.check_output([sys.executable, "-c", script], text=True)
    assert output.strip() == "['billing.lightning.connect']"


def test_an_unknown_back_end_is_named_beside_the_known_ones() -> None:
    with pytest.raises(UnknownBackend, match=r"'lightnig'; there is: cln, .*simulated"):
        connect("lightnig")


@pytest.mark.parametrize(
    "settings", [{}, {"url": "127.0.0.1:9740"}, {"url": "http://x", "network": "mainnet"}]
)
def test_a_back_end_with_settings_it_cannot_use_says_so(settings: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="simulated Lightning network"):
        connect("simulated", **settings)
