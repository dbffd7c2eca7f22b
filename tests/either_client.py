"""Fixtures for tests that put both clients through the same scenes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from client import AsyncClient, Client, Patience, SimulatedWallet
from tests.contract_server import KEY, WORDS, ContractServer, running_server

PROMPT = "Why is the sky blue?"
ANSWER = "".join(WORDS)
OFFER_MSAT = 1000 + 10  # 5 prompt tokens and 15 more, at the server's rates
PATIENCE = Patience(attempts=4, first_s=0.01, longest_s=0.02)


@pytest.fixture(name="server")
def server_fixture() -> Iterator[ContractServer]:
    with running_server() as contract:
        yield contract


@dataclass
class CountingWallet:
    """The server's simulated wallet, and what it was asked to pay."""

    url: str
    paid: list[tuple[str, int]] = field(default_factory=list)

    def __call__(self, bolt11: str, amount_msat: int) -> str:
        self.paid.append((bolt11, amount_msat))
        return SimulatedWallet(self.url)(bolt11, amount_msat)


@dataclass
class Either:
    """One of the two clients, with methods to await."""

    client: Client | AsyncClient
    wallet: CountingWallet

    async def do(self, method: str, *args: Any, **options: Any) -> Any:
        call = getattr(self.client, method)
        if isinstance(self.client, Client):
            return await asyncio.to_thread(call, *args, **options)
        return await call(*args, **options)

    async def events(self, *args: Any, **options: Any) -> tuple[list[Any], Any]:
        """The events of a stream, and the stream."""
        stream: Any = self.client.stream(*args, **options)
        if isinstance(self.client, Client):
            return await asyncio.to_thread(list, stream), stream
        return [event async for event in stream], stream


@pytest.fixture(name="either", params=["sync", "async"])
async def either_fixture(
    request: pytest.FixtureRequest, server: ContractServer
) -> AsyncIterator[Either]:
    wallet = CountingWallet(server.url)
    kind = Client if request.param == "sync" else AsyncClient
    async with opened(kind(server.url, wallet=wallet, patience=PATIENCE)) as client:
        yield Either(client, wallet)


@pytest.fixture(name="keyed", params=["sync", "async"])
async def keyed_fixture(
    request: pytest.FixtureRequest, server: ContractServer
) -> AsyncIterator[Either]:
    kind = Client if request.param == "sync" else AsyncClient
    async with opened(kind(server.url, key=KEY, patience=PATIENCE)) as client:
        yield Either(client, CountingWallet(server.url))


class opened:
    """`async with` for both kinds of client."""

    def __init__(self, client: Client | AsyncClient) -> None:
        self.client = client

    async def __aenter__(self) -> Client | AsyncClient:
        return self.client

    async def __aexit__(self, *_: object) -> None:
        if isinstance(self.client, Client):
            self.client.close()
        else:
            await self.client.close()
