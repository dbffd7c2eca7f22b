"""Unknown paths and wrong methods, in the dialect of the door that the path belongs to.

The web framework refuses these before any door sees them.
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


def no_such_door(request: Request, error: Exception) -> Response:
    """The answer, with the status and the headers (`Allow`) that the framework gives it."""
    assert isinstance(error, HTTPException)
    problem = Problem(_CODES.get(error.status_code, "bad_request"), str(error.detail), {})
    path = request.url.path + "/"
    in_dialect = next(
        (say for door, say in _DIALECTS if path.startswith(f"{door}/")), Problem.as_json
    )
    headers = {**problem.headers, **(error.headers or {})}
    return answer(in_dialect(problem), status=error.status_code, headers=headers)
