"""Invoices of the simulated network, as rows and as signed BOLT 11.

    open -> settled     the HTLC came and was taken, with the wallet's next settlement index
    open -> held        it came and is being held; then settled, or open again
    open -> canceled    by its owner; nothing can settle it any more

A preimage leaves this module by one door: `settle`, which hands it to whoever paid.
"""

from __future__ import annotations

import re
import secrets
import sqlite3
from dataclasses import dataclass
from hashlib import sha256

from billing import bolt11_codec
from billing.lightning.simulated import wallets
from billing.lightning.simulated.store import Transaction
from billing.lightning.simulated.wallets import Refused

PREFIX = "bcrt"
EXPIRY_MAX_S = 31_536_000
_NODE_CHARS = 16  # of the public key, in a cursor
_CURSOR = re.compile(r"([0-9a-f]{16})-([0-9]{1,15})")

INVOICE_SCHEMA = """
CREATE TABLE IF NOT EXISTS invoice (
    payment_hash TEXT PRIMARY KEY,
    wallet TEXT NOT NULL REFERENCES wallet (name),
    preimage BLOB NOT NULL,
    bolt11 TEXT NOT NULL,
    amount_msat INTEGER NOT NULL CHECK (amount_msat > 0),
    description TEXT NOT NULL,
    expiry_s INTEGER NOT NULL,
    created_at_s INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('open', 'held', 'settled', 'canceled')),
    idempotency_key TEXT,
    settle_index INTEGER,
    amount_received_msat INTEGER NOT NULL DEFAULT 0,
    settled_at_s REAL,
    UNIQUE (wallet, idempotency_key),
    UNIQUE (wallet, settle_index)
) STRICT;
"""


_SELECT = (
    "SELECT invoice.*, wallet.pubkey AS node"
    " FROM invoice JOIN wallet ON wallet.name = invoice.wallet "
)


@dataclass(frozen=True, slots=True)
class Settled:
    """A note for those who listen: this wallet has a settlement more."""

    wallet: str
    record: InvoiceRecord


@dataclass(frozen=True, slots=True)
class InvoiceRecord:
    """What a wallet may see of its invoice: everything but the preimage."""

    payment_hash: str
    bolt11: str
    amount_msat: int
    description: str
    created_at_s: int
    expires_at_s: int
    state: str  # open, held, settled, canceled or expired
    amount_received_msat: int
    settled_at_s: float | None
    cursor: str | None  # the settlement's place among those of its node


def create(
    transaction: Transaction,
    wallet: str,
    *,
    amount_msat: int,
    description: str,
    expiry_s: int,
    idempotency_key: str | None,
    now_s: float,
    hash_description: bool = False,
    preimage: bytes | None = None,
) -> InvoiceRecord:
    """A new invoice, or the one that this key has made before; `preimage` is drawn unless given.

    `hash_description` puts the SHA-256 of the description into the invoice, as LNURL-pay has it.
    Raises Refused when the key was used for other terms or the preimage at all, and BadInvoice on
    impossible terms.
    """
    owner = wallets.find(transaction, wallet)
    if not 0 < expiry_s <= EXPIRY_MAX_S:
        raise Refused("malformed", f"an invoice lasts between 1 s and {EXPIRY_MAX_S} s")
    if idempotency_key is not None:
        row = transaction.row(
            _SELECT + "WHERE wallet = ? AND idempotency_key = ?",
            wallet,
            idempotency_key,
        )
        if row is not None:
            terms = (row["amount_msat"], row["description"], row["expiry_s"])
            if terms != (amount_msat, description, expiry_s):
                raise Refused("conflict", "this key has made an invoice with other terms")
            return _record(row, now_s)
    if preimage is None:
        preimage = secrets.token_bytes(32)
    payment_hash = sha256(preimage).digest()
    if transaction.row("SELECT 1 FROM invoice WHERE payment_hash = ?", payment_hash.hex()):
        raise Refused("conflict", "there is an invoice with this payment hash")
    bolt11 = bolt11_codec.sign(
        wallets.key_of(owner.secret),
        prefix=PREFIX,
        amount_msat=amount_msat,
        payment_hash=payment_hash,
        payment_secret=secrets.token_bytes(32),
        created_at_s=int(now_s),
        expiry_s=expiry_s,
        description=None if hash_description else description,
        description_hash=sha256(description.encode()).digest() if hash_description else None,
    )
    transaction.run(
        "INSERT INTO invoice (payment_hash, wallet, preimage, bolt11, amount_msat, description,"
        " expiry_s, created_at_s, state, idempotency_key)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, 'open', ?)",
        payment_hash.hex(),
        wallet,
        preimage,
        bolt11,
        amount_msat,
        description,
        expiry_s,
        int(now_s),
        idempotency_key,
    )
    created = lookup(transaction, wallet, payment_hash.hex(), now_s=now_s)
    assert created is not None
    return created


def lookup(
    transaction: Transaction, wallet: str, payment_hash: str, *, now_s: float
) -> InvoiceRecord | None:
    """None when this wallet has no such invoice."""
    row = transaction.row(_SELECT + "WHERE payment_hash = ? AND wallet = ?", payment_hash, wallet)
    return None if row is None else _record(row, now_s)


