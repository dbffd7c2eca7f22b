"""Server-sent events: their wire form, and an answer that streams them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable
from typing import Any

import orjson
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from router.api.leaving import ClientGone, UnlessGone

HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


def event(name: str, data: Any, event_id: int | str | None = None) -> bytes:
    """One named event with JSON data."""
    head = f"event: {name}\n" if event_id is None else f"id: {event_id}\nevent: {name}\n"
    return head.encode() + b"data: " + orjson.dumps(data) + b"\n\n"


def data(body: Any) -> bytes:
    """One unnamed event with JSON data."""
    return b"data: " + orjson.dumps(body) + b"\n\n"


def comment(text: str) -> bytes:
    """Something that keeps the line open and that clients skip."""
    return f": {text}\n\n".encode()


class Last(bytes):
    """The last chunk of a stream: it goes out together with the end."""


class EventStream(StreamingResponse):
    """An answer that streams events. `on_gone` is called when the client leaves before the end.

    Sent from the task of the request: what Starlette starts for each stream costs as much as pricing
    a job does.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        *,
        headers: dict[str, str] | None = None,
        on_gone: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(
            events, media_type="text/event-stream", headers={**HEADERS, **(headers or {})}
        )
        self._events = events
        self._on_gone = on_gone

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(ClientGone), UnlessGone(scope, receive):
            await self._send_all(send)

    async def _send_all(self, send: Send) -> None:
        finished = False
        try:
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
            async for chunk in self._events:
                finished = type(chunk) is Last
                await send({"type": "http.response.body", "body": chunk, "more_body": not finished})
            if not finished:
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            finished = True
        finally:
            if not finished and self._on_gone is not None:
                self._on_gone()
            await self._events.aclose()
