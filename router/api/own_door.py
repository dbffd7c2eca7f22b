"""What the small doors of our own share: errors in one shape, checked fields, who is asking."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from billing.errors import BadCredential
from router.api import payment
from router.api.answers import noted, problem_answer
from router.api.payment import Payer
from router.core import Core
from router.errors import BadRequest, NoSuchThing, Unauthorized
from router.rate_limits import KEY_FAILURES_PER_MINUTE

# Guessing one of these is what the throttle is against; the other reasons are honest mistakes.
_GUESSES = frozenset({"unknown", "forged", "wrong_preimage", "malformed"})
PAGE_DEFAULT, PAGE_MAX = 50, 500


class OwnDoorRoute(APIRoute):
    """A route whose errors, whatever they are, are answered in the shape of our own doors."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                # PostgreSQL has no such character in its texts, so nothing can be named so.
                if any("\0" in str(value) for value in request.path_params.values()):
                    raise NoSuchThing("there is no such thing")
                return await handler(request)
            except HTTPException:
                raise
            except Exception as error:
                return problem_answer(noted(error, request))

        return handle


async def identify(core: Core, request: Request, capability: str) -> Payer | None:
    """`payment.identify` for something that is not a job; wrong secrets are counted.

    Raises BadCredential, TooManyRequests.
    """
    try:
        return await payment.identify(core, request, payment.facts(core, capability))
    except BadCredential as error:
        if error.reason in _GUESSES:
            core.limiter.failed(request, "key", KEY_FAILURES_PER_MINUTE)
        raise


async def owner(core: Core, request: Request, capability: str) -> Payer:
    """Whose account it is. Raises Unauthorized without a credential, and what `identify` raises."""
    payer = await identify(core, request, capability)
    if payer is None:
        raise Unauthorized(
            "send `Authorization: Bearer sk-…`, the L402 credential of a payment, or its claim"
            " token as X-Claim-Token"
        )
    return payer


def only(body: dict[str, Any], *names: str) -> None:
    """Raises BadRequest for a field that nobody would read: it is probably misspelt."""
    for name in body:
        if name not in names:
            raise BadRequest(
                f"there is no field {name!r} here; there are: {', '.join(names) or 'none'}",
                param=name,
            )


def whole_number(
    body: dict[str, Any], name: str, *, low: int, high: int, needed: bool = True
) -> int | None:
    """A whole number within bounds; None when it is absent and not needed. Raises BadRequest."""
    value = body.get(name)
    if value is None and not needed:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise BadRequest(f"{name} must be a whole number from {low} to {high}", param=name)
    return value


def short_text(body: dict[str, Any], name: str, *, most: int) -> str | None:
    """A text of at most `most` characters, None when absent or empty. Raises BadRequest."""
    value = body.get(name)
    if value is None or value == "":
        return None
    if not isinstance(value, str) or len(value) > most or "\0" in value:
        raise BadRequest(f"{name} must be a text of at most {most} characters", param=name)
    return value


def flag(body: dict[str, Any], name: str) -> bool:
    """True or false; false when absent. Raises BadRequest."""
    value = body.get(name, False)
    if not isinstance(value, bool):
        raise BadRequest(f"{name} must be true or false", param=name)
    return value


def page_size(request: Request) -> int:
    """`?limit=`, at most 500. Raises BadRequest."""
    text = request.query_params.get("limit", str(PAGE_DEFAULT))
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:6]) <= PAGE_MAX:
        raise BadRequest(f"limit must be a whole number from 1 to {PAGE_MAX}", param="limit")
    return int(text)


def query_text(request: Request, name: str, *, most: int = 200) -> str | None:
    """`?name=`, None when absent or empty. Raises BadRequest."""
    return short_text(dict(request.query_params), name, most=most)
