"""Each move of a payout and its attempt, with the transfers that belong to it, in one transaction.

The caller opens the transaction, checks the lease in it where it is the runner, and commits. A move
names the state that it starts from; when the row is in another, somebody else was faster: Moved.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from billing import ledger, payout_transfers
from billing.accounts import new_id
from billing.payout_rows import Payout
from billing.payout_states import (
    ATTEMPT_MOVES,
    OPEN_PAYOUT,
    PAYOUT_MOVES,
    Alert,
    AttemptState,
    PayoutState,
    Wait,
)


class Moved(Exception):
    """The payout is not in the state that the move starts from. Undo, and look at it again."""


async def plan(connection: Any, payout: Payout, *, now: datetime) -> None:
    """Take the money from its owner. Raises InsufficientFunds."""
    assert payout.state is PayoutState.PLANNED
    await ledger.post(connection, payout_transfers.when_planned(payout))
    await connection.execute(
        "insert into payouts (id, kind, account, target, amount_msat, fee_cap_msat, state,"
        " created_at, next_try_at) values ($1, $2, $3, $4, $5, $6, 'planned', $7, $7)",
        payout.id,
        payout.kind.value,
        payout.account,
        payout.target,
        payout.amount_msat,
        payout.fee_cap_msat,
        now,
    )


async def begin_attempt(
    connection: Any, payout: Payout, *, now: datetime, address: str | None
) -> str:
    """An attempt that has no invoice yet; returns its id."""
    attempt_id = new_id()
    await connection.execute(
        "insert into payout_attempts (id, payout_id, state, address, created_at)"
        " values ($1, $2, 'new', $3, $4)",
        attempt_id,
        payout.id,
        address,
        now,
    )
    return attempt_id


async def hash_used(connection: Any, payment_hash: str) -> bool:
    """Whether any attempt, ever, had this payment hash."""
    found = await connection.fetchval(
        "select 1 from payout_attempts where payment_hash = $1", payment_hash
    )
    return found is not None


async def got_invoice(
    connection: Any, attempt_id: str, *, bolt11: str, payment_hash: str, expires_at: datetime
) -> None:
    await _move_attempt(connection, attempt_id, AttemptState.INVOICED)
    await connection.execute(
        "update payout_attempts set bolt11 = $2, payment_hash = $3, expires_at = $4 where id = $1",
        attempt_id,
        bolt11,
        payment_hash,
        expires_at,
    )


async def abandon(connection: Any, attempt_id: str, code: str, *, now: datetime) -> None:
    """Give up an invoice that no node was asked to pay."""
    await _move_attempt(connection, attempt_id, AttemptState.ABANDONED)
    await _end_attempt(connection, attempt_id, code, now)


async def submit(
    connection: Any,
    payout: Payout,
    attempt_id: str,
    *,
    backend: str,
    node_pubkey: str,
    lease_token: int,
    now: datetime,
) -> None:
    """Write down that the node is about to be asked: committed before it is."""
    await _move_payout(connection, payout.id, PayoutState.SENDING)
    await _move_attempt(connection, attempt_id, AttemptState.SUBMITTED)
    await connection.execute(
        "update payout_attempts set submissions = submissions + 1, submitted_at = $2,"
        " backend = $3, node_pubkey = $4, lease_token = $5 where id = $1",
        attempt_id,
        now,
        backend,
        node_pubkey,
        lease_token,
    )


async def submit_again(
    connection: Any, attempt_id: str, *, lease_token: int, now: datetime
) -> None:
    """Write down that the same node is about to be asked the same once more."""
    changed = await connection.fetchval(
        "update payout_attempts set submissions = submissions + 1, submitted_at = $2,"
        " lease_token = $3, agreed_state = null, agreed_since = null, alert = null"
        " where id = $1 and state = 'submitted' returning 1",
        attempt_id,
        now,
        lease_token,
    )
    if changed is None:
        raise Moved


async def unsubmit(connection: Any, payout: Payout, attempt_id: str) -> None:
    """Take a first submission back that certainly reached nobody, or was certainly not acted on."""
    await _move_payout(connection, payout.id, PayoutState.PLANNED)
    await _move_attempt(connection, attempt_id, AttemptState.INVOICED)
    await connection.execute(
        "update payout_attempts set submissions = 0, submitted_at = null, node_pubkey = null,"
        " backend = null, lease_token = null where id = $1",
        attempt_id,
    )


async def wait(
    connection: Any,
    payout: Payout,
    attempt_id: str,
    decision: Wait,
    *,
    known: bool,
    missing: bool,
    now: datetime,
    next_try_at: datetime,
) -> None:
    """Write down what a look-up has said. `known` and `missing` are what it adds."""
    changed = await connection.fetchval(
        "update payout_attempts set last_checked_at = $2, was_known = was_known or $3,"
        " was_missing = was_missing or $4, agreed_state = $5, agreed_since = $6, alert = $7"
        " where id = $1 and state = 'submitted' returning 1",
        attempt_id,
        now,
        known,
        missing,
        decision.agreed_state,
        decision.agreed_since,
        decision.alert,
    )
    if changed is None:
        raise Moved
    await postpone(connection, payout.id, next_try_at)


async def note_missing(connection: Any, attempt_id: str) -> None:
    """A look-up has not found it: from now on `failed` speaks for the last submission only."""
    await connection.execute(
        "update payout_attempts set was_missing = true where id = $1", attempt_id
    )


async def postpone(connection: Any, payout_id: str, next_try_at: datetime) -> None:
    await connection.execute(
        "update payouts set next_try_at = $2 where id = $1 and state = any($3::text[])",
        payout_id,
        next_try_at,
        list(OPEN_PAYOUT),
    )


async def pay(
    connection: Any,
    payout: Payout,
    attempt_id: str,
    *,
    preimage: str,
    fee_msat: int,
    now: datetime,
) -> None:
    """It is paid, and here is the proof."""
    await _move_payout(connection, payout.id, PayoutState.PAID)
    await _move_attempt(connection, attempt_id, AttemptState.SUCCEEDED)
    await _end_attempt(connection, attempt_id, None, now)
    await connection.execute(
        "update payout_attempts set preimage = $2, fee_msat = $3 where id = $1",
        attempt_id,
        preimage,
        fee_msat,
    )
    await connection.execute(
        "update payouts set fee_msat = $2, ended_at = $3, error_code = null where id = $1",
        payout.id,
        fee_msat,
        now,
    )
    await ledger.post(connection, payout_transfers.when_paid(payout, fee_msat))


async def fail(
    connection: Any, payout: Payout, attempt_id: str | None, code: str, *, now: datetime
) -> None:
    """Nothing was paid, nor will be: the money goes back to where it came from."""
    await _move_payout(connection, payout.id, PayoutState.FAILED)
    if attempt_id is not None:
        await _move_attempt(connection, attempt_id, AttemptState.FAILED)
        await _end_attempt(connection, attempt_id, code, now)
    await connection.execute(
        "update payouts set error_code = $2, ended_at = $3 where id = $1", payout.id, code, now
    )
    await ledger.post(connection, payout_transfers.when_failed(payout))


async def correct(
    connection: Any, payout: Payout, attempt_id: str, *, preimage: str, fee_msat: int
) -> None:
    """A payout that was counted as failed has been paid: put the books right by other transfers.

    The one move that is in no table: it must not happen, and its alert stays.
    """
    for table, row_id, to in (
        ("payouts", payout.id, PayoutState.PAID),
        ("payout_attempts", attempt_id, AttemptState.SUCCEEDED),
    ):
        moved = await connection.fetchval(
            f"update {table} set state = $2, fee_msat = $3 where id = $1 and state = 'failed'"
            " returning 1",
            row_id,
            to,
            fee_msat,
        )
        if moved is None:
            raise Moved
    held = await ledger.lock_balances(connection, [payout.account])
    await ledger.post(
        connection,
        payout_transfers.when_paid_after_all(
            payout, fee_msat, owner_holds_msat=held.get(payout.account, 0)
        ),
    )
    await connection.execute(
        "update payout_attempts set preimage = $2, alert = $3 where id = $1",
        attempt_id,
        preimage,
        Alert.PAID_AFTER_ALL,
    )


async def _move_payout(connection: Any, payout_id: str, to: PayoutState) -> None:
    starts = [state for state, ends in PAYOUT_MOVES.items() if to in ends]
    moved = await connection.fetchval(
        "update payouts set state = $2 where id = $1 and state = any($3::text[]) returning 1",
        payout_id,
        to,
        starts,
    )
    if moved is None:
        raise Moved


async def _move_attempt(connection: Any, attempt_id: str, to: AttemptState) -> None:
    starts = [state for state, ends in ATTEMPT_MOVES.items() if to in ends]
    moved = await connection.fetchval(
        "update payout_attempts set state = $2 where id = $1 and state = any($3::text[])"
        " returning 1",
        attempt_id,
        to,
        starts,
    )
    if moved is None:
        raise Moved


async def _end_attempt(connection: Any, attempt_id: str, code: str | None, now: datetime) -> None:
    await connection.execute(
        "update payout_attempts set failure_code = $2, ended_at = $3, alert = null where id = $1",
        attempt_id,
        code,
        now,
    )
