"""The states of a payment out, and what follows from what the node says about it. Pure.

A payout is money on its way to one payee: a worker's batch or a client's withdrawal. Its money sits
in `liabilities:payouts_sending` from `planned` until it ends.

    planned ──── a node is asked to pay ────▶ sending ──── the preimage is here ────▶ paid
      │  ▲                                     │   │
      │  └── the request never reached it ─────┘   └──── nothing was, nor will be sent ──▶ failed
      └───── no invoice to be had ───────────────────────────────────────────────────────▶ failed

An attempt is one invoice of a payout; of its attempts at most one is new, invoiced or submitted.

    new ──▶ invoiced ──▶ submitted ──▶ succeeded
     │       │    ▲        │   │
     │       │    └────────┘   └─────▶ failed    (back to invoiced: the request reached nobody)
     │       └─▶ abandoned                       (expired, or not wanted, before any request)
     └─▶ failed

"Unknown" is no state: it is `submitted` with a question that is open, and it never times out. The
rule that makes this safe: there is no second invoice before the first is certainly dead. Until its
expiry the same invoice may be submitted again, because a node pays a payment hash once; after it,
a node that never had it cannot start it any more. `next_step` is that rule as a table:

    look-up says          not expired             within the margin   past the margin
    succeeded, proved     Succeeded               Succeeded           Succeeded
    in flight             Wait                    Wait                Wait, alert after an hour
    failed, definitive    Failed                  Failed              Failed
    failed, other nodes   Resubmit or Wait        Wait                Failed when two look-ups agree
    not found             Resubmit or Wait        Wait                Failed when two look-ups agree
    unknown               Wait                    Wait                Wait

"Not found" is the weak word: a node whose history was deleted says it too. So it concludes nothing
when the node has changed, is not synced, once knew this payment, or has forgotten payments before
and after it that we hold preimages of; and once it was said, a later "failed" speaks only for the
last submission. What cannot be concluded raises an alert and waits for the operator.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from hashlib import sha256

from billing.lightning import Capabilities, PaymentState, PaymentStatus


class PayoutKind(StrEnum):
    WORKER = "worker"
    WITHDRAWAL = "withdrawal"


class PayoutState(StrEnum):
    PLANNED = "planned"
    SENDING = "sending"
    PAID = "paid"
    FAILED = "failed"


class AttemptState(StrEnum):
    NEW = "new"
    INVOICED = "invoiced"
    SUBMITTED = "submitted"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    ABANDONED = "abandoned"


class Alert(StrEnum):
    """Why a submitted attempt needs a person, or soon may. Cleared when it goes on by itself."""

    IN_FLIGHT_LONG = "in_flight_long"  # a payee may hold an HTLC for days: it stays unresolved
    WRONG_PREIMAGE = "wrong_preimage"  # the node says paid, and proves something else
    NODE_CHANGED = "node_changed"  # another node answers than the one that was asked to pay
    NODE_FORGOT = "node_forgot"  # it has lost records, so that "not found" means nothing
    MAYBE_PAID = "maybe_paid"  # the payee refuses a second HTLC: it may have taken the first
    PAID_AFTER_ALL = "paid_after_all"  # counted as failed, and paid: the node contradicts itself


# The payee's refusal of an HTLC, which it gives for an invoice that has been paid as well.
PAYEE_REFUSES = "incorrect_payment_details"

OPEN_PAYOUT = (PayoutState.PLANNED, PayoutState.SENDING)
LIVE_ATTEMPT = (AttemptState.NEW, AttemptState.INVOICED, AttemptState.SUBMITTED)

PAYOUT_MOVES: dict[PayoutState, frozenset[PayoutState]] = {
    PayoutState.PLANNED: frozenset({PayoutState.SENDING, PayoutState.FAILED}),
    PayoutState.SENDING: frozenset({PayoutState.PLANNED, PayoutState.PAID, PayoutState.FAILED}),
    PayoutState.PAID: frozenset(),
    PayoutState.FAILED: frozenset(),
}
ATTEMPT_MOVES: dict[AttemptState, frozenset[AttemptState]] = {
    AttemptState.NEW: frozenset({AttemptState.INVOICED, AttemptState.FAILED}),
    AttemptState.INVOICED: frozenset({AttemptState.SUBMITTED, AttemptState.ABANDONED}),
    AttemptState.SUBMITTED: frozenset(
        {AttemptState.INVOICED, AttemptState.SUCCEEDED, AttemptState.FAILED}
    ),
    AttemptState.SUCCEEDED: frozenset(),
    AttemptState.FAILED: frozenset(),
    AttemptState.ABANDONED: frozenset(),
}

EXPIRY_MARGIN = timedelta(seconds=120)
SUBMIT_NEEDS = timedelta(seconds=60)  # an invoice with less time left is not given to a node
AGREE_AFTER = timedelta(seconds=60)
AGREE_AFTER_UNCHECKED = timedelta(minutes=10)  # of a node that does not check an invoice's expiry
LONG_IN_FLIGHT = timedelta(hours=1)
LONGEST_PAUSE = timedelta(minutes=10)


@dataclass(frozen=True, slots=True)
class Submitted:
    """What our own record says of an attempt that a node was asked to pay.

    `calling`: a request of ours may still be on its way to the node. `was_known`: a look-up once
    found it. `was_missing`: one did not. `agreed_state` and `agreed_since`: what look-ups past the
    margin have been saying since when.
    """

    payment_hash: str
    submitted_at: datetime
    expires_at: datetime
    calling: bool
    was_known: bool
    was_missing: bool
    agreed_state: PaymentState | None
    agreed_since: datetime | None
    alert: Alert | None


@dataclass(frozen=True, slots=True)
class AskedNode:
    """The node that answered the look-up. `same`: it is the one that was asked to pay.

    `remembers`: it still knows the payments before and after this one that it has proved to us;
    `idle`: it has no money out in HTLCs at all. The runner finds out
    only where it matters.
    """

    capabilities: Capabilities
    same: bool
    synced: bool
    remembers: bool
    idle: bool


@dataclass(frozen=True, slots=True)
class Succeeded:
    preimage: str
    fee_msat: int


@dataclass(frozen=True, slots=True)
class Failed:
    code: str


@dataclass(frozen=True, slots=True)
class Resubmit:
    """Give the node the same invoice again."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Ask again later, and remember this much until then."""

    agreed_state: PaymentState | None = None
    agreed_since: datetime | None = None
    alert: Alert | None = None


