"""Between our requests and httpx, for both drivers."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import httpx

from client.exchange import Answer, Request

T = TypeVar("T")

USER_AGENT = "satherd-client"
DEFAULT_TIMEOUT_S = 30.0


@dataclass(slots=True)
class Outcome(Generic[T]):
    """Where a driver leaves what a flow returned; `done` False: it has not come so far."""

    value: T | None = None
    done: bool = False

    def set(self, value: T) -> None:
        self.value = value
        self.done = True

    def get(self) -> T:
        """Raises RuntimeError before the end."""
        if not self.done:
            raise RuntimeError("the events have not been read to their end")
        return self.value  # type: ignore[return-value]


def http_arguments(request: Request, timeout_s: float) -> dict[str, Any]:
    """Arguments for httpx's `build_request`."""
    read_s = request.read_timeout_s or timeout_s
    return {
        "method": request.method,
        "url": request.path,
        "json": None if request.body is None else dict(request.body),
        # No compression: a compressed event stream arrives in lumps.
        "headers": {"User-Agent": USER_AGENT, "Accept-Encoding": "identity", **request.headers},
        "timeout": httpx.Timeout(timeout_s, read=read_s),
    }


def answer_of(response: httpx.Response, body: bytes) -> Answer:
    return Answer(
        status=response.status_code,
        headers={name.lower(): value for name, value in response.headers.items()},
        body=body,
        challenges=tuple(response.headers.get_list("www-authenticate")),
    )


def is_async_callable(function: object) -> bool:
    """Whether calling it gives something to await: a coroutine function, or an object with one."""
    call = getattr(function, "__call__", None)  # noqa: B004 - whether its call is async, not whether it has one
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)
