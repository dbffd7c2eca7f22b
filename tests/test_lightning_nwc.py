"""NWC beyond the conformance suite: what a wallet and a relay may do to us. All before a stand-in
of both, with real signatures and real encryption."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from coincurve import PrivateKey

from billing.lightning import (
    BackendAuthError,
    BackendRejected,
    BackendUnavailable,
    InvoiceState,
    OutcomeUnknown,
    PaymentState,
)
from billing.lightning import nwc as nwc_module
from billing.lightning.nostr import pubkey_of, read_event, sign_event
from billing.lightning.nwc import from_settings
from billing.lightning.nwc_link import read_connection
from tests.lightning_rig import ask, hash_of, pay, take
from tests.stand_ins.nwc import METHODS, UNPAID_PREIMAGE
from tests.stand_ins.wallet_rig import NwcRig

WALLET = pubkey_of(PrivateKey(b"\x07" * 32))
SECRET = "3b" * 32
RELAY = "relay=wss%3A%2F%2Frelay.example.com"


@pytest.fixture
async def rig(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[NwcRig]:
    rig = NwcRig(tmp_path, **getattr(request, "param", {}))
    await rig.start()
    yield rig
    await rig.stop()


def with_wallet(**options: Any) -> Any:
    return pytest.mark.parametrize("rig", [options], indirect=True, ids=["_".join(options)])


# Connection strings and events


def test_a_connection_string_is_read() -> None:
    text = (
        f"nostr+walletconnect://{WALLET}?{RELAY}&relay=ws://127.0.0.1:1&secret={SECRET}&lud16=a@b"
    )
    connection = read_connection(text)
    assert connection.wallet_pubkey == WALLET
    assert connection.relays == ("wss://relay.example.com", "ws://127.0.0.1:1")
    assert connection.key.secret.hex() == SECRET
    assert SECRET not in repr(connection)


@pytest.mark.parametrize(
    "text",
    [
        f"https://{WALLET}?{RELAY}&secret={SECRET}",
        f"nostr+walletconnect://{WALLET}?secret={SECRET}",
        f"nostr+walletconnect://{WALLET}?relay=https://relay.example.com&secret={SECRET}",
        f"nostr+walletconnect://{WALLET}?{RELAY}",
        f"nostr+walletconnect://{WALLET[:-2]}?{RELAY}&secret={SECRET}",
        f"nostr+walletconnect://{'ff' * 32}?{RELAY}&secret={SECRET}",
        f"nostr+walletconnect://{WALLET}?{RELAY}&secret={'00' * 32}",
        SECRET,
    ],
)
def test_what_is_no_connection_string_is_refused_without_repeating_it(text: str) -> None:
    with pytest.raises(ValueError) as refusal:
        from_settings(url=text)
    assert SECRET not in str(refusal.value)
    assert WALLET[:20] not in str(refusal.value)


def test_an_event_is_read_only_as_it_was_signed() -> None:
    event = sign_event(PrivateKey(), kind=1, tags=[["p", "x"]], content='"é\n', created_at=17)
    value = json.loads(json.dumps(asdict(event)))
    assert read_event(value) == event
    changes = {
        "id": "00" * 32,
        "pubkey": WALLET,
        "created_at": 18,
        "kind": 2,
        "tags": [],
        "content": "other",
        "sig": "11" * 64,
    }
    for name, changed in changes.items():
        assert read_event(value | {name: changed}) is None, name
        assert read_event({key: kept for key, kept in value.items() if key != name}) is None
    for nonsense in (None, [], "x", value | {"tags": [1]}, value | {"content": 5}):
        assert read_event(nonsense) is None


# What goes over the wire


async def test_requests_are_encrypted_expire_and_are_for_the_wallet_alone(rig: NwcRig) -> None:
    bolt11 = await rig.their_invoice(50_000)
    assert (await pay(rig, bolt11)).state is PaymentState.SUCCEEDED
    [request] = [one for one in rig.wallet.requests if one["method"] == "pay_invoice"]
    assert request["params"] == {"invoice": bolt11}
    for event in rig.wallet.events:
        assert bolt11 not in event.content
        assert event.tag("p") == pubkey_of(rig.wallet.key)
        assert event.tag("encryption") == "nip44_v2"
        assert event.created_at < int(event.tag("expiration") or 0) <= event.created_at + 60


async def test_nothing_secret_is_logged_or_kept(
    rig: NwcRig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    invoice = await ask(rig)
    status = await rig.backend.lookup_invoice(invoice.payment_hash)
    assert status.state is InvoiceState.OPEN
    assert UNPAID_PREIMAGE not in repr(invoice) + repr(status) + caplog.text
    assert rig.wallet.client_key.secret.hex() not in caplog.text


# Answers


async def test_a_lost_answer_is_looked_up(rig: NwcRig) -> None:
    bolt11 = await rig.their_invoice(50_000)
    rig.wallet.answers_to_lose.append("pay_invoice")
    status = await pay(rig, bolt11, timeout_s=0.3)
    assert status.state is PaymentState.SUCCEEDED
    assert len([one for one in rig.wallet.requests if one["method"] == "pay_invoice"]) == 1


async def test_a_wallet_that_falls_silent_leaves_it_unknown(
    rig: NwcRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nwc_module, "_ANSWER_TIMEOUT_S", 0.3)
    bolt11 = await rig.their_invoice(50_000)
    await rig.backend.node_info()
    rig.wallet.answers_to_lose += ["pay_invoice"]
    original = rig.wallet._look_up

    async def silent_after_paying(payment_hash: str) -> dict[str, Any]:
        if not rig.wallet.answers_to_lose:
            rig.wallet.answers_to_lose.append("lookup_invoice")
        return await original(payment_hash)

    monkeypatch.setattr(rig.wallet, "_look_up", silent_after_paying)
    with pytest.raises(OutcomeUnknown):
        await pay(rig, bolt11, timeout_s=0.3)
    assert await rig.left_msat(hash_of(bolt11)) == 50_000


async def test_a_question_without_an_answer_before_paying_sends_nothing(
    rig: NwcRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nwc_module, "_ANSWER_TIMEOUT_S", 0.3)
    bolt11 = await rig.their_invoice(50_000)
    await rig.backend.node_info()
    rig.wallet.answers_to_lose.append("lookup_invoice")
    with pytest.raises(BackendUnavailable):
        await pay(rig, bolt11)
    assert not [one for one in rig.wallet.requests if one["method"] == "pay_invoice"]


async def test_forged_answers_are_not_believed(rig: NwcRig) -> None:
    """The relay repeats each answer under the wallet's name with a wrong signature, and under
    another name with a right one, before the wallet's own comes."""
    rig.wallet.forge_answers = True
    assert (await rig.backend.balance()).spendable_msat > 0
    assert (await pay(rig, await rig.their_invoice(50_000))).state is PaymentState.SUCCEEDED


