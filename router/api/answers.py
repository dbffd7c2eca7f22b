"""Answers in JSON, and the reading of bodies; shared by all doors."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import orjson
from fastapi import Request, Response
from starlette.requests import ClientDisconnect

from router.api.errors import Problem, problem_of
from router.core import Core
from router.errors import BadRequest

log = logging.getLogger(__name__)

NO_STORE = {"Cache-Control": "no-store"}
# The parser takes four times as much, but what is made of a request is nested a little deeper than the
# request, and no writer of JSON may fail at it later.
MOST_NESTED = 200
_WRITERS_MOST = 254


def core_of(request: Request) -> Core:
    return request.app.state.core


def answer(
    body: Any,
    *,
    status: int = 200,
    headers: dict[str, str] | None = None,
    challenges: Sequence[str] = (),
) -> Response:
    """A JSON answer; private ones are not to be cached. `challenges`: how it can be paid for, each
    in a WWW-Authenticate header of its own, in this order."""
    response = Response(
        orjson.dumps(body),
        status_code=status,
        headers={**NO_STORE, **(headers or {})},
        media_type="application/json",
    )
    for challenge in challenges:
        response.headers.append("WWW-Authenticate", challenge)
    return response


async def read_json(request: Request) -> Any:
    """The body as JSON. Raises BadRequest: broken, or not JSON at all."""
    raw = await request.body()
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is not valid JSON: {error.msg} at {error.pos}") from None
    if raw.count(b"[") + raw.count(b"{") > MOST_NESTED and _is_deep(value):
        raise BadRequest(f"the body is nested more than {MOST_NESTED} deep")
    return value


def _is_deep(value: Any) -> bool:
    """Whether a value is nested deeper than MOST_NESTED, by what JSON's writer says of it."""
    for _ in range(_WRITERS_MOST - MOST_NESTED):
        value = [value]
    try:
        orjson.dumps(value)
    except orjson.JSONEncodeError:
        return True
    return False


async def read_object(request: Request) -> dict[str, Any]:
    """The body as a JSON object; an empty body is an empty object."""
    if not await request.body():
        return {}
    body = await read_json(request)
    if not isinstance(body, dict):
        raise BadRequest("the body must be a JSON object")
    return body


def problem_answer(problem: Problem) -> Response:
    """An error in the shape of our own doors."""
    return answer(problem.as_json(), status=problem.status, headers=problem.headers)


def noted(error: Exception, request: Request) -> Problem:
    """The problem of an error, with what nobody expected written to the log."""
    if isinstance(error, ClientDisconnect):
        return Problem("bad_request", "the connection ended before the body did", {})
    problem = problem_of(error)
    if problem.code == "internal_error":
        # The path of the route: in a real one there may be an id that opens a job.
        path = getattr(request.scope.get("route"), "path", None) or request.url.path
        log.error("a request failed method=%s path=%s", request.method, path, exc_info=error)
    return problem
