# pyright: reportAssignmentType=false
# (SQLModel declares __tablename__ as a property; its own documentation assigns a text.)
"""The tables of money, as SQLModel classes: the schema that migrations are checked against.

Ids are 128 random bits in hex. Amounts are bigint msat. Secrets are stored as SHA-256 only.
"""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    DateTime,
    Index,
    LargeBinary,
    Text,
    func,
    text,
)
from sqlmodel import Field, SQLModel


def _now() -> Column:
    return Column(DateTime(timezone=True), nullable=False, server_default=func.now())


def _time() -> Column:
    return Column(DateTime(timezone=True), nullable=True)


class Account(SQLModel, table=True):
    """A payer. May be anonymous: credentials and keys are names for it."""

    __tablename__ = "accounts"
    id: str = Field(sa_column=Column(Text, primary_key=True))
    created_at: datetime = Field(sa_column=_now())


class AccountKey(SQLModel, table=True):
    """A prepaid key `sk-…` of an account. `spent_msat` counts only where there is a limit."""

    __tablename__ = "account_keys"
    key_hash: bytes = Field(sa_column=Column(LargeBinary, primary_key=True))
    id: str = Field(sa_column=Column(Text, nullable=False, unique=True))
    account_id: str = Field(sa_column=Column(Text, nullable=False, index=True))
    label: str | None = Field(default=None, sa_column=Column(Text))
    limit_msat: int | None = Field(default=None, sa_column=Column(BigInteger))
    spent_msat: int = Field(
        default=0, sa_column=Column(BigInteger, nullable=False, server_default="0")
    )
    can_withdraw: bool = Field(default=False, nullable=False)
    is_primary: bool = Field(default=False, nullable=False)
    created_at: datetime = Field(sa_column=_now())
    revoked_at: datetime | None = Field(default=None, sa_column=_time())


class InvoiceRow(SQLModel, table=True):
    """An invoice of ours. State: open, paid, late, expired (billing.invoices draws the moves)."""

    __tablename__ = "invoices"
    __table_args__ = (
        CheckConstraint("amount_msat > 0", name="invoices_amount"),
        Index(
            "invoices_check", "next_check_at", postgresql_where=text("next_check_at is not null")
        ),
        Index("invoices_reference", "reference"),
        Index("invoices_claim", "claim_hash", unique=True),
    )
    payment_hash: str = Field(sa_column=Column(Text, primary_key=True))
    account_id: str = Field(sa_column=Column(Text, nullable=False, index=True))
    purpose: str = Field(sa_column=Column(Text, nullable=False))
    reference: str = Field(sa_column=Column(Text, nullable=False))
    amount_msat: int = Field(sa_column=Column(BigInteger, nullable=False))
    bolt11: str = Field(sa_column=Column(Text, nullable=False))
    state: str = Field(sa_column=Column(Text, nullable=False))
    token_id: bytes = Field(sa_column=Column(LargeBinary, nullable=False))
    claim_hash: bytes = Field(sa_column=Column(LargeBinary, nullable=False))
    created_at: datetime = Field(sa_column=_now())
    expires_at: datetime = Field(sa_column=Column(DateTime(timezone=True), nullable=False))
    next_check_at: datetime | None = Field(default=None, sa_column=_time())
    settled_at: datetime | None = Field(default=None, sa_column=_time())
    received_msat: int | None = Field(default=None, sa_column=Column(BigInteger))
    key_shown_at: datetime | None = Field(default=None, sa_column=_time())


class NodeCursor(SQLModel, table=True):
    """Where the settlement stream of a back end is to be resumed."""

    __tablename__ = "node_cursors"
    backend: str = Field(sa_column=Column(Text, primary_key=True))
    cursor: str = Field(sa_column=Column(Text, nullable=False))


class LedgerTransfer(SQLModel, table=True):
    """One movement of money. Never edited, never deleted."""

    __tablename__ = "ledger_transfers"
    __table_args__ = (
        CheckConstraint("amount_msat > 0", name="ledger_transfers_amount"),
        CheckConstraint("debit <> credit", name="ledger_transfers_two_accounts"),
        Index("ledger_transfers_reference", "reference"),
    )
    id: str = Field(sa_column=Column(Text, primary_key=True))
    debit: str = Field(sa_column=Column(Text, nullable=False))
    credit: str = Field(sa_column=Column(Text, nullable=False))
    amount_msat: int = Field(sa_column=Column(BigInteger, nullable=False))
    code: str = Field(sa_column=Column(Text, nullable=False))
    reference: str = Field(sa_column=Column(Text, nullable=False))
    created_at: datetime = Field(sa_column=_now())


