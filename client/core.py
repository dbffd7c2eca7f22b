"""What the synchronous and the asynchronous client have in common: flows, and no I/O.

Every public method of the two clients is one flow from here, carried out by its own driver.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any

from client import account
from client.answers import Balance, Completion, Info, Job, Purchase, Quote, TopUp
from client.credentials import ApiKey, Credential, parse_credential
from client.errors import BadRequest, NoWallet, PaymentNeeded, SatherdError
from client.events import Ended, Event, Paid, Position, StateChanged, Text
from client.exchange import Answer, Flow, Patience, Request, ask, must
from client.fee_policy import automatic_multiplier_for
from client.following import Tracker, collect, fetch_job, follow
from client.paying import paid_request
from client.pricing import ONE_MILLI, format_multiplier, parse_multiplier_milli
from client.purchase import (
    DEFAULT_MAX_FEE_MSAT,
    Terms,
    bought_jobs,
    buy,
    fetch_info,
    job_body,
    make_quote,
)

Prompt = str | Sequence[Mapping[str, Any]] | None
Multiplier = str | int | float | Decimal
AUTO = "auto"
# What a model must be able to do for a job that is not text.
MODEL_KINDS = {kind: kind for kind in ("embedding", "image", "image_edit")}


@dataclass(slots=True)
class Ask:
    """One prompt and what its payer agrees to; the keyword arguments of `run` and its like.

    `fee_multiplier` or `offer_msat` buys a better place in the queue; `fee_multiplier="auto"` asks
    `client.fee_policy`, and `times_auto` offers so many times what that says. `fields` are those of
    OpenAI's requests: max_tokens, temperature, stop, n, kind …
    """

    prompt: Prompt = None
    model: str | None = None
    models: Sequence[str] | None = None
    fee_multiplier: Multiplier | None = None
    times_auto: Multiplier | None = None
    offer_msat: int | None = None
    max_fee_msat: int | None = DEFAULT_MAX_FEE_MSAT
    max_wait_s: int | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, prompt: Prompt, options: Mapping[str, Any]) -> Ask:
        """From keyword arguments: those named above, and all others as fields of the request."""
        own = {name: value for name, value in options.items() if name in _OWN_OPTIONS}
        rest = {name: value for name, value in options.items() if name not in _OWN_OPTIONS}
        return cls(prompt, fields=rest, **own)

    def __post_init__(self) -> None:
        """Raises ValueError for a multiplier that is none, or given beside an offer."""
        if self.times_auto is not None:
            if self.fee_multiplier not in (None, AUTO):
                raise ValueError("times_auto multiplies the automatic multiplier, not yours")
            parse_multiplier_milli(self.times_auto)
            self.fee_multiplier = AUTO
        if self.fee_multiplier is None:
            return
        if self.offer_msat is not None:
            raise ValueError("give a fee_multiplier or an offer_msat, not both")
        if self.fee_multiplier != AUTO:
            parse_multiplier_milli(self.fee_multiplier)

    def body(self, *, stream: bool) -> dict[str, Any]:
        """The body of the request; `fee_multiplier` is a number by now."""
        body = job_body(self.prompt, model=self.model, models=self.models, fields=self.fields)
        if self.fee_multiplier is not None:
            body["fee_multiplier"] = format_multiplier(parse_multiplier_milli(self.fee_multiplier))
        if self.offer_msat is not None:
            body["offer_msat"] = self.offer_msat
        if self.max_fee_msat is not None:
            body["max_fee_msat"] = self.max_fee_msat
        if stream and body["kind"] in ("chat", "completion"):
            body.setdefault("stream", True)
        return body

    def terms(self) -> Terms:
        return Terms(max_fee_msat=self.max_fee_msat, max_wait_s=self.max_wait_s)


_OWN_OPTIONS = frozenset(
    {
        "model",
        "models",
        "fee_multiplier",
        "times_auto",
        "offer_msat",
        "max_fee_msat",
        "max_wait_s",
    }
)


class Watched:
    """What the events of a prompt have said so far: the purchase, and which jobs there are."""

    def __init__(self) -> None:
        self.purchase: Purchase | None = None
        self.job_ids: list[str] = []
        self.ended: set[str] = set()

    def take(self, event: Event) -> None:
        match event:
            case Paid(purchase):
                self.purchase = purchase
                self.job_ids = [job.id for job in purchase.jobs]
            case StateChanged(job_id=job_id) | Position(job_id=job_id) | Text(job_id=job_id):
                self._remember(job_id)
            case Ended(job):
                self._remember(job.id)
                self.ended.add(job.id)
            case _:
                pass

    def open(self) -> list[str]:
        """The jobs that are known and have not ended."""
        return [job_id for job_id in self.job_ids if job_id not in self.ended]

    def _remember(self, job_id: str) -> None:
        if job_id not in self.job_ids:
            self.job_ids.append(job_id)


def listener(
    on_event: Callable[[Event], None] | None, on_position: Callable[[Position], None] | None
) -> Callable[[Event], None]:
    """One callback of the two that a caller may give."""

    def listen(event: Event) -> None:
        if on_event is not None:
            on_event(event)
        if on_position is not None and isinstance(event, Position):
            on_position(event)

    return listen


class Core:
    """Flows for one router and one payer. `credential` None: a wallet pays each prompt."""

    def __init__(
        self, credential: str | Credential | None, *, has_wallet: bool, patience: Patience
    ) -> None:
        self.credential = parse_credential(credential) if credential is not None else None
        self.has_wallet = has_wallet
        self.patience = patience

    def info(self) -> Flow[Info]:
        return fetch_info(self.patience)

    def quote(self, asked: Ask) -> Flow[Quote]:
        asked = yield from self._filled_in(asked)
        body, terms = asked.body(stream=False), asked.terms()
        return (
            yield from make_quote(body, terms, patience=self.patience, credential=self.credential)
        )

    def submit(self, asked: Ask) -> Flow[Purchase]:
        """Buy and return as soon as the jobs have ids."""
        purchase = yield from self._buy(asked, stream=False)
        try:
            return (yield from bought_jobs(purchase, self.patience))
        except SatherdError as error:
            error.credential = purchase.credential
            raise

    def complete(self, asked: Ask) -> Flow[Completion]:
        """Buy, and follow the jobs to their end."""
        purchase = yield from self._buy(asked, stream=True)
        return (yield from self.resume(purchase))

    def resume(self, purchase: Purchase, last_event_id: str = "") -> Flow[Completion]:
        """Follow the jobs of a purchase, from the beginning or after an event."""
        tracker = Tracker(purchase.quote.jobs, last_event_id)
        path = f"/quotes/{purchase.quote.id}/events"
        try:
            yield from follow(path, purchase.credential, tracker, patience=self.patience)
            return (yield from collect(purchase, tracker, patience=self.patience))
        except SatherdError as error:
            error.credential = purchase.credential
            raise

    def follow_job(
        self, job_id: str, credential: Credential | None, last_event_id: str = ""
    ) -> Flow[Job]:
        """Follow one job, with its token or the payer's credential, and return it ended."""
        opened = self.opener(credential)
        tracker = Tracker(1, last_event_id)
        yield from follow(f"/jobs/{job_id}/events", opened, tracker, patience=self.patience)
        ended = tracker.ended.get(job_id)
        if ended is None or ended.result is None:
            ended = yield from fetch_job(job_id, opened, patience=self.patience)
        return ended

    def job(self, job_id: str, credential: Credential | None) -> Flow[Job]:
        return fetch_job(job_id, self.opener(credential), patience=self.patience)

    def cancel(self, job_id: str, credential: Credential | None) -> Flow[Job]:
        headers = self.opener(credential).headers()
        request = Request("DELETE", f"/jobs/{job_id}", None, headers)
        raw = yield from ask(request, patience=self.patience)
        return Job.from_json({"id": job_id, "state": "cancelled", **raw})

    def bump(
        self,
        job_id: str,
        credential: Credential | None,
        *,
        offer_msat: int | None,
        fee_multiplier: Multiplier | None,
        max_fee_msat: int | None,
    ) -> Flow[Job]:
        """Raise a waiting job's offer to a new total; a wallet pays the difference if it must."""
        if (offer_msat is None) == (fee_multiplier is None):
            raise ValueError("give an offer_msat or a fee_multiplier")
        body: dict[str, Any] = {"offer_msat": offer_msat}
        if fee_multiplier is not None:
            milli = parse_multiplier_milli(fee_multiplier)
            body = {"fee_multiplier": format_multiplier(milli)}
        answer, _ = yield from paid_request(
            Request("POST", f"/jobs/{job_id}/bump", body),
            max_fee_msat=max_fee_msat,
            credential=self.opener(credential),
            has_wallet=self.has_wallet,
            patience=self.patience,
        )
        return Job.from_json({"id": job_id, **answer.json()})

    def request(
        self, request: Request, max_fee_msat: int | None
    ) -> Flow[tuple[Answer, Credential | None]]:
        """Any request to any door; a 402 is paid if there is a wallet."""
        return paid_request(
            request,
            max_fee_msat=max_fee_msat,
            credential=self.credential,
            has_wallet=self.has_wallet,
            patience=self.patience,
        )

    def models(self) -> Flow[list[Mapping[str, Any]]]:
        headers = self.credential.headers() if self.credential else {}
        request = Request("GET", "/v1/models", None, headers)
        raw = yield from ask(request, patience=self.patience)
        return must(raw, "data", list)

    def balance(self, credential: Credential | None) -> Flow[Balance]:
        return account.show_balance(self.opener(credential), self.patience)

    def top_up(self, amount_msat: int) -> Flow[TopUp]:
        if not self.has_wallet:
            raise NoWallet("a top-up is paid by a wallet")
        return account.top_up(amount_msat, self.credential, self.patience)

    def rotate(self, payment_hash: str, credential: Credential | None) -> Flow[ApiKey]:
        return account.rotate_key(payment_hash, self.opener(credential), self.patience)

    def keys(self, credential: Credential | None) -> Flow[list[Mapping[str, Any]]]:
        return account.list_keys(self.opener(credential), self.patience)

    def create_key(
        self, credential: Credential | None, limit_msat: int | None, withdraw: bool
    ) -> Flow[ApiKey]:
        return account.create_key(self.opener(credential), limit_msat, withdraw, self.patience)

    def delete_key(self, key_id: str, credential: Credential | None) -> Flow[None]:
        return account.delete_key(key_id, self.opener(credential), self.patience)

    def withdraw(
        self,
        credential: Credential | None,
        invoice: str | None,
        address: str | None,
        amount_msat: int | None,
    ) -> Flow[Mapping[str, Any]]:
        if (invoice is None) == (address is None):
            raise ValueError("give an invoice or an address")
        body = {"invoice": invoice, "address": address, "amount_msat": amount_msat}
        body = {name: value for name, value in body.items() if value is not None}
        return account.withdraw(body, self.opener(credential), self.patience)

    def withdrawal(
        self, withdrawal_id: str, credential: Credential | None
    ) -> Flow[Mapping[str, Any]]:
        return account.show_withdrawal(withdrawal_id, self.opener(credential), self.patience)

    def opener(self, credential: Credential | None) -> Credential:
        """The credential given, or the client's own. Raises PaymentNeeded without either."""
        chosen = credential or self.credential
        if chosen is None:
            raise PaymentNeeded("this needs a prepaid key or the credential of a payment")
        return chosen

    def _buy(self, asked: Ask, *, stream: bool) -> Flow[Purchase]:
        if self.credential is None and not self.has_wallet:
            raise NoWallet("give a prepaid key, or a wallet that pays invoices")
        asked = yield from self._filled_in(asked)
        return (
            yield from buy(
                asked.body(stream=stream),
                asked.terms(),
                credential=self.credential,
                patience=self.patience,
            )
        )

    def _filled_in(self, asked: Ask) -> Flow[Ask]:
        """What the caller left to us: the router's first model of the kind, the multiplier."""
        models = list(asked.models or ([asked.model] if asked.model else []))
        if models and asked.fee_multiplier != AUTO:
            return asked
        info = yield from fetch_info(self.patience)
        if not models:
            kind = MODEL_KINDS.get(str(asked.fields.get("kind")), "text")
            model = info.first_model(kind)
            if model is None:
                raise BadRequest(f"this router has no {kind} model", code="unknown_model")
            models = [model.id]
            asked = replace(asked, model=model.id)
        if asked.fee_multiplier == AUTO:
            times = (
                ONE_MILLI if asked.times_auto is None else parse_multiplier_milli(asked.times_auto)
            )
            milli = max(automatic_multiplier_for(info, m, times_milli=times) for m in models)
            asked = replace(asked, fee_multiplier=format_multiplier(milli), times_auto=None)
        return asked
