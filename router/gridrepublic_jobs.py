"""What a GridRepublic job asks for, and how one looks (peers.md GR-1 ... GR-8). Pure.

`commandLine` is a text that holds an object: JSON, or, as that system's own documentation has it, a
Python literal. Only literals are read, and only so many and so deep.
"""

from __future__ import annotations

import ast
import json
import math
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from router.errors import BadRequest
from router.following import answer_text
from router.job_states import State
from router.job_views import explain, outcome_of
from router.requests import MAX_MODELS

APP = "gridrepublic:text-inference"
MAX_COMMAND_CHARACTERS = 1 << 20
# The parser of literals needs memory and stack for each: a fraction of what JSON may have.
MAX_LITERAL_CHARACTERS = 64 << 10
MAX_LITERAL_BRACKETS = 200
DEFAULT_HOURS = 1

# GR-6: only `running` is named there; these are what its clients know, in lower case.
STATUSES = {
    State.AWAITING_PAYMENT: "pending",
    State.QUEUED: "pending",
    State.RUNNING: "running",
    State.SUCCEEDED: "completed",
    State.FAILED: "failed",
    State.CANCELLED: "aborted",
    State.EXPIRED: "aborted",
}


@dataclass(frozen=True, slots=True)
class GridJob:
    """One checked submission: each model is asked each of the inputs."""

    models: tuple[str, ...]
    inputs: tuple[str, ...]
    run_limit_s: int


def read_job(body: dict[str, Any], *, most_s: int) -> GridJob:
    """Check a submission. Raises BadRequest."""
    if body.get("app", APP) != APP:
        raise BadRequest(f"the only app here is {APP}", param="app")
    tag: Any = body.get("tag")
    tags: list[Any] = tag if isinstance(tag, list) else [tag]
    named = all(isinstance(name, str) and name for name in tags)
    if not named or not 1 <= len(set(tags)) == len(tags) <= MAX_MODELS:
        raise BadRequest(
            f"tag must be the name of a model, or a list of 1 to {MAX_MODELS} that differ",
            param="tag",
        )
    return GridJob(tuple(tags), read_inputs(body.get("commandLine")), _seconds(body, most_s))


def _seconds(body: dict[str, Any], most_s: int) -> int:
    hours = body.get("hours")
    if hours is None:
        hours = DEFAULT_HOURS
    if isinstance(hours, str):
        try:
            hours = float(hours)
        except ValueError:
            hours = None
    if isinstance(hours, bool) or not isinstance(hours, int | float) or math.isnan(hours):
        raise BadRequest("hours must be a number", param="hours")
    # As hours: of a number that is too large there may be no seconds.
    if not 0 < hours <= most_s / 3600:
        raise BadRequest(f"hours must be above 0 and at most {most_s / 3600:g}", param="hours")
    return math.ceil(hours * 3600)


def read_inputs(command_line: Any) -> tuple[str, ...]:
    """The prompts of a command line (GR-2). Raises BadRequest."""
    wrong = BadRequest(
        "Invalid input format: commandLine must be a text such as"
        ' {"inputs": ["When does 1+1=10?"]}',
        param="commandLine",
    )
    if not isinstance(command_line, str) or len(command_line) > MAX_COMMAND_CHARACTERS:
        raise wrong
    command = _parsed(command_line)
    if not isinstance(command, dict):
        raise wrong
    inputs = command.get("inputs", command.get("input"))
    inputs = [inputs] if isinstance(inputs, str) else inputs
    if not isinstance(inputs, list | tuple) or not inputs:
        raise wrong
    if not all(isinstance(text, str) and text.strip() for text in inputs):
        raise wrong
    return tuple(inputs)


def _parsed(text: str) -> Any:
    """The value that a text spells, in JSON or else as a Python literal; None for neither."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    brackets = sum(text.count(bracket) for bracket in "([{")
    if len(text) > MAX_LITERAL_CHARACTERS or brackets > MAX_LITERAL_BRACKETS:
        return None
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def show_job(row: Any, *, log: str, position: int | None, now: datetime) -> dict[str, Any]:
    """One job of a status (GR-5). `log` is what has been said so far."""
    status = STATUSES[State(row["state"])]
    outcome = outcome_of(row)
    if outcome is not None:
        log = answer_text(outcome)
    state: dict[str, Any] = {
        "status": status,
        "outputFiles": [],
        "log": log,
        "commandLine": _command_line(row["spec"]),
        "app": APP,
    }
    if position is not None:
        state["position"] = position
    if outcome is not None and outcome.state is not State.SUCCEEDED:
        state["error"] = explain(outcome)
    if outcome is not None and outcome.wiped:
        state["wiped"] = True
    return {
        "vmStatus": status,
        "states": {"default": state},
        "created": row["created_at"].astimezone(UTC).isoformat(timespec="seconds"),
        "copy": row["index"],
        "tag": row["model"],
        "runtime": _runtime_s(row, now),
    }


def _command_line(spec: str | None) -> str:
    if spec is None:
        return ""
    prompt = json.loads(spec)["messages"][0]["content"]
    return json.dumps({"inputs": [prompt]}, ensure_ascii=False)


def _runtime_s(row: Any, now: datetime) -> int:
    if row["started_at"] is None:
        return 0
    return max(0, int(((row["ended_at"] or now) - row["started_at"]).total_seconds()))