class LedgerBalance(SQLModel, table=True):
    """The stored balance of a liability; a liability without a row holds nothing."""

    __tablename__ = "ledger_balances"
    __table_args__ = (CheckConstraint("balance_msat >= 0", name="ledger_balances_not_negative"),)
    account: str = Field(sa_column=Column(Text, primary_key=True))
    balance_msat: int = Field(sa_column=Column(BigInteger, nullable=False))


class FeeChange(SQLModel, table=True):
    """One change of the rates. `model` null is the default; `removed` returns a model to it."""

    __tablename__ = "fee_changes"
    id: int | None = Field(
        default=None, sa_column=Column(BigInteger, primary_key=True, autoincrement=True)
    )
    model: str | None = Field(default=None, sa_column=Column(Text, index=True))
    removed: bool = Field(default=False, nullable=False)
    prompt_fee_msat: int = Field(sa_column=Column(BigInteger, nullable=False))
    input_msat_per_mtok: int = Field(sa_column=Column(BigInteger, nullable=False))
    output_msat_per_mtok: int = Field(sa_column=Column(BigInteger, nullable=False))
    image_fee_msat: int = Field(sa_column=Column(BigInteger, nullable=False))
    training_msat_per_mtok: int = Field(sa_column=Column(BigInteger, nullable=False))
    changed_at: datetime = Field(sa_column=_now())
    changed_by: str = Field(sa_column=Column(Text, nullable=False))


class Payee(SQLModel, table=True):
    """Where a worker is paid (billing.payees). A change waits until `next_ln_url_at`; while that is
    set, `next_ln_url` null means that no payout is wanted from then on.

    `owed_since` is when it was first seen to be owed enough to be paid for its age alone.
    """

    __tablename__ = "payees"
    id: str = Field(sa_column=Column(Text, primary_key=True))
    ln_url: str | None = Field(default=None, sa_column=Column(Text))
    next_ln_url: str | None = Field(default=None, sa_column=Column(Text))
    next_ln_url_at: datetime | None = Field(default=None, sa_column=_time())
    owed_since: datetime | None = Field(default=None, sa_column=_time())
    failures: int = Field(default=0, nullable=False, sa_column_kwargs={"server_default": "0"})
    failing_since: datetime | None = Field(default=None, sa_column=_time())
    failure_code: str | None = Field(default=None, sa_column=Column(Text))
    next_try_at: datetime | None = Field(default=None, sa_column=_time())
    held_until: datetime | None = Field(default=None, sa_column=_time())
    created_at: datetime = Field(sa_column=_now())


class Payout(SQLModel, table=True):
    """One payment out: a worker's batch or a client's withdrawal (billing.payout_states draws the
    states).

    `account` is the liability that it was taken from, and returns to when it definitely failed.
    `target` is an address or `ln_url`, or the BOLT11 invoice of a withdrawal.
    """

    __tablename__ = "payouts"
    __table_args__ = (
        CheckConstraint("amount_msat > 0", name="payouts_amount"),
        CheckConstraint("fee_cap_msat >= 0", name="payouts_fee_cap"),
        Index(
            "payouts_one_open_per_payee",
            "account",
            unique=True,
            postgresql_where=text("kind = 'worker' and state in ('planned', 'sending')"),
        ),
        Index(
            "payouts_due", "next_try_at", postgresql_where=text("state in ('planned', 'sending')")
        ),
        Index("payouts_newest", "created_at", "id"),
        Index("payouts_of_account", "account", "created_at", "id"),
    )
    id: str = Field(sa_column=Column(Text, primary_key=True))
    kind: str = Field(sa_column=Column(Text, nullable=False))
    account: str = Field(sa_column=Column(Text, nullable=False))
    target: str = Field(sa_column=Column(Text, nullable=False))
    amount_msat: int = Field(sa_column=Column(BigInteger, nullable=False))
    fee_cap_msat: int = Field(sa_column=Column(BigInteger, nullable=False))
    state: str = Field(sa_column=Column(Text, nullable=False))
    error_code: str | None = Field(default=None, sa_column=Column(Text))
    fee_msat: int | None = Field(default=None, sa_column=Column(BigInteger))
    created_at: datetime = Field(sa_column=_now())
    next_try_at: datetime = Field(sa_column=_now())
    ended_at: datetime | None = Field(default=None, sa_column=_time())


