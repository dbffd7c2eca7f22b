"""Talking to a router without I/O: a flow is a generator that yields what it wants done.

    Send(request)   -> Answer          one request, the whole answer
    Open(request)   -> Answer          a stream; the body is empty when the status is 200
    Read()          -> bytes           the next piece of the open stream, b"" at its end
    Close()         -> None            the open stream is no longer wanted
    Pay(invoice, …) -> str | None      the wallet's preimage in hex; None from wallets that hide it
    Wait(seconds)   -> None
    Emit(event)     -> None            something for the caller to see

`client.sync_driver` and `client.async_driver` carry flows out with httpx. A request that got no
answer is `ConnectionLost`, thrown into the flow, which decides whether to try again.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from client.errors import RouterRefused, UnexpectedAnswer, Unreachable, refusal

T = TypeVar("T")

LONGEST_RETRY_AFTER_S = 30.0
# Facts about workers and operators, which a caller wants to know now, whatever Retry-After says.
LASTING = frozenset({"no_worker", "max_wait", "paused"})


class ConnectionLost(Exception):
    """No answer, or half of one. What the router has done is not known."""


@dataclass(frozen=True, slots=True)
class Request:
    """`read_timeout_s` is for the next bytes, not for the whole answer; None: the client's own."""

    method: str
    path: str
    body: Mapping[str, Any] | None = field(default=None, repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    read_timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """`headers` have lower-case names; `challenges` are the `WWW-Authenticate` values in order."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    body: bytes = field(default=b"", repr=False)
    challenges: tuple[str, ...] = field(default=(), repr=False)

    def json(self) -> dict[str, Any]:
        """The body as an object. Raises UnexpectedAnswer when it is anything else."""
        value = self._json_or_none()
        if not isinstance(value, dict):
            raise UnexpectedAnswer("the answer is not a JSON object", status=self.status)
        return value

    def refusal(self) -> RouterRefused:
        """The error that a status of 400 and above stands for."""
        return refusal(self.status, self._json_or_none(), retry_after_s=self.retry_after_s)

    def error_code(self) -> str | None:
        """The `code` that the router gave with an error; None when there is none."""
        body = self._json_or_none()
        error = body.get("error") if isinstance(body, dict) else None
        code = error.get("code") if isinstance(error, dict) else None
        return code if isinstance(code, str) else None

    @property
    def retry_after_s(self) -> float | None:
        value = self.headers.get("retry-after", "")
        return float(value) if value.isascii() and value.isdigit() else None

    def _json_or_none(self) -> Any:
        try:
            return json.loads(self.body)
        except ValueError:
            return None


@dataclass(frozen=True, slots=True)
class Send:
    request: Request


@dataclass(frozen=True, slots=True)
class Open:
    request: Request


@dataclass(frozen=True, slots=True)
class Read:
    pass


@dataclass(frozen=True, slots=True)
class Close:
    pass


@dataclass(frozen=True, slots=True)
class Pay:
    invoice: str
    amount_msat: int


@dataclass(frozen=True, slots=True)
class Wait:
    seconds: float


@dataclass(frozen=True, slots=True)
class Emit:
    event: Any


Effect = Send | Open | Read | Close | Pay | Wait | Emit
Flow = Generator[Effect, Any, T]


class Credentialed(Protocol):
    """Whatever has headers that open an account."""

    def headers(self) -> dict[str, str]: ...


@dataclass(frozen=True, slots=True)
class Patience:
    """How often and how long to try again. `jitter` gives numbers from 0 to 1.

    `attempts` counts failures in a row: an event that comes through starts the count again.
    """

    attempts: int = 8
    first_s: float = 0.25
    longest_s: float = 8.0
    jitter: Callable[[], float] = random.random

    def delay_s(self, failures: int) -> float:
        """The wait after so many failures in a row (1, 2, …): doubled each time, half random."""
        whole = min(self.longest_s, self.first_s * 2 ** (failures - 1))
        return whole * (0.5 + 0.5 * self.jitter())


def send(request: Request, *, patience: Patience, repeatable: bool) -> Flow[Answer]:
    """The answer with any status, after trying again where that is safe and promising.

    `repeatable`: doing it twice is doing it once. A request that is not is repeated only when the
    router says that it was not looked at (429). Raises Unreachable when no answer came.
    """
    failures = 0
    while True:
        answer: Answer | None = None
        lost = ""
        try:
            answer = yield Send(request)
        except ConnectionLost as error:
            if not repeatable:
                raise Unreachable(f"the connection was lost: {error}") from error
            lost = str(error)
        failures += 1
        if answer is not None and (
            not is_worth_repeating(answer, repeatable=repeatable) or failures >= patience.attempts
        ):
            return answer
        if failures >= patience.attempts:
            raise Unreachable(f"no answer after {failures} attempts: {lost}")
        yield Wait(max(patience.delay_s(failures), _asked_wait_s(answer)))


def ask(request: Request, *, patience: Patience, repeatable: bool = True) -> Flow[dict[str, Any]]:
    """The answer's JSON object; RouterRefused for any status of 400 and above."""
    answer = yield from send(request, patience=patience, repeatable=repeatable)
    if answer.status >= 400:
        raise answer.refusal()
    return answer.json() if answer.body else {}


def is_worth_repeating(answer: Answer, *, repeatable: bool) -> bool:
    """Whether the same request may soon be answered otherwise, and repeating it does no harm."""
    asked_s = answer.retry_after_s
    soon = asked_s is not None and asked_s <= LONGEST_RETRY_AFTER_S
    if answer.status == 429:
        return soon
    if answer.status == 503:
        return repeatable and soon and answer.error_code() not in LASTING
    # With a code it is the router that speaks, and not a proxy in front of it.
    return repeatable and answer.status in (502, 504) and answer.error_code() is None


def _asked_wait_s(answer: Answer | None) -> float:
    return (answer.retry_after_s or 0.0) if answer is not None else 0.0


def must(value: Mapping[str, Any], name: str, kind: type[T]) -> T:
    """A field that the contract promises. Raises UnexpectedAnswer when it is missing or wrong."""
    found = value.get(name)
    if not isinstance(found, kind) or (kind is int and isinstance(found, bool)):
        raise UnexpectedAnswer(f"the answer lacks `{name}`")
    return found
