"""What people say to the payout runner, and it to them, through the database: any process may ask.

paused    by an admin, or by the runner itself when the books need a person: nothing is sent
blocked   by circumstances: the runner tries again by itself, and burns no attempt meanwhile
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from billing import foreign_payments, payees, payout_moves, payout_rows
from billing.errors import BillingError
from billing.payout_lease import lease_ends_at
from billing.payout_states import Alert, AttemptState, PayoutKind, PayoutState, proves

_PAUSED = "payouts_paused"
_BLOCKED = "payouts_blocked"

# With these alerts the table of moves has no answer: a person, who can look at the node, has.
_FOR_A_PERSON = (Alert.NODE_FORGOT, Alert.MAYBE_PAID, Alert.NODE_CHANGED, Alert.WRONG_PREIMAGE)


class Blocked(StrEnum):
    NODE_UNREACHABLE = "node_unreachable"
    NODE_REFUSES_KEY = "node_refuses_key"
    NODE_NOT_SYNCED = "node_not_synced"
    NOT_RECONCILED = "not_reconciled"  # the node's history was not compared with the books yet
    NODE_CHANGED = "node_changed"  # payouts are unresolved at another node than the one connected
    INSUFFICIENT_BALANCE = "insufficient_balance"


class NotForAPerson(BillingError):
    """This payout resolves by itself, or is not unresolved: nobody may decide it."""

    code = "payout_not_undecided"


@dataclass(frozen=True, slots=True)
class ControlState:
    """`paused_why` None: not paused. `unknown_payments` of the node, which come to `unknown_msat`,
    wait for somebody's word (billing.foreign_payments), and pause payouts as well. `lease_ends_at`:
    until when some process is the one that pays; in the past, none is alive."""

    paused_why: str | None
    paused_at: datetime | None
    unknown_payments: int
    unknown_msat: int
    blocked: Blocked | None
    blocked_since: datetime | None
    lease_ends_at: datetime | None


async def pause(connection: Any, why: str, *, now: datetime) -> None:
    """Send nothing more. What is on its way is still looked up. Twice keeps the first reason."""
    await _set(connection, _PAUSED, why, now)


async def resume(connection: Any) -> None:
    await connection.execute("delete from billing_state where key = $1", _PAUSED)


async def is_paused(connection: Any) -> bool:
    """Whether nothing may be sent: somebody has said so, or there are payments that nobody knows."""
    return await connection.fetchval(
        "select exists (select from billing_state where key = $1) or exists"
        " (select from foreign_payments where confirmed_at is null and state <> 'failed')",
        _PAUSED,
    )


async def set_blocked(connection: Any, blocked: Blocked | None, *, now: datetime) -> None:
    if blocked is None or (await _get(connection, _BLOCKED))[0] not in (None, blocked.value):
        await connection.execute("delete from billing_state where key = $1", _BLOCKED)
    if blocked is not None:
        await _set(connection, _BLOCKED, blocked.value, now)


async def control_state(connection: Any) -> ControlState:
    paused_why, paused_at = await _get(connection, _PAUSED)
    unknown_payments, unknown_msat = await foreign_payments.held(connection)
    if unknown_payments and paused_why is None:
        paused_why = (
            f"the node has made {unknown_payments} payment(s) of {unknown_msat} msat that these books"
            " do not know: look at them, and confirm each"
        )
    blocked, blocked_since = await _get(connection, _BLOCKED)
    return ControlState(
        paused_why=paused_why,
        paused_at=paused_at,
        unknown_payments=unknown_payments,
        unknown_msat=unknown_msat,
        blocked=Blocked(blocked) if blocked else None,
        blocked_since=blocked_since,
        lease_ends_at=await lease_ends_at(connection),
    )


async def retry(connection: Any, payout_id: str, *, now: datetime) -> bool:
    """Do the next thing for this payout now, and forget its payee's failures; False: unknown id.

    A failed payout stays failed: its money is back with the worker, and becomes another payout. The
    caller wakes the runner.
    """
    found = await connection.fetchval("select 1 from payouts where id = $1", payout_id)
    if found is None:
        return False
    payout, _ = await payout_rows.load(connection, payout_id)
    await payout_moves.postpone(connection, payout_id, now)
    if payout.payee_id is not None:
        await payees.clear_back_off(connection, payout.payee_id)
    return True


async def decide(
    connection: Any,
    payout_id: str,
    *,
    preimage: str | None,
    fee_msat: int = 0,
    now: datetime,
) -> PayoutState:
    """An operator, having looked at the node, says how an undecidable payout has ended.

    With a preimage, which must be that of its payment hash: it was paid. None: it was not, and
    never will be. Raises NotForAPerson unless the payout carries an alert that asks for this.
    """
    found = await connection.fetchval("select 1 from payouts where id = $1", payout_id)
    if found is None:
        raise NotForAPerson(f"there is no payout {payout_id}")
    payout, attempt = await payout_rows.load(connection, payout_id)
    if (
        attempt is None
        or attempt.state is not AttemptState.SUBMITTED
        or attempt.alert not in _FOR_A_PERSON
    ):
        raise NotForAPerson(f"payout {payout_id} is not waiting for anybody's decision")
    if preimage is None:
        await payout_moves.fail(connection, payout, attempt.id, "operator", now=now)
        return PayoutState.FAILED
    if not proves(preimage, attempt.payment_hash) or fee_msat < 0:
        raise NotForAPerson("this is not the preimage of the payout's payment hash")
    await payout_moves.pay(
        connection, payout, attempt.id, preimage=preimage, fee_msat=fee_msat, now=now
    )
    if payout.kind is PayoutKind.WORKER and payout.payee_id is not None:
        await payees.note_paid(connection, payout.payee_id)
    return PayoutState.PAID


async def _get(connection: Any, key: str) -> tuple[str | None, datetime | None]:
    row = await connection.fetchrow("select value, set_at from billing_state where key = $1", key)
    return (row["value"], row["set_at"]) if row else (None, None)


async def _set(connection: Any, key: str, value: str, now: datetime) -> None:
    await connection.execute(
        "insert into billing_state (key, value, set_at) values ($1, $2, $3)"
        " on conflict (key) do nothing",
        key,
        value,
        now,
    )
