"""The answers of an LNURL-pay server, checked (LUD-06, LUD-12, LUD-18). Pure.

Two answers: the terms (between which amounts, and where to ask), and an invoice for one amount.
All of it is a stranger's word. What protects our money: the amount of the invoice is what we asked
for, its network is ours, it can still be paid, and its payee is not ourselves. What `h` commits to
is noted but not enforced, as wallets no longer do (luds #234). `routes`, `disposable`,
`successAction` and unknown fields are ignored: a payout expects nothing in return.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from billing.bolt11_codec import MAX_AMOUNT_MSAT, MAX_LENGTH, decode
from billing.errors import BadInvoice, BadLightningAddress
from billing.ln_url import Payee
from billing.outside_http import OutsideAnswer
from billing.outside_url import BadOutsideUrl, OutsideRules, OutsideUrl, parse_outside_url

MSAT_PER_SAT = 1000
SECONDS_LEFT_MIN = 60
# A week of blocks, as the payer's risk: a payee can hold our HTLC that long.
FINAL_CLTV_MAX = 1008
_REASON_MAX_LENGTH = 200


class PayeeError(BadLightningAddress):
    """The payee's server said no. `reason` is its word: at most 200 printable characters of text
    that a stranger wrote, for logs and the payee himself, never to be rendered as HTML."""

    def __init__(self, reason: str) -> None:
        super().__init__("payee_error", "the payee's server refuses")
        self.reason = reason


@dataclass(frozen=True, slots=True)
class PayTerms:
    """What a payee accepts, as of now: ask again for the next payout."""

    payee: Payee
    callback: OutsideUrl
    min_sendable_msat: int
    max_sendable_msat: int
    comment_max_length: int  # 0: none is accepted
    metadata_sha256: str


@dataclass(frozen=True, slots=True)
class RequestedInvoice:
    """An invoice that passed every check but one: the caller makes sure, by a unique index on
    `payment_hash`, that no earlier attempt had this hash.

    `hash_ok`: the invoice commits to the metadata; None when it has a plain description.
    `verify_url` and `success_action_tag` are the payee's word, unchecked, for diagnosis only: never
    conclude from them that something was not paid.
    """

    bolt11: str = field(repr=False)
    payment_hash: str
    amount_msat: int
    created_at: datetime
    expires_at: datetime
    payee_pubkey: str
    min_final_cltv: int
    callback_host: str
    hash_ok: bool | None
    verify_url: str | None
    success_action_tag: str | None


def payable_msat(terms: PayTerms, amount_msat: int) -> int:
    """The most that may be paid at once out of `amount_msat`, in whole satoshis; 0 if too little.

    Above the payee's maximum the rest stays for another payout.
    """
    payable = min(amount_msat, terms.max_sendable_msat) // MSAT_PER_SAT * MSAT_PER_SAT
    return payable if payable >= max(terms.min_sendable_msat, MSAT_PER_SAT) else 0


def read_json(answer: OutsideAnswer) -> dict[str, Any]:
    """The JSON object of an answer, whatever its status (LUD-01). Raises BadLightningAddress.

    `payee_error` (a PayeeError) when the object says so; without JSON, `unreachable` for a 5xx,
    which will pass, and `bad_answer` for the rest.
    """
    try:
        # Decoded first: given bytes, json would guess UTF-16 too.
        found = json.loads(answer.body.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        if answer.status >= 500:
            raise BadLightningAddress("unreachable", "the server cannot be reached")
        raise _bad_answer("it is no JSON object")
    status = found.get("status")
    if isinstance(status, str) and status.upper() == "ERROR":
        raise PayeeError(_printable(found.get("reason")))
    return found


def read_terms(payee: Payee, found: dict[str, Any], rules: OutsideRules) -> PayTerms:
    """The terms in a server's first answer. Raises BadLightningAddress."""
    if found.get("tag") != "payRequest":
        raise BadLightningAddress("not_a_payment", "this LNURL is not for receiving payments")
    least, most = _whole(found.get("minSendable")), _whole(found.get("maxSendable"))
    if least is None or most is None or not 1 <= least <= most:
        raise _bad_answer("minSendable and maxSendable are missing or wrong")
    _refuse_mandatory_payer_data(found.get("payerData"))
    return PayTerms(
        payee=payee,
        callback=_read_callback(found.get("callback"), rules),
        min_sendable_msat=least,
        max_sendable_msat=min(most, MAX_AMOUNT_MSAT),
        comment_max_length=max(0, _whole(found.get("commentAllowed")) or 0),
        metadata_sha256=_hash_metadata(found.get("metadata")),
    )


