"""Unknown paths, wrong methods and bodies over the limit, in the dialect of the door that the path
belongs to.

These are refused before any door sees them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import Request, Response
from starlette.exceptions import HTTPException

from router.api import gridrepublic, herder, horde_errors, kobold, openai_shapes
from router.api.answers import answer
from router.api.decentralgpt_shapes import envelope
from router.api.errors import Problem

_CODES = {404: "not_found", 405: "method_not_allowed"}
# Where a door begins, and how it says an error.
_DIALECTS: tuple[tuple[str, Callable[[Problem], Any]], ...] = (
    ("/v1", openai_shapes.error_body),
    ("/api/v0", envelope),
    ("/api/v2", horde_errors.error_body),
    ("/generate", kobold.error_body),
    ("/servers", kobold.error_body),
    ("/usage", kobold.error_body),
    ("/contributions", kobold.error_body),
    ("/models", kobold.error_body),
    ("/remotejobs", gridrepublic.error_body),
    ("/herder", herder.error_body),
)


def in_dialect(path: str, problem: Problem) -> Any:
    """An error as the door of a path says it."""
    within = f"{path}/"
    say = next((say for door, say in _DIALECTS if within.startswith(f"{door}/")), Problem.as_json)
    return say(problem)


def no_such_door(request: Request, error: Exception) -> Response:
    """The answer, with the status and the headers (`Allow`) that the framework gives it."""
    assert isinstance(error, HTTPException)
    problem = Problem(_CODES.get(error.status_code, "bad_request"), str(error.detail), {})
    headers = {**problem.headers, **(error.headers or {})}
    body = in_dialect(request.url.path, problem)
    return answer(body, status=error.status_code, headers=headers)
