"""Errors as AI Horde says them: `{"message", "rc"}`, and flask-restx's shape for a bad field."""

from __future__ import annotations

from typing import Any

from fastapi import Request, Response

from billing.errors import BadCredential
from router.api.answers import answer, core_of, noted
from router.api.errors import Problem
from router.api.purchase import PaymentRequired, payment_body
from router.errors import TooManyRequests
from router.rate_limits import KEY_FAILURES_PER_MINUTE

# Our codes, and the return codes that clients of AI Horde know.
RETURN_CODES = {
    "unauthorized": "InvalidAPIKey",
    "insufficient_balance": "KudosUpfront",
    "payment_required": "KudosUpfront",
    "prompt_too_long": "TokenOverflow",
    "too_many_requests": "TooManyPrompts",
    "queue_full": "TooManyPrompts",
    "paused": "MaintenanceMode",
    "draining": "MaintenanceMode",
    "idempotency_conflict": "IdempotencyKeyConflict",
    "forbidden": "WrongCredentials",
    "not_found": "NotFound",
}


class HordeRefusal(Exception):
    """A refusal that this dialect has a status and a return code of its own for."""

    def __init__(self, status: int, rc: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.rc = rc
        self.message = message


def refusal(error: Exception, request: Request) -> Response:
    """The answer for an error."""
    match error:
        case HordeRefusal():
            return answer({"message": error.message, "rc": error.rc}, status=error.status)
        case PaymentRequired():
            message = (
                "A prompt is paid for: send a prepaid key as `apikey` (POST /balance/topups), or pay"
                " the invoice and repeat the request with its credential."
            )
            body = {"message": message, "rc": "KudosUpfront"}
            return answer(
                body | payment_body(core_of(request), error),
                status=402,
                challenges=error.offer.challenges,
            )
        case BadCredential():
            return bad_key(request)
        case _:
            problem = noted(error, request)
            return answer(error_body(problem), status=problem.status, headers=problem.headers)


_NO_SUCH_KEY = (
    "No user matching sent API Key. Have you remembered to buy one (POST /balance/topups)?"
)


def bad_key(request: Request, message: str = _NO_SUCH_KEY) -> Response:
    """401 for a key that is none; wrong ones are counted."""
    try:
        core_of(request).limiter.failed(request, "key", KEY_FAILURES_PER_MINUTE)
    except TooManyRequests as throttled:
        return refusal(throttled, request)
    return answer({"message": message, "rc": "InvalidAPIKey"}, status=401)


def error_body(problem: Problem) -> dict[str, Any]:
    """An error of ours in that shape."""
    named = problem.facts.get("param")
    if problem.code == "bad_request" and isinstance(named, str):
        return {
            "errors": {named: problem.message},
            "message": "Input payload validation failed",
            "rc": "ValidationError",
        }
    facts = {name: value for name, value in problem.facts.items() if name != "param"}
    return {"message": problem.message, "rc": RETURN_CODES.get(problem.code, problem.code), **facts}
