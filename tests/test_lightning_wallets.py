"""The conformance suite again, for the wallets that promise little, each before its stand-in.

Named stand-ins: no real wallet was asked. What such a wallet cannot do has a test of its own here
in place of the suite's.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from billing import bolt11_codec
from billing.lightning import Invoice, OutcomeUnknown, PaymentState
from billing.lightning.simulated.faults import FaultKind
from tests import test_lightning_backends as suite
from tests.lightning_rig import Rig, hash_of, pay
from tests.stand_ins.wallet_rig import NwcRig, WalletRig

_OTHERWISE_HERE = {
    "test_the_same_key_gives_the_same_invoice",
    "test_an_invoice_lost_on_its_way_is_found_again_by_its_key",
    "test_a_node_that_lost_its_history_says_not_found_and_pays_no_second_time",
    "test_an_invoice_says_what_was_asked_for",
    "test_a_failed_payment_costs_nothing_and_may_be_tried_again",
}
globals().update(
    {
        name: test
        for name, test in vars(suite).items()
        if name.startswith("test_") and name not in _OTHERWISE_HERE
    }
)

KINDS = ["nwc", "lnbits", "electrum"]


@pytest.fixture(params=[f"{kind} (stand-in)" for kind in KINDS])
async def rig(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Rig]:
    kind = request.param.partition(" ")[0]
    rig = NwcRig(tmp_path) if kind == "nwc" else WalletRig(tmp_path, kind)
    await rig.start()
    yield rig
    assert (await rig.network.audit()).balances
    await rig.stop()


async def create(rig: Rig, key: str) -> Invoice:
    return await rig.backend.create_invoice(
        amount_msat=12_000, description="a prompt", expiry_s=90, idempotency_key=key
    )


async def test_an_invoice_says_what_was_asked_for(rig: Rig) -> None:
    invoice = await create(rig, "quote")
    decoded = bolt11_codec.decode(invoice.bolt11)
    assert decoded.network == "regtest" == (await rig.backend.node_info()).network
    assert decoded.amount_msat == invoice.amount_msat == 12_000
    assert decoded.payment_hash == invoice.payment_hash
    assert decoded.expires_at == invoice.expires_at
    assert (decoded.expiry_s, decoded.description) == (90, "a prompt")
    # LNbits does not say whose node it is; its wallet has a name of its own instead.
    of_the_node = decoded.payee_pubkey == (await rig.backend.node_info()).pubkey
    assert of_the_node is (rig.backend.name != "lnbits")


async def test_a_node_keeps_its_name(rig: Rig) -> None:
    first = await rig.backend.node_info()
    await rig.restart()
    assert await rig.backend.node_info() == first


async def test_the_same_key_gives_another_invoice(rig: Rig) -> None:
    """These wallets know no keys; a caller that lost an invoice has shown it to nobody."""
    assert (await create(rig, "same")).payment_hash != (await create(rig, "same")).payment_hash


async def test_an_invoice_lost_on_its_way_is_unknown(rig: Rig) -> None:
    await rig.backend.node_info()
    await rig.go_wrong(FaultKind.DROP_AFTER, "create_invoice")
    with pytest.raises(OutcomeUnknown):
        await create(rig, "lost")
    assert (await create(rig, "lost")).amount_msat == 12_000


async def test_a_wallet_that_lost_its_history_pays_no_second_time(rig: Rig) -> None:
    """The payee does not take it twice, and none of these wallets passes on its word for that: the
    failure is not certain, which is what the caller must know."""
    bolt11 = await rig.their_invoice(50_000)
    assert (await pay(rig, bolt11)).state is PaymentState.SUCCEEDED
    await rig.delete_history(hash_of(bolt11))
    assert (await rig.backend.lookup_payment(hash_of(bolt11))).state is PaymentState.NOT_FOUND
    again = await pay(rig, bolt11)
    assert again.state is PaymentState.UNKNOWN
    assert again.failure_code
    assert await rig.left_msat(hash_of(bolt11)) == 50_000


async def test_a_failed_payment_costs_nothing(rig: Rig) -> None:
    """LNbits never tries again what its node has called failed; the others do."""
    bolt11 = await rig.their_invoice(50_000)
    before = await rig.backend.balance()
    await rig.go_wrong(FaultKind.FAIL, "pay_invoice")
    failed = await pay(rig, bolt11)
    assert failed.state is PaymentState.UNKNOWN
    assert failed.failure_code
    assert (await rig.backend.lookup_payment(hash_of(bolt11))).state is PaymentState.FAILED
    assert await rig.backend.balance() == before
    again = await pay(rig, bolt11)
    if rig.backend.name == "lnbits":
        assert again.state is PaymentState.UNKNOWN
        assert await rig.left_msat(hash_of(bolt11)) == 0
    else:
        assert again.state is PaymentState.SUCCEEDED
