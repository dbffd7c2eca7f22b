"""Invoices of ours: issue them, credit what was paid (billing.invoice_watcher sees it).

        issue
          │
        open ──────── settled in time, in full ──────▶ paid
          │ └──────── settled after expires_at ──────▶ late        credited, nothing is started
          │ └──────── settled for less than asked ───▶ underpaid   credited, nothing is started
          ▼
        expired ───── settled after all ─────────────▶ late

Whatever comes in is credited in full to the invoice's account, whole and once: the transfer's id is
made from the payment hash, so stream, poll and restart may all report the same settlement. A receipt
for a hash that is none of ours goes to `liabilities:unassigned`.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from billing import bolt11_codec, ledger
from billing.accounts import hash_secret
from billing.errors import BadInvoice
from billing.ledger import Transfer
from billing.lightning import LightningBackend

log = logging.getLogger(__name__)

Clock = Callable[[], datetime]
Transaction = Callable[[], AbstractAsyncContextManager[Any]]


def utc_now() -> datetime:
    return datetime.now(UTC)


class State(StrEnum):
    OPEN = "open"
    PAID = "paid"
    LATE = "late"
    UNDERPAID = "underpaid"
    EXPIRED = "expired"


class Purpose(StrEnum):
    """What paying in time does besides crediting; `reference` names the quote, account or job."""

    QUOTE = "quote"
    TOPUP = "topup"
    BUMP = "bump"


@dataclass(frozen=True, slots=True)
class IssuedInvoice:
    """A stored invoice. `token_id` goes into its L402 token; `claim_token` is shown once."""

    payment_hash: str
    bolt11: str
    amount_msat: int
    account_id: str
    purpose: Purpose
    reference: str
    token_id: bytes
    claim_token: str
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class Credit:
    """A settlement that was recorded now, for the first time."""

    payment_hash: str
    account_id: str
    purpose: Purpose
    reference: str
    received_msat: int
    state: State


async def request_invoice(
    backend: LightningBackend, *, amount_msat: int, description: str, expiry_s: int, network: str
) -> tuple[str, str, datetime]:
    """Ask the node for an invoice; returns (payment hash, bolt11, expires_at).

    The node's answer is decoded and checked before anybody sees it: some nodes round the amount, or
    make one without any. Raises BadInvoice or a BackendError.
    """
    made = await backend.create_invoice(
        amount_msat=amount_msat,
        description=description,
        expiry_s=expiry_s,
        idempotency_key=secrets.token_hex(16),
    )
    decoded = bolt11_codec.decode(made.bolt11)
    if decoded.amount_msat != amount_msat or decoded.payment_hash != made.payment_hash:
        raise BadInvoice("the node made another invoice than it was asked for")
    if decoded.network != network:
        raise BadInvoice(f"the node made an invoice for {decoded.network}, not {network}")
    return made.payment_hash, made.bolt11, decoded.expires_at


async def store_invoice(
    connection: Any,
    *,
    payment_hash: str,
    bolt11: str,
    amount_msat: int,
    account_id: str,
    purpose: Purpose,
    reference: str,
    expires_at: datetime,
    first_check_at: datetime,
) -> IssuedInvoice:
    """Keep a fresh invoice; the caller commits before it shows it to anybody."""
    issued = IssuedInvoice(
        payment_hash=payment_hash,
        bolt11=bolt11,
        amount_msat=amount_msat,
        account_id=account_id,
        purpose=purpose,
        reference=reference,
        token_id=secrets.token_bytes(32),
        claim_token=secrets.token_urlsafe(24),
        expires_at=expires_at,
    )
    await connection.execute(
        "insert into invoices (payment_hash, account_id, purpose, reference, amount_msat, bolt11,"
        " state, token_id, claim_hash, expires_at, next_check_at)"
        " values ($1, $2, $3, $4, $5, $6, 'open', $7, $8, $9, $10)",
        payment_hash,
        account_id,
        purpose.value,
        reference,
        amount_msat,
        bolt11,
        issued.token_id,
        hash_secret(issued.claim_token),
        expires_at,
        first_check_at,
    )
    return issued


@dataclass(frozen=True, slots=True)
class Unassigned:
    """A receipt for none of our invoices that was booked now, for the first time."""

    payment_hash: str


LockStarted = Callable[[Any, Purpose, str], Awaitable[None]]


async def record_settlement(
    connection: Any,
    *,
    payment_hash: str,
    received_msat: int,
    settled_at: datetime,
    joined_at: datetime | None = None,
    lock: LockStarted | None = None,
) -> Credit | Unassigned | None:
    """Credit a receipt, once. None when it was known already, or is none of these books': the node
    was paid it before `joined_at`.

    Runs in the caller's transaction, with the invoice's row locked. `lock(connection, purpose,
    reference)` locks what the payment may start, which has to come before balances: whoever ends it
    locks it in that order.
    """
    row = await connection.fetchrow(
        "select * from invoices where payment_hash = $1 for update", payment_hash
    )
    if row is None:
        if joined_at is not None and settled_at < joined_at:
            return None
        receipt = Transfer(
            ledger.LIGHTNING, ledger.UNASSIGNED, received_msat, "received", payment_hash
        )
        if not await ledger.post(connection, [receipt]):
            return None
        log.warning("receipt without an invoice of ours payment_hash=%s", payment_hash)
        return Unassigned(payment_hash)
    if row["state"] not in (State.OPEN, State.EXPIRED):
        return None
    if received_msat < row["amount_msat"]:
        state = State.UNDERPAID
    elif settled_at > row["expires_at"] or row["state"] == State.EXPIRED:
        state = State.LATE
    else:
        state = State.PAID
    await connection.execute(
        "update invoices set state = $2, settled_at = $3, received_msat = $4, next_check_at = null"
        " where payment_hash = $1",
        payment_hash,
        state.value,
        settled_at,
        received_msat,
    )
    if lock is not None:
        await lock(connection, Purpose(row["purpose"]), row["reference"])
    owner = ledger.client(row["account_id"])
    await ledger.post(
        connection, [Transfer(ledger.LIGHTNING, owner, received_msat, "received", payment_hash)]
    )
    return Credit(
        payment_hash,
        row["account_id"],
        Purpose(row["purpose"]),
        row["reference"],
        received_msat,
        state,
    )
