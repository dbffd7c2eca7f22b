"""Buying: a price, the checks before the money, the payment, and the jobs that it queues.

    quote -> check limit and arithmetic -> invoice -> check amount -> wallet -> check preimage
    quote -> check limit and arithmetic -> POST /jobs from a balance

Everything is checked before the wallet is asked, and the wallet is asked once.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from client.answers import Info, Invoice, Purchase, Quote, job_list
from client.credentials import Credential
from client.errors import FeeOverLimit, NotQueued, RouterRefused, WrongQuote
from client.events import InvoiceDue, Paid, Quoted
from client.exchange import Emit, Flow, Patience, Request, Wait, ask, must, send
from client.paying import check_invoice, pay_invoice
from client.pricing import base_fee_msat, prompt_tokens

# 1000 satoshi: the cap that other L402 clients start with (lightning.md 3.2).
DEFAULT_MAX_FEE_MSAT = 1_000_000


@dataclass(frozen=True, slots=True)
class Terms:
    """What the payer agrees to. `max_fee_msat` None: any price; `max_wait_s` None: the router's."""

    max_fee_msat: int | None = DEFAULT_MAX_FEE_MSAT
    max_wait_s: int | None = None

    def headers(self) -> dict[str, str]:
        headers: dict[str, str] = {}
        if self.max_fee_msat is not None:
            headers["X-Max-Fee-Msat"] = str(self.max_fee_msat)
        if self.max_wait_s is not None:
            headers["X-Max-Wait-S"] = str(self.max_wait_s)
        return headers


def job_body(
    prompt: str | Sequence[Mapping[str, Any]] | None,
    *,
    model: str | None,
    models: Sequence[str] | None,
    fields: Mapping[str, Any],
) -> dict[str, Any]:
    """The body of a job. Text is one user's message, a list is the messages.

    `fields` are OpenAI's, and win; with `kind="completion"` the prompt stays a prompt, with
    `kind="embedding"` it is the input, with `kind="image"` what to draw. None as a value leaves a
    field out.
    """
    body: dict[str, Any] = {"kind": fields.get("kind") or "chat"}
    if models:
        body["models"] = list(models)
    elif model:
        body["model"] = model
    if prompt is not None:
        body |= _prompt_fields(body["kind"], prompt)
    return body | {name: value for name, value in fields.items() if value is not None}


def fetch_info(patience: Patience) -> Flow[Info]:
    raw = yield from ask(Request("GET", "/info"), patience=patience)
    return Info.from_json(raw)


def make_quote(
    body: Mapping[str, Any], terms: Terms, *, patience: Patience, credential: Credential | None
) -> Flow[Quote]:
    """A price for this job; nothing is owed."""
    headers = terms.headers() | (credential.headers() if credential else {})
    try:
        raw = yield from ask(Request("POST", "/quotes", body, headers), patience=patience)
    except RouterRefused as error:
        if error.code == "fee_too_high":
            raise FeeOverLimit(error.message, status=error.status, facts=error.facts) from error
        raise
    return Quote.from_json(raw)


def check_quote(quote: Quote, body: Mapping[str, Any], terms: Terms) -> None:
    """Refuse a price above the payer's limit, or above what the public rules make of the request.

    The arithmetic is checked where this client knows all of it: one job, text only. Raises
    FeeOverLimit and WrongQuote.
    """
    limit_msat = terms.max_fee_msat
    if limit_msat is not None and quote.offer_msat > limit_msat:
        raise FeeOverLimit(
            f"the fee is {quote.offer_msat} msat, the limit {limit_msat} msat",
            facts={"needed_msat": quote.offer_msat, "max_fee_msat": limit_msat},
        )
    kind = body.get("kind", "chat")
    if quote.jobs > 1 or kind not in ("chat", "completion", "embedding", "image"):
        return
    if _has_images(body):
        return
    tokens = prompt_tokens(body)
    due_msat = base_fee_msat(
        quote.rates,
        prompt_tokens=tokens,
        max_tokens=quote.max_tokens,
        images=int(kind == "image"),
    )
    asked_for = body.get("max_tokens")
    too_long = isinstance(asked_for, int) and quote.max_tokens > asked_for
    if quote.base_fee_msat > due_msat or too_long:
        raise WrongQuote(
            f"the router asks {quote.base_fee_msat} msat for {quote.prompt_tokens} prompt tokens"
            f" and {quote.max_tokens} more; the rules make it {tokens} and {due_msat} msat",
            facts={"base_fee_msat": quote.base_fee_msat, "expected_msat": due_msat},
        )