def cancel(transaction: Transaction, wallet: str, payment_hash: str) -> bool:
    """True when the invoice can never settle any more; False when it has, or when an HTLC is held
    for it, or when the wallet does not know it."""
    transaction.run(
        "UPDATE invoice SET state = 'canceled'"
        " WHERE payment_hash = ? AND wallet = ? AND state = 'open'",
        payment_hash,
        wallet,
    )
    row = transaction.row(
        "SELECT state FROM invoice WHERE payment_hash = ? AND wallet = ?", payment_hash, wallet
    )
    return row is not None and row["state"] == "canceled"


def refusal_of_htlc(
    transaction: Transaction, wallet: str, payment_hash: str, amount_msat: int, *, now_s: float
) -> str | None:
    """Why the payee refuses an HTLC on its arrival; None when it takes it.

    BOLT 4 gives one word for unknown, paid already, canceled, expired and the wrong amount, so
    that a prober learns nothing. The payer cannot tell them apart either.
    """
    row = transaction.row(
        "SELECT * FROM invoice WHERE payment_hash = ? AND wallet = ?", payment_hash, wallet
    )
    if (
        row is None
        or row["state"] != "open"
        or now_s >= row["created_at_s"] + row["expiry_s"]
        or not row["amount_msat"] <= amount_msat <= 2 * row["amount_msat"]
    ):
        return "incorrect_payment_details"
    return None


def hold(transaction: Transaction, payment_hash: str) -> None:
    transaction.run("UPDATE invoice SET state = 'held' WHERE payment_hash = ?", payment_hash)


def release(transaction: Transaction, payment_hash: str) -> None:
    """The held HTLC is gone; the invoice waits for another."""
    transaction.run(
        "UPDATE invoice SET state = 'open' WHERE payment_hash = ? AND state = 'held'", payment_hash
    )


def settle(transaction: Transaction, payment_hash: str, amount_msat: int, *, now_s: float) -> str:
    """Take the HTLC: the payee has the money and a settlement index more, the payer the preimage,
    which is returned as hex."""
    row = transaction.row("SELECT * FROM invoice WHERE payment_hash = ?", payment_hash)
    assert row is not None and row["state"] in ("open", "held")
    wallet = row["wallet"]
    transaction.run(
        "UPDATE wallet SET settled_count = settled_count + 1, balance_msat = balance_msat + ?"
        " WHERE name = ?",
        amount_msat,
        wallet,
    )
    transaction.run(
        "UPDATE invoice SET state = 'settled', amount_received_msat = ?, settled_at_s = ?,"
        " settle_index = (SELECT settled_count FROM wallet WHERE name = ?)"
        " WHERE payment_hash = ?",
        amount_msat,
        now_s,
        wallet,
        payment_hash,
    )
    record = lookup(transaction, wallet, payment_hash, now_s=now_s)
    assert record is not None
    transaction.notes.append(Settled(wallet, record))
    return row["preimage"].hex()


def index_of(transaction: Transaction, wallet: str, cursor: str | None) -> int:
    """The settlement index that a cursor stands for; 0, from the beginning, for None.

    A cursor names its node. One of another node, or of one whose data were deleted, means that the
    caller knows nothing of this one. Raises Refused for what is no cursor.
    """
    node = wallets.find(transaction, wallet).pubkey
    if cursor is None:
        return 0
    match = _CURSOR.fullmatch(cursor)
    if match is None:
        raise Refused("malformed", "not a cursor of the simulated network")
    return int(match[2]) if match[1] == node[:_NODE_CHARS] else 0


def follows(record: InvoiceRecord, cursor: str | None) -> bool:
    """Whether a settlement is the very next one after a cursor."""
    if record.cursor is None or cursor is None:
        return False
    node, _, index = record.cursor.rpartition("-")
    return cursor == f"{node}-{int(index) - 1}"


def settled_after(
    transaction: Transaction,
    wallet: str,
    settle_index: int,
    *,
    now_s: float,
    limit: int = 100,
    since_s: float = 0.0,
) -> list[InvoiceRecord]:
    """Settlements in order, strictly after an index, and not from before `since_s`."""
    rows = transaction.rows(
        _SELECT + "WHERE wallet = ? AND settle_index > ? AND settled_at_s >= ?"
        " ORDER BY settle_index LIMIT ?",
        wallet,
        settle_index,
        since_s,
        limit,
    )
    return [_record(row, now_s) for row in rows]


def _record(row: sqlite3.Row, now_s: float) -> InvoiceRecord:
    expires_at_s = row["created_at_s"] + row["expiry_s"]
    state, index = row["state"], row["settle_index"]
    return InvoiceRecord(
        payment_hash=row["payment_hash"],
        bolt11=row["bolt11"],
        amount_msat=row["amount_msat"],
        description=row["description"],
        created_at_s=row["created_at_s"],
        expires_at_s=expires_at_s,
        state="expired" if state == "open" and now_s >= expires_at_s else state,
        amount_received_msat=row["amount_received_msat"],
        settled_at_s=row["settled_at_s"],
        cursor=None if index is None else f"{row['node'][:_NODE_CHARS]}-{index}",
    )