Decision = Succeeded | Failed | Resubmit | Wait


def next_step(
    attempt: Submitted,
    lookup: PaymentStatus,
    node: AskedNode,
    now: datetime,
    *,
    margin: timedelta = EXPIRY_MARGIN,
) -> Decision:
    """What follows from what the node said. `margin` is added to the invoice's expiry."""
    if lookup.state is PaymentState.SUCCEEDED:
        if proves(lookup.preimage, attempt.payment_hash):
            assert lookup.preimage is not None
            return Succeeded(lookup.preimage, lookup.fee_msat or 0)
        return Wait(alert=Alert.WRONG_PREIMAGE)
    if not node.same:
        return Wait(alert=Alert.NODE_CHANGED)
    past_margin = now >= attempt.expires_at + margin
    match lookup.state:
        case PaymentState.UNKNOWN:
            return Wait(attempt.agreed_state, attempt.agreed_since, attempt.alert)
        case PaymentState.IN_FLIGHT:
            long = past_margin and now - attempt.submitted_at >= LONG_IN_FLIGHT
            return Wait(alert=Alert.IN_FLIGHT_LONG if long else None)
        case PaymentState.FAILED:
            return _after_failed(attempt, lookup, node, now, past_margin=past_margin)
        case PaymentState.NOT_FOUND:
            return _after_not_found(attempt, node, now, past_margin=past_margin)
    raise AssertionError(lookup.state)


def _after_failed(
    attempt: Submitted,
    lookup: PaymentStatus,
    node: AskedNode,
    now: datetime,
    *,
    past_margin: bool,
) -> Decision:
    code = lookup.failure_code or "failed"
    if attempt.was_missing and code == PAYEE_REFUSES:
        return Wait(alert=Alert.MAYBE_PAID)
    if attempt.calling:
        # The record may be of an earlier submission, and the later one still be on its way.
        return Wait()
    if node.capabilities.failed_is_definitive and not attempt.was_missing:
        return Failed(code)
    if attempt.was_missing and not node.remembers:
        return Wait(alert=Alert.NODE_FORGOT)
    if not past_margin:
        return _resubmit_or_wait(attempt, node, now)
    if not node.idle:
        return Wait()
    return _agree(attempt, PaymentState.FAILED, code, now, AGREE_AFTER)


def _after_not_found(
    attempt: Submitted, node: AskedNode, now: datetime, *, past_margin: bool
) -> Decision:
    if attempt.was_known or not node.remembers:
        return Wait(alert=Alert.NODE_FORGOT)
    if attempt.calling or not node.synced:
        return Wait()
    if not past_margin:
        return _resubmit_or_wait(attempt, node, now)
    checked = node.capabilities.checks_expiry
    wait = AGREE_AFTER if checked else AGREE_AFTER_UNCHECKED
    return _agree(attempt, PaymentState.NOT_FOUND, "not_sent", now, wait)


def _resubmit_or_wait(attempt: Submitted, node: AskedNode, now: datetime) -> Decision:
    if (
        node.capabilities.refuses_duplicate_hash
        and node.synced
        and attempt.expires_at - now >= SUBMIT_NEEDS
    ):
        return Resubmit()
    return Wait()


def _agree(
    attempt: Submitted, said: PaymentState, code: str, now: datetime, wait: timedelta
) -> Decision:
    """Failed when an earlier look-up past the margin said the same, long enough ago."""
    if attempt.agreed_state is not said or attempt.agreed_since is None:
        return Wait(said, now)
    if now < attempt.agreed_since:
        # The clock was set back: what it measured before counts for nothing.
        return Wait(said, now)
    if now - attempt.agreed_since >= wait:
        return Failed(code)
    return Wait(said, attempt.agreed_since)


def proves(preimage: str | None, payment_hash: str) -> bool:
    """Whether this is the preimage of the hash: the only proof of a payment."""
    try:
        return preimage is not None and sha256(bytes.fromhex(preimage)).hexdigest() == payment_hash
    except ValueError:
        return False


def look_again_after(waited: timedelta, submissions: int) -> timedelta:
    """When to look an unresolved payment up again, by how long it has been unresolved.

    Each further submission doubles the pause, so that a payee without a route is not hammered.
    """
    if waited < timedelta(minutes=2):
        pause = timedelta(seconds=5)
    elif waited < timedelta(hours=1):
        pause = timedelta(seconds=60)
    else:
        return LONGEST_PAUSE
    return max(pause, min(timedelta(seconds=5) * 2 ** min(submissions - 1, 10), LONGEST_PAUSE))
