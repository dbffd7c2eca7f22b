"""How phoenixd answers: payments without a state field, sentences for reasons, texts for errors."""

from __future__ import annotations

from typing import Any

from billing.lightning import Settlement
from billing.lightning.node_http import Fields, Reply, read_objects
from billing.lightning.node_rules import time_of


def settlement_of(incoming: Fields) -> Settlement:
    """A receipt. What the payer sent counts in full: of it phoenixd keeps its price for liquidity
    (`fees`), which is the operator's cost."""
    completed_at_ms = incoming.number("completedAt")
    return Settlement(
        payment_hash=incoming.text("paymentHash"),
        amount_received_msat=incoming.number("receivedSat") * 1000 + incoming.number_or("fees", 0),
        settled_at=time_of(completed_at_ms / 1000),
        cursor=str(completed_at_ms),
    )


def state_of(payment: Fields) -> str:
    """There is no field for it: what is neither paid nor completed may still succeed."""
    match payment.get("isPaid"):
        case True:
            return "succeeded"
        case False:
            return "pending" if payment.get("completedAt") is None else "failed"
        case _:
            return "unknown"


def failure_code(reason: str) -> str:
    """A stable word for the sentence that phoenixd gives as a reason. For logs; it decides nothing
    but that "paid" and "in progress" contradict a failure."""
    lowered = reason.lower()
    for sign, code in (
        ("already been paid", "already_paid"),
        ("in progress", "in_progress"),
        ("reject", "incorrect_payment_details"),
        ("balance", "insufficient_balance"),
        ("funds", "insufficient_balance"),
        ("route", "no_route"),
        ("recipient", "no_route"),
    ):
        if sign in lowered:
            return code
    return "failed"


def ok(reply: Reply) -> Fields:
    if reply.status != 200:
        raise reply.unexpected()
    return reply.fields()


def listed(reply: Reply) -> list[Fields]:
    if reply.status != 200 or not isinstance(reply.value, list):
        raise reply.unexpected()
    values: list[Any] = reply.value
    return read_objects(reply.backend, reply.operation, values, "payments")
