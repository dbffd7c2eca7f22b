"""The synchronous client.

with Client("http://127.0.0.1:8000", wallet=SimulatedWallet("http://127.0.0.1:8000")) as client:
    print(client.run("Why is the sky blue?", max_tokens=64).text)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping
from typing import Any, Self

import httpx

from client.answers import Balance, Completion, Info, Job, Purchase, Quote, TopUp
from client.core import Ask, Core, Multiplier, Prompt, Watched, listener
from client.credentials import ApiKey, Credential
from client.events import Event, Paid, Position, Text
from client.exchange import Answer, Flow, Patience, Request
from client.purchase import DEFAULT_MAX_FEE_MSAT
from client.sync_driver import Driver
from client.transport import DEFAULT_TIMEOUT_S, Outcome, is_async_callable
from client.wallet import SyncWallet


class PromptStream:
    """A prompt under way: iterate for its events, or `text()` for the first job's words alone.

    `completion` is there once the events have been read to their end. Leaving early leaves the jobs
    running, to be fetched with `purchase.credential`; `cancel()` ends them.
    """

    def __init__(self, client: Client, flow: Flow[Completion]) -> None:
        self._client = client
        self._outcome: Outcome[Completion] = Outcome()
        self._events = client.driver.iterate(flow, self._outcome)
        self.watched = Watched()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        event = next(self._events)
        self.watched.take(event)
        return event

    def text(self) -> Generator[str, None, None]:
        """The pieces of the first job's answer, as they come."""
        for event in self:
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

    def cancel(self) -> list[Job]:
        """Cancel the jobs that have not ended: what they made is charged, the rest refunded."""
        purchase = self.watched.purchase
        if purchase is None:
            return []
        return [self._client.cancel(job_id, purchase.credential) for job_id in self.watched.open()]

    def close(self) -> None:
        self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Client:
    """A paying client of one router. Give a prepaid key (or other credential), or a wallet.

    Errors are those of `client.errors`, and whatever the wallet raises. Amounts are msat.
    """

    def __init__(
        self,
        router_url: str,
        *,
        key: str | Credential | None = None,
        wallet: SyncWallet | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        patience: Patience | None = None,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if wallet is not None and is_async_callable(wallet):
            raise TypeError("an async wallet needs the AsyncClient")
        self._http = httpx.Client(base_url=router_url, transport=transport)
        self._core = Core(key, has_wallet=wallet is not None, patience=patience or Patience())
        self.driver = Driver(self._http, wallet, timeout_s=timeout_s, sleep=sleep)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    # --- prices ---------------------------------------------------------------------------------

    def info(self) -> Info:
        return self.driver.run(self._core.info())

    def models(self) -> list[Mapping[str, Any]]:
        """The router's models, in OpenAI's shape."""
        return self.driver.run(self._core.models())

    def quote(self, prompt: Prompt = None, **options: Any) -> Quote:
        """A price; nothing is owed. Options as for `run`."""
        return self.driver.run(self._core.quote(Ask.of(prompt, options)))

    # --- prompts --------------------------------------------------------------------------------

    def run(
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
        return self.driver.run(flow, listener(on_event, on_position))

    def stream(self, prompt: Prompt = None, **options: Any) -> PromptStream:
        """As `run`, event by event. Nothing is asked or paid before the first one is taken."""
        return PromptStream(self, self._core.complete(Ask.of(prompt, options)))

    def resume(self, purchase: Purchase, *, last_event_id: str = "") -> PromptStream:
        """Follow a purchase again, in another process too: its quote and credential suffice."""
        stream = PromptStream(self, self._core.resume(purchase, last_event_id))
        stream.watched.take(Paid(purchase))
        return stream

    def request(
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
        answer, _ = self.driver.run(self._core.request(request, max_fee_msat))
        return answer

    # --- jobs -----------------------------------------------------------------------------------

    def submit(self, prompt: Prompt = None, **options: Any) -> Purchase:
        """Buy without waiting; `purchase.jobs` have ids and tokens. Options as for `run`."""
        return self.driver.run(self._core.submit(Ask.of(prompt, options)))

    def job(self, job_id: str, credential: Credential | None = None) -> Job:
        return self.driver.run(self._core.job(job_id, credential))

    def follow(
        self,
        job_id: str,
        credential: Credential | None = None,
        *,
        last_event_id: str = "",
        on_event: Callable[[Event], None] | None = None,
    ) -> Job:
        """Wait for a job's end over its event stream, and return it whatever that end is."""
        flow = self._core.follow_job(job_id, credential, last_event_id)
        return self.driver.run(flow, on_event)

    def cancel(self, job_id: str, credential: Credential | None = None) -> Job:
        return self.driver.run(self._core.cancel(job_id, credential))

    def bump(
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
        return self.driver.run(flow)

    # --- the account ----------------------------------------------------------------------------

    def balance(self, credential: Credential | None = None) -> Balance:
        return self.driver.run(self._core.balance(credential))

    def top_up(self, amount_msat: int) -> TopUp:
        """Pay into the client's own key, or into a new account whose key comes back."""
        return self.driver.run(self._core.top_up(amount_msat))

    def rotate(self, payment_hash: str, credential: Credential | None = None) -> ApiKey:
        """A new key for the account of a top-up, shown this once; the old one is dead."""
        return self.driver.run(self._core.rotate(payment_hash, credential))

    def keys(self, credential: Credential | None = None) -> list[Mapping[str, Any]]:
        return self.driver.run(self._core.keys(credential))

    def create_key(
        self,
        credential: Credential | None = None,
        *,
        limit_msat: int | None = None,
        withdraw: bool = False,
    ) -> ApiKey:
        return self.driver.run(self._core.create_key(credential, limit_msat, withdraw))

    def delete_key(self, key_id: str, credential: Credential | None = None) -> None:
        self.driver.run(self._core.delete_key(key_id, credential))

    def withdraw(
        self,
        credential: Credential | None = None,
        *,
        invoice: str | None = None,
        address: str | None = None,
        amount_msat: int | None = None,
    ) -> Mapping[str, Any]:
        """Pay out to an invoice, or an amount (None: all) to a Lightning address."""
        flow = self._core.withdraw(credential, invoice, address, amount_msat)
        return self.driver.run(flow)

    def withdrawal(
        self, withdrawal_id: str, credential: Credential | None = None
    ) -> Mapping[str, Any]:
        return self.driver.run(self._core.withdrawal(withdrawal_id, credential))
