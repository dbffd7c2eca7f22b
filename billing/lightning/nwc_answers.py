"""What an NWC wallet's answers mean, field by field; whatever is misshapen is not known."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from billing.lightning import (
    BackendAuthError,
    BackendError,
    BackendRejected,
    OutcomeUnknown,
    PaymentState,
    SentPayment,
    Settlement,
)
from billing.lightning.node_rules import time_of
from billing.lightning.nwc_link import NAME, WalletError

_REASONS = {
    "RATE_LIMITED": "quota",
    "QUOTA_EXCEEDED": "quota",
    "INSUFFICIENT_BALANCE": "insufficient_funds",
    "NOT_IMPLEMENTED": "unsupported",
    "UNSUPPORTED_ENCRYPTION": "unsupported",
    "BAD_REQUEST": "malformed",
    "EXPIRED": "expired",
}
_REFUSES_US = frozenset({"RESTRICTED", "UNAUTHORIZED"})
PAYMENT_STATES = {
    "pending": PaymentState.IN_FLIGHT,
    "accepted": PaymentState.IN_FLIGHT,
    "settled": PaymentState.SUCCEEDED,
    "failed": PaymentState.FAILED,
}
NETWORKS = {"bitcoin": "mainnet", "mainnet": "mainnet"} | {
    name: name for name in ("testnet", "signet", "regtest")
}


def wallet_failure(operation: str, error: WalletError) -> BackendError:
    if error.code in _REFUSES_US:
        return BackendAuthError(NAME, operation, "the wallet does not let us do this", error.code)
    reason = _REASONS.get(error.code)
    if reason is None:
        return OutcomeUnknown(NAME, operation, "the wallet failed", error.code[:40])
    return BackendRejected(NAME, operation, "the wallet refused", error.code, reason=reason)


def read_settlement(found: Any) -> Settlement | None:
    """None for what is no settled receipt."""
    if not isinstance(found, dict) or found.get("type") != "incoming":
        return None
    moment, payment_hash, amount_msat = (
        settled_at(found),
        found.get("payment_hash"),
        found.get("amount"),
    )
    if found.get("state", "settled") != "settled" or moment is None:
        return None
    if not isinstance(payment_hash, str) or not isinstance(amount_msat, int):
        return None
    return Settlement(payment_hash, amount_msat, moment, cursor=None)


def read_sent(found: dict[str, Any]) -> SentPayment | None:
    """None for what is no payment of ours, or one that took nothing."""
    if found.get("type") != "outgoing":
        return None
    if found.get("state") is None:
        settled = settled_at(found) is not None
        state = PaymentState.SUCCEEDED if settled else PaymentState.IN_FLIGHT
    else:
        state = PAYMENT_STATES.get(str(found["state"]), PaymentState.UNKNOWN)
    payment_hash, created_at_s = found.get("payment_hash"), found.get("created_at")
    if state in (PaymentState.FAILED, PaymentState.UNKNOWN) or not isinstance(payment_hash, str):
        return None
    if not isinstance(created_at_s, int):
        raise OutcomeUnknown(NAME, "sent_since", "the wallet does not say when it paid")
    return SentPayment(
        payment_hash,
        state,
        whole(found, "amount", "sent_since"),
        fees(found),
        time_of(created_at_s),
    )


def settled_at(found: dict[str, Any]) -> datetime | None:
    value = found.get("settled_at")
    return time_of(value) if isinstance(value, int) and value > 0 else None


def fees(found: dict[str, Any]) -> int:
    """Zero where the wallet does not say, since the field is optional."""
    value = found.get("fees_paid")
    return value if isinstance(value, int) else 0


def whole(answer: dict[str, Any], name: str, operation: str) -> int:
    value = answer.get(name)
    if not isinstance(value, int) or value < 0:
        raise OutcomeUnknown(NAME, operation, "the wallet's answer lacks a number", name)
    return value


def read_pubkey(value: Any) -> str | None:
    try:
        return value.lower() if len(bytes.fromhex(value)) == 33 else None
    except (TypeError, ValueError):
        return None
