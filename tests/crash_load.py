"""Clients for crash tests: they buy in every way there is, repeat what broke as a good client does,
and note what they were told. `tests.crash_checks` holds the notes against the books.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import httpx

from tests.follower import Follower, Refused

MODEL = "echo"
PURSE = "purse"
REPEAT_S = 0.2
HTTP_S = 20.0
# Whoever follows a job that ended so long ago, and was not told, waits for ever.
UNTOLD_S = 10.0


class GaveUp(Exception):
    """The time to repeat a request is over; what became of it is for the checks to find out."""


@dataclass(slots=True)
class Notes:
    """What clients were told. Texts by job, credentials and keys by what they named."""

    answers: dict[str, str] = field(default_factory=dict)
    streams_done: dict[str, str] = field(default_factory=dict)
    once: dict[str, set[str]] = field(default_factory=dict)
    credentials: list[Credential] = field(default_factory=list)
    withdrawals: dict[str, str] = field(default_factory=dict)
    keys: list[str] = field(default_factory=list)
    owners: list[dict[str, str]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    happened: Counter[str] = field(default_factory=Counter)

    def found(self, what: str) -> None:
        """Something that must not be. The same again is not repeated."""
        if what not in self.wrong:
            self.wrong.append(what)

    def answer(self, job_id: str, text: str) -> None:
        """A whole answer; told twice it must be the same."""
        before = self.answers.setdefault(job_id, text)
        if before != text:
            self.found(f"job {job_id} was answered twice, and not alike")


@dataclass(slots=True)
class Credential:
    """A paid invoice and the request that it was for."""

    payment_hash: str
    headers: dict[str, str]
    body: dict[str, Any]
    job_id: str | None = None
    ended: str | None = None


class Clients:
    """All clients of one run. What they do is drawn from `draw`, so that a seed repeats it."""

    def __init__(self, urls: Sequence[str], network_url: str, draw: random.Random) -> None:
        self.notes = Notes()
        self.patience_s = 30.0
        self._draw = draw
        limits = httpx.Limits(max_connections=200, max_keepalive_connections=0)
        self._routers = [
            httpx.AsyncClient(base_url=url, timeout=HTTP_S, trust_env=False, limits=limits)
            for url in urls
        ]
        self._network = httpx.AsyncClient(base_url=network_url, timeout=HTTP_S, trust_env=False)
        self._stopping = False

    @property
    def _http(self) -> httpx.AsyncClient:
        """A client of whichever router: each request goes to another, as behind a load balancer."""
        return self._draw.choice(self._routers)

    def _another(self, http: httpx.AsyncClient) -> httpx.AsyncClient:
        """A client of any router but this one's, if there is another."""
        return self._draw.choice([each for each in self._routers if each is not http] or [http])

    async def aclose(self) -> None:
        for router in self._routers:
            await router.aclose()
        await self._network.aclose()

    async def open_accounts(self, count: int) -> None:
        """Buy prepaid keys to spend from."""
        made = await self._network.post(f"/v1/wallets/{PURSE}/fund", json={"amount_msat": 1000})
        made.raise_for_status()
        for _ in range(count):
            await self._top_up(2_000_000)

    def stop(self) -> None:
        """Begin nothing new; what is under way is brought to its end."""
        self._stopping = True

    async def shop(self) -> None:
        """One errand after the other, until `stop`."""
        errands: list[tuple[Callable[[], Awaitable[None]], int]] = [
            (self._prepaid, 3),
            (self._prepaid_once, 4),
            (self._pay_per_request, 5),
            (self._queue_bump_cancel, 2),
            (self._withdraw, 2),
            (self._walk_away, 1),
            (self._stored_quote, 2),
            (self._follow, 4),
        ]
        while not self._stopping:
            errand = self._draw.choices([e for e, _ in errands], [w for _, w in errands])[0]
            try:
                await errand()
            except (httpx.HTTPError, GaveUp) as error:
                self.notes.happened[f"{errand.__name__}: {type(error).__name__}"] += 1
            else:
                self.notes.happened[errand.__name__] += 1

    # --- errands --------------------------------------------------------------------------------

    async def _prepaid(self) -> None:
        """No Idempotency-Key: never repeated, and nothing is lost but the answer."""
        body = self._body(stream=self._draw.random() < 0.7)
        await self._ask(body, self._bearer())

    async def _prepaid_once(self) -> None:
        """With an Idempotency-Key, often on two connections at once, repeated until it is done."""
        body = self._body(stream=self._draw.random() < 0.5)
        name = f"once-{self._draw.getrandbits(64):x}"
        headers = self._bearer() | {"Idempotency-Key": name}
        copies = 2 if self._draw.random() < 0.4 else 1
        asked = await asyncio.gather(
            *(self._repeat(lambda: self._ask(body, headers)) for _ in range(copies)),
            return_exceptions=True,
        )
        for job in asked:
            if isinstance(job, str):
                self.notes.once.setdefault(name, set()).add(job)
            elif isinstance(job, Exception) and not isinstance(job, GaveUp):
                raise job

    async def _pay_per_request(self) -> None:
        body = self._body(stream=self._draw.random() < 0.5)
        challenge = await self._http.post("/v1/chat/completions", json=body)
        if challenge.status_code != 402:
            return
        due = challenge.json()
        preimage = await self._repeat(lambda: self._pay(due["invoice"], due["payment_hash"]))
        headers = {"Authorization": f"L402 {due['l402_token']}:{preimage}"}
        credential = Credential(due["payment_hash"], headers, body)
        self.notes.credentials.append(credential)
        await self.use(credential)

    async def use(self, credential: Credential) -> None:
        """Repeat a paid request until it is answered, or refunded for good."""
        job = await self._repeat(lambda: self._ask(credential.body, credential.headers))
        if job is not None:
            if credential.job_id not in (None, job):
                self.notes.found(f"one credential, two jobs: {credential.job_id}, {job}")
            credential.job_id = job
            credential.ended = "answered" if job in self.notes.answers else "refunded"
        else:
            credential.ended = "credited"

    async def _queue_bump_cancel(self) -> None:
        headers = self._bearer() | {"Idempotency-Key": f"jobs-{self._draw.getrandbits(64):x}"}
        body = self._body() | {"kind": "chat"}

        job = await self._repeat(lambda: self._submit(body, headers))
        token = {"Authorization": f"Bearer {job['token']}"}
        if self._draw.random() < 0.7:
            multiplier = str(1 + self._draw.randrange(1, 3000) / 1000)
            with suppress(httpx.HTTPError):
                await self._http.post(
                    f"{job['status_url']}/bump", json={"fee_multiplier": multiplier}, headers=token
                )
        if self._draw.random() < 0.5:
            with suppress(httpx.HTTPError):
                await self._http.delete(job["status_url"], headers=token)

    async def _submit(self, body: dict[str, Any], headers: dict[str, str]) -> dict[str, Any]:
        made = await self._http.post("/jobs", json=body, headers=headers)
        self._again_unless(made, 202)
        return made.json()["jobs"][0]

    async def _withdraw(self) -> None:
        made = await self._network.post(
            f"/v1/wallets/{PURSE}/create_invoice",
            json={
                "amount_msat": 1000 * self._draw.randrange(10, 30),
                "description": "my change",
                "expiry_s": 600,
            },
        )
        made.raise_for_status()
        invoice = made.json()
        # A key may not withdraw unless it was made to: the top-up's own credential may.
        headers = self._draw.choice(self.notes.owners)
        copies = 2 if self._draw.random() < 0.5 else 1

        async def order() -> str:
            answer = await self._http.post(
                "/balance/withdrawals", json={"invoice": invoice["bolt11"]}, headers=headers
            )
            self._again_unless(answer, 202)
            return answer.json()["id"]

        ids = await asyncio.gather(
            *(self._repeat(order) for _ in range(copies)), return_exceptions=True
        )
        for found in ids:
            if isinstance(found, str):
                before = self.notes.withdrawals.setdefault(invoice["payment_hash"], found)
                if before != found:
                    self.notes.found("one invoice, two withdrawals")

    async def _walk_away(self) -> None:
        """A client that closes its connection in the middle."""
        body = self._body(stream=True) | {"max_tokens": 60}
        with suppress(TimeoutError):
            async with asyncio.timeout(self._draw.random()):
                await self._ask(body, self._bearer())

    async def _stored_quote(self) -> None:
        """Quote, then start it from a key, repeating the start."""
        body = self._body() | {"kind": "chat", "n": self._draw.randrange(1, 4)}
        made = await self._http.post("/quotes", json=body)
        if made.status_code != 201:
            return
        headers = self._bearer()
        quote_id = made.json()["quote_id"]

        async def start() -> None:
            begun = await self._http.post("/jobs", json={"quote_id": quote_id}, headers=headers)
            self._again_unless(begun, 202)
            jobs = begun.json()["jobs"]
            if len(jobs) != body["n"]:
                self.notes.found(f"quote {quote_id} has {len(jobs)} jobs, not {body['n']}")

        await self._repeat(start)

    async def _follow(self) -> None:
        """Read a job's events; go on at another router when cut off, and at times for no reason."""
        headers = self._bearer() | {"Idempotency-Key": f"follow-{self._draw.getrandbits(64):x}"}
        body = self._body() | {"kind": "chat", "max_tokens": self._draw.randrange(20, 120)}
        link = await self._repeat(lambda: self._submit(body, headers))
        follower = Follower(link, {"Authorization": f"Bearer {link['token']}"})
        http = self._http
        try:
            async with asyncio.timeout(2 * self.patience_s):
                while follower.done is None:
                    http = self._another(http)
                    more = self._draw.choice((None, self._draw.randrange(1, 200)))
                    at_least = None if more is None else len(follower.text) + more
                    if not await self._read_on(follower, http, at_least):
                        await asyncio.sleep(REPEAT_S)
        except TimeoutError:
            await self._look_whether_ended(link)
            raise GaveUp from None
        self._note_followed(link["id"], follower)

    async def _read_on(
        self, follower: Follower, http: httpx.AsyncClient, at_least: int | None
    ) -> bool:
        """Whether there was anything new to read."""
        before = follower.last_id
        try:
            await follower.read(http, at_least=at_least)
        except Refused as refused:
            if refused.status not in (200, 503):
                self.notes.found(f"the events of a job were refused: {refused}")
        return follower.last_id != before

    def _note_followed(self, job_id: str, follower: Follower) -> None:
        done = follower.done or {}
        if done["state"] == "succeeded":
            self.notes.answer(job_id, follower.text)
            self.notes.happened["followed to the end"] += 1
        elif done.get("result"):
            # What was shown in a router's last moments may be more than it has kept.
            kept = done["result"]["choices"][0]["message"]["content"]
            if not (kept.startswith(follower.text) or follower.text.startswith(kept)):
                self.notes.found(f"job {job_id}: kept {kept!r}, shown {follower.text!r}")

    async def _look_whether_ended(self, link: dict[str, Any]) -> None:
        """Of a job that was followed in vain: if it ended a while ago, its reader was never told."""
        token = {"Authorization": f"Bearer {link['token']}"}

        async def look() -> str | None:
            shown = await self._http.get(link["status_url"], headers=token)
            self._again_unless(shown, 200)
            return shown.json().get("ended_at")

        ended_at = await self._repeat(look)
        if ended_at is None:
            return
        ago = datetime.now(UTC) - datetime.fromisoformat(ended_at)
        if ago.total_seconds() > UNTOLD_S:
            self.notes.found(f"job {link['id']} ended at {ended_at}, and its reader was not told")

    # --- asking ---------------------------------------------------------------------------------

    def _bearer(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._draw.choice(self.notes.keys)}"}

    def _body(self, *, stream: bool = False) -> dict[str, Any]:
        words = " ".join(f"w{self._draw.randrange(1000)}" for _ in range(8))
        return {
            "model": MODEL,
            "messages": [{"role": "user", "content": words}],
            "max_tokens": self._draw.randrange(1, 40),
            "stream": stream,
        }

    async def _ask(self, body: dict[str, Any], headers: dict[str, str]) -> str | None:
        """The id of the job that answered, or ended refunded; None: the money is on the account.

        Raises httpx.HTTPError for what may be repeated.
        """
        if not body["stream"]:
            reply = await self._http.post("/v1/chat/completions", json=body, headers=headers)
            return self._whole(reply)
        async with self._http.stream(
            "POST", "/v1/chat/completions", json=body, headers=headers
        ) as reply:
            if reply.status_code != 200:
                await reply.aread()
                return self._whole(reply)
            return await self._read_stream(reply)

    def _whole(self, reply: httpx.Response) -> str | None:
        job = reply.headers.get("x-satherd-job")
        if reply.status_code == 200:
            self.notes.answer(job, reply.json()["choices"][0]["message"]["content"])
            return job
        if job is not None:
            return job
        if reply.status_code == 402:
            return None
        self._again_unless(reply, 200)
        return None

    async def _read_stream(self, reply: httpx.Response) -> str:
        job = reply.headers["x-satherd-job"]
        said = []
        async for line in reply.aiter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                text = "".join(said)
                self.notes.answer(job, text)
                self.notes.streams_done[job] = text
                return job
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                return job
            for choice in chunk["choices"]:
                said.append(choice["delta"].get("content") or "")
        raise httpx.ReadError("the stream ended without a word")

    def _again_unless(self, reply: httpx.Response, *good: int) -> None:
        """Only what says that it will pass may be repeated; anything else is a finding."""
        if reply.status_code in good:
            return
        if reply.status_code >= 500 or reply.status_code == 401:
            # 401: the router has not heard of the payment yet.
            if reply.status_code == 500:
                self.notes.found(f"{reply.request.url.path}: 500 {reply.text[:300]}")
            raise httpx.HTTPStatusError("again", request=reply.request, response=reply)
        if reply.status_code not in (402, 404, 409):
            self.notes.found(f"{reply.request.url.path}: {reply.status_code} {reply.text[:300]}")
        raise GaveUp

    async def _repeat(self, work: Callable[[], Awaitable[Any]]) -> Any:
        until = time.monotonic() + self.patience_s
        while True:
            try:
                return await work()
            except httpx.HTTPError:
                if time.monotonic() > until:
                    raise GaveUp from None
                await asyncio.sleep(REPEAT_S)

    # --- money ----------------------------------------------------------------------------------

    async def _pay(self, invoice: str, payment_hash: str) -> str:
        """Pay at the network itself; a wallet that lost the answer looks its payment up."""
        looked = await self._network.post(
            "/v1/wallets/payer/lookup_payment", json={"payment_hash": payment_hash}
        )
        if looked.status_code == 200 and looked.json().get("preimage"):
            return looked.json()["preimage"]
        paid = await self._network.post("/v1/pay", json={"invoice": invoice})
        paid.raise_for_status()
        if not paid.json().get("preimage"):
            raise httpx.ReadError("not paid yet")
        return paid.json()["preimage"]

    async def _top_up(self, amount_msat: int) -> None:
        made = (await self._http.post("/balance/topups", json={"amount_msat": amount_msat})).json()
        preimage = await self._pay(made["invoice"], made["payment_hash"])
        headers = {"Authorization": f"L402 {made['l402_token']}:{preimage}"}
        shown = await self._http.get(f"/balance/topups/{made['payment_hash']}", headers=headers)
        assert shown.status_code == 200, shown.text
        self.notes.keys.append(shown.json()["key"])
        self.notes.owners.append(headers)
