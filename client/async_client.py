"""The asynchronous client.

    async with AsyncClient("http://127.0.0.1:8000", key="sk-…") as client:
        print((await client.run("Why is the sky blue?", max_tokens=64)).text)

Callbacks for events are plain functions; the wallet may be either kind, and one that blocks is
called in a thread of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any, Self

import httpx

from client.answers import Balance, Completion, Info, Job, Purchase, Quote, TopUp
from client.async_driver import AsyncDriver
from client.core import Ask, Core, Multiplier, Prompt, Watched, listener
from client.credentials import ApiKey, Credential
from client.events import Event, Paid, Position, Text
from client.exchange import Answer, Flow, Patience, Request
from client.purchase import DEFAULT_MAX_FEE_MSAT
from client.transport import DEFAULT_TIMEOUT_S, Outcome
from client.wallet import Wallet


class AsyncPromptStream:
    """A prompt under way: iterate for its events, or `text()` for the first job's words alone.

    `completion` is there once the events have been read to their end. Leaving early leaves the jobs
    running, to be fetched with `purchase.credential`; `cancel()` ends them.
    """

    def __init__(self, client: AsyncClient, flow: Flow[Completion]) -> None:
        self._client = client
        self._outcome: Outcome[Completion] = Outcome()
        self._events = client.driver.iterate(flow, self._outcome)
        self.watched = Watched()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        event = await anext(self._events)
        self.watched.take(event)
        return event

    async def text(self) -> AsyncGenerator[str, None]:
        """The pieces of the first job's answer, as they come."""
        async for event in self:
            if isinstance(event, Text) and event.job_id == self.watched.job_ids[0]:
                yield event.text

    @property
    def completion(self) -> Completion:
        """Raises RuntimeError before the end."""
        return self._outcome.get()

    @property
    def purchase(self) -> Purchase | None:
        """What was bought; None before it is paid."""
        return self.watched.purchase

    async def cancel(self) -> list[Job]:
        """Cancel the jobs that have not ended: what they made is charged, the rest refunded."""
        purchase = self.watched.purchase
        if purchase is None:
            return []
        paid_with = purchase.credential
        return [await self._client.cancel(job_id, paid_with) for job_id in self.watched.open()]

    async def close(self) -> None:
        await self._events.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class AsyncClient:
    """A paying client of one router. Give a prepaid key (or other credential), or a wallet.

    Errors are those of `client.errors`, and whatever the wallet raises. Amounts are msat.
    """

    def __init__(
        self,
        router_url: str,
        *,
        key: str | Credential | None = None,
        wallet: Wallet | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        patience: Patience | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._http = httpx.AsyncClient(base_url=router_url, transport=transport)
        self._core = Core(key, has_wallet=wallet is not None, patience=patience or Patience())
        self.driver = AsyncDriver(self._http, wallet, timeout_s=timeout_s, sleep=sleep)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    # --- prices ---------------------------------------------------------------------------------

    async def info(self) -> Info:
        return await self.driver.run(self._core.info())

    async def models(self) -> list[Mapping[str, Any]]:
        """The router's models, in OpenAI's shape."""
        return await self.driver.run(self._core.models())

    async def quote(self, prompt: Prompt = None, **options: Any) -> Quote:
        """A price; nothing is owed. Options as for `run`."""
        return await self.driver.run(self._core.quote(Ask.of(prompt, options)))

    # --- prompts --------------------------------------------------------------------------------

    async def run(
        self,
        prompt: Prompt = None,
        *,
        on_event: Callable[[Event], None] | None = None,
        on_position: Callable[[Position], None] | None = None,
        **options: Any,
    ) -> Completion:
        """Quote, pay, wait and return the answer.

        `options`: model, models, fee_multiplier, times_auto, offer_msat, max_fee_msat, max_wait_s,
        and any field of OpenAI's requests (see `Ask`).
        """
        flow = self._core.complete(Ask.of(prompt, options))
        return await self.driver.run(flow, listener(on_event, on_position))

    def stream(self, prompt: Prompt = None, **options: Any) -> AsyncPromptStream:
        """As `run`, event by event. Nothing is asked or paid before the first one is taken."""
        return AsyncPromptStream(self, self._core.complete(Ask.of(prompt, options)))

    def resume(self, purchase: Purchase, *, last_event_id: str = "") -> AsyncPromptStream:
        """Follow a purchase again, in another process too: its quote and credential suffice."""
        stream = AsyncPromptStream(self, self._core.resume(purchase, last_event_id))
        stream.watched.take(Paid(purchase))
        return stream

    async def request(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        max_fee_msat: int | None = DEFAULT_MAX_FEE_MSAT,
    ) -> Answer:
        """Any request to any door of the router; a 402 is paid by the wallet, and repeated."""
        request = Request(method, path, body, headers or {})
        answer, _ = await self.driver.run(self._core.request(request, max_fee_msat))
        return answer

    # --- jobs -----------------------------------------------------------------------------------

    async def submit(self, prompt: Prompt = None, **options: Any) -> Purchase:
        """Buy without waiting; `purchase.jobs` have ids and tokens. Options as for `run`."""
        return await self.driver.run(self._core.submit(Ask.of(prompt, options)))

    async def job(self, job_id: str, credential: Credential | None = None) -> Job:
        return await self.driver.run(self._core.job(job_id, credential))

    async def follow(
        self,
        job_id: str,
        credential: Credential | None = None,
        *,
        last_event_id: str = "",
        on_event: Callable[[Event], None] | None = None,
    ) -> Job:
        """Wait for a job's end over its event stream, and return it whatever that end is."""
        flow = self._core.follow_job(job_id, credential, last_event_id)
        return await self.driver.run(flow, on_event)

    async def cancel(self, job_id: str, credential: Credential | None = None) -> Job:
        return await self.driver.run(self._core.cancel(job_id, credential))

    async def bump(
        self,
        job_id: str,
        credential: Credential | None = None,
        *,
        offer_msat: int | None = None,
        fee_multiplier: Multiplier | None = None,
        max_fee_msat: int | None = DEFAULT_MAX_FEE_MSAT,
    ) -> Job:
        """Raise a waiting job's offer to a new total, never a lower one."""
        flow = self._core.bump(
            job_id,
            credential,
            offer_msat=offer_msat,
            fee_multiplier=fee_multiplier,
            max_fee_msat=max_fee_msat,
        )
        return await self.driver.run(flow)

    # --- the account ----------------------------------------------------------------------------

    async def balance(self, credential: Credential | None = None) -> Balance:
        return await self.driver.run(self._core.balance(credential))

    async def top_up(self, amount_msat: int) -> TopUp:
        """Pay into the client's own key, or into a new account whose key comes back."""
        return await self.driver.run(self._core.top_up(amount_msat))

    async def rotate(self, payment_hash: str, credential: Credential | None = None) -> ApiKey:
        """A new key for the account of a top-up, shown this once; the old one is dead."""
        return await self.driver.run(self._core.rotate(payment_hash, credential))

    async def keys(self, credential: Credential | None = None) -> list[Mapping[str, Any]]:
        return await self.driver.run(self._core.keys(credential))

    async def create_key(
        self,
        credential: Credential | None = None,
        *,
        limit_msat: int | None = None,
        withdraw: bool = False,
    ) -> ApiKey:
        return await self.driver.run(self._core.create_key(credential, limit_msat, withdraw))

    async def delete_key(self, key_id: str, credential: Credential | None = None) -> None:
        await self.driver.run(self._core.delete_key(key_id, credential))

    async def withdraw(
        self,
        credential: Credential | None = None,
        *,
        invoice: str | None = None,
        address: str | None = None,
        amount_msat: int | None = None,
    ) -> Mapping[str, Any]:
        """Pay out to an invoice, or an amount (None: all) to a Lightning address."""
        flow = self._core.withdraw(credential, invoice, address, amount_msat)
        return await self.driver.run(flow)

    async def withdrawal(
        self, withdrawal_id: str, credential: Credential | None = None
    ) -> Mapping[str, Any]:
        return await self.driver.run(self._core.withdrawal(withdrawal_id, credential))
