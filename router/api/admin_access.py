"""Who may use `/admin/*`: the holder of the admin token."""

from __future__ import annotations

import hmac

from fastapi import APIRouter, Depends, Request

from router.api.answers import core_of
from router.api.own_door import OwnDoorRoute
from router.errors import NoSuchThing, Unauthorized
from router.rate_limits import ADMIN_FAILURES_PER_MINUTE

REASON_MAX = 500


async def require_admin(request: Request) -> None:
    """Lets the admin through. Raises Unauthorized, TooManyRequests, NoSuchThing.

    The token is compared in constant time, and wrong ones are counted for each address.
    """
    core = core_of(request)
    token = core.settings.admin_token.get_secret_value()
    if not token:
        raise NoSuchThing("the admin API is off; set SATHERD_ADMIN_TOKEN to turn it on")
    scheme, _, presented = request.headers.get("authorization", "").partition(" ")
    right = hmac.compare_digest(presented.strip().encode(), token.encode())
    if scheme.lower() != "bearer" or not right:
        core.limiter.failed(request, "admin", ADMIN_FAILURES_PER_MINUTE)
        raise Unauthorized("send the admin token as `Authorization: Bearer …`")


def admin_router() -> APIRouter:
    """A router whose every route wants the admin token."""
    return APIRouter(
        prefix="/admin",
        tags=["admin"],
        route_class=OwnDoorRoute,
        dependencies=[Depends(require_admin)],
    )
