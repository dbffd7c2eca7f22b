"""The payer's account at a router: balance, top-ups, keys, withdrawals."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from client.answers import Balance, Invoice, TopUp
from client.credentials import ApiKey, Credential
from client.errors import SatherdError
from client.events import InvoiceDue
from client.exchange import Answer, Emit, Flow, Patience, Request, Wait, ask, send
from client.paying import check_invoice, pay_invoice


def show_balance(credential: Credential, patience: Patience) -> Flow[Balance]:
    raw = yield from ask(Request("GET", "/balance", None, credential.headers()), patience=patience)
    return Balance.from_json(raw)


def top_up(amount_msat: int, credential: Credential | None, patience: Patience) -> Flow[TopUp]:
    """Pay into an account: a new one, whose key comes back, or that of `credential`.

    The invoice must be over `amount_msat` in whole satoshis, rounded up.
    """
    headers = {"Idempotency-Key": str(uuid.uuid4())} | (credential.headers() if credential else {})
    request = Request("POST", "/balance/topups", {"amount_msat": amount_msat}, headers)
    invoice = Invoice.from_json((yield from ask(request, patience=patience)))
    check_invoice(
        invoice.invoice,
        amount_msat=invoice.amount_msat,
        quoted_msat=amount_msat,
        max_fee_msat=None,
    )
    yield Emit(InvoiceDue(invoice))
    paid = yield from pay_invoice(invoice)
    try:
        return (yield from _collect(invoice, paid, patience))
    except SatherdError as error:
        error.credential = paid
        raise


def rotate_key(payment_hash: str, credential: Credential, patience: Patience) -> Flow[ApiKey]:
    """A new key for the account of a top-up; the old one is dead. `credential`: the top-up's."""
    path = f"/balance/topups/{payment_hash}/rotate"
    # Not repeated on a lost answer: each time would kill the key of the time before.
    raw = yield from ask(
        Request("POST", path, {}, credential.headers()), patience=patience, repeatable=False
    )
    return ApiKey(str(raw["key"]))


def list_keys(credential: Credential, patience: Patience) -> Flow[list[Mapping[str, Any]]]:
    raw = yield from ask(
        Request("GET", "/balance/keys", None, credential.headers()), patience=patience
    )
    return list(raw.get("keys") or [])


def create_key(
    credential: Credential, limit_msat: int | None, withdraw: bool, patience: Patience
) -> Flow[ApiKey]:
    """A further key on the account, with a spending limit in msat if one is given."""
    body: dict[str, Any] = {"withdraw": withdraw}
    if limit_msat is not None:
        body["limit_msat"] = limit_msat
    request = Request("POST", "/balance/keys", body, credential.headers())
    raw = yield from ask(request, patience=patience, repeatable=False)
    return ApiKey(str(raw["key"]))


def delete_key(key_id: str, credential: Credential, patience: Patience) -> Flow[None]:
    request = Request("DELETE", f"/balance/keys/{key_id}", None, credential.headers())
    yield from ask(request, patience=patience)


def withdraw(
    body: Mapping[str, Any], credential: Credential, patience: Patience
) -> Flow[Mapping[str, Any]]:
    """Ask for a payout to an invoice, or of an amount to a Lightning address."""
    headers = {**credential.headers(), "Idempotency-Key": str(uuid.uuid4())}
    request = Request("POST", "/balance/withdrawals", body, headers)
    return (yield from ask(request, patience=patience))


def show_withdrawal(
    withdrawal_id: str, credential: Credential, patience: Patience
) -> Flow[Mapping[str, Any]]:
    path = f"/balance/withdrawals/{withdrawal_id}"
    return (yield from ask(Request("GET", path, None, credential.headers()), patience=patience))


def _collect(invoice: Invoice, paid: Credential, patience: Patience) -> Flow[TopUp]:
    """The key of a paid top-up, asking until the router has seen the settlement."""
    request = Request("GET", f"/balance/topups/{invoice.payment_hash}", None, paid.headers())
    failures = 0
    while True:
        answer = yield from send(request, patience=patience, repeatable=True)
        failures += 1
        if answer.status < 400:
            return _top_up_of(answer, invoice, paid)
        if answer.status != 402 or failures >= patience.attempts:
            raise answer.refusal()
        yield Wait(patience.delay_s(failures))


def _top_up_of(answer: Answer, invoice: Invoice, paid: Credential) -> TopUp:
    raw = answer.json()
    key = raw.get("key")
    return TopUp(
        payment_hash=invoice.payment_hash,
        paid_msat=invoice.amount_msat,
        balance_msat=int(raw.get("balance_msat", 0)),
        key=ApiKey(key) if isinstance(key, str) else None,
        credential=paid,
    )
