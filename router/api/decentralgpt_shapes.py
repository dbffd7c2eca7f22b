"""DecentralGPT's envelope: `code` 0 and `message` beside an answer, another `code` beside an error.

The numbers are those of its nodes (DG-11). On the paths that it shares with OpenAI they stand beside
OpenAI's own `error`, whose clients pass over fields that they do not know.
"""

from __future__ import annotations

from typing import Any

from router.api.errors import Problem

SUCCESS: dict[str, Any] = {"code": 0, "message": "success"}
PARAMETER, JSON, TIMEOUT, MODEL, PERMISSION = 1001, 1003, 1005, 1007, 1010
UNSUPPORTED, DATABASE, PROXY, INTERNAL = 1011, 1016, 1017, 5000

# Whose fault it was, by our own code; what is not here is internal.
NUMBERS: dict[str, int] = {
    "bad_request": PARAMETER,
    "prompt_too_long": PARAMETER,
    "fee_too_high": PARAMETER,
    "bad_lightning_address": PARAMETER,
    "idempotency_conflict": PARAMETER,
    "body_too_large": PARAMETER,
    "conflict": PARAMETER,
    "method_not_allowed": UNSUPPORTED,
    "max_wait": TIMEOUT,
    "unknown_model": MODEL,
    "not_found": MODEL,
    "unauthorized": PERMISSION,
    "payment_required": PERMISSION,
    "insufficient_balance": PERMISSION,
    "forbidden": PERMISSION,
    "too_many_requests": PERMISSION,
    "database_unavailable": DATABASE,
    "answer_delayed": DATABASE,
    "no_worker": PROXY,
    "job_failed": PROXY,
    "cancelled": PROXY,
    "queue_full": PROXY,
    "paused": PROXY,
    "draining": PROXY,
    "router_silent": PROXY,
}
# Statuses that say something beyond `code`: pay, come with a key, come later.
_OWN_STATUSES = frozenset({401, 402, 403, 413, 429})


def envelope(problem: Problem) -> dict[str, Any]:
    """`code` and `message` of an error."""
    return {"code": NUMBERS.get(problem.code, INTERNAL), "message": problem.message}


def node_status(problem: Problem) -> int:
    """The HTTP status at the node's own paths: 504 for a time-out, 500 for nearly all else (DG-11)."""
    if problem.status in _OWN_STATUSES:
        return problem.status
    return 504 if problem.code == "max_wait" else 500
