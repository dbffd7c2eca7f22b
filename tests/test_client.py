"""Both clients over real HTTP, against a server that can be made to fail: paying."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

import pytest

from client import L402, AsyncClient, ClaimToken, Client, SimulatedWallet
from client.errors import BadRequest, FeeOverLimit, NoWallet, WalletFailed, WrongInvoice, WrongQuote
from client.events import Position
from tests.contract_server import WORDS, invoice_for
from tests.either_client import (  # noqa: F401 - the fixtures are used by name
    ANSWER,
    OFFER_MSAT,
    PATIENCE,
    PROMPT,
    CountingWallet,
    either_fixture,
    keyed_fixture,
    server_fixture,
)

# --- paying by Lightning ------------------------------------------------------------------------


async def test_a_prompt_is_quoted_paid_once_and_answered(either, server):
    completion = await either.do("run", PROMPT, model="stand-in", max_tokens=15)
    assert completion.text == ANSWER
    assert [amount for _, amount in either.wallet.paid] == [2000]
    assert completion.purchase.paid_msat == 2000
    assert (completion.charged_msat, completion.refunded_msat) == (1010, 71)
    quote = server.quotes[completion.purchase.quote.id]
    assert completion.credential == L402(quote.id, quote.preimage)
    assert quote.body["messages"] == [{"role": "user", "content": PROMPT}]


async def test_the_events_of_a_prompt_come_in_order(either):
    events, stream = await either.events(PROMPT, model="stand-in", max_tokens=15)
    kinds = [type(event).__name__ for event in events]
    assert kinds == [
        "Quoted",
        "InvoiceDue",
        "Paid",
        "Position",
        "StateChanged",
        *["Text"] * 4,
        "Ended",
    ]
    assert stream.completion.text == ANSWER
    assert stream.purchase.credential == stream.completion.credential


async def test_the_callbacks_see_positions(either):
    seen: list[Any] = []
    await either.do("run", PROMPT, model="stand-in", on_position=seen.append)
    assert [(event.position, event.wait_p50_s) for event in seen] == [(2, 1.5)]
    assert all(isinstance(event, Position) for event in seen)


async def test_text_alone_is_streamed_without_anything_paid_before_the_first_piece(server):
    wallet = CountingWallet(server.url)
    async with AsyncClient(server.url, wallet=wallet, patience=PATIENCE) as client:
        stream = client.stream(PROMPT, model="stand-in")
        assert (server.requests, wallet.paid) == ([], [])
        async with aclosing(stream.text()) as pieces:
            assert [piece async for piece in pieces] == WORDS


def test_text_alone_is_streamed_synchronously(server):
    with Client(server.url, wallet=SimulatedWallet(server.url), patience=PATIENCE) as client:
        assert list(client.stream(PROMPT, model="stand-in").text()) == WORDS


async def test_an_async_wallet_is_awaited(server):
    async def pay(bolt11: str, amount_msat: int) -> str:
        return await asyncio.to_thread(SimulatedWallet(server.url), bolt11, amount_msat)

    async with AsyncClient(server.url, wallet=pay, patience=PATIENCE) as client:
        assert (await client.run(PROMPT, model="stand-in")).text == ANSWER


def test_an_async_wallet_in_the_synchronous_client_is_a_type_error(server):
    async def pay(bolt11: str, amount_msat: int) -> str:
        raise AssertionError("never called")

    wallet: Any = pay
    with pytest.raises(TypeError, match="AsyncClient"):
        Client(server.url, wallet=wallet)


async def test_without_a_model_the_routers_first_is_taken(either, server):
    completion = await either.do("run", PROMPT)
    assert completion.jobs[0].model == "stand-in"


@pytest.mark.parametrize(("queue_length", "multiplier"), [(0, "1.000"), (3, "1.508")])
async def test_an_automatic_multiplier_follows_the_queue(either, server, queue_length, multiplier):
    """LH-10: half a percent over the last one charged, and only while jobs wait."""
    server.faults.model = {
        "queue_length": queue_length,
        "last_multiplier": "1.500",
        "multiplier_to_be_next": "2.001",
    }
    completion = await either.do("run", PROMPT, fee_multiplier="auto")
    assert completion.purchase.quote.multiplier == multiplier


async def test_times_auto_offers_so_many_times_the_automatic_multiplier(either, server):
    """LH-10: the options `Multiplier` and `Fee` of Llama-Herder's client."""
    server.faults.model = {
        "queue_length": 3,
        "last_multiplier": "1.500",
        "multiplier_to_be_next": "2.001",
    }
    completion = await either.do("run", PROMPT, times_auto="1.1")
    assert completion.purchase.quote.multiplier == "1.659"  # 1.508 x 1.1
    for mixed in ({"fee_multiplier": "2"}, {"offer_msat": 5000}):
        with pytest.raises(ValueError, match=r"times_auto|not both"):
            await either.do("run", PROMPT, times_auto="1.1", **mixed)


async def test_a_router_without_a_fitting_model_is_told_before_anything_is_paid(either, server):
    server.faults.model = {"kind": "embedding"}
    with pytest.raises(BadRequest, match="no text model"):
        await either.do("run", PROMPT)
    assert server.seen("POST", "/quotes") == []


