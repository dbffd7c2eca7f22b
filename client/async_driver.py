"""Carries out flows with httpx, for the asynchronous client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar, cast

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
from client.transport import Outcome, answer_of, http_arguments, is_async_callable
from client.wallet import AsyncWallet, SyncWallet, Wallet

T = TypeVar("T")


class AsyncDriver:
    """Carries out flows with httpx. Calls may run in parallel."""

    def __init__(
        self,
        http: httpx.AsyncClient,
        wallet: Wallet | None,
        *,
        timeout_s: float,
        sleep: Callable[[float], Awaitable[None]],
    ) -> None:
        self._http = http
        self._wallet = wallet
        self._timeout_s = timeout_s
        self._sleep = sleep

    async def run(self, flow: Flow[T], on_event: Callable[[Event], None] | None = None) -> T:
        outcome: Outcome[T] = Outcome()
        async with aclosing(self.iterate(flow, outcome)) as events:
            async for event in events:
                if on_event is not None:
                    on_event(event)
        return outcome.get()

    async def iterate(self, flow: Flow[T], outcome: Outcome[T]) -> AsyncGenerator[Event, None]:
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
                        await self._sleep(seconds)
                    case Pay(invoice, amount_msat):
                        given = await self._pay(invoice, amount_msat)
                    case Send() | Open() | Read() | Close():
                        try:
                            given = await line.carry_out(effect)
                        except httpx.TransportError as error:
                            await line.close()
                            lost = ConnectionLost(str(error) or type(error).__name__)
        finally:
            flow.close()
            await line.close()

    async def _pay(self, invoice: str, amount_msat: int) -> str | None:
        if self._wallet is None:
            raise NoWallet("no wallet was given that could pay the invoice")
        if is_async_callable(self._wallet):
            return await cast("AsyncWallet", self._wallet)(invoice, amount_msat)
        return await asyncio.to_thread(cast("SyncWallet", self._wallet), invoice, amount_msat)


class _Line:
    """Requests, and at most one open stream."""

    def __init__(self, http: httpx.AsyncClient, timeout_s: float) -> None:
        self._http = http
        self._timeout_s = timeout_s
        self._response: httpx.Response | None = None
        self._pieces: AsyncIterator[bytes] = _nothing()

    async def carry_out(self, effect: Send | Open | Read | Close) -> Answer | bytes | None:
        match effect:
            case Send(request):
                response = await self._http.request(**http_arguments(request, self._timeout_s))
                return answer_of(response, response.content)
            case Open(request):
                return await self._open(request)
            case Read():
                return await anext(self._pieces, b"")
            case Close():
                await self.close()
                return None

    async def close(self) -> None:
        if self._response is not None:
            await self._response.aclose()
        self._response, self._pieces = None, _nothing()

    async def _open(self, request: Request) -> Answer:
        await self.close()
        built = self._http.build_request(**http_arguments(request, self._timeout_s))
        response = await self._http.send(built, stream=True)
        if response.status_code != 200:
            try:
                return answer_of(response, await response.aread())
            finally:
                await response.aclose()
        self._response, self._pieces = response, response.aiter_bytes()
        return answer_of(response, b"")


async def _nothing() -> AsyncIterator[bytes]:
    for piece in ():
        yield piece
