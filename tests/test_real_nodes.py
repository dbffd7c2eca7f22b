"""The same rules against a real node of yours; skipped unless the environment names one.

    SATHERD_TEST_NODE=lnd SATHERD_LND_URL=… SATHERD_LND_MACAROON=… SATHERD_LND_CERT=… \\
        python -m pytest -m real_node

The settings are those of a router. Nothing is paid, unless SATHERD_TEST_INVOICE is an invoice of
somebody else's, of at most 1,000 sat: that is paid, once, and asked for twice.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import pytest
from coincurve import PrivateKey

from billing import bolt11_codec
from billing.lightning import (
    BackendRejected,
    InvoiceState,
    LightningBackend,
    PaymentState,
)
from billing.lightning.connect import connect
from router.settings import Settings, backend_settings
from tests.lightning_rig import ENOUGH_FEE_MSAT, answers

pytestmark = pytest.mark.real_node

PREFIXES = {network: prefix for prefix, network in bolt11_codec.NETWORK_OF_PREFIX.items()}
MOST_MSAT = 1_000_000


@pytest.fixture
async def backend() -> AsyncIterator[LightningBackend]:
    kind = os.environ.get("SATHERD_TEST_NODE")
    if not kind:
        pytest.skip("set SATHERD_TEST_NODE and its settings to try a real node")
    settings = Settings.model_construct(**Settings(lightning="simulated").model_dump())
    settings.lightning = kind
    backend = connect(kind, **backend_settings(settings))
    yield backend
    await backend.aclose()


async def test_it_says_what_it_is_and_what_it_holds(backend: LightningBackend) -> None:
    info = await backend.node_info()
    assert info.network in PREFIXES
    assert len(bytes.fromhex(info.pubkey)) == 33
    balance = await backend.balance()
    assert balance.spendable_msat >= 0 and balance.pending_msat >= 0


async def test_an_invoice_is_what_was_asked_for_and_is_found_again(
    backend: LightningBackend,
) -> None:
    key = secrets.token_hex(16)

    async def create(amount_msat: int):
        return await backend.create_invoice(
            amount_msat=amount_msat, description="a test", expiry_s=600, idempotency_key=key
        )

    made = await create(21_000)
    decoded = bolt11_codec.decode(made.bolt11)
    assert (decoded.amount_msat, decoded.expiry_s) == (21_000, 600)
    assert decoded.network == (await backend.node_info()).network
    assert (await backend.lookup_invoice(made.payment_hash)).state is InvoiceState.OPEN
    if backend.capabilities.cancel_invoice:
        assert (await create(21_000)).payment_hash == made.payment_hash
        with pytest.raises(BackendRejected):
            await create(22_000)
        assert await backend.cancel_invoice(made.payment_hash)
        state = (await backend.lookup_invoice(made.payment_hash)).state
        assert state in (InvoiceState.CANCELED, InvoiceState.NOT_FOUND)


async def test_what_nobody_made_is_not_found(backend: LightningBackend) -> None:
    unknown = secrets.token_hex(32)
    assert (await backend.lookup_invoice(unknown)).state is InvoiceState.NOT_FOUND
    assert (await backend.lookup_payment(unknown)).state is PaymentState.NOT_FOUND


async def refusal(backend: LightningBackend, bolt11: str) -> str:
    with pytest.raises(BackendRejected) as refused:
        await backend.pay_invoice(bolt11, max_fee_msat=0, timeout_s=5.0, max_cltv_blocks=None)
    return refused.value.reason


async def test_what_cannot_be_paid_is_refused(backend: LightningBackend) -> None:
    network = (await backend.node_info()).network
    own = await backend.create_invoice(
        amount_msat=1_000, description="own", expiry_s=60, idempotency_key=secrets.token_hex(16)
    )
    assert await refusal(backend, own.bolt11) == "self_payment"
    assert await refusal(backend, own.bolt11[:-1]) == "malformed"
    elsewhere = "bcrt" if network != "regtest" else "tbs"
    for prefix, age_s, reason in (
        (elsewhere, 0, "wrong_network"),
        (PREFIXES[network], 3600, "expired"),
    ):
        bolt11 = bolt11_codec.sign(
            PrivateKey(),
            prefix=prefix,
            amount_msat=1_000,
            payment_hash=secrets.token_bytes(32),
            payment_secret=secrets.token_bytes(32),
            created_at_s=int(datetime.now(UTC).timestamp()) - age_s,
            expiry_s=600,
            description="never to be paid",
        )
        assert await refusal(backend, bolt11) == reason


async def test_its_own_history_can_be_listed(backend: LightningBackend) -> None:
    """What reconciliation reads; nothing of it is printed."""
    since = datetime.now(UTC) - timedelta(days=1)
    received = [one async for one in backend.received_since(since)]
    sent = [one async for one in backend.sent_since(since)]
    assert all(one.settled_at.tzinfo is not None for one in received)
    for payment in sent:
        assert payment.state in (PaymentState.SUCCEEDED, PaymentState.IN_FLIGHT)
        looked_up = await backend.lookup_payment(payment.payment_hash)
        assert looked_up.state is not PaymentState.NOT_FOUND


async def test_an_invoice_is_paid_once(backend: LightningBackend) -> None:
    bolt11 = os.environ.get("SATHERD_TEST_INVOICE")
    if not bolt11:
        pytest.skip("set SATHERD_TEST_INVOICE to have an invoice paid, of at most 1,000 sat")
    invoice = bolt11_codec.decode(bolt11)
    assert invoice.amount_msat is not None and invoice.amount_msat <= MOST_MSAT
    first, again = [
        await backend.pay_invoice(
            bolt11, max_fee_msat=ENOUGH_FEE_MSAT // 10, timeout_s=60.0, max_cltv_blocks=None
        )
        for _ in range(2)
    ]
    assert first.state is PaymentState.SUCCEEDED
    assert answers(first.preimage, invoice.payment_hash)
    assert first.amount_msat == invoice.amount_msat
    assert again == first
    assert await backend.lookup_payment(invoice.payment_hash) == first
