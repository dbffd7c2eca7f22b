"""Where workers are paid: addresses, their changes, and what became of the last tries.

A first address counts at once. A change, also to none, counts an hour later, so that whoever steals
a worker key has to wait while the owner can see it. Nothing here asks the network: the caller has
resolved the address (`LightningAddresses.resolve`) and gives its canonical text.

An address that fails is tried again after 1 min, 5 min, 30 min, 2 h, 12 h, then daily; after a week
it is shown as `address_failing`. What is owed stays owed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from billing import ledger
from billing.payout_settings import PayoutSettings, back_off

CHANGE_DELAY = timedelta(hours=1)
SHOWN_AS_FAILING_AFTER = timedelta(days=7)


class PayeeStatus(StrEnum):
    UNPAID = "unpaid"  # no address
    PAYABLE = "payable"
    RETRYING = "retrying"  # the last try failed, another will follow
    ADDRESS_FAILING = "address_failing"  # nothing has worked for a week


@dataclass(frozen=True, slots=True)
class PayeeAddress:
    """What a worker may know of its own address. `next_ln_url` counts from `next_ln_url_at` on, and
    None there means that it will be unpaid. `held_until`: its money waits until then."""

    ln_url: str | None
    next_ln_url: str | None
    next_ln_url_at: datetime | None
    status: PayeeStatus
    failure_code: str | None
    next_try_at: datetime | None
    held_until: datetime | None = None


@dataclass(frozen=True, slots=True)
class DuePayee:
    """A payee whose batch is to be paid now. `owed_msat` may be more when it is."""

    id: str
    ln_url: str
    owed_msat: int


async def set_address(
    connection: Any, payee_id: str, ln_url: str | None, *, now: datetime
) -> PayeeAddress:
    """Say where a worker is to be paid; None: nowhere. Twice is harmless.

    Naming the address that counts already takes back a change that waits; naming the one that waits
    does not restart its hour.
    """
    await connection.execute(
        "insert into payees (id, created_at) values ($1, $2) on conflict (id) do nothing",
        payee_id,
        now,
    )
    row = await connection.fetchrow("select * from payees where id = $1 for update", payee_id)
    if row["next_ln_url_at"] is not None and row["next_ln_url_at"] <= now:
        await apply_changes(connection, now, payee_id)
        row = await connection.fetchrow("select * from payees where id = $1", payee_id)
    if ln_url == row["ln_url"]:
        await _write_address(connection, payee_id, ln_url, None, None)
    elif row["ln_url"] is None:
        await _write_address(connection, payee_id, ln_url, None, None)
        await clear_back_off(connection, payee_id)
    elif row["next_ln_url_at"] is None or row["next_ln_url"] != ln_url:
        await _write_address(connection, payee_id, row["ln_url"], ln_url, now + CHANGE_DELAY)
    found = await get_address(connection, payee_id, now=now)
    assert found is not None
    return found


async def get_address(connection: Any, payee_id: str, *, now: datetime) -> PayeeAddress | None:
    """What counts at `now`; None when the worker has never named an address."""
    row = await connection.fetchrow("select * from payees where id = $1", payee_id)
    if row is None:
        return None
    if row["next_ln_url_at"] is not None and row["next_ln_url_at"] <= now:
        status = PayeeStatus.PAYABLE if row["next_ln_url"] else PayeeStatus.UNPAID
        return PayeeAddress(row["next_ln_url"], None, None, status, None, None, row["held_until"])
    return PayeeAddress(
        ln_url=row["ln_url"],
        next_ln_url=row["next_ln_url"],
        next_ln_url_at=row["next_ln_url_at"],
        status=_status(row, now),
        failure_code=row["failure_code"],
        next_try_at=row["next_try_at"],
        held_until=row["held_until"],
    )


async def apply_changes(connection: Any, now: datetime, payee_id: str | None = None) -> None:
    """Let the changes count whose hour is over. A new address starts without a record."""
    await connection.execute(
        "update payees set ln_url = next_ln_url, next_ln_url = null, next_ln_url_at = null,"
        " failures = 0, failing_since = null, failure_code = null, next_try_at = null"
        " where next_ln_url_at <= $1 and ($2::text is null or id = $2)",
        now,
        payee_id,
    )


_OWED_SINCE = """
update payees p set owed_since = $1
from ledger_balances b
where p.owed_since is null and b.account = $2 || p.id and b.balance_msat >= $3"""

_DUE = """
select p.id, p.ln_url, b.balance_msat
from payees p join ledger_balances b on b.account = $2 || p.id
where p.ln_url is not null and b.balance_msat >= $4
  and (p.next_try_at is null or p.next_try_at <= $1)
  and (p.held_until is null or p.held_until <= $1)
  and (b.balance_msat >= $3 or p.owed_since <= $5)
  and p.id <> all($6::text[])
  and not exists (
      select 1 from payouts o
      where o.account = b.account and o.kind = 'worker' and o.state in ('planned', 'sending'))
