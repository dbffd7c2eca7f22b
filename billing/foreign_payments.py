"""Payments that our node has made and these books know nothing of.

They are found by `billing.reconciliation`. Either somebody else pays from the same node, or the
database was restored from a backup and has forgotten payouts of its own: then whoever got them is
still owed that money here, and would be paid a second time. So while there is one that nobody has
looked at, nothing is paid out.

    seen ──▶ confirmed     an operator says whose it was; booked as soon as it has succeeded
      └────▶ failed        it took nothing after all: forgotten

Whoever it was for pays for it: the operator (equity), a worker or a client (what they are owed, and
what they no longer hold of it is lost: goodwill).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from billing import ledger, payout_moves, payout_rows
from billing.errors import BillingError
from billing.ledger import Transfer
from billing.lightning import PaymentState, SentPayment
from billing.payout_states import AttemptState, PayoutState

LISTED_AT_MOST = 200


class NoSuchForeignPayment(BillingError):
    """No payment of that hash waits for anybody's word."""

    code = "no_such_payment"


@dataclass(frozen=True, slots=True)
class ForeignPayment:
    """`account` is the ledger account that pays for it, None until somebody has said so."""

    payment_hash: str
    state: PaymentState
    amount_msat: int
    fee_msat: int
    sent_at: datetime
    seen_at: datetime
    confirmed_at: datetime | None
    account: str | None
    booked: bool


async def unknown(connection: Any, sent: Sequence[SentPayment]) -> list[SentPayment]:
    """Those of a node's payments that no attempt of ours has asked for, as far as it remembers."""
    rows = await connection.fetch(
        "select payment_hash from payout_attempts"
        " where payment_hash = any($1::text[]) and submitted_at is not null",
        [payment.payment_hash for payment in sent],
    )
    ours = {row["payment_hash"] for row in rows}
    return [payment for payment in sent if payment.payment_hash not in ours]


async def note(connection: Any, payment: SentPayment, *, node_pubkey: str, now: datetime) -> bool:
    """Write down what was found; whether it was not known before. Twice is harmless."""
    inserted = await connection.fetchval(
        "insert into foreign_payments (payment_hash, node_pubkey, state, amount_msat, fee_msat,"
        " sent_at, seen_at) values ($1, $2, $3, $4, $5, $6, $7)"
        " on conflict (payment_hash) do update set state = excluded.state,"
        " amount_msat = excluded.amount_msat, fee_msat = excluded.fee_msat"
        " where foreign_payments.state = 'in_flight' returning xmax = 0",
        payment.payment_hash,
        node_pubkey,
        payment.state.value,
        payment.amount_msat,
        payment.fee_msat,
        payment.sent_at,
        now,
    )
    return bool(inserted)


async def in_flight(connection: Any) -> list[str]:
    """The hashes of those whose end is still open."""
    rows = await connection.fetch(
        "select payment_hash from foreign_payments where state = 'in_flight'"
    )
    return [row["payment_hash"] for row in rows]


async def ended(
    connection: Any, payment_hash: str, state: PaymentState, *, fee_msat: int | None
) -> None:
    """Its end is known: SUCCEEDED or FAILED."""
    await connection.execute(
        "update foreign_payments set state = $2, fee_msat = coalesce($3, fee_msat)"
        " where payment_hash = $1 and state = 'in_flight'",
        payment_hash,
        state.value,
        fee_msat,
    )


async def held(connection: Any) -> tuple[int, int]:
    """How many wait for somebody's word, and how much they come to: while any does, nothing is paid
    out."""
    row = await connection.fetchrow(
        "select count(*) as count, coalesce(sum(amount_msat + fee_msat), 0)::bigint as msat"
        " from foreign_payments where confirmed_at is null and state <> 'failed'"
    )
    return row["count"], row["msat"]


