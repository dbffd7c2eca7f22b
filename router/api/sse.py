"""Server-sent events: their wire form, and an answer that streams them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import orjson
from starlette.responses import StreamingResponse

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


class EventStream(StreamingResponse):
    """An answer that streams events. `on_gone` is called when the client leaves before the end."""

    def __init__(
        self,
        events: AsyncIterator[bytes],
        *,
        headers: dict[str, str] | None = None,
        on_gone: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(
            _watched(events, on_gone),
            media_type="text/event-stream",
            headers={**HEADERS, **(headers or {})},
        )


async def _watched(
    events: AsyncIterator[bytes], on_gone: Callable[[], None] | None
) -> AsyncIterator[bytes]:
    finished = False
    try:
        async for chunk in events:
            yield chunk
        finished = True
    finally:
        if not finished and on_gone is not None:
            on_gone()
