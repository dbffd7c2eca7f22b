"""A client's money out: held, sent once, charged what routing really cost, or all of it back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest

from billing import bolt11_codec, ledger
from billing.errors import BadAmount, BadInvoice, BadLightningAddress, InsufficientFunds
from billing.ledger import LIGHTNING, ROUTING_FEES
from billing.lightning import PaymentStatus
from billing.lightning.simulated.faults import Fault, FaultKind
from billing.lightning.simulated.payments import routing_fee_msat
from billing.lightning.simulated.wallets import ROUTER
from billing.payout_control import retry
from billing.payout_records import list_payouts
from billing.payout_settings import fee_cap_msat
from billing.payout_states import PayoutKind, PayoutState
from router.database import Database
from tests.payout_world import World

ALICE, BOB = "alice", "bob"


@pytest.fixture
async def world(database: Database) -> AsyncIterator[World]:
    async with World.open(database) as opened:
        await opened.deposit(ALICE, 1_000_000)
        yield opened
        await opened.check_books()
        await opened.check_payments()
        await opened.check_node()


async def left_msat(world: World, account_id: str = ALICE) -> int:
    return await world.balance_msat(ledger.client(account_id))


async def test_an_invoice_is_paid_and_routing_charged_at_its_true_cost(world: World):
    process = world.process()
    bolt11 = await world.invoice("purse", 700_000)
    ordered = await process.withdrawals.by_invoice(ALICE, bolt11)
    cap_msat = fee_cap_msat(700_000)
    assert (ordered.state, ordered.fee_cap_msat) == (PayoutState.PLANNED, cap_msat)
    assert await left_msat(world) == 300_000 - cap_msat, "amount and fee cap are held"
    await process.runner.run_once()
    paid = await process.withdrawals.get(ALICE, ordered.id)
    assert paid is not None and paid.state is PayoutState.PAID
    fee_msat = routing_fee_msat(700_000)
    assert paid.fee_msat == fee_msat
    assert await left_msat(world) == 300_000 - fee_msat
    assert await world.received_msat("purse") == 700_000
    assert await world.balance_msat(ledger.SENDING) == 0
    assert await world.balance_msat(ROUTING_FEES) == 0, "not the router's cost"
    assert await world.balance_msat(LIGHTNING) == 300_000 - fee_msat


async def test_the_same_invoice_again_is_the_same_withdrawal(world: World):
    process = world.process()
    bolt11 = await world.invoice("purse", 300_000)
    first = await process.withdrawals.by_invoice(ALICE, bolt11)
    spellings = (bolt11, bolt11.upper(), f"lightning:{bolt11}", f"LIGHTNING:{bolt11.upper()}")
    for text in spellings:
        assert (await process.withdrawals.by_invoice(ALICE, text)).id == first.id
    await process.runner.run_once()
    again = await process.withdrawals.by_invoice(ALICE, bolt11)
    assert (again.id, again.state) == (first.id, PayoutState.PAID)
    assert await world.received_msat("purse") == 300_000


async def test_the_same_invoice_many_times_at_once_is_one_withdrawal(world: World):
    one, two = world.process(), world.process()
    bolt11 = await world.invoice("purse", 300_000)
    ordered = await asyncio.gather(
        *(process.withdrawals.by_invoice(ALICE, bolt11) for process in (one, two) * 4)
    )
    assert len({record.id for record in ordered}) == 1
    assert await left_msat(world) == 700_000 - fee_cap_msat(300_000)


async def test_another_account_may_not_order_the_same_invoice(world: World):
    await world.deposit(BOB, 1_000_000)
    process = world.process()
    bolt11 = await world.invoice("purse", 300_000)
    ordered = await process.withdrawals.by_invoice(ALICE, bolt11)
    with pytest.raises(BadInvoice):
        await process.withdrawals.by_invoice(BOB, bolt11)
    assert await left_msat(world, BOB) == 1_000_000
    assert await process.withdrawals.get(BOB, ordered.id) is None
    assert await process.withdrawals.get(ALICE, "nothing") is None


async def test_a_withdrawal_that_definitely_failed_returns_everything(world: World):
    await world.network.script(Fault(FaultKind.FAIL))
    process = world.process()
    bolt11 = await world.invoice("purse", 300_000)
    ordered = await process.withdrawals.by_invoice(ALICE, bolt11)
    await process.runner.run_once()
    failed = await process.withdrawals.by_invoice(ALICE, bolt11)
    assert (failed.id, failed.state) == (ordered.id, PayoutState.FAILED)
    assert failed.error_code == "no_route"
    assert await left_msat(world) == 1_000_000


async def test_one_that_is_unresolved_holds_the_money_until_it_is_known(world: World):
    await world.network.script(Fault(FaultKind.HANG))
    process = world.process()
    ordered = await process.withdrawals.by_invoice(ALICE, await world.invoice("purse", 300_000))
    for _ in range(3):
        await process.runner.run_once()
        await world.pass_time(3600)
    assert await left_msat(world) == 700_000 - fee_cap_msat(300_000)
    await world.network.resolve(await world.live_hash(ordered.id), settle=False)
    await process.runner.run_once()
    assert await left_msat(world) == 1_000_000


async def test_an_order_that_is_too_large_moves_nothing(world: World):
    process = world.process()
    with pytest.raises(InsufficientFunds):
        await process.withdrawals.by_invoice(ALICE, await world.invoice("purse", 999_000))
    with pytest.raises(InsufficientFunds):
        await process.withdrawals.by_address(ALICE, "purse@pay.example", 999_000)
    assert await left_msat(world) == 1_000_000
    assert await world.payouts() == []


async def test_an_invoice_of_another_network_or_without_an_amount_is_refused(world: World):
    from_mainnet = bolt11_codec.decode(MAINNET)
    assert from_mainnet.network == "mainnet"
    process = world.process()
    for text in (MAINNET, WITHOUT_AMOUNT):
        with pytest.raises(BadInvoice):
            await process.withdrawals.by_invoice(ALICE, text)
    with pytest.raises(BadInvoice):
        await process.withdrawals.by_invoice(ALICE, "no invoice at all")


# From the examples of BOLT 11: 2500 µBTC on mainnet; any amount on mainnet.
MAINNET = (
    "lnbc2500u1pvjluezsp5zyg3zyg3zyg3zyg3zyg3zyg3zyg3zyg3zyg3zyg3zyg3zyg3zygspp5qqqsyqcyq5rqwzqfqqqsy"
    "qcyq5rqwzqfqqqsyqcyq5rqwzqfqypqdq5xysxxatsyp3k7enxv4jsxqzpu9qrsgquk0rl77nj30yxdy8j9vdx85fkpmdla20"
    "87ne0xh8nhedh8w27kyke0lp53ut353s06fv3qfegext0eh0ymjpf39tuven09sam30g4vgpfna3rh"
)
WITHOUT_AMOUNT = (
    "lnbc1pvjluezsp5zyg3zyg3zyg3zyg3zyg3zyg3zyg3zyg3zyg3zyg3zyg3zyg3zygspp5qqqsyqcyq5rqwzqfqqqsyqcyq5r"
    "qwzqfqqqsyqcyq5rqwzqfqypqdpl2pkx2ctnv5sxxmmwwd5kgetjypeh2ursdae8g6twvus8g6rfwvs8qun0dfjkxaq9qrsg"
    "q357wnc5r2ueh7ck6q93dj32dlqnls087fxdwk8qakdyafkq3yap9us6v52vjjsrvywa6rt52cm9r9zqt8r2t7mlcwspyetp"
    "5h2tztugp9lfyql"
)


async def test_an_invoice_that_has_nearly_expired_is_refused(world: World):
    process = world.process()
    bolt11 = await world.invoice("purse", 300_000, expiry_s=120)
    await world.pass_time(61)
    with pytest.raises(BadInvoice):
        await process.withdrawals.by_invoice(ALICE, bolt11)


async def test_an_invoice_of_our_own_node_is_refused(world: World):
    with pytest.raises(BadInvoice):
        await world.process().withdrawals.by_invoice(ALICE, await world.invoice(ROUTER, 300_000))
    assert await left_msat(world) == 1_000_000


async def test_very_small_withdrawals_stay_as_credit(world: World):
    process = world.process()
    with pytest.raises(BadAmount):
        await process.withdrawals.by_invoice(ALICE, await world.invoice("purse", 9_999))
    with pytest.raises(BadAmount):
        await process.withdrawals.by_address(ALICE, "purse@pay.example", 9_000)
    await process.withdrawals.by_invoice(ALICE, await world.invoice("purse", 10_000))
    await process.runner.run_once()
    assert await world.received_msat("purse") == 10_000


async def test_an_order_that_expires_before_it_is_sent_returns_everything(world: World):
    process = world.process()
    ordered = await process.withdrawals.by_invoice(ALICE, await world.invoice("purse", 300_000))
    await world.pass_time(600)
    await process.runner.run_once()
    ended = await process.withdrawals.get(ALICE, ordered.id)
    assert ended is not None
    assert (ended.state, ended.error_code) == (PayoutState.FAILED, "invoice_expired")
    assert await left_msat(world) == 1_000_000


async def test_an_address_is_paid_in_whole_satoshis(world: World):
    process = world.process()
    ordered = await process.withdrawals.by_address(ALICE, "Purse@Pay.Example", 250_000)
    assert ordered.target == "purse@pay.example"
    await process.runner.run_once()
    assert await world.received_msat("purse") == 250_000
    assert await left_msat(world) == 750_000 - routing_fee_msat(250_000)
    with pytest.raises(BadAmount):
        await process.withdrawals.by_address(ALICE, "purse@pay.example", 250_001)


async def test_without_an_amount_all_that_can_be_withdrawn_is(world: World):
    process = world.process()
    ordered = await process.withdrawals.by_address(ALICE, "purse@pay.example")
    assert ordered.amount_msat == 995_000
    await process.runner.run_once()
    assert await world.received_msat("purse") == 995_000
    assert await left_msat(world) == 5_000 - routing_fee_msat(995_000)


async def test_an_idempotency_key_makes_one_withdrawal_of_many_orders(world: World):
    process = world.process()
    ordered = [
        await process.withdrawals.by_address(
            ALICE, "purse@pay.example", 100_000, idempotency_key="k1"
        )
        for _ in range(3)
    ]
    assert len({record.id for record in ordered}) == 1
    other = await process.withdrawals.by_address(
        ALICE, "purse@pay.example", 100_000, idempotency_key="k2"
    )
    assert other.id != ordered[0].id


@pytest.mark.parametrize("address", ["", "nonsense", "DONT_PAY_ME", "me@127.0.0.1"])
async def test_an_address_that_cannot_be_used_is_refused_at_once(world: World, address: str):
    with pytest.raises(BadLightningAddress):
        await world.process().withdrawals.by_address(ALICE, address, 100_000)
    assert await left_msat(world) == 1_000_000


async def test_an_address_that_does_not_answer_is_refused_at_once(world: World):
    world.servers.broken["purse"] = "unreachable"
    with pytest.raises(BadLightningAddress):
        await world.process().withdrawals.by_address(ALICE, "purse@pay.example", 100_000)


async def test_an_amount_outside_what_the_payee_takes_is_refused(world: World):
    world.servers.min_msat, world.servers.max_msat = 200_000, 300_000
    process = world.process()
    for amount_msat in (199_000, 301_000):
        with pytest.raises(BadAmount):
            await process.withdrawals.by_address(ALICE, "purse@pay.example", amount_msat)
    assert (await process.withdrawals.by_address(ALICE, "purse@pay.example")).amount_msat == 300_000
    await process.runner.run_once()


async def test_an_address_that_fails_later_returns_everything(world: World):
    process = world.process()
    ordered = await process.withdrawals.by_address(ALICE, "purse@pay.example", 100_000)
    world.servers.broken["purse"] = "no_invoice"
    await process.runner.run_once()
    failed = await process.withdrawals.get(ALICE, ordered.id)
    assert failed is not None
    assert (failed.state, failed.error_code) == (PayoutState.FAILED, "payee_error")
    assert await left_msat(world) == 1_000_000


async def test_what_routing_costs_beyond_the_cap_is_not_the_clients(database: Database):
    """A node without a fee limit may exceed what was held: the client has agreed to the cap only.

    This one only says that it did, so that the books are not compared with the network after it.
    """
    async with World.open(database) as world:
        await world.deposit(ALICE, 1_000_000)
        await pays_more_than_the_cap(world)
        await world.check_books()


async def pays_more_than_the_cap(world: World) -> None:
    process = world.process()

    async def dear(operation: str, call):
        answer = await call()
        if operation == "pay_invoice":
            assert isinstance(answer, PaymentStatus)
            return PaymentStatus(
                answer.payment_hash,
                answer.state,
                preimage=answer.preimage,
                amount_msat=answer.amount_msat,
                fee_msat=7_000,
            )
        return answer

    process.backend.answer = dear
    ordered = await process.withdrawals.by_invoice(ALICE, await world.invoice("purse", 300_000))
    await process.runner.run_once()
    assert await left_msat(world) == 700_000 - ordered.fee_cap_msat
    assert await world.balance_msat(ROUTING_FEES) == 7_000 - ordered.fee_cap_msat


async def test_workers_and_clients_are_listed_apart_and_a_client_has_no_back_off(world: World):
    process = world.process()
    await world.worker("w1")
    ordered = await process.withdrawals.by_invoice(ALICE, await world.invoice("purse", 300_000))
    await process.runner.run_once()
    async with world.database.transaction() as connection:
        mine = await list_payouts(connection, account=ledger.client(ALICE))
        workers = await list_payouts(connection, kind=PayoutKind.WORKER)
        assert await retry(connection, ordered.id, now=world.now + timedelta(seconds=1))
    assert [p.id for p in mine.payouts] == [ordered.id]
    assert [p.owner_id for p in workers.payouts] == ["w1"]
    assert mine.payouts[0].owner_id == ALICE
