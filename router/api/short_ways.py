"""Short ways between a connection and what handles it, past tasks, queues and layers of `send`.

A token that takes them wakes no task, which would cost more than the token itself. What serves the
router may offer these ways in a scope's `extensions`; where it does not, `receive` and `send` will do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from starlette.types import Scope

LINE = "satherd.client_line"
FRAMES = "satherd.frame_source"

FrameHandler = Callable[[str], None]


class ClientLine(Protocol):
    """The connection of a request; what is said of parts of a body is so once its answer has begun."""

    def ready(self) -> bool:
        """Whether it takes a part of a body now: the client reads, and is there."""
        ...

    def write(self, body: bytes) -> None:
        """Send a part of the body, after all that went through `send`. Only when `ready`."""
        ...

    def on_gone(self, told: Callable[[], None] | None) -> None:
        """Have somebody told that the client has gone before the end of the answer; None: nobody."""
        ...


class FrameSource(Protocol):
    """A WebSocket that gives its text frames to a handler as it reads them.

    Frames that came before are received as usual, and first. What a handler raises ends this: it is
    received as an empty frame, and `check` raises it.
    """

    def hand_to(self, handler: FrameHandler | None) -> None: ...

    def check(self) -> None: ...


def client_line(scope: Scope) -> ClientLine | None:
    """What the server of a request offers, if anything."""
    return (scope.get("extensions") or {}).get(LINE)


def frame_source(scope: Scope) -> FrameSource | None:
    """What the server of a WebSocket offers, if anything."""
    return (scope.get("extensions") or {}).get(FRAMES)