def read_invoice(
    terms: PayTerms,
    found: dict[str, Any],
    *,
    amount_msat: int,
    network: str,
    now: datetime,
    own_pubkey: str | None,
) -> RequestedInvoice:
    """The invoice in a callback's answer, for exactly `amount_msat`. Raises BadLightningAddress."""
    text = found.get("pr")
    if not isinstance(text, str) or len(text) > MAX_LENGTH:
        raise _bad_answer("there is no invoice in it")
    try:
        invoice = decode(text)
    except BadInvoice:
        raise BadLightningAddress("invoice_unreadable", "the invoice cannot be read") from None
    if invoice.network != network:
        raise BadLightningAddress("invoice_network", "the invoice is for another network")
    if invoice.amount_msat != amount_msat:
        raise BadLightningAddress("invoice_amount", "the invoice is for another amount")
    if (invoice.expires_at - now).total_seconds() < SECONDS_LEFT_MIN:
        raise BadLightningAddress("invoice_expiry", "the invoice has expired, or nearly")
    if not invoice.has_payment_secret:
        raise BadLightningAddress("invoice_unpayable", "the invoice has no payment secret")
    if invoice.min_final_cltv > FINAL_CLTV_MAX:
        raise BadLightningAddress("invoice_unpayable", "the invoice would lock money too long")
    if own_pubkey is not None and invoice.payee_pubkey == own_pubkey:
        raise BadLightningAddress("invoice_ours", "the invoice is one of our own node")
    described = invoice.description_hash
    return RequestedInvoice(
        bolt11=text.lower(),
        payment_hash=invoice.payment_hash,
        amount_msat=amount_msat,
        created_at=invoice.created_at,
        expires_at=invoice.expires_at,
        payee_pubkey=invoice.payee_pubkey,
        min_final_cltv=invoice.min_final_cltv,
        callback_host=terms.callback.host,
        hash_ok=None if described is None else described == terms.metadata_sha256,
        verify_url=_printable(found.get("verify"), limit=2000) or None,
        success_action_tag=_success_action_tag(found.get("successAction")),
    )


def _read_callback(value: object, rules: OutsideRules) -> OutsideUrl:
    if not isinstance(value, str):
        raise _bad_answer("it names no callback")
    try:
        return parse_outside_url(value, rules)
    except BadOutsideUrl as error:
        raise BadLightningAddress("bad_url", str(error)) from None


def _hash_metadata(value: object) -> str:
    """SHA-256 of the metadata exactly as received. Odd entries in it are no reason to refuse."""
    if not isinstance(value, str):
        raise _bad_answer("metadata is missing")
    try:
        entries = json.loads(value)
        digest = hashlib.sha256(value.encode()).hexdigest()
    except (ValueError, RecursionError):  # UnicodeEncodeError, of a lone surrogate, is a ValueError
        entries, digest = None, ""
    if not isinstance(entries, list):
        raise _bad_answer("metadata is no JSON array")
    return digest


def _refuse_mandatory_payer_data(value: object) -> None:
    fields = value.values() if isinstance(value, dict) else ()
    if any(isinstance(entry, dict) and entry.get("mandatory") for entry in fields):
        raise BadLightningAddress("payer_data_required", "the payee asks who pays: we do not say")


def _whole(value: object) -> int | None:
    """A whole number, also when written as 1000.0 or "1000", as some servers do."""
    if isinstance(value, bool):
        return None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 30:
        return int(value)
    return value if isinstance(value, int) else None


def _success_action_tag(value: object) -> str | None:
    return _printable(value.get("tag"), limit=32) or None if isinstance(value, dict) else None


def _printable(value: object, limit: int = _REASON_MAX_LENGTH) -> str:
    text = value[:limit] if isinstance(value, str) else ""
    return "".join(character if character.isprintable() else " " for character in text).strip()


def _bad_answer(why: str) -> BadLightningAddress:
    return BadLightningAddress("bad_answer", f"the server's answer cannot be used: {why}")
