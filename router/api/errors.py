"""Every error code with its HTTP status, in one table; each door renders them in its dialect."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from billing.errors import BadCredential, BadLightningAddress, BillingError, InsufficientFunds
from billing.l402 import BUY_AGAIN
from billing.lightning import BackendError
from router.database import DatabaseUnavailable, UnstorableText
from router.errors import RouterError

# code -> (status, what it means): published in the OpenAPI document and in docs/errors.md.
STATUSES: dict[str, tuple[int, str]] = {
    "bad_request": (400, "The request cannot be understood or is out of bounds; `param` names it."),
    "prompt_too_long": (400, "The prompt fits no registered worker's context."),
    "fee_too_high": (400, "The fee is over the `max_fee_msat` of the request."),
    "bad_lightning_address": (400, "The address cannot be paid; `reason` says why."),
    "bad_invoice": (400, "The BOLT11 invoice cannot be paid."),
    "bad_amount": (400, "The amount is outside what is allowed."),
    "unauthorized": (401, "No credential, or one that opens nothing."),
    "payment_required": (402, "Pay the invoice and repeat the request with its credential."),
    "insufficient_balance": (402, "The balance or the key's limit does not cover the request."),
    "forbidden": (403, "The credential is good, but not for this."),
    "unknown_model": (404, "No worker has ever served this model."),
    "no_such_quote": (404, "There is no such quote."),
    "no_such_job": (404, "There is no such job."),
    "not_found": (404, "There is no such thing."),
    "method_not_allowed": (405, "The path exists, but not for this method."),
    "timeout": (408, "The answer took longer than the `timeout` of the request; refunded."),
    "idempotency_conflict": (409, "The Idempotency-Key was used for another request."),
    "job_not_waiting": (409, "Only a waiting job can be bumped."),
    "job_not_ended": (409, "A job has its receipt when it has ended."),
    "too_many_keys": (409, "The account has as many keys as it may."),
    "conflict": (409, "The state of things does not allow it."),
    "cancelled": (409, "The job was cancelled."),
    "quote_expired": (410, "The quote has been used or has expired."),
    "wiped": (410, "The answer existed and has been deleted."),
    "body_too_large": (413, "The body is over the limit."),
    "too_many_requests": (429, "Too many requests; `Retry-After` says when to come back."),
    "job_failed": (502, "The job ended without an answer; what was not delivered was refunded."),
    "no_worker": (503, "The model is known, but no worker that serves it is connected."),
    "max_wait": (503, "No worker was free in the time the client was ready to wait; refunded."),
    "paused": (503, "The operator has paused new work."),
    "draining": (503, "This router is shutting down."),
    "queue_full": (503, "The queue is full."),
    "database_unavailable": (
        503,
        "The database is away; nothing was charged, or a repeat finds it.",
    ),
    "answer_delayed": (503, "The answer is whole but not recorded yet; fetch it at `status_url`."),
    "answer_lost": (
        503,
        "The worker was lost; the answer is made anew and can be fetched as `job`, from its start.",
    ),
    "router_silent": (503, "The router on which this hangs does not answer; send the same again."),
    "lightning_unavailable": (503, "The Lightning node is away; nothing was charged."),
    "internal_error": (500, "A fault of the router; it is in its log."),
}
RETRY_AFTER_S = {"no_worker": 30, "paused": 60, "draining": 5, "queue_full": 10}


@dataclass(frozen=True, slots=True)
class Problem:
    """An error as a door is to render it."""

    code: str
    message: str
    facts: dict[str, Any]

    @property
    def status(self) -> int:
        return STATUSES[self.code][0]

    @property
    def headers(self) -> dict[str, str]:
        retry = self.facts.get("retry_after_s") or RETRY_AFTER_S.get(self.code)
        if retry is None and self.status == 503:
            retry = 5
        return {"Retry-After": str(retry)} if retry else {}

    def as_json(self) -> dict[str, Any]:
        """The shape of our own doors."""
        return {"error": {"code": self.code, "message": self.message, **self.facts}}


def problem_of(error: Exception) -> Problem:
    """What a client is told of an error; anything unknown is an internal error without detail."""
    match error:
        case RouterError():
            return Problem(error.code, error.message, error.facts)
        case BadCredential():
            if error.reason in BUY_AGAIN:
                message = f"this credential is not good for this: {error.reason}"
            else:
                message = f"the credential was refused: {error.reason}"
            return Problem("unauthorized", message, {"reason": error.reason})
        case BadLightningAddress():
            return Problem("bad_lightning_address", str(error), {"reason": error.code})
        case InsufficientFunds():
            return Problem(
                "insufficient_balance",
                "the balance does not cover this",
                {"balance_msat": error.balance_msat, "fee_msat": error.needed_msat},
            )
        case UnstorableText():
            return Problem("bad_request", "a text contains the character U+0000", {})
        case DatabaseUnavailable():
            return Problem("database_unavailable", STATUSES["database_unavailable"][1], {})
        case BackendError():
            return Problem("lightning_unavailable", STATUSES["lightning_unavailable"][1], {})
        case BillingError():
            code = error.code if error.code in STATUSES else "bad_request"
            return Problem(code, str(error), {})
        case _:
            return Problem("internal_error", STATUSES["internal_error"][1], {})
