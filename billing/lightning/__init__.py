"""The seam between billing and a Lightning node: one interface, its results, its errors.

Every back end (simulated, lnd, cln, phoenixd, lnbits, nwc, electrum) implements `LightningBackend`.
Inside, amounts are msat, payment hashes are 64 lower-case hex characters, and times are aware
datetimes in UTC.

    BillingError
    └── BackendError          carries back end, operation, a message safe to show, and a detail
        ├── BackendUnavailable  the request certainly did not reach the node   retry later
        ├── BackendAuthError    our key was refused                            tell the operator
        ├── BackendRejected     the node answered, and certainly did nothing   the attempt failed
        └── OutcomeUnknown      it may or may not have acted                   look it up

The pay call never decides "failed" alone, the look-up does: `NOT_FOUND` is not `FAILED`, and an
error of a pay call is a failure only if it is `BackendRejected`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Literal, Protocol

from billing.errors import BillingError


class PaymentState(StrEnum):
    """What a node knows of a payment of ours."""

    NOT_FOUND = "not_found"  # the node has no record; it may have lost it
    IN_FLIGHT = "in_flight"  # may still succeed
    SUCCEEDED = "succeeded"
    FAILED = "failed"  # nothing is in flight, nor will be: see `failed_is_definitive`
    UNKNOWN = "unknown"  # we could not find out


class InvoiceState(StrEnum):
    """What a node knows of an invoice it made for us."""

    OPEN = "open"
    SETTLED = "settled"
    EXPIRED = "expired"  # not settled in time; an HTLC that came in time may yet settle it
    CANCELED = "canceled"  # can never settle
    NOT_FOUND = "not_found"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What differs between nodes in ways that callers must know."""

    granularity_msat: int  # 1, or 1000 where the node takes whole satoshis only
    description_max_bytes: int
    description_hash: bool
    fee_limit: bool  # the node itself enforces max_fee_msat
    cancel_invoice: bool
    push: Literal["cursor", "live", "none"]  # settlements: replayable, live only, or poll
    refuses_duplicate_hash: bool
    checks_expiry: bool  # the node refuses to start paying an expired invoice
    failed_is_definitive: bool  # FAILED of this node needs no second look


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """`network` is mainnet, testnet, signet or regtest. `simulated` money is nobody's money."""

    pubkey: str
    alias: str
    version: str
    network: str
    synced: bool
    simulated: bool = False


@dataclass(frozen=True, slots=True)
class NodeBalance:
    """`receivable_msat` is None where the node cannot tell; `pending_msat` is out in HTLCs;
    `reserve_msat` is ours too, and cannot be sent now: channel reserves, channels that are away."""

    spendable_msat: int
    receivable_msat: int | None
    pending_msat: int
    reserve_msat: int = 0

    @property
    def held_msat(self) -> int:
        """All that is ours, as far as the node tells."""
        return self.spendable_msat + self.pending_msat + self.reserve_msat


@dataclass(frozen=True, slots=True)
class Invoice:
    """An invoice the node has made for us. There is no preimage in it, on purpose."""

    payment_hash: str
    bolt11: str
    amount_msat: int
    created_at: datetime
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class InvoiceStatus:
    """`cursor` is the settlement's place in the stream, if the node has such a thing."""

    payment_hash: str
    state: InvoiceState
    amount_received_msat: int = 0
    settled_at: datetime | None = None
    cursor: str | None = None


@dataclass(frozen=True, slots=True)
class Settlement:
    """Money that came in. `cursor` is to be stored in the transaction that records it."""

    payment_hash: str
    amount_received_msat: int
    settled_at: datetime
    cursor: str | None


@dataclass(frozen=True, slots=True)
class PaymentStatus:
    """`preimage`, `amount_msat` and `fee_msat` are set when SUCCEEDED, and then the SHA-256 of the
    preimage is the hash (a back end answers UNKNOWN where it is not). `failure_code` is a word of
    the node's, safe to log. One of them matters: FAILED with `incorrect_payment_details` is the
    payee refusing an HTLC, which it also does when the invoice *has been paid already*; after a
    NOT_FOUND and a re-submission it is therefore no proof that nothing was paid."""

    payment_hash: str
    state: PaymentState
    preimage: str | None = None
    amount_msat: int | None = None
    fee_msat: int | None = None
    failure_code: str | None = None


