"""Writing a part of a streamed body straight to the client's connection.

A token that passes through `send` wakes a task, which passes its word down through the layers around
the application: more than the token itself costs. What serves the router may offer the connection
under EXTENSION in a request's `scope["extensions"]`; where it does not, `send` does as well.
"""

from __future__ import annotations

from typing import Protocol

from starlette.types import Scope

EXTENSION = "satherd.direct_write"


class DirectWrite(Protocol):
    """The connection of a request whose answer has begun."""

    def ready(self) -> bool:
        """Whether it takes a part of a body now: the client reads, and is there."""
        ...

    def write(self, body: bytes) -> None:
        """Send a part of the body, after all that went through `send`. Only when `ready`."""
        ...


def of(scope: Scope) -> DirectWrite | None:
    """What the server of a request offers, if anything."""
    return (scope.get("extensions") or {}).get(EXTENSION)