class PayoutAttempt(SQLModel, table=True):
    """One invoice of a payout. A payment hash is used once, ever.

    What a node was asked: `submissions` counts the calls to pay, each before it is made, and
    `backend`, `node_pubkey`, `lease_token` say by whom and of which node. What it said: `was_known`,
    `was_missing`, and since when its look-ups agree that nothing was sent. `alert` is why somebody
    should look at it (billing.payout_states).
    """

    __tablename__ = "payout_attempts"
    __table_args__ = (
        Index(
            "payout_attempts_one_live",
            "payout_id",
            unique=True,
            postgresql_where=text("state in ('new', 'invoiced', 'submitted')"),
        ),
        Index("payout_attempts_payout", "payout_id"),
        Index(
            "payout_attempts_proved",
            "submitted_at",
            postgresql_where=text("state = 'succeeded'"),
        ),
    )
    id: str = Field(sa_column=Column(Text, primary_key=True))
    payout_id: str = Field(sa_column=Column(Text, nullable=False))
    state: str = Field(sa_column=Column(Text, nullable=False))
    address: str | None = Field(default=None, sa_column=Column(Text))
    bolt11: str | None = Field(default=None, sa_column=Column(Text))
    payment_hash: str | None = Field(default=None, sa_column=Column(Text, unique=True))
    expires_at: datetime | None = Field(default=None, sa_column=_time())
    submitted_at: datetime | None = Field(default=None, sa_column=_time())
    submissions: int = Field(default=0, nullable=False, sa_column_kwargs={"server_default": "0"})
    backend: str | None = Field(default=None, sa_column=Column(Text))
    node_pubkey: str | None = Field(default=None, sa_column=Column(Text))
    lease_token: int | None = Field(default=None, sa_column=Column(BigInteger))
    last_checked_at: datetime | None = Field(default=None, sa_column=_time())
    was_known: bool = Field(
        default=False, nullable=False, sa_column_kwargs={"server_default": text("false")}
    )
    was_missing: bool = Field(
        default=False, nullable=False, sa_column_kwargs={"server_default": text("false")}
    )
    agreed_state: str | None = Field(default=None, sa_column=Column(Text))
    agreed_since: datetime | None = Field(default=None, sa_column=_time())
    alert: str | None = Field(default=None, sa_column=Column(Text))
    preimage: str | None = Field(default=None, sa_column=Column(Text))
    fee_msat: int | None = Field(default=None, sa_column=Column(BigInteger))
    failure_code: str | None = Field(default=None, sa_column=Column(Text))
    created_at: datetime = Field(sa_column=_now())
    ended_at: datetime | None = Field(default=None, sa_column=_time())


class ForeignPayment(SQLModel, table=True):
    """A payment of our node that no attempt of ours has asked for (billing.foreign_payments).

    State: in_flight, succeeded, failed. `account`: who pays for it, once somebody has said so.
    """

    __tablename__ = "foreign_payments"
    __table_args__ = (
        Index(
            "foreign_payments_held",
            "payment_hash",
            postgresql_where=text("confirmed_at is null and state <> 'failed'"),
        ),
    )
    payment_hash: str = Field(sa_column=Column(Text, primary_key=True))
    node_pubkey: str = Field(sa_column=Column(Text, nullable=False))
    state: str = Field(sa_column=Column(Text, nullable=False))
    amount_msat: int = Field(sa_column=Column(BigInteger, nullable=False))
    fee_msat: int = Field(sa_column=Column(BigInteger, nullable=False))
    sent_at: datetime = Field(sa_column=Column(DateTime(timezone=True), nullable=False))
    seen_at: datetime = Field(sa_column=Column(DateTime(timezone=True), nullable=False))
    confirmed_at: datetime | None = Field(default=None, sa_column=_time())
    account: str | None = Field(default=None, sa_column=Column(Text))
    booked: bool = Field(
        default=False, nullable=False, sa_column_kwargs={"server_default": text("false")}
    )


class BillingState(SQLModel, table=True):
    """Small facts of the payout runner: its lease with the fencing token, paused and why, blocked
    and by what. `set_at` is since when; a lease also has an end."""

    __tablename__ = "billing_state"
    key: str = Field(sa_column=Column(Text, primary_key=True))
    value: str = Field(sa_column=Column(Text, nullable=False))
    set_at: datetime | None = Field(default=None, sa_column=_time())
    expires_at: datetime | None = Field(default=None, sa_column=_time())
