"""Electrum beyond the conformance suite, before stand-ins of 4.3.4 and 4.8.1."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from billing.lightning import (
    BackendAuthError,
    BackendRejected,
    InvoiceState,
    PaymentState,
)
from billing.lightning.electrum import from_settings
from billing.lightning.simulated.faults import FaultKind
from tests.lightning_rig import ENOUGH_FEE_MSAT, ask, hash_of, pay
from tests.stand_ins.electrum import PASSWORD
from tests.stand_ins.wallet_rig import WalletRig


@pytest.fixture(params=["4.3.4", "4.8.1"])
async def rig(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[WalletRig]:
    rig = WalletRig(tmp_path, "electrum", version=request.param)
    await rig.start()
    yield rig
    await rig.stop()


def asked(rig: WalletRig, method: str) -> dict[str, object]:
    [params] = [params for _, name, params in rig.core.requests if name == method]
    return params


@pytest.mark.parametrize(
    "settings, word",
    [
        ({}, "SATHERD_ELECTRUM_URL"),
        ({"url": "http://127.0.0.1:7777"}, "SATHERD_ELECTRUM_USER"),
        ({"url": "http://u:p@127.0.0.1:7777", "user": "u", "password": "p"}, "without user"),
    ],
)
def test_settings_that_lack_something_say_what(settings: dict[str, str], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        from_settings(**settings)


async def test_a_wrong_password_is_the_operators_business(rig: WalletRig) -> None:
    stranger = rig.electrum_backend(password="wrong")
    with pytest.raises(BackendAuthError) as refusal:
        await stranger.node_info()
    assert PASSWORD not in str(refusal.value)
    await stranger.aclose()


async def test_a_daemon_without_a_wallet_says_what_to_do(rig: WalletRig) -> None:
    rig.electrum.loaded = False
    with pytest.raises(BackendRejected, match="load_wallet"):
        await rig.backend.node_info()


async def test_amounts_go_as_decimals_of_bitcoin_by_the_names_of_the_version(
    rig: WalletRig,
) -> None:
    await ask(rig, 21_000, expiry_s=90)
    params = asked(rig, "add_request")
    assert params["amount"] == "0.00000021"
    if rig.electrum.version == "4.3.4":
        assert (params["expiration"], params["force"]) == (90, True)
    else:
        assert (params["expiry"], params["lightning"]) == (90, True)


async def test_an_invoice_that_no_channel_can_receive_is_not_handed_out(rig: WalletRig) -> None:
    rig.electrum.can_receive = False
    with pytest.raises(BackendRejected):
        await ask(rig)


async def test_a_request_paid_on_chain_is_not_settled(rig: WalletRig) -> None:
    invoice = await ask(rig)
    rig.electrum.on_chain.add(invoice.payment_hash)
    status = await rig.backend.lookup_invoice(invoice.payment_hash)
    assert (status.state, status.amount_received_msat) == (InvoiceState.UNKNOWN, 0)


async def test_limits_are_given_to_versions_that_know_them(rig: WalletRig) -> None:
    bolt11 = await rig.their_invoice(50_000)
    status = await rig.backend.pay_invoice(
        bolt11, max_fee_msat=ENOUGH_FEE_MSAT, timeout_s=5, max_cltv_blocks=144
    )
    assert status.state is PaymentState.SUCCEEDED
    limits = {"max_fee_msat": ENOUGH_FEE_MSAT, "max_cltv": 144}
    expected = {"invoice": bolt11} | (limits if rig.electrum.version == "4.8.1" else {})
    assert asked(rig, "lnpay") == expected


async def test_given_up_is_failed_only_when_no_htlc_is_out(rig: WalletRig) -> None:
    """Electrum clears its flag when the session gives up, and an HTLC may still be on its way."""
    bolt11 = await rig.their_invoice(50_000)
    await rig.go_wrong(FaultKind.FAIL, "pay_invoice")
    rig.electrum.stuck_sat = 50
    assert (await pay(rig, bolt11)).state is PaymentState.UNKNOWN
    stuck = await rig.backend.lookup_payment(hash_of(bolt11))
    assert (stuck.state, stuck.failure_code) == (PaymentState.UNKNOWN, "htlcs_pending")
    assert (await rig.backend.balance()).pending_msat == 50_000
    rig.electrum.stuck_sat = 0
    assert (await rig.backend.lookup_payment(hash_of(bolt11))).state is PaymentState.FAILED


async def test_what_the_channels_have_settled_is_paid_whatever_the_invoice_says(
    rig: WalletRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4.3.4 writes the two one after the other, and can be killed in between. Given the invoice
    again it would pay it again."""
    bolt11 = await rig.their_invoice(50_000)
    paid = await pay(rig, bolt11)

    async def unpaid(invoice_id: str) -> dict[str, object]:
        return {"is_lightning": True, "status": 0, "invoice_id": invoice_id}

    monkeypatch.setattr(rig.electrum, "_get_invoice", unpaid)
    assert await rig.backend.lookup_payment(hash_of(bolt11)) == paid
    assert await pay(rig, bolt11) == paid
    assert await rig.left_msat(hash_of(bolt11)) == 50_000


async def test_paid_without_a_preimage_in_the_history_is_unknown(
    rig: WalletRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nothing() -> list[object]:
        return []

    bolt11 = await rig.their_invoice(50_000)
    monkeypatch.setattr(rig.electrum, "_lightning_history", nothing)
    assert (await pay(rig, bolt11)).state is PaymentState.UNKNOWN
    monkeypatch.undo()
    assert (await pay(rig, bolt11)).state is PaymentState.SUCCEEDED
    assert await rig.left_msat(hash_of(bolt11)) == 50_000
