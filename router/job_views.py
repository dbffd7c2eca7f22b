"""How jobs look to clients: the shapes of the contract (§8), made from rows or from memory. Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from billing.fees import format_multiplier
from router.job_states import FINAL, State


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a job ended. `result` and `usage` as `router.results` and `router.charging` make them."""

    state: State
    end_reason: str
    held_msat: int
    charged_msat: int
    worker_id: str | None = None
    usage: dict[str, Any] | None = None
    result: dict[str, Any] | None = None
    wiped: bool = False

    @property
    def refunded_msat(self) -> int:
        return self.held_msat - self.charged_msat


# What a client is told of an end without an answer; the worker is named in the attempt's record.
EXPLANATIONS = {
    "max_wait": "no worker was free in the time you were ready to wait; nothing was charged",
    "quote_expired": "the quote was not paid in time",
    "cancelled": "the job was cancelled",
    "run_limit": "the time that the job was given is over; what was delivered is charged",
    "client_gone": "the client went away",
    "attempts_exhausted": "several workers failed at this job; nothing was charged",
    "worker_failed": "the worker failed; nothing was charged",
    "worker_lost": "the worker was lost after part of the answer; the rest was refunded",
    "prompt_too_long": "the prompt is too long for the model's context; nothing was charged",
    "timeout": "the answer took longer than the timeout of the request; what was not delivered was"
    " refunded",
    "bad_request": "the worker could not understand this request; nothing was charged",
}


def outcome_of(row: Any) -> Outcome | None:
    """The outcome of a job's row; None while it is alive."""
    state = State(row["state"])
    if state not in FINAL:
        return None
    return Outcome(
        state=state,
        end_reason=row["end_reason"] or state.value,
        held_msat=row["held_msat"] if row["seq"] is not None else 0,
        charged_msat=row["charged_msat"] or 0,
        worker_id=row["worker_id"],
        usage=json.loads(row["usage"]) if row["usage"] else None,
        result=json.loads(row["result"]) if row["result"] else None,
        wiped=row["wiped"],
    )


def answer_text(ended: Outcome) -> str:
    """The text of a chat or completion answer; empty for other kinds, or without an answer."""
    for choice in (ended.result or {}).get("choices", ()):
        return choice.get("text") or (choice.get("message") or {}).get("content") or ""
    return ""


def answer_calls(ended: Outcome) -> list[dict[str, Any]]:
    """The tool calls of a chat answer, each with its index as in a delta."""
    for choice in (ended.result or {}).get("choices", ()):
        calls = (choice.get("message") or {}).get("tool_calls") or ()
        return [{"index": index, **call} for index, call in enumerate(calls)]
    return []


def job_view(row: Any) -> dict[str, Any]:
    """A job as `GET /jobs/{id}` shows it, without its place in the queue."""
    outcome = outcome_of(row)
    view: dict[str, Any] = {
        "id": row["id"],
        "quote_id": row["quote_id"],
        "kind": row["kind"],
        "model": row["model"],
        "state": row["state"],
        "attempt": row["attempt"],
        "multiplier": format_multiplier(row["multiplier_milli"]),
        "held_msat": row["held_msat"] if row["seq"] is not None else 0,
        **{name: time_text(row[name]) for name in TIMES},
        "end_reason": row["end_reason"],
    }
    if row["worker_id"]:
        view["worker"] = row["worker_id"]
    if outcome is None:
        return view
    view["charged_msat"] = outcome.charged_msat
    view["refunded_msat"] = outcome.refunded_msat
    if outcome.usage:
        view["usage"] = outcome.usage
    if outcome.wiped:
        view["wiped"] = True
    elif outcome.result is not None:
        view["result"] = outcome.result
    if outcome.state is not State.SUCCEEDED:
        view["error"] = {"code": outcome.end_reason, "message": explain(outcome)}
    return view


TIMES = ("created_at", "queued_at", "started_at", "first_token_at", "ended_at")


def explain(outcome: Outcome) -> str:
    """What the client is told of a job that ended without a whole answer."""
    return EXPLANATIONS.get(outcome.end_reason, f"the job ended: {outcome.end_reason}")


def time_text(moment: datetime | None) -> str | None:
    """RFC 3339 in UTC."""
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z") if moment else None
