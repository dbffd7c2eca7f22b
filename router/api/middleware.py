"""What every request passes: CORS, the limit of bodies, the drain of a router that shuts down.

Plain ASGI: it runs for every request and every streamed token goes through `send`, so nothing is
wrapped that need not be.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import orjson

from router.api.errors import Problem

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Any, Receive, Send], Awaitable[None]]

_METHODS = b"GET, POST, PUT, DELETE, OPTIONS, PATCH"
_EXPOSED = (
    b"WWW-Authenticate, Payment-Receipt, Retry-After, X-Satherd-Job, X-Satherd-Fee-Msat,"
    b" X-Satherd-Refund-Msat, X-Satherd-Worker, X-Satherd-Position, X-Reason, X-Needed"
)
_ALLOWED = (
    b"Authorization, Content-Type, Accept, Accept-Authenticate, Idempotency-Key, Last-Event-ID,"
    b" X-Claim-Token, X-Fee-Multiplier, X-Max-Fee-Msat, X-Max-Wait-S, apikey, Client-Agent"
)


# Where a paid request's receipt waits for its answer.
RECEIPT = "satherd.payment_receipt"


# How much of a body that is too large is read, to no end but a clear answer.
DISCARD_BYTES = 64 << 20
DISCARD_S = 10.0


class PaymentReceipt:
    """A good answer to a request that was paid by the `Payment` scheme carries its receipt (AP-2).

    Whoever reads the credential leaves the receipt in the request's scope.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not any(
            name == b"authorization" and b"payment " in value.lower()
            for name, value in scope["headers"]
        ):
            await self._app(scope, receive, send)
            return

        async def send_with_receipt(message: Message) -> None:
            receipt = scope.get(RECEIPT)
            if message["type"] == "http.response.start" and receipt and message["status"] < 300:
                headers = [*message["headers"], (b"payment-receipt", receipt.encode())]
                message = {**message, "headers": headers}
            await send(message)

        await self._app(scope, receive, send_with_receipt)


class Cors:
    """Any origin may call (QB-R1, KC-11, KL-9), except on the operator's own paths."""

    def __init__(self, app: App, *, closed: tuple[str, ...] = ("/admin",)) -> None:
        self._app = app
        self._closed = closed

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(self._closed):
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        origin = headers.get(b"origin")
        if origin is None:
            await self._app(scope, receive, send)
            return
        # With credentials the wildcard is not allowed, so the origin is given back to itself.
        allow = [
            (b"access-control-allow-origin", origin),
            (b"access-control-allow-credentials", b"true"),
            (b"vary", b"Origin"),
        ]
        if scope["method"] == "OPTIONS" and b"access-control-request-method" in headers:
            asked = headers.get(b"access-control-request-headers", b"")
            await send(
                {
                    "type": "http.response.start",
                    "status": 204,
                    "headers": [
                        *allow,
                        (b"access-control-allow-methods", _METHODS),
                        (b"access-control-allow-headers", asked or _ALLOWED),
                        (b"access-control-max-age", b"86400"),
                    ],
                }
            )
            await send({"type": "http.response.body", "body": b""})
            return

        async def send_with_origin(message: Message) -> None:
            if message["type"] == "http.response.start":
                exposed = (b"access-control-expose-headers", _EXPOSED)
                message["headers"] = [*message["headers"], *allow, exposed]
            await send(message)

        await self._app(scope, receive, send_with_origin)


class BodyLimit:
    """413 for bodies over the limit, whether they say their length or not.

    `body_of` says it as the door of a path does.
    """

    def __init__(
        self,
        app: App,
        *,
        max_bytes: int,
        body_of: Callable[[str, Problem], Any] = lambda path, problem: problem.as_json(),
    ) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._body_of = body_of

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._max_bytes:
            await _discard(receive)
            await self._refuse(scope["path"], send)
            return
        if b"transfer-encoding" not in headers:
            # The server reads no more than was said, and tokens are sent without a detour.
            await self._app(scope, receive, send)
            return
        seen = 0
        refused = False
        unread = True

        async def limited() -> Message:
            nonlocal seen, refused, unread
            message = await receive()
            unread = bool(message.get("more_body"))
            if message["type"] == "http.request":
                seen += len(message.get("body", b""))
                if seen > self._max_bytes:
                    refused = True
                    return {"type": "http.disconnect"}
            return message

        async def guarded(message: Message) -> None:
            if not refused:
                await send(message)

        try:
            await self._app(scope, limited, guarded)
        finally:
            if refused:
                if unread:
                    await _discard(receive)
                await self._refuse(scope["path"], send)

    async def _refuse(self, path: str, send: Send) -> None:
        problem = Problem(
            "body_too_large",
            f"the body is over {self._max_bytes} bytes",
            {"max_bytes": self._max_bytes},
        )
        body = orjson.dumps(self._body_of(path, problem))
        await send(
            {
                "type": "http.response.start",
                "status": problem.status,
                "headers": [
                    (b"content-type", b"application/json"),
                    (b"content-length", str(len(body)).encode()),
                    (b"connection", b"close"),
                ],
            }
        )
        await send({"type": "http.response.body", "body": body})


async def _discard(receive: Receive) -> None:
    """Read the rest of a body, within reason: a connection that is closed with something unread is
    reset, and takes the answer with it."""
    left = DISCARD_BYTES
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_S):
            while left > 0:
                message = await receive()
                left -= len(message.get("body", b""))
                if not message.get("more_body"):
                    return
