"""Each move of a payout and its attempt, with the transfers that belong to it, in one transaction.

The caller opens the transaction, checks the lease in it where it is the runner, and commits. A move
names the state that it starts from; when the row is in another, somebody else was faster: Moved.

    planned   owner                  -> payouts_sending    amount, and fee cap if a client's
    paid      payouts_sending        -> assets:lightning   amount, and fee if a client's
              expenses:routing_fees  -> assets:lightning   fee, if a worker's
              payouts_sending        -> owner              what is left of the fee cap
    failed    payouts_sending        -> owner              all of it
    paid after all, of a payout that failed:
              owner                  -> assets:lightning   amount, as far as it still holds it
              expenses:goodwill      -> assets:lightning   the rest of the amount
              expenses:routing_fees  -> assets:lightning   fee

The transfers are named by the payout, so each of them can be posted once only.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from billing import ledger
from billing.accounts import new_id
from billing.ledger import Transfer
from billing.payout_states import (
    ATTEMPT_MOVES,
    LIVE_ATTEMPT,
    OPEN_PAYOUT,
    PAYOUT_MOVES,
    Alert,
    AttemptState,
    PayoutKind,
    PayoutState,
    Wait,
)


class Moved(Exception):
    """The payout is not in the state that the move starts from. Undo, and look at it again."""


@dataclass(frozen=True, slots=True)
class Payout:
    """A row of `payouts`. `account` is the ledger account that the money came from."""

    id: str
    kind: PayoutKind
    account: str
    target: str
    amount_msat: int
    fee_cap_msat: int
    state: PayoutState

    @property
    def held_msat(self) -> int:
        """What of it is in `payouts_sending`: a worker's routing fee is the router's cost."""
        capped = self.kind is PayoutKind.WITHDRAWAL
        return self.amount_msat + (self.fee_cap_msat if capped else 0)

    @property
    def payee_id(self) -> str | None:
        """The worker, if it is one."""
        prefix = ledger.worker("")
        return self.account.removeprefix(prefix) if self.kind is PayoutKind.WORKER else None


@dataclass(frozen=True, slots=True)
class Attempt:
    """A row of `payout_attempts` that is live; the empty string where it has no invoice yet."""

    id: str
    state: AttemptState
    address: str | None  # None: the payee has given the invoice itself
    bolt11: str
    payment_hash: str
    expires_at: datetime | None
    submitted_at: datetime | None
    submissions: int
    node_pubkey: str | None
    lease_token: int | None
    was_known: bool
    was_missing: bool
    agreed_state: str | None
    agreed_since: datetime | None
    alert: Alert | None


async def load(connection: Any, payout_id: str) -> tuple[Payout, Attempt | None]:
    """A payout and its live attempt, locked until the transaction ends."""
    row = await connection.fetchrow("select * from payouts where id = $1 for update", payout_id)
    payout = Payout(
        id=row["id"],
        kind=PayoutKind(row["kind"]),
        account=row["account"],
        target=row["target"],
        amount_msat=row["amount_msat"],
        fee_cap_msat=row["fee_cap_msat"],
        state=PayoutState(row["state"]),
    )
    found = await connection.fetchrow(
        "select * from payout_attempts where payout_id = $1 and state = any($2::text[])",
        payout_id,
        list(LIVE_ATTEMPT),
    )
    if found is None:
        return payout, None
    return payout, Attempt(
        id=found["id"],
        state=AttemptState(found["state"]),
        address=found["address"],
        bolt11=found["bolt11"] or "",
        payment_hash=found["payment_hash"] or "",
        expires_at=found["expires_at"],
        submitted_at=found["submitted_at"],
        submissions=found["submissions"],
        node_pubkey=found["node_pubkey"],
        lease_token=found["lease_token"],
        was_known=found["was_known"],
        was_missing=found["was_missing"],
        agreed_state=found["agreed_state"],
        agreed_since=found["agreed_since"],
        alert=Alert(found["alert"]) if found["alert"] else None,
    )


async def plan(connection: Any, payout: Payout, *, now: datetime) -> None:
    """Take the money from its owner. Raises InsufficientFunds."""
    assert payout.state is PayoutState.PLANNED
    await ledger.post(
        connection,
        [Transfer(payout.account, ledger.SENDING, payout.held_msat, "payout", payout.id)],
    )
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
    await ledger.post(connection, _transfers_when_paid(payout, fee_msat))


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
    await ledger.post(
        connection,
        [Transfer(ledger.SENDING, payout.account, payout.held_msat, "payout_failed", payout.id)],
    )


async def correct(
    connection: Any, payout: Payout, attempt_id: str, *, preimage: str, fee_msat: int
) -> None:
    """A payout that was counted as failed has been paid: put the books right by other transfers.

    What it gave back to its owner is taken again; what the owner has spent since is the router's
    loss. The one move that is in no table: it must not happen, and its alert stays.
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
    taken_msat = min(payout.amount_msat, held.get(payout.account, 0))
    lost_msat = payout.amount_msat - taken_msat
    code = "paid_after_all"
    await ledger.post(
        connection,
        [
            Transfer(payout.account, ledger.LIGHTNING, taken_msat, code, payout.id),
            Transfer(ledger.GOODWILL, ledger.LIGHTNING, lost_msat, f"{code}_lost", payout.id),
            Transfer(ledger.ROUTING_FEES, ledger.LIGHTNING, fee_msat, f"{code}_fee", payout.id),
        ],
    )
    await connection.execute(
        "update payout_attempts set preimage = $2, alert = $3 where id = $1",
        attempt_id,
        preimage,
        Alert.PAID_AFTER_ALL,
    )


def _transfers_when_paid(payout: Payout, fee_msat: int) -> list[Transfer]:
    def transfer(debit: str, credit: str, amount_msat: int, code: str) -> Transfer:
        return Transfer(debit, credit, amount_msat, code, payout.id)

    if payout.kind is PayoutKind.WORKER:
        return [
            transfer(ledger.SENDING, ledger.LIGHTNING, payout.amount_msat, "paid"),
            transfer(ledger.ROUTING_FEES, ledger.LIGHTNING, fee_msat, "routing_fee"),
        ]
    # A node that exceeds its cap costs the router, not the client, who has agreed to the cap.
    charged_msat = min(fee_msat, payout.fee_cap_msat)
    return [
        transfer(ledger.SENDING, ledger.LIGHTNING, payout.amount_msat + charged_msat, "paid"),
        transfer(ledger.SENDING, payout.account, payout.fee_cap_msat - charged_msat, "fee_rest"),
        transfer(ledger.ROUTING_FEES, ledger.LIGHTNING, fee_msat - charged_msat, "routing_fee"),
    ]


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
