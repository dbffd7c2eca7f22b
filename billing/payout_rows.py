"""A payout and its live attempt, as rows."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from billing import ledger
from billing.payout_states import LIVE_ATTEMPT, Alert, AttemptState, PayoutKind, PayoutState


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