async def listed(connection: Any) -> list[ForeignPayment]:
    """Those that wait come first, then the newest."""
    rows = await connection.fetch(
        "select * from foreign_payments where state <> 'failed'"
        " order by confirmed_at is not null, sent_at desc limit $1",
        LISTED_AT_MOST,
    )
    return [_read(row) for row in rows]


async def confirm(
    connection: Any, payment_hash: str, account: str, *, now: datetime
) -> ForeignPayment:
    """Somebody has looked at it: `account` pays for it. Raises NoSuchForeignPayment."""
    row = await connection.fetchrow(
        "update foreign_payments set confirmed_at = $2, account = $3"
        " where payment_hash = $1 and confirmed_at is null and state <> 'failed' returning *",
        payment_hash,
        now,
        account,
    )
    if row is None:
        raise NoSuchForeignPayment(f"no payment {payment_hash} waits to be confirmed")
    await book_confirmed(connection, now=now)
    found = await connection.fetchrow(
        "select * from foreign_payments where payment_hash = $1", payment_hash
    )
    return _read(found)


async def book_confirmed(connection: Any, *, now: datetime) -> int:
    """Book those that are confirmed and have succeeded; how many that were."""
    rows = await connection.fetch(
        "select * from foreign_payments where confirmed_at is not null and state = 'succeeded'"
        " and not booked order by payment_hash for update"
    )
    for row in rows:
        payment = _read(row)
        assert payment.account is not None
        await _take_back_planned(connection, payment.account, now)
        held_msat = await _held_msat(connection, payment.account)
        await ledger.post(connection, _transfers(payment, payment.account, held_msat))
        await connection.execute(
            "update foreign_payments set booked = true where payment_hash = $1",
            payment.payment_hash,
        )
    return len(rows)


async def _take_back_planned(connection: Any, account: str, now: datetime) -> None:
    """Its planned payouts, which no node was asked for, may be the very ones that this payment was
    made for after the backup. What it is owed beside the payment is planned anew."""
    rows = await connection.fetch(
        "select id from payouts where account = $1 and state = 'planned' order by id", account
    )
    for row in rows:
        payout, attempt = await payout_rows.load(connection, row["id"])
        if payout.state is not PayoutState.PLANNED:
            continue
        if attempt is not None and attempt.state is AttemptState.INVOICED:
            await payout_moves.abandon(connection, attempt.id, "operator", now=now)
            attempt = None
        attempt_id = None if attempt is None else attempt.id
        await payout_moves.fail(connection, payout, attempt_id, "operator", now=now)


async def _held_msat(connection: Any, account: str) -> int | None:
    """What the account can give; None: as much as is asked of it."""
    if account == ledger.OPERATOR:
        return None
    return (await ledger.lock_balances(connection, [account])).get(account, 0)


def _transfers(payment: ForeignPayment, account: str, held_msat: int | None) -> list[Transfer]:
    def transfer(debit: str, amount_msat: int, code: str) -> Transfer:
        return Transfer(debit, ledger.LIGHTNING, amount_msat, code, payment.payment_hash)

    if held_msat is None:
        return [transfer(account, payment.amount_msat + payment.fee_msat, "foreign_payment")]
    taken_msat = min(payment.amount_msat, held_msat)
    return [
        transfer(account, taken_msat, "foreign_payment"),
        transfer(ledger.GOODWILL, payment.amount_msat - taken_msat, "foreign_payment_lost"),
        transfer(ledger.ROUTING_FEES, payment.fee_msat, "foreign_payment_fee"),
    ]


def _read(row: Any) -> ForeignPayment:
    return ForeignPayment(
        payment_hash=row["payment_hash"],
        state=PaymentState(row["state"]),
        amount_msat=row["amount_msat"],
        fee_msat=row["fee_msat"],
        sent_at=row["sent_at"],
        seen_at=row["seen_at"],
        confirmed_at=row["confirmed_at"],
        account=row["account"],
        booked=row["booked"],
    )
