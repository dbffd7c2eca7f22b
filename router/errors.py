"""What can go wrong with a request or a job. Facts, no HTTP: `router.api.errors` gives statuses.

RouterError
├── BadRequest            the request cannot be understood or is out of bounds
├── UnknownModel          nobody has ever served it
├── PromptTooLong         it fits no registered worker
├── NoWorker              the model is known, but nobody who serves it is connected
├── FeeTooHigh            over the client's own max_fee
├── NotEnoughBalance      the payer's account or the key's limit does not cover it
├── NoSuchQuote / NoSuchJob
├── QuoteExpired
├── JobWiped              the answer existed and has been deleted
├── IdempotencyConflict   the same key with another request
├── JobNotWaiting         only a waiting job can be bumped
├── JobNotEnded           there is no receipt before the end
├── AnswerDelayed         the answer is whole, but the database is not there to take it
├── AnswerLost            what was shown of an answer will not be continued; it is being made anew
├── JobFailed             the job ended without an answer
├── Forbidden             the credential does not open this
├── Paused / Draining     no new work is taken
├── RouterSilent          the router on which it hangs does not answer the one that was asked
└── QueueFull
"""

from __future__ import annotations

from typing import Any


class RouterError(Exception):
    """`code` is stable; `facts` go into the answer beside code and message."""

    code = "router_error"

    def __init__(self, message: str, **facts: Any) -> None:
        super().__init__(message)
        self.message = message
        self.facts = facts


class BadRequest(RouterError):
    """`param` in the facts names the field at fault, where there is one."""

    code = "bad_request"


class UnknownModel(RouterError):
    code = "unknown_model"


class PromptTooLong(RouterError):
    code = "prompt_too_long"


class NoWorker(RouterError):
    code = "no_worker"


class FeeTooHigh(RouterError):
    code = "fee_too_high"


class NotEnoughBalance(RouterError):
    """Facts: balance_msat, fee_msat, affordable_max_tokens."""

    code = "insufficient_balance"


class NoSuchQuote(RouterError):
    code = "no_such_quote"


class NoSuchJob(RouterError):
    code = "no_such_job"


class NoSuchThing(RouterError):
    """Something else that was named does not exist."""

    code = "not_found"


class QuoteExpired(RouterError):
    code = "quote_expired"


class JobWiped(RouterError):
    code = "wiped"


class IdempotencyConflict(RouterError):
    code = "idempotency_conflict"


class JobNotWaiting(RouterError):
    code = "job_not_waiting"


class JobNotEnded(RouterError):
    """Facts: state."""

    code = "job_not_ended"


class AnswerDelayed(RouterError):
    """Facts: job, token, status_url, where the answer can be fetched once it is recorded."""

    code = "answer_delayed"


class AnswerLost(RouterError):
    """Facts: job."""

    code = "answer_lost"


class JobFailed(RouterError):
    """Facts: job, end_reason, refunded_msat."""

    code = "job_failed"


class Conflict(RouterError):
    """The state of things does not allow it."""

    code = "conflict"


class Unauthorized(RouterError):
    """No credential, or one that opens nothing. Facts: reason."""

    code = "unauthorized"


class Forbidden(RouterError):
    code = "forbidden"


class Paused(RouterError):
    code = "paused"


class Draining(RouterError):
    code = "draining"


class RouterSilent(RouterError):
    """Another router of this market, on which this hangs, does not answer: try again."""

    code = "router_silent"


class QueueFull(RouterError):
    code = "queue_full"


class TooManyRequests(RouterError):
    """Facts: retry_after_s."""

    code = "too_many_requests"


class BodyTooLarge(RouterError):
    code = "body_too_large"