async def test_several_answers_are_several_jobs(either):
    completion = await either.do("run", PROMPT, models=["one", "two"], max_tokens=15)
    assert completion.texts == [ANSWER, ANSWER]
    assert [job.model for job in completion.jobs] == ["one", "two"]
    assert completion.charged_msat == 2020


async def test_limits_and_priority_reach_the_router(either, server):
    await either.do(
        "run", PROMPT, model="stand-in", fee_multiplier=1.5, max_fee_msat=9000, max_wait_s=60
    )
    [(_, headers, body)] = server.seen("POST", "/quotes")
    assert (headers["x-max-fee-msat"], headers["x-max-wait-s"]) == ("9000", "60")
    assert (body["fee_multiplier"], body["max_fee_msat"]) == ("1.500", 9000)


async def test_a_wallet_that_hides_preimages_pays_with_the_claim_token(server):
    def pay(bolt11: str, amount_msat: int) -> None:
        SimulatedWallet(server.url)(bolt11, amount_msat)

    async with AsyncClient(server.url, wallet=pay, patience=PATIENCE) as client:
        completion = await client.run(PROMPT, model="stand-in")
    assert completion.text == ANSWER
    assert isinstance(completion.credential, ClaimToken)


# --- refusing to pay ----------------------------------------------------------------------------


async def test_a_fee_over_the_limit_is_refused_before_an_invoice_exists(either, server):
    with pytest.raises(FeeOverLimit) as raised:
        await either.do("run", PROMPT, model="stand-in", max_tokens=15, max_fee_msat=1009)
    assert raised.value.facts == {"needed_msat": OFFER_MSAT, "max_fee_msat": 1009}
    assert server.seen("POST", "/quotes/.*") == []
    assert either.wallet.paid == []


async def test_a_limit_that_the_router_sees_first_is_the_same_error(either, server):
    """The router knows the limit too, and refuses before it stores a quote."""
    facts = {"fee_msat": 2000, "max_fee_msat": 1009}
    refused = {"error": {"code": "fee_too_high", "message": "over your limit", **facts}}
    server.faults.answers["/quotes"] = [(400, {}, refused)]
    with pytest.raises(FeeOverLimit) as raised:
        await either.do("run", PROMPT, model="stand-in", max_fee_msat=1009)
    assert raised.value.facts == facts


async def test_a_fee_at_the_limit_is_paid(either):
    completion = await either.do(
        "run", PROMPT, model="stand-in", max_tokens=15, max_fee_msat=OFFER_MSAT
    )
    assert completion.purchase.paid_msat == 2000


async def test_there_is_a_limit_when_none_is_given(either, server):
    server.faults.quote = {"offer_msat": 1_000_001}
    with pytest.raises(FeeOverLimit):
        await either.do("run", PROMPT, model="stand-in")
    assert either.wallet.paid == []


@pytest.mark.parametrize(
    "forged",
    [
        lambda invoice: invoice_for(3000),
        lambda invoice: invoice.replace("lnbcrt20n", "lnbcrt"),
        lambda invoice: "not an invoice",
    ],
)
async def test_an_invoice_over_another_amount_is_not_paid(either, server, forged):
    server.faults.invoice = forged
    with pytest.raises(WrongInvoice):
        await either.do("run", PROMPT, model="stand-in", max_tokens=15)
    assert either.wallet.paid == []


@pytest.mark.parametrize("forged", [{"base_fee_msat": 1011}, {"max_tokens": 16}])
async def test_a_price_above_the_public_rules_is_not_paid(either, server, forged):
    server.faults.quote = forged
    with pytest.raises(WrongQuote):
        await either.do("run", PROMPT, model="stand-in", max_tokens=15)
    assert server.seen("POST", "/quotes/.*") == []


async def test_a_preimage_of_another_invoice_is_not_a_payment(either, server):
    server.faults.wrong_preimage = True
    with pytest.raises(WalletFailed, match="does not belong"):
        await either.do("run", PROMPT, model="stand-in")


async def test_what_a_wallet_raises_reaches_the_caller(server):
    class OutOfMoney(Exception):
        pass

    def pay(bolt11: str, amount_msat: int) -> str:
        raise OutOfMoney

    async with AsyncClient(server.url, wallet=pay) as client:
        with pytest.raises(OutOfMoney):
            await client.run(PROMPT, model="stand-in")
    assert server.seen("GET", "/quotes/.*") == []


async def test_without_key_and_wallet_nothing_is_asked(server):
    async with AsyncClient(server.url) as client:
        with pytest.raises(NoWallet):
            await client.run(PROMPT, model="stand-in")
    assert server.requests == []


def test_simulated_money_pays_nothing_outside_its_network(server):
    with pytest.raises(WalletFailed, match="mainnet"):
        SimulatedWallet(server.url)("lnbc20n1qqqqqqqq", 2000)
    with pytest.raises(WalletFailed, match="not a simulated"):
        SimulatedWallet(server.url)(invoice_for(2000), 2000)
    assert len(server.requests) == 1