@dataclass(frozen=True, slots=True)
class SentPayment:
    """A payment as the node's own history lists it: `state` is IN_FLIGHT or SUCCEEDED. One that is
    in flight may name no fee yet."""

    payment_hash: str
    state: PaymentState
    amount_msat: int
    fee_msat: int
    sent_at: datetime


class BackendError(BillingError):
    """Base of what a node or the way to it can do to us. `code` and `safe_message` may be shown;
    `detail` is for the operator's log and holds no secrets."""

    code = "lightning_error"

    def __init__(self, backend: str, operation: str, safe_message: str, detail: str = "") -> None:
        tail = f" ({detail})" if detail else ""
        super().__init__(f"{backend}.{operation}: {safe_message}{tail}")
        self.backend = backend
        self.operation = operation
        self.safe_message = safe_message
        self.detail = detail


class BackendUnavailable(BackendError):
    """The request certainly did not reach the node. Retry later; nothing has changed."""

    code = "lightning_unavailable"


class BackendAuthError(BackendError):
    """The node refused our credentials. Stop, and tell the operator."""

    code = "lightning_auth"


class BackendRejected(BackendError):
    """The node answered, did nothing, and had done nothing for this request before: an attempt to
    pay has failed. `reason` is a stable word: malformed, wrong_network, expired,
    insufficient_funds, fee_limit, self_payment, conflict, unsupported, quota, refused."""

    code = "lightning_rejected"

    def __init__(
        self,
        backend: str,
        operation: str,
        safe_message: str,
        detail: str = "",
        *,
        reason: str = "refused",
    ) -> None:
        super().__init__(backend, operation, safe_message, detail)
        self.reason = reason


class OutcomeUnknown(BackendError):
    """The request was sent and no clear answer came. Look it up; assume neither yes nor no."""

    code = "lightning_outcome_unknown"


class LightningBackend(Protocol):
    """One node. Every method may raise `BackendError`; none retries by itself."""

    name: str
    capabilities: Capabilities

    async def node_info(self) -> NodeInfo: ...

    async def balance(self) -> NodeBalance: ...

    async def create_invoice(
        self, *, amount_msat: int, description: str, expiry_s: int, idempotency_key: str
    ) -> Invoice:
        """A new invoice for exactly `amount_msat`. The same key again gives the same invoice where
        the node allows that; the same key with other terms is `BackendRejected`."""
        ...

    async def lookup_invoice(self, payment_hash: str) -> InvoiceStatus: ...

    async def cancel_invoice(self, payment_hash: str) -> bool:
        """True when the invoice can never settle any more; False when it has settled, when money
        for it is held, or when the node cannot cancel. Twice is harmless."""
        ...

    def settlements(self, cursor: str | None) -> AsyncIterator[Settlement]:
        """Money as it comes in, in the node's order, strictly after `cursor`.

        It never ends by itself. When the connection is lost it raises `BackendUnavailable` or
        `OutcomeUnknown`, and the caller starts again with the last cursor it stored. None: a node
        may replay everything or nothing, so look up all open invoices first.
        """
        ...

    async def worst_case_fee_msat(self, amount_msat: int) -> int | None:
        """The most that routing can cost where the node sets that itself; None: max_fee_msat is
        the limit."""
        ...

    async def pay_invoice(
        self, bolt11: str, *, max_fee_msat: int, timeout_s: float, max_cltv_blocks: int | None
    ) -> PaymentStatus:
        """Pay. IN_FLIGHT when `timeout_s` passed first; FAILED only if `failed_is_definitive`,
        else UNKNOWN. Cancelling the task leaves the outcome unknown: the node goes on. The same
        invoice again never raises `BackendRejected` for being the same: a back end whose node
        refuses it (`refuses_duplicate_hash`) looks up and answers what became of the first call,
        SUCCEEDED with its preimage or IN_FLIGHT. After FAILED it is a new attempt."""
        ...

    async def lookup_payment(self, payment_hash: str) -> PaymentStatus: ...

    def received_since(self, since: datetime) -> AsyncIterator[Settlement]:
        """What the node's own history says came in since then, asked for, paid, by whomever; read
        page by page and ending. Some from before may come too. Raises `BackendRejected` with
        `unsupported` where the node keeps no list that we may read."""
        ...

    def sent_since(self, since: datetime) -> AsyncIterator[SentPayment]:
        """What left or is leaving since then, likewise, whoever asked for it."""
        ...

    async def aclose(self) -> None: ...
