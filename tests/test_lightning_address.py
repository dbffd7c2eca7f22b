"""From an `ln_url` to a checked invoice, against real LNURL servers on loopback addresses."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from datetime import timedelta

import bolt11
import pytest

from billing.lightning.simulated.network import Network
from billing.lightning.simulated.serving import NetworkServer
from billing.lightning_address import (
    LightningAddresses,
    PayeeError,
    payable_msat,
)
from billing.outside_http import OutsideHttp, OutsideLimits
from billing.outside_url import OutsideRules
from tests.lnurl_wallet import (
    KEY,
    NOW,
    Clock,
    Wallet,
    addresses,
    invoice,
    payee_of,
    refused,
    serving,
)
from tests.loopback_http import Loopback, Request, http, http_json


@pytest.fixture
async def wallet() -> AsyncIterator[Wallet]:
    async with serving() as wallet:
        yield wallet


# The whole way


@pytest.mark.parametrize("form", ["address", "lnurlp", "http"])
async def test_an_address_becomes_an_invoice_for_the_amount_asked(wallet, form):
    port = wallet.server.port
    text = {
        "address": f"lightning:Worker@localhost:{port}",
        "lnurlp": f"lnurlp://localhost:{port}/.well-known/lnurlp/worker",
        "http": f"http://localhost:{port}/.well-known/lnurlp/worker",
    }[form]
    ours = addresses()
    payee = ours.parse(text)
    assert payee is not None
    terms = await ours.resolve(payee)
    assert (terms.min_sendable_msat, terms.max_sendable_msat) == (1000, 100_000_000)
    made = await ours.request_invoice(terms, 21_000)
    assert made.amount_msat == 21_000 and made.hash_ok is True
    assert made.expires_at == NOW + timedelta(seconds=600)
    assert made.payee_pubkey == KEY.public_key.format().hex()
    assert made.callback_host == "127.0.0.1"
    assert [request.target for request in wallet.server.requests] == [
        "/.well-known/lnurlp/worker",
        "/callback?id=7&amount=21000",
    ]
    assert bolt11.decode(made.bolt11).payment_hash == made.payment_hash


async def test_each_request_brings_a_new_invoice_and_costs_nothing_to_repeat(wallet):
    ours = addresses()
    terms = await ours.resolve(payee_of(wallet.address))
    hashes = {(await ours.request_invoice(terms, 1000)).payment_hash for _ in range(3)}
    assert len(hashes) == 3


async def test_the_simulated_wallets_addresses_are_payable(tmp_path):
    network = await Network.open(tmp_path)
    server = NetworkServer(network, port=0)
    await server.start()
    try:
        ours = LightningAddresses(OutsideHttp(OutsideRules(allow_private=True)), network="regtest")
        payee = ours.parse(f"worker@{server.url.removeprefix('http://')}")
        assert payee is not None
        terms = await ours.resolve(payee, on_behalf_of="worker-1")
        made = await ours.request_invoice(terms, payable_msat(terms, 5999), comment="payout 1")
        assert made.amount_msat == 5000 and made.hash_ok is True
        with refused("amount_out_of_range"):
            await ours.request_invoice(terms, terms.max_sendable_msat + 1000)
    finally:
        await server.stop()
        await network.aclose()


async def test_a_callback_elsewhere_is_followed_and_noted(wallet, caplog):
    caplog.set_level(logging.INFO, logger="billing")
    async with Loopback(lambda request: http_json({"pr": invoice(5000)}), "127.0.0.2") as other:
        wallet.terms["callback"] = other.url("/pay/secret-id")
        ours = addresses()
        terms = await ours.resolve(payee_of(wallet.address))
        made = await ours.request_invoice(terms, 5000)
    assert made.callback_host == "127.0.0.2"
    assert "127.0.0.2" in caplog.text and "secret-id" not in caplog.text


async def test_an_apex_that_redirects_to_its_www_is_followed_and_the_callback_is_not(wallet):
    async with Loopback(lambda request: http(301, Location=wallet.server.url("/lnurl"))) as apex:
        ours = addresses()
        terms = await ours.resolve(payee_of(apex.url("/lnurl")))
        assert wallet.server.requests[-1].path == "/lnurl"
        wallet.make = lambda amount_msat: http(302, Location=wallet.server.url("/callback"))
        with refused("bad_answer"):
            await ours.request_invoice(terms, 1000)


@pytest.mark.parametrize("allowed, sent", [(0, None), (5, None), (6, "abc 12"), (200, "abc 12")])
async def test_a_comment_is_sent_if_the_payee_takes_one_of_its_length(wallet, allowed, sent):
    wallet.terms["commentAllowed"] = allowed
    ours = addresses()
    terms = await ours.resolve(payee_of(wallet.address))
    await ours.request_invoice(terms, 1000, comment="abc 12")
    assert wallet.server.requests[-1].query.get("comment") == sent


# Limits


async def test_a_stranger_asks_thirty_times_a_minute_and_the_router_as_it_likes(wallet):
    clock = Clock()
    ours = addresses(clock=clock)
    payee = payee_of(wallet.address)
    for _ in range(30):
        await ours.resolve(payee, on_behalf_of="worker-1")
    with refused("too_many_lookups"):
        await ours.resolve(payee, on_behalf_of="worker-1")
    await ours.resolve(payee, on_behalf_of="worker-2")
    await ours.resolve(payee)
    clock.now += 60
    await ours.resolve(payee, on_behalf_of="worker-1")


async def test_a_failure_is_remembered_for_strangers_and_forgotten_after_five_minutes(wallet):
    clock = Clock()
    ours = addresses(clock=clock)
    payee = payee_of(wallet.address)
    wallet.first = lambda request: http_json({"status": "ERROR", "reason": "no such user"})
    for _ in range(3):
        with refused("payee_error") as caught:
            await ours.resolve(payee, on_behalf_of="worker-1")
        assert isinstance(caught.value, PayeeError) and caught.value.reason == "no such user"
    assert len(wallet.server.requests) == 1
    wallet.first = None
    clock.now += 299
    with refused("payee_error"):
        await ours.resolve(payee, on_behalf_of="worker-2")
    clock.now += 2
    assert await ours.resolve(payee, on_behalf_of="worker-2")


async def test_a_server_that_could_not_be_reached_is_asked_again_after_ten_seconds(wallet):
    clock = Clock()
    ours = addresses(clock=clock)
    payee = payee_of(wallet.address)
    wallet.first = lambda request: http(502, "bad gateway")
    for _ in range(3):
        with refused("unreachable"):
            await ours.resolve(payee, on_behalf_of="worker-1")
    assert len(wallet.server.requests) == 1
    wallet.first = None
    clock.now += 11
    assert await ours.resolve(payee, on_behalf_of="worker-1")


async def test_the_routers_own_retry_is_never_answered_from_memory(wallet):
    ours = addresses()
    payee = payee_of(wallet.address)
    wallet.first = lambda request: http(200, "no json")
    for _ in range(2):
        with refused("bad_answer"):
            await ours.resolve(payee)
    assert len(wallet.server.requests) == 2
    wallet.first = None
    await ours.resolve(payee)
    await ours.resolve(payee, on_behalf_of="worker-1")  # the success made the failure forgotten


async def test_being_busy_is_not_held_against_the_payee(wallet):
    async def silence(request: Request) -> AsyncIterator[bytes]:
        await asyncio.Event().wait()
        yield b""

    ours = addresses(limits=OutsideLimits(per_host=1, turn_s=0.05, total_s=5))
    payee = payee_of(wallet.address)
    wallet.first = silence
    waiting = asyncio.create_task(ours.resolve(payee))
    async with asyncio.timeout(20):
        while not wallet.server.requests:
            await asyncio.sleep(0.005)
    with refused("busy"):
        await ours.resolve(payee, on_behalf_of="worker-1")
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    wallet.first = None
    await ours.resolve(payee, on_behalf_of="worker-1")


@pytest.mark.parametrize("network", ["mainnet", "bitcoin", "", "liquid"])
def test_private_addresses_are_never_allowed_with_real_money(network):
    with pytest.raises(ValueError):
        addresses(network=network)
    LightningAddresses(OutsideHttp(OutsideRules()), network=network)


async def test_a_private_address_is_unreachable_by_the_strict_rules(wallet):
    strict = LightningAddresses(OutsideHttp(OutsideRules()), network="regtest")
    with refused("unreachable"):
        await strict.resolve(payee_of(wallet.address))
    assert wallet.server.requests == []
    with refused("bad_address"):
        strict.parse(wallet.address)
