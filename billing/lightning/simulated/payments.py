"""Payments of the simulated network, from the HTLC's departure to its end.

    begin -> in_flight, travelling until due_at_s -> arrives -> succeeded, or refused: failed
                                                  -> lost on the way: failed
          -> in_flight, held by the payee -> resolve -> succeeded or failed
          -> failed at once, or succeeded at once when nothing delays it

The amount and the routing fee leave the payer's balance at departure and come back on failure.
A record may be forgotten by its node; the money and this table, the oracle of tests, are not.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from hashlib import sha256

from billing.bolt11_codec import DecodedInvoice
from billing.lightning.simulated import invoices, wallets
from billing.lightning.simulated.faults import Fault, FaultKind
from billing.lightning.simulated.store import Transaction
from billing.lightning.simulated.wallets import Refused

PAYMENT_SCHEMA = """
CREATE TABLE IF NOT EXISTS payment (
    id INTEGER PRIMARY KEY,
    wallet TEXT NOT NULL REFERENCES wallet (name),
    payment_hash TEXT NOT NULL,
    payee TEXT,
    amount_msat INTEGER NOT NULL CHECK (amount_msat > 0),
    fee_msat INTEGER NOT NULL CHECK (fee_msat >= 0),
    state TEXT NOT NULL CHECK (state IN ('in_flight', 'succeeded', 'failed')),
    arrives INTEGER NOT NULL,
    due_at_s REAL,
    preimage TEXT,
    failure_code TEXT,
    sent_at_s REAL NOT NULL,
    ended_at_s REAL,
    forgotten INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE UNIQUE INDEX IF NOT EXISTS payment_once ON payment (wallet, payment_hash)
    WHERE state <> 'failed' AND NOT forgotten;
CREATE INDEX IF NOT EXISTS payment_of_hash ON payment (payment_hash);
CREATE INDEX IF NOT EXISTS payment_under_way ON payment (due_at_s) WHERE state = 'in_flight';
"""


def routing_fee_msat(amount_msat: int) -> int:
    """What every payment costs on this network: 1 sat and 0.1 %, rounded up."""
    return 1000 + -(-amount_msat // 1000)


@dataclass(frozen=True, slots=True)
class PaymentRecord:
    """One attempt to pay an invoice. `forgotten`: its node would not tell you."""

    payment_id: int
    wallet: str
    payment_hash: str
    payee: str | None
    amount_msat: int
    fee_msat: int
    state: str  # in_flight, succeeded, failed
    preimage: str | None
    failure_code: str | None
    sent_at_s: float
    ended_at_s: float | None
    forgotten: bool


@dataclass(frozen=True, slots=True)
class Ended:
    """A note for those who wait: this payment has succeeded or failed."""

    payment_id: int


@dataclass(frozen=True, slots=True)
class Departed:
    """A note for the clock: an HTLC is under way until then."""

    due_at_s: float


def payee_of(transaction: Transaction, invoice: DecodedInvoice) -> str | None:
    """The wallet whose key has signed the invoice; None: not of this network."""
    row = transaction.row("SELECT name FROM wallet WHERE pubkey = ?", invoice.payee_pubkey)
    return None if row is None else row["name"]


def find(transaction: Transaction, wallet: str, payment_hash: str) -> PaymentRecord | None:
    """What the node knows: the attempt that counts, or the last that failed."""
    row = transaction.row(
        "SELECT * FROM payment WHERE wallet = ? AND payment_hash = ? AND NOT forgotten"
        " ORDER BY state = 'failed', id DESC LIMIT 1",
        wallet,
        payment_hash,
    )
    return None if row is None else _record(row)


def begin(
    transaction: Transaction,
    wallet: str,
    invoice: DecodedInvoice,
    *,
    max_fee_msat: int,
    max_cltv_blocks: int | None,
    latency_s: float,
    fault: Fault | None,
    forget: bool,
    now_s: float,
) -> PaymentRecord:
    """Send the HTLC. An invoice that is paid or under way already gives its first payment.

    Raises Refused when the node will not even try; then there is no record.
    """
    known = find(transaction, wallet, invoice.payment_hash)
    if known is not None and known.state != "failed":
        return known
    payer = wallets.find(transaction, wallet)
    payee = payee_of(transaction, invoice)
    amount_msat = _amount_to_pay(invoice, now_s)
    fee_msat = routing_fee_msat(amount_msat)
    if payee == wallet:
        raise Refused("self_payment", "the invoice is this node's own")
    if fee_msat > max_fee_msat:
        raise Refused("fee_limit", f"routing costs {fee_msat} msat, more than is allowed")
    if max_cltv_blocks is not None and invoice.min_final_cltv > max_cltv_blocks:
        raise Refused("refused", "the payee wants more blocks than are allowed")
    if payer.balance_msat < amount_msat + fee_msat:
        raise Refused("insufficient_funds", "the node holds less than amount and routing fee")
    kind = None if fault is None else fault.kind
    extra_s = fault.delay_s if fault and kind in (FaultKind.DELAY, FaultKind.FAIL_LATE) else 0.0
    transaction.run(
        "UPDATE wallet SET balance_msat = balance_msat - ? WHERE name = ?",
        amount_msat + fee_msat,
        wallet,
    )
    payment_id = transaction.run(
        "INSERT INTO payment (wallet, payment_hash, payee, amount_msat, fee_msat, state, arrives,"
        " due_at_s, sent_at_s, forgotten) VALUES (?, ?, ?, ?, ?, 'in_flight', ?, ?, ?, ?)",
        wallet,
        invoice.payment_hash,
        payee,
        amount_msat,
        fee_msat,
        kind is not FaultKind.FAIL_LATE,
        now_s + latency_s + extra_s,
        now_s,
        forget,
    ).lastrowid
    assert payment_id is not None
    if payee is None or kind is FaultKind.FAIL:
        _fail(transaction, payment_id, "no_route", now_s)
    elif kind is FaultKind.HANG:
        _arrive_and_hold(transaction, payment_id, now_s)
    elif latency_s + extra_s > 0:
        transaction.notes.append(Departed(now_s + latency_s + extra_s))
    else:
        _end_of_the_way(transaction, payment_id, now_s)
    return get(transaction, payment_id)


def get(transaction: Transaction, payment_id: int) -> PaymentRecord:
    row = transaction.row("SELECT * FROM payment WHERE id = ?", payment_id)
    assert row is not None
    return _record(row)


def next_due_at_s(transaction: Transaction) -> float | None:
    row = transaction.row("SELECT min(due_at_s) AS due FROM payment WHERE state = 'in_flight'")
    return None if row is None else row["due"]


def run_due(transaction: Transaction, now_s: float) -> None:
    """Let every HTLC whose time has come arrive, or be lost."""
    for row in transaction.rows(
        "SELECT id FROM payment WHERE state = 'in_flight' AND due_at_s <= ? ORDER BY due_at_s, id",
        now_s,
    ):
        _end_of_the_way(transaction, row["id"], now_s)


def resolve(transaction: Transaction, payment_hash: str, settle: bool, *, now_s: float) -> int:
    """End what is in flight for this hash, held or travelling: how many payments that were.

    One that would settle still needs the payee's consent, unless the payee holds it.
    """
    rows = transaction.rows(
        "SELECT id FROM payment WHERE payment_hash = ? AND state = 'in_flight' ORDER BY id",
        payment_hash,
    )
    for row in rows:
        payment = get(transaction, row["id"])
        if not settle:
            if _is_held(transaction, payment):
                invoices.release(transaction, payment_hash)
            _fail(transaction, payment.payment_id, "payee_gave_up", now_s)
        elif _is_held(transaction, payment):
            _succeed(transaction, payment, now_s)
        else:
            _arrive(transaction, payment, now_s)
    return len(rows)


def forget(transaction: Transaction, wallet: str, payment_hash: str) -> int:
    """Delete the node's history of a payment: how many attempts that were."""
    return transaction.run(
        "UPDATE payment SET forgotten = 1 WHERE wallet = ? AND payment_hash = ? AND NOT forgotten",
        wallet,
        payment_hash,
    ).rowcount


def history(transaction: Transaction, wallet: str, *, limit: int) -> list[PaymentRecord]:
    """All attempts of a wallet, newest first, the forgotten ones too: the truth, for tests and
    for the people who run them, which no look-up tells."""
    rows = transaction.rows(
        "SELECT * FROM payment WHERE wallet = ? ORDER BY id DESC LIMIT ?", wallet, limit
    )
    return [_record(row) for row in rows]


def listed_after(
    transaction: Transaction, wallet: str, payment_id: int, *, since_s: float, limit: int
) -> list[PaymentRecord]:
    """What the node's own list says, in order: not what failed, nor what it has forgotten."""
    rows = transaction.rows(
        "SELECT * FROM payment WHERE wallet = ? AND id > ? AND sent_at_s >= ?"
        " AND state <> 'failed' AND NOT forgotten ORDER BY id LIMIT ?",
        wallet,
        payment_id,
        since_s,
        limit,
    )
    return [_record(row) for row in rows]


def left_msat(transaction: Transaction, wallet: str, payment_hash: str) -> int:
    """What has left the wallet for good for that hash, without fees, forgotten or not."""
    row = transaction.row(
        "SELECT coalesce(sum(amount_msat), 0) AS left FROM payment"
        " WHERE wallet = ? AND payment_hash = ? AND state = 'succeeded'",
        wallet,
        payment_hash,
    )
    assert row is not None
    return row["left"]


def _amount_to_pay(invoice: DecodedInvoice, now_s: float) -> int:
    if invoice.prefix != invoices.PREFIX:
        raise Refused("wrong_network", "the simulated network pays regtest invoices only")
    if invoice.amount_msat is None:
        raise Refused("unsupported", "the invoice names no amount")
    if now_s >= invoice.expires_at.timestamp():
        raise Refused("expired", "the invoice has expired")
    return invoice.amount_msat


def _is_held(transaction: Transaction, payment: PaymentRecord) -> bool:
    row = transaction.row("SELECT due_at_s FROM payment WHERE id = ?", payment.payment_id)
    return row is not None and row["due_at_s"] is None


def _end_of_the_way(transaction: Transaction, payment_id: int, now_s: float) -> None:
    row = transaction.row("SELECT arrives FROM payment WHERE id = ?", payment_id)
    assert row is not None
    if row["arrives"]:
        _arrive(transaction, get(transaction, payment_id), now_s)
    else:
        _fail(transaction, payment_id, "temporary_channel_failure", now_s)


def _arrive(transaction: Transaction, payment: PaymentRecord, now_s: float) -> None:
    assert payment.payee is not None
    refusal = invoices.refusal_of_htlc(
        transaction, payment.payee, payment.payment_hash, payment.amount_msat, now_s=now_s
    )
    if refusal is None:
        _succeed(transaction, payment, now_s)
    else:
        _fail(transaction, payment.payment_id, refusal, now_s)


def _arrive_and_hold(transaction: Transaction, payment_id: int, now_s: float) -> None:
    payment = get(transaction, payment_id)
    assert payment.payee is not None
    refusal = invoices.refusal_of_htlc(
        transaction, payment.payee, payment.payment_hash, payment.amount_msat, now_s=now_s
    )
    if refusal is not None:
        _fail(transaction, payment_id, refusal, now_s)
        return
    invoices.hold(transaction, payment.payment_hash)
    transaction.run("UPDATE payment SET due_at_s = NULL WHERE id = ?", payment_id)


def _succeed(transaction: Transaction, payment: PaymentRecord, now_s: float) -> None:
    preimage = invoices.settle(transaction, payment.payment_hash, payment.amount_msat, now_s=now_s)
    # The payer's own check: nothing but the preimage of this hash ends an HTLC well.
    assert sha256(bytes.fromhex(preimage)).hexdigest() == payment.payment_hash
    transaction.run(
        "UPDATE payment SET state = 'succeeded', preimage = ?, ended_at_s = ? WHERE id = ?",
        preimage,
        now_s,
        payment.payment_id,
    )
    transaction.notes.append(Ended(payment.payment_id))


def _fail(transaction: Transaction, payment_id: int, failure_code: str, now_s: float) -> None:
    payment = get(transaction, payment_id)
    transaction.run(
        "UPDATE wallet SET balance_msat = balance_msat + ? WHERE name = ?",
        payment.amount_msat + payment.fee_msat,
        payment.wallet,
    )
    transaction.run(
        "UPDATE payment SET state = 'failed', failure_code = ?, ended_at_s = ? WHERE id = ?",
        failure_code,
        now_s,
        payment_id,
    )
    transaction.notes.append(Ended(payment_id))


def _record(row: sqlite3.Row) -> PaymentRecord:
    return PaymentRecord(
        payment_id=row["id"],
        wallet=row["wallet"],
        payment_hash=row["payment_hash"],
        payee=row["payee"],
        amount_msat=row["amount_msat"],
        fee_msat=row["fee_msat"],
        state=row["state"],
        preimage=row["preimage"],
        failure_code=row["failure_code"],
        sent_at_s=row["sent_at_s"],
        ended_at_s=row["ended_at_s"],
        forgotten=bool(row["forgotten"]),
    )