order by p.owed_since nulls last, p.id limit $7"""


async def due_payees(
    connection: Any,
    settings: PayoutSettings,
    *,
    now: datetime,
    limit: int,
    except_ids: Sequence[str] = (),
) -> list[DuePayee]:
    """Who is to be paid now: owed enough, or for long enough, with an address that may be tried
    and no payout under way. Those owed for longest come first."""
    await apply_changes(connection, now)
    await connection.execute(_OWED_SINCE, now, ledger.worker(""), settings.minimum_msat)
    rows = await connection.fetch(
        _DUE,
        now,
        ledger.worker(""),
        settings.threshold_msat,
        settings.smallest_batch_msat,
        now - timedelta(seconds=settings.interval_s),
        list(except_ids),
        limit,
    )
    return [DuePayee(row["id"], row["ln_url"], row["balance_msat"]) for row in rows]


async def note_failure(
    connection: Any, payee_id: str, code: str, *, now: datetime, jitter: float
) -> None:
    """A try has failed for a reason that is the payee's or its server's: leave it alone a while."""
    failures = await connection.fetchval(
        "update payees set failures = failures + 1, failure_code = $2,"
        " failing_since = coalesce(failing_since, $3) where id = $1 returning failures",
        payee_id,
        code,
        now,
    )
    if failures is not None:
        await connection.execute(
            "update payees set next_try_at = $2 where id = $1",
            payee_id,
            now + back_off(failures, jitter),
        )


async def postpone(connection: Any, payee_id: str, code: str, until: datetime) -> None:
    """Not now, for a reason that is nobody's failure."""
    await connection.execute(
        "update payees set next_try_at = $2, failure_code = $3 where id = $1", payee_id, until, code
    )


async def hold(connection: Any, payee_id: str, until: datetime | None) -> None:
    """Let a payee wait for its money until then, or, with None, no longer. What is owed stays owed."""
    await connection.execute("update payees set held_until = $2 where id = $1", payee_id, until)


async def note_paid(connection: Any, payee_id: str) -> None:
    """The address works, and what is owed from now on is owed since then."""
    await clear_back_off(connection, payee_id)
    await connection.execute("update payees set owed_since = null where id = $1", payee_id)


async def clear_back_off(connection: Any, payee_id: str) -> bool:
    """Forget the failures and try at the next turn; whether there is such a payee."""
    found = await connection.fetchval(
        "update payees set failures = 0, failing_since = null, failure_code = null,"
        " next_try_at = null where id = $1 returning 1",
        payee_id,
    )
    return found is not None


async def _write_address(
    connection: Any,
    payee_id: str,
    ln_url: str | None,
    next_ln_url: str | None,
    next_ln_url_at: datetime | None,
) -> None:
    await connection.execute(
        "update payees set ln_url = $2, next_ln_url = $3, next_ln_url_at = $4 where id = $1",
        payee_id,
        ln_url,
        next_ln_url,
        next_ln_url_at,
    )


def _status(row: Any, now: datetime) -> PayeeStatus:
    if row["ln_url"] is None:
        return PayeeStatus.UNPAID
    if row["failing_since"] is None:
        return PayeeStatus.PAYABLE
    if now - row["failing_since"] >= SHOWN_AS_FAILING_AFTER:
        return PayeeStatus.ADDRESS_FAILING
    return PayeeStatus.RETRYING