async def test_only_forged_answers_are_no_answer(
    rig: NwcRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nwc_module, "_ANSWER_TIMEOUT_S", 0.3)
    rig.wallet.forge_answers = True
    rig.wallet.answers_to_lose.append("get_balance")
    with pytest.raises(OutcomeUnknown):
        await rig.backend.balance()


async def test_a_success_without_its_preimage_is_unknown(rig: NwcRig) -> None:
    rig.wallet.preimage = "ab" * 32
    bolt11 = await rig.their_invoice(50_000)
    status = await pay(rig, bolt11)
    assert (status.state, status.preimage) == (PaymentState.UNKNOWN, None)
    looked_up = await rig.backend.lookup_payment(hash_of(bolt11))
    assert looked_up.state is PaymentState.UNKNOWN


@pytest.mark.parametrize(
    "code, reason",
    [
        ("RATE_LIMITED", "quota"),
        ("QUOTA_EXCEEDED", "quota"),
        ("INSUFFICIENT_BALANCE", "insufficient_funds"),
        ("NOT_IMPLEMENTED", "unsupported"),
        ("UNSUPPORTED_ENCRYPTION", "unsupported"),
        ("BAD_REQUEST", "malformed"),
        ("EXPIRED", "expired"),
    ],
)
async def test_refusals_that_are_certain_are_rejections(
    rig: NwcRig, code: str, reason: str
) -> None:
    rig.wallet.errors.append(("pay_invoice", code))
    with pytest.raises(BackendRejected) as refusal:
        await pay(rig, await rig.their_invoice(50_000))
    assert refusal.value.reason == reason


@pytest.mark.parametrize("code", ["RESTRICTED", "UNAUTHORIZED"])
async def test_a_connection_that_may_not_pay_is_the_operators_business(
    rig: NwcRig, code: str
) -> None:
    rig.wallet.errors.append(("pay_invoice", code))
    with pytest.raises(BackendAuthError):
        await pay(rig, await rig.their_invoice(50_000))


