"""LNbits 1.6.2 itself, in CI or with `SATHERD_TEST_LNBITS=1`: two wallets pay each other.

What its FakeWallet cannot do (fees, routes, payments that stay pending) is left to the stand-in.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from hashlib import sha256
from pathlib import Path

import pytest

from billing import bolt11_codec
from billing.lightning import (
    BackendAuthError,
    BackendRejected,
    BackendUnavailable,
    Invoice,
    InvoiceState,
    OutcomeUnknown,
    PaymentState,
    PaymentStatus,
    Settlement,
)
from billing.lightning.lnbits import LnbitsBackend, from_settings
from tests.real_lnbits import VERSION, RealLnbits, RealWallet, wanted

pytestmark = [
    pytest.mark.skipif(
        not wanted(),
        reason="set SATHERD_TEST_LNBITS=1 to install and run a real LNbits (270 MB)",
    ),
    pytest.mark.timeout(400),
    # Both would install it at once.
    pytest.mark.xdist_group("lnbits"),
]

CREDIT_SAT = 100_000


class Server:
    """A running LNbits: `ours` is the wallet under test, `theirs` another's."""

    def __init__(self, lnbits: RealLnbits, ours: RealWallet, theirs: RealWallet) -> None:
        self.lnbits = lnbits
        self.ours = self.backend(ours.key, ours.pay_key)
        self.theirs = self.backend(theirs.key, theirs.pay_key)

    def backend(self, key: str, pay_key: str | None) -> LnbitsBackend:
        return from_settings(url=self.lnbits.url, key=key, pay_key=pay_key)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    lnbits = RealLnbits(tmp_path / "lnbits")
    await lnbits.install()
    await lnbits.start()
    try:
        server = Server(lnbits, *await lnbits.wallets(CREDIT_SAT, CREDIT_SAT))
        yield server
        await server.ours.aclose()
        await server.theirs.aclose()
    finally:
        await lnbits.kill()


async def ask(backend: LnbitsBackend, amount_msat: int = 21_000, expiry_s: int = 600) -> Invoice:
    return await backend.create_invoice(
        amount_msat=amount_msat, description="a prompt", expiry_s=expiry_s, idempotency_key=""
    )


async def pay(backend: LnbitsBackend, bolt11: str) -> PaymentStatus:
    return await backend.pay_invoice(
        bolt11, max_fee_msat=10_000_000, timeout_s=20, max_cltv_blocks=None
    )


async def test_the_whole_flow_between_two_wallets(server: Server) -> None:
    """One server, one story: LNbits takes seconds to start."""
    info = await server.ours.node_info()
    # FakeWallet's invoices say mainnet, and nobody can pay them.
    assert (info.version, info.network) == (f"LNbits {VERSION}", "mainnet")
    assert info.pubkey != (await server.theirs.node_info()).pubkey
    assert (await server.ours.balance()).spendable_msat == CREDIT_SAT * 1000

    invoice = await ask(server.ours)
    decoded = bolt11_codec.decode(invoice.bolt11)
    assert (decoded.amount_msat, decoded.payment_hash) == (21_000, invoice.payment_hash)
    assert decoded.expiry_s == 600
    status = await server.ours.lookup_invoice(invoice.payment_hash)
    assert (status.state, status.amount_received_msat) == (InvoiceState.OPEN, 0)

    # Received: by the look-up, on the stream as it comes, and again on a later one.
    streaming = asyncio.create_task(told_of(server.ours, invoice.payment_hash))
    await asyncio.sleep(0.5)
    paid = await pay(server.theirs, invoice.bolt11)
    assert paid.state is PaymentState.SUCCEEDED and paid.preimage is not None
    assert sha256(bytes.fromhex(paid.preimage)).hexdigest() == invoice.payment_hash
    streamed = await streaming
    assert streamed.amount_received_msat == 21_000
    assert await told_of(server.ours, invoice.payment_hash) == streamed
    settled = await server.ours.lookup_invoice(invoice.payment_hash)
    assert (settled.state, settled.amount_received_msat) == (InvoiceState.SETTLED, 21_000)

    # Paid once, whatever is asked, and by many at once.
    assert await pay(server.theirs, invoice.bolt11) == paid
    other = await ask(server.ours, 50_000)
    statuses = await asyncio.gather(*(pay(server.theirs, other.bolt11) for _ in range(5)))
    assert {one.state for one in statuses} == {PaymentState.SUCCEEDED}
    balance = await server.theirs.balance()
    assert (balance.spendable_msat, balance.pending_msat) == (CREDIT_SAT * 1000 - 71_000, 0)

    # Refusals.
    own = await ask(server.theirs)
    too_much = await ask(server.ours, CREDIT_SAT * 1000)
    for bolt11, reason in (
        (own.bolt11, "self_payment"),
        (too_much.bolt11, "insufficient_funds"),
        (own.bolt11[:-1] + ("q" if own.bolt11[-1] != "q" else "p"), "malformed"),
    ):
        with pytest.raises(BackendRejected) as refusal:
            await pay(server.theirs, bolt11)
        assert refusal.value.reason == reason
    unknown = "00" * 32
    assert (await server.ours.lookup_payment(unknown)).state is PaymentState.NOT_FOUND
    assert (await server.ours.lookup_invoice(unknown)).state is InvoiceState.NOT_FOUND
    stranger = server.backend("no-such-key", None)
    for question in (stranger.node_info(), stranger.lookup_invoice(invoice.payment_hash)):
        with pytest.raises(BackendAuthError):
            await question
    await stranger.aclose()

    # Killed, and started again with what it had on its disk.
    await server.lnbits.kill()
    # A connection that was kept open may be the one that finds out.
    with pytest.raises((BackendUnavailable, OutcomeUnknown)):
        await server.ours.balance()
    await server.lnbits.start()
    assert await server.theirs.lookup_payment(invoice.payment_hash) == paid
    assert await server.ours.lookup_invoice(invoice.payment_hash) == settled
    assert await server.theirs.balance() == balance


async def test_a_server_that_is_killed_breaks_the_stream(server: Server) -> None:
    invoice = await ask(server.ours)
    await pay(server.theirs, invoice.bolt11)
    seen: list[Settlement] = []

    async def listen() -> None:
        async for settlement in server.ours.settlements(None):
            seen.append(settlement)
            if settlement.payment_hash == invoice.payment_hash:
                await server.lnbits.kill()

    with pytest.raises((BackendUnavailable, OutcomeUnknown)):
        async with asyncio.timeout(20):
            await listen()
    assert seen[-1].payment_hash == invoice.payment_hash


async def told_of(backend: LnbitsBackend, payment_hash: str) -> Settlement:
    """That settlement, from the stream; the wallet's first credit is told before it."""
    stream = backend.settlements(None)
    async with asyncio.timeout(20):
        async for settlement in stream:
            if settlement.payment_hash == payment_hash:
                await stream.aclose()  # type: ignore[attr-defined]
                return settlement
    raise AssertionError("the stream ended")