def buy(
    body: Mapping[str, Any],
    terms: Terms,
    *,
    credential: Credential | None,
    patience: Patience,
) -> Flow[Purchase]:
    """Quote and pay; then the jobs are queued. Without a credential the wallet pays."""
    quote = yield from make_quote(body, terms, patience=patience, credential=credential)
    check_quote(quote, body, terms)
    yield Emit(Quoted(quote))
    if credential is not None:
        purchase = yield from _submit(quote, body, terms, credential, patience)
    else:
        purchase = yield from _pay_quote(quote, terms, patience)
    yield Emit(Paid(purchase))
    return purchase


def _submit(
    quote: Quote,
    body: Mapping[str, Any],
    terms: Terms,
    credential: Credential,
    patience: Patience,
) -> Flow[Purchase]:
    """Start the quote from a balance; where that cannot be, buy the same request at its price.

    A key with a spending limit starts no stored quote, and a balance that is too small for the
    router's default length of an answer buys a shorter one only with the request itself.
    """
    shown = {**terms.headers(), **credential.headers()}
    # The key makes the request repeatable: without it a lost answer could not be asked for again.
    start = Request("POST", "/jobs", {"quote_id": quote.id}, _once(shown))
    try:
        raw = yield from ask(start, patience=patience)
    except RouterRefused as error:
        shorter = error.code == "insufficient_balance" and not _names_length(body)
        if error.status != 403 and not shorter:
            raise
        shown["X-Max-Fee-Msat"] = str(quote.offer_msat)
        direct = Request("POST", "/jobs", body, _once(shown))
        raw = yield from ask(direct, patience=patience)
        quote = replace(quote, id=must(raw, "quote_id", str))
    return Purchase(quote, 0, credential, job_list(raw))


def _names_length(body: Mapping[str, Any]) -> bool:
    return any(body.get(name) is not None for name in ("max_tokens", "max_completion_tokens"))


def _once(headers: Mapping[str, str]) -> dict[str, str]:
    return {**headers, "Idempotency-Key": str(uuid.uuid4())}


def _pay_quote(quote: Quote, terms: Terms, patience: Patience) -> Flow[Purchase]:
    request = Request("POST", f"/quotes/{quote.id}/invoice", {}, terms.headers())
    invoice = Invoice.from_json((yield from ask(request, patience=patience)))
    check_invoice(
        invoice.invoice,
        amount_msat=invoice.amount_msat,
        quoted_msat=quote.offer_msat,
        max_fee_msat=terms.max_fee_msat,
    )
    yield Emit(InvoiceDue(invoice))
    credential = yield from pay_invoice(invoice)
    return Purchase(quote, invoice.amount_msat, credential)


def bought_jobs(purchase: Purchase, patience: Patience) -> Flow[Purchase]:
    """The purchase with its jobs' ids, asking until the router has seen the payment.

    Raises NotQueued when it came too late, or is still not seen after many attempts.
    """
    if purchase.jobs:
        return purchase
    path = f"/quotes/{purchase.quote.id}"
    failures = 0
    while True:
        request = Request("GET", path, None, purchase.credential.headers())
        answer = yield from send(request, patience=patience, repeatable=True)
        if answer.status >= 400 and answer.status != 402:
            raise answer.refusal()
        raw = answer.json() if answer.status == 200 else {}
        if jobs := job_list(raw):
            return replace(purchase, jobs=jobs)
        failures += 1
        if raw.get("state") in ("late", "expired") or failures >= patience.attempts:
            raise NotQueued(
                "the payment has not queued the quote in time",
                facts={"quote_id": purchase.quote.id, "state": raw.get("state")}
                | {"credited_msat": raw.get("credited_msat")},
            )
        yield Wait(patience.delay_s(failures))


def _prompt_fields(kind: str, prompt: str | Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if kind in ("completion", "image", "image_edit"):
        return {"prompt": prompt}
    if kind == "embedding":
        return {"input": prompt}
    if isinstance(prompt, str):
        return {"messages": [{"role": "user", "content": prompt}]}
    return {"messages": [dict(message) for message in prompt]}


def _has_images(body: Mapping[str, Any]) -> bool:
    # Their tokens are the router's figure; without /info at hand nothing is said about them.
    return prompt_tokens(body, image_prompt_tokens=0) != prompt_tokens(body, image_prompt_tokens=1)
