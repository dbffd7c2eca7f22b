"""The way of a request for an answer: straight to its handler.

Nearly all requests are for an answer, and their handlers take the bare request and catch whatever
goes wrong; routing, dependencies and exit stacks of the framework would do nothing for them, at the
price of a sixth of a paid job. The routes stay in the framework, too: for the API's description, and
for whatever asks with another method.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

Handler = Callable[[Request], Awaitable[Response]]


class Shortcut:
    """Plain ASGI: a POST to one of `handlers` by its exact path; everything else goes on."""

    def __init__(self, app: ASGIApp, *, handlers: Mapping[str, Handler]) -> None:
        self._app = app
        self._handlers = handlers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            handler = self._handlers.get(scope["path"])
            if handler is not None:
                response = await handler(Request(scope, receive, send))
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)