@pytest.mark.parametrize("code", ["INTERNAL", "OTHER", "NOT_FOUND", "SOMETHING_NEW"])
async def test_other_errors_of_a_payment_are_unknown(rig: NwcRig, code: str) -> None:
    rig.wallet.errors.append(("pay_invoice", code))
    with pytest.raises(OutcomeUnknown):
        await pay(rig, await rig.their_invoice(50_000))


async def test_payment_failed_is_not_final(rig: NwcRig) -> None:
    rig.wallet.errors.append(("pay_invoice", "PAYMENT_FAILED"))
    status = await pay(rig, await rig.their_invoice(50_000))
    assert status.state is PaymentState.UNKNOWN
    assert not rig.backend.capabilities.failed_is_definitive


# Wallets and relays of other kinds


@with_wallet(methods=METHODS.replace("list_transactions ", ""))
async def test_a_wallet_that_cannot_list_is_not_paid_from(rig: NwcRig) -> None:
    invoice = await ask(rig)
    await rig.pay_us(invoice.bolt11)
    settled = await rig.backend.lookup_invoice(invoice.payment_hash)
    assert settled.state is InvoiceState.SETTLED
    with pytest.raises(BackendRejected) as refusal:
        await pay(rig, await rig.their_invoice(50_000))
    assert refusal.value.reason == "unsupported"


@with_wallet(notifications="")
async def test_a_wallet_without_notifications_is_polled(rig: NwcRig) -> None:
    assert rig.backend.capabilities.push == "live"
    await rig.backend.node_info()
    assert rig.backend.capabilities.push == "none"


@with_wallet(says_state=False)
async def test_a_wallet_without_states_is_read_by_its_times(rig: NwcRig) -> None:
    invoice, lapsed = await ask(rig), await ask(rig, expiry_s=60)
    states = [(await rig.backend.lookup_invoice(invoice.payment_hash)).state]
    await rig.pay_us(invoice.bolt11)
    states.append((await rig.backend.lookup_invoice(invoice.payment_hash)).state)
    await rig.pass_time(61)
    states.append((await rig.backend.lookup_invoice(lapsed.payment_hash)).state)
    assert states == [InvoiceState.OPEN, InvoiceState.SETTLED, InvoiceState.EXPIRED]
    status = await pay(rig, await rig.their_invoice(50_000))
    looked_up = await rig.backend.lookup_payment(status.payment_hash)
    assert looked_up == status and status.state is PaymentState.SUCCEEDED


@with_wallet(encryption=None)
async def test_a_wallet_that_offers_nothing_else_is_spoken_to_by_nip04(rig: NwcRig) -> None:
    invoice = await ask(rig)
    told = asyncio.create_task(take(rig, None, 1))
    await rig.pay_us(invoice.bolt11)
    assert [one.payment_hash for one in await told] == [invoice.payment_hash]
    bolt11 = await rig.their_invoice(50_000)
    assert (await pay(rig, bolt11)).state is PaymentState.SUCCEEDED
    assert (await rig.backend.lookup_payment(hash_of(bolt11))).state is PaymentState.SUCCEEDED
    for event in rig.wallet.events:
        assert event.tag("encryption") is None and "?iv=" in event.content


async def test_a_lost_connection_is_made_again(rig: NwcRig) -> None:
    await rig.backend.node_info()
    await rig.wallet.drop_connections()
    # The first to use a connection may be the one who finds out that it is gone.
    with contextlib.suppress(OutcomeUnknown):
        await rig.backend.balance()
    invoice = await ask(rig)
    await rig.pay_us(invoice.bolt11)
    [settlement] = await take(rig, None, 1)
    assert settlement.payment_hash == invoice.payment_hash


async def test_the_next_relay_is_tried_and_none_is_unavailable(rig: NwcRig) -> None:
    head, _, tail = rig.wallet.uri.partition("?")
    nobody = "relay=" + quote("ws://127.0.0.1:1", safe="")
    second = from_settings(url=f"{head}?{nobody}&{tail}")
    assert (await second.node_info()).network == "regtest"
    await second.aclose()
    secret = rig.wallet.client_key.secret.hex()
    none = from_settings(url=f"{head}?{nobody}&secret={secret}")
    with pytest.raises(BackendUnavailable) as trouble:
        await none.balance()
    assert secret not in str(trouble.value)
    await none.aclose()


async def test_a_relay_that_knows_no_such_wallet_is_unavailable(rig: NwcRig) -> None:
    tail = rig.wallet.uri.partition("?")[2]
    stranger = from_settings(url=f"nostr+walletconnect://{WALLET}?{tail}")
    with pytest.raises(BackendUnavailable):
        await stranger.balance()
    await stranger.aclose()
