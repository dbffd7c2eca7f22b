"""Carries out flows with httpx, for the synchronous client."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import Any, TypeVar

import httpx

from client.errors import NoWallet
from client.events import Event
from client.exchange import (
    Answer,
    Close,
    ConnectionLost,
    Emit,
    Flow,
    Open,
    Pay,
    Read,
    Request,
    Send,
    Wait,
)
from client.transport import Outcome, answer_of, http_arguments
from client.wallet import SyncWallet

T = TypeVar("T")


class Driver:
    """Carries out flows with httpx. Calls may run in parallel."""

    def __init__(
        self,
        http: httpx.Client,
        wallet: SyncWallet | None,
        *,
        timeout_s: float,
        sleep: Callable[[float], None],
    ) -> None:
        self._http = http
        self._wallet = wallet
        self._timeout_s = timeout_s
        self._sleep = sleep

    def run(self, flow: Flow[T], on_event: Callable[[Event], None] | None = None) -> T:
        outcome: Outcome[T] = Outcome()
        with closing(self.iterate(flow, outcome)) as events:
            for event in events:
                if on_event is not None:
                    on_event(event)
        return outcome.get()

    def iterate(self, flow: Flow[T], outcome: Outcome[T]) -> Generator[Event, None, None]:
        """The events of a flow; its result is in `outcome` at the end."""
        line = _Line(self._http, self._timeout_s)
        given: Any = None
        lost: ConnectionLost | None = None
        try:
            while True:
                try:
                    effect = flow.send(given) if lost is None else flow.throw(lost)
                except StopIteration as stop:
                    outcome.set(stop.value)
                    return
                given, lost = None, None
                match effect:
                    case Emit(event):
                        yield event
                    case Wait(seconds):
                        self._sleep(seconds)
                    case Pay(invoice, amount_msat):
                        given = self._pay(invoice, amount_msat)
                    case Send() | Open() | Read() | Close():
                        try:
                            given = line.carry_out(effect)
                        except httpx.TransportError as error:
                            line.close()
                            lost = ConnectionLost(str(error) or type(error).__name__)
        finally:
            flow.close()
            line.close()

    def _pay(self, invoice: str, amount_msat: int) -> str | None:
        if self._wallet is None:
            raise NoWallet("no wallet was given that could pay the invoice")
        return self._wallet(invoice, amount_msat)


class _Line:
    """Requests, and at most one open stream."""

    def __init__(self, http: httpx.Client, timeout_s: float) -> None:
        self._http = http
        self._timeout_s = timeout_s
        self._response: httpx.Response | None = None
        self._pieces: Iterator[bytes] = iter(())

    def carry_out(self, effect: Send | Open | Read | Close) -> Answer | bytes | None:
        match effect:
            case Send(request):
                response = self._http.request(**http_arguments(request, self._timeout_s))
                return answer_of(response, response.content)
            case Open(request):
                return self._open(request)
            case Read():
                return next(self._pieces, b"")
            case Close():
                self.close()
                return None

    def close(self) -> None:
        if self._response is not None:
            self._response.close()
        self._response, self._pieces = None, iter(())

    def _open(self, request: Request) -> Answer:
        self.close()
        built = self._http.build_request(**http_arguments(request, self._timeout_s))
        response = self._http.send(built, stream=True)
        if response.status_code != 200:
            try:
                return answer_of(response, response.read())
            finally:
                response.close()
        self._response, self._pieces = response, response.iter_bytes()
        return answer_of(response, b"")
