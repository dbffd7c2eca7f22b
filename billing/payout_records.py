"""What doors, pages and metrics read about payouts: lists, sums, what is unresolved."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from billing import ledger
from billing.errors import BillingError
from billing.payout_states import Alert, AttemptState, PayoutKind, PayoutState

PAGE_MAX = 500


class BadCursor(BillingError):
    """Not a cursor that a list gave out."""

    code = "bad_cursor"

    def __init__(self) -> None:
        super().__init__("not a cursor of this list")


@dataclass(frozen=True, slots=True)
class PayoutRecord:
    """A payout with its latest attempt.

    `owner_id` is the worker's or the client account's id. `fee_msat` is set when it is paid, and
    `preimage` proves it: both are for the owner and the admin. `submitted_at` None: no node was
    asked. `alert`: it waits for a person.
    """

    id: str
    kind: PayoutKind
    owner_id: str
    target: str
    state: PayoutState
    amount_msat: int
    fee_cap_msat: int
    fee_msat: int | None
    error_code: str | None
    created_at: datetime
    ended_at: datetime | None
    next_try_at: datetime | None
    attempts: int
    attempt_state: AttemptState | None
    payment_hash: str | None
    preimage: str | None
    submitted_at: datetime | None
    last_checked_at: datetime | None
    alert: Alert | None

    @property
    def at(self) -> datetime:
        """When it ended, or else was planned."""
        return self.ended_at or self.created_at


@dataclass(frozen=True, slots=True)
class PayoutPage:
    """`cursor` None: there are no more."""

    payouts: list[PayoutRecord]
    cursor: str | None


@dataclass(frozen=True, slots=True)
class WorkerSums:
    """All a worker has earned is paid, on its way, or pending."""

    paid_msat: int
    sending_msat: int
    pending_msat: int

    @property
    def earned_msat(self) -> int:
        return self.paid_msat + self.sending_msat + self.pending_msat


@dataclass(frozen=True, slots=True)
class Unresolved:
    """Payments that a node was asked for and has not answered for. The age is of the oldest."""

    count: int
    amount_msat: int
    oldest_age_s: float
    alerts: dict[Alert, int]


_SELECT = """
select o.*, a.attempts, a.attempt_state, a.payment_hash, a.preimage, a.submitted_at,
       a.last_checked_at, a.alert
from payouts o
left join lateral (
    select count(*) over () as attempts, t.state as attempt_state, t.payment_hash, t.preimage,
           t.submitted_at, t.last_checked_at, t.alert
    from payout_attempts t where t.payout_id = o.id
    order by t.state in ('new', 'invoiced', 'submitted', 'succeeded') desc, t.created_at desc
    limit 1) a on true
"""


async def find_payout(connection: Any, payout_id: str) -> PayoutRecord | None:
    row = await connection.fetchrow(_SELECT + "where o.id = $1", payout_id)
    return None if row is None else _record(row)


async def list_payouts(
    connection: Any,
    *,
    account: str | None = None,
    kind: PayoutKind | None = None,
    state: PayoutState | None = None,
    cursor: str | None = None,
    limit: int = 50,
) -> PayoutPage:
    """Payouts, newest first. `account` is a ledger account: `ledger.worker(id)` or
    `ledger.client(id)`; None: everybody's. Raises BadCursor."""
    before_at, before_id = _read_cursor(cursor)
    limit = max(1, min(limit, PAGE_MAX))
    rows = await connection.fetch(
        _SELECT + "where ($1::text is null or o.account = $1) and ($2::text is null or o.kind = $2)"
        " and ($3::text is null or o.state = $3)"
        " and ($4::timestamptz is null or (o.created_at, o.id) < ($4, $5))"
        " order by o.created_at desc, o.id desc limit $6",
        account,
        kind,
        state,
        before_at,
        before_id,
        limit + 1,
    )
    payouts = [_record(row) for row in rows[:limit]]
    return PayoutPage(payouts, _write_cursor(payouts[-1]) if len(rows) > limit else None)


async def worker_sums(connection: Any, worker_id: str) -> WorkerSums:
    account = ledger.worker(worker_id)
    row = await connection.fetchrow(
        "select coalesce(sum(amount_msat) filter (where state = 'paid'), 0)::bigint as paid,"
        " coalesce(sum(amount_msat) filter (where state in ('planned', 'sending')), 0)::bigint"
        " as sending,"
        " coalesce((select balance_msat from ledger_balances where account = $1), 0) as pending"
        " from payouts where account = $1",
        account,
    )
    return WorkerSums(row["paid"], row["sending"], row["pending"])


async def unresolved(connection: Any, *, now: datetime) -> Unresolved:
    """For metrics: alarm on the age, and on any alert."""
    rows = await connection.fetch(
        "select a.alert, count(*) as count, sum(o.amount_msat)::bigint as amount_msat,"
        " min(a.submitted_at) as oldest"
        " from payout_attempts a join payouts o on o.id = a.payout_id"
        " where a.state = 'submitted' and o.state = 'sending' group by a.alert"
    )
    ages_s = [(now - row["oldest"]).total_seconds() for row in rows]
    return Unresolved(
        count=sum(row["count"] for row in rows),
        amount_msat=sum(row["amount_msat"] for row in rows),
        oldest_age_s=max([0.0, *ages_s]),
        alerts={Alert(row["alert"]): row["count"] for row in rows if row["alert"]},
    )


def _record(row: Any) -> PayoutRecord:
    kind = PayoutKind(row["kind"])
    prefix = ledger.worker("") if kind is PayoutKind.WORKER else ledger.client("")
    state = PayoutState(row["state"])
    is_open = state in (PayoutState.PLANNED, PayoutState.SENDING)
    return PayoutRecord(
        id=row["id"],
        kind=kind,
        owner_id=row["account"].removeprefix(prefix),
        target=row["target"],
        state=state,
        amount_msat=row["amount_msat"],
        fee_cap_msat=row["fee_cap_msat"],
        fee_msat=row["fee_msat"],
        error_code=row["error_code"],
        created_at=row["created_at"],
        ended_at=row["ended_at"],
        next_try_at=row["next_try_at"] if is_open else None,
        attempts=row["attempts"] or 0,
        attempt_state=AttemptState(row["attempt_state"]) if row["attempt_state"] else None,
        payment_hash=row["payment_hash"],
        preimage=row["preimage"],
        submitted_at=row["submitted_at"],
        last_checked_at=row["last_checked_at"],
        alert=Alert(row["alert"]) if row["alert"] else None,
    )


def _write_cursor(last: PayoutRecord) -> str:
    text = f"{last.created_at.isoformat()} {last.id}"
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def _read_cursor(cursor: str | None) -> tuple[datetime | None, str]:
    if cursor is None:
        return None, ""
    try:
        text = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode()
        at, _, payout_id = text.partition(" ")
        before_at = datetime.fromisoformat(at)
    except (ValueError, binascii.Error):
        raise BadCursor from None
    if before_at.tzinfo is None:
        raise BadCursor
    return before_at, payout_id
