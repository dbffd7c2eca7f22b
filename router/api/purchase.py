"""Buying jobs: from a request to jobs in the queue, whatever the door and the means of payment."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from fastapi import Request

from billing import fees, ledger
from billing.accounts import Key
from billing.errors import BadCredential
from billing.fees import Rates, format_multiplier
from billing.l402 import BUY_AGAIN
from router import requests
from router.api import payment
from router.api.payment import Offer, Payer
from router.core import Core
from router.errors import BadRequest, Draining, NotEnoughBalance, Paused, QueueFull
from router.job_records import NewJob, NewQuote
from router.job_views import time_text
from router.market import ROUGHLY_S
from router.requests import Terms
from worker.protocol import TEXT_KINDS, Kind

CAPABILITIES = {
    Kind.CHAT: "chat",
    Kind.COMPLETION: "completions",
    Kind.EMBEDDING: "embeddings",
    Kind.IMAGE: "images",
    Kind.IMAGE_EDIT: "images",
}
_IDEMPOTENCY_KEY_MAX = 255
_TERMS = {
    b"x-fee-multiplier": "multiplier",
    b"x-max-fee-msat": "max_fee_msat",
    b"x-max-wait-s": "max_wait_s",
}
# Not in the middle of a word: by chance these letters stand in many a credential in base64.
_KEY = re.compile(r"(?:^|\s)sk-")


class PaymentRequired(Exception):
    """The request is to be paid for: a quote, and an invoice for it."""

    def __init__(self, quote: NewQuote, offer: Offer) -> None:
        super().__init__("payment required")
        self.quote = quote
        self.offer = offer


@dataclass(frozen=True, slots=True)
class Style:
    """What differs between doors in how they sell.

    `apikey`: clients may bring a key in that header. `polls`: they come back for the answer, so that
    a job goes on without them, and from a prepaid key one is taken that no worker can do yet (AH-4).
    `attached`: clients wait for the answer, and a prepaid one that goes away takes its jobs along.
    """

    apikey: bool = False
    polls: bool = False
    attached: bool = False


AT_ONCE = Style()


@dataclass(frozen=True, slots=True)
class Purchase:
    """Jobs that were bought. `cancel_when_gone`: a client that goes away takes its jobs with it."""

    quote_id: str
    job_ids: tuple[str, ...]
    payer: Payer
    cancel_when_gone: bool


def parse(core: Core, request: Request, kind: Kind, body: Any) -> requests.Request:
    """A checked request with the terms of its headers."""
    wanted = requests.parse(kind, body, core.limits, terms(core, request))
    return requests.renamed(wanted, lambda model: core.models.name_of(kind, model))


def terms(core: Core, request: Request) -> Terms:
    """What the headers say about money and time. Raises BadRequest."""
    said: dict[str, str] = {}
    for name, value in request.headers.raw:
        if name in _TERMS:
            said.setdefault(_TERMS[name], value.decode("latin-1"))
    return requests.terms_from(**said, limits=core.limits)


async def buy(
    core: Core, request: Request, wanted: requests.Request, style: Style = AT_ONCE
) -> Purchase:
    """Pay for a request and queue its jobs, or find those it had bought before.

    Raises PaymentRequired with a fresh invoice, BadCredential for credentials that paying does not
    mend, and what pricing and submitting raise. Nothing is charged for any of them.
    """
    about = payment.facts(
        core,
        CAPABILITIES[wanted.kind],
        models=frozenset(model for item in wanted.items for model in item.models),
        max_tokens=wanted.max_tokens,
        request_sha256=wanted.request_hash.hex(),
    )
    try:
        payer = await payment.identify(core, request, about, apikey=style.apikey)
    except BadCredential as error:
        if error.reason not in BUY_AGAIN or request.headers.get("x-claim-token"):
            raise
        if brings_key(request, style):
            raise
        payer = None
    if payer is None:
        await refuse_when_closed(core)
        raise await _challenge(core, request, wanted)
    once = _once(request, wanted, payer)
    before = await _bought_before(core, wanted, payer, once)
    if before is not None:
        return before
    await refuse_when_closed(core)
    return await _from_balance(core, request, wanted, payer, once, style)


def brings_key(request: Request, style: Style = AT_ONCE) -> bool:
    """Whether a request comes with a prepaid key, good or not."""
    if style.apikey and request.headers.get("apikey", "") not in ("", payment.ANONYMOUS):
        return True
    return any(_KEY.search(value) for value in request.headers.getlist("authorization"))


async def refuse_when_closed(core: Core) -> None:
    """Raises Paused, Draining, QueueFull: no new work is taken."""
    if core.draining:
        raise Draining("this router is shutting down; try again in a moment")
    if core.runtime.paused is not None:
        raise Paused(core.runtime.paused or "the operator has paused new work")
    await core.market.refresh(max_age_s=ROUGHLY_S)
    if core.market.queue_length >= core.settings.max_queue:
        raise QueueFull("the queue is full; try again later")


async def _bought_before(
    core: Core, wanted: requests.Request, payer: Payer, once: tuple[str, str] | None
) -> Purchase | None:
    """The jobs that were bought by this very request, with this credential or Idempotency-Key.

    Looked for before anything that could refuse a new purchase: what is bought may be fetched though
    the router is paused, the price has changed, or no worker is there.
    """
    if payer.payment_hash is not None:
        quote = await core.quotes.by_payment_hash(payer.payment_hash)
        if quote and quote.state == "paid" and quote.request_hash == wanted.request_hash:
            return await _purchase(core, quote.id, payer, cancel_when_gone=False)
    quote_id = await core.jobs.submitted(once, wanted.request_hash) if once else None
    if quote_id is None:
        return None
    return await _purchase(core, quote_id, payer, cancel_when_gone=False)


async def _from_balance(
    core: Core,
    request: Request,
    wanted: requests.Request,
    payer: Payer,
    once: tuple[str, str] | None,
    style: Style,
) -> Purchase:
    gone = once is None and _leaves_with_client(request, payer, style)
    budget = None
    if wanted.max_tokens is None and wanted.kind in TEXT_KINDS:
        budget = await _budget_msat(core, payer)
    anyhow = style.polls and payer.key is not None
    quote = await core.quotes.price(wanted, budget_msat=budget, anyhow=anyhow)
    try:
        submitted = await core.jobs.submit(
            quote,
            account_id=payer.account_id,
            key_id=payer.limited_key_id,
            once=once,
            attached_to=core.router_id if gone else None,
        )
    except NotEnoughBalance as error:
        if payer.key is None:
            raise await _challenge(core, request, wanted, account_id=payer.account_id) from None
        raise _with_affordable(error, wanted.kind, quote, payer) from None
    if submitted.repeated:
        return await _purchase(core, submitted.quote_id, payer, cancel_when_gone=gone)
    return Purchase(quote.id, tuple(job.id for job in quote.jobs), payer, gone)


def _leaves_with_client(request: Request, payer: Payer, style: Style) -> bool:
    """Whether a client that goes takes its jobs along (§3.5), if it cannot come back for them."""
    return payer.key is not None and (style.attached or request.scope["path"].startswith("/v1/"))


def _once(request: Request, wanted: requests.Request, payer: Payer) -> tuple[str, str] | None:
    if payer.payment_hash is not None:
        return f"l402:{payer.payment_hash}", wanted.request_hash.hex()
    named = idempotency_key(request)
    return (payer.account_id, named) if named else None


def idempotency_key(request: Request) -> str | None:
    """What makes repeating a request safe; None: nothing, as where it is empty. Raises BadRequest for
    one that is too long: if they were cut, two of them might be the same."""
    named = request.headers.get("idempotency-key")
    if named and len(named) > _IDEMPOTENCY_KEY_MAX:
        raise BadRequest(f"an Idempotency-Key has at most {_IDEMPOTENCY_KEY_MAX} characters")
    return named or None


async def _budget_msat(core: Core, payer: Payer) -> int:
    async with core.database.connection() as connection:
        balance_msat = await ledger.balance_msat(connection, ledger.client(payer.account_id))
    return min(balance_msat, _limit_left_msat(payer.key, balance_msat))


def _limit_left_msat(key: Key | None, balance_msat: int) -> int:
    if key is None or key.limit_msat is None:
        return balance_msat
    return max(0, key.limit_msat - key.spent_msat)


async def _purchase(core: Core, quote_id: str, payer: Payer, *, cancel_when_gone: bool) -> Purchase:
    rows = await core.jobs.of_quote(quote_id)
    return Purchase(quote_id, tuple(row["id"] for row in rows), payer, cancel_when_gone)


async def _challenge(
    core: Core, request: Request, wanted: requests.Request, *, account_id: str | None = None
) -> PaymentRequired:
    core.limiter.invoice(request)
    await core.market.refresh()
    quote = await core.quotes.price(wanted)
    core.limiter.unpaid(request, quote.characters)
    issued = await core.quotes.issue(quote, account_id=account_id)
    return PaymentRequired(quote, payment.offer(core, issued))


def _with_affordable(
    error: NotEnoughBalance, kind: Kind, quote: NewQuote, payer: Payer
) -> NotEnoughBalance:
    """Say how long an answer can be bought with what is there (OR-1)."""
    balance_msat = error.facts["balance_msat"]
    if kind not in TEXT_KINDS:
        return NotEnoughBalance(
            f"{error.message}: the fee is {quote.offer_msat} msat and the balance"
            f" {balance_msat} msat",
            **error.facts,
        )
    left_msat = min(balance_msat, _limit_left_msat(payer.key, balance_msat))
    tokens = max(0, min(_affordable(job, left_msat // len(quote.jobs)) for job in quote.jobs))
    return NotEnoughBalance(
        f"{error.message}: the fee is {quote.offer_msat} msat and the balance {balance_msat} msat;"
        f" {left_msat} msat can be spent, which buys {tokens} tokens",
        **error.facts,
        affordable_max_tokens=tokens,
    )


def _affordable(job: NewJob, budget_msat: int) -> int:
    """The `max_tokens` with which a job costs no more than the budget at its own multiplier."""
    tokens = fees.affordable_max_tokens(
        Rates(**json.loads(job.rates)),
        prompt_tokens=job.prompt_tokens,
        budget_msat=max(0, budget_msat - 1) * fees.ONE_MILLI // job.multiplier_milli,
    )
    return min(tokens, job.max_tokens)


def quote_json(core: Core, quote: NewQuote, *, expires_in_s: int) -> dict[str, Any]:
    """A quote as the contract shows it (§2)."""
    first = quote.jobs[0]
    milli = min(job.multiplier_milli for job in quote.jobs)
    place = core.market.place(first.lanes, first.multiplier_milli, first.model)
    return {
        "quote_id": quote.id,
        "base_fee_msat": quote.base_fee_msat,
        "offer_msat": quote.offer_msat,
        "multiplier": format_multiplier(milli),
        "expires_at": time_text(core.clock() + timedelta(seconds=expires_in_s)),
        "expires_in_s": expires_in_s,
        "prompt_tokens": sum(job.prompt_tokens for job in quote.jobs),
        "max_tokens": sum(job.max_tokens for job in quote.jobs),
        "fees": json.loads(first.rates),
        "items": [
            {
                "model": job.model,
                "base_fee_msat": job.base_fee_msat,
                "offer_msat": job.offer_msat,
                "prompt_tokens": job.prompt_tokens,
                "max_tokens": job.max_tokens,
            }
            for job in quote.jobs
        ],
        "queue": place.as_json(),
        "network": core.node.network,
        "simulated": core.node.simulated,
    }


def payment_body(core: Core, due: PaymentRequired) -> dict[str, Any]:
    """What a 402 says beside its error: the quote, the invoice, and what paying it opens."""
    left_s = int((due.offer.issued.expires_at - core.clock()).total_seconds())
    return {
        "quote": quote_json(core, due.quote, expires_in_s=max(0, left_s)),
        **due.offer.as_json(core),
    }
