"""What a router answers, as small types. `raw` is the whole JSON, for all that has no name here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from client.credentials import ApiKey, Credential, JobToken
from client.errors import UnexpectedAnswer
from client.exchange import must
from client.pricing import DEFAULT_IMAGE_PROMPT_TOKENS, Rates, parse_multiplier_milli

TERMINAL_STATES = frozenset({"succeeded", "failed", "cancelled", "expired"})


@dataclass(frozen=True, slots=True)
class Model:
    """One row of `/info`'s models."""

    id: str
    kind: str
    rates: Rates
    queue_length: int
    last_multiplier_milli: int
    multiplier_to_be_next_milli: int
    servable: bool
    raw: Mapping[str, Any] = field(repr=False)

    @property
    def kinds(self) -> Sequence[str]:
        """All that it does, where it does more than one thing."""
        return [str(kind) for kind in self.raw.get("kinds") or ()]

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Model:
        return cls(
            id=must(raw, "id", str),
            kind=str(raw.get("kind", "text")),
            rates=Rates.from_json(raw.get("fees") or {}),
            queue_length=int(raw.get("queue_length", 0)),
            last_multiplier_milli=_milli(raw, "last_multiplier"),
            multiplier_to_be_next_milli=_milli(raw, "multiplier_to_be_next"),
            servable=bool(raw.get("servable", True)),
            raw=raw,
        )


@dataclass(frozen=True, slots=True)
class Info:
    """`GET /info`: rates, limits, models, and whether the money is simulated."""

    simulated: bool
    network: str
    rates: Rates
    image_prompt_tokens: int
    default_max_tokens: int
    models: tuple[Model, ...]
    raw: Mapping[str, Any] = field(repr=False)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Info:
        return cls(
            simulated=bool(raw.get("simulated", False)),
            network=str(raw.get("network", "")),
            rates=Rates.from_json(must(raw, "fees", dict)),
            image_prompt_tokens=int(raw.get("image_prompt_tokens", DEFAULT_IMAGE_PROMPT_TOKENS)),
            default_max_tokens=int(raw.get("default_max_tokens", 1024)),
            models=tuple(Model.from_json(model) for model in must(raw, "models", list)),
            raw=raw,
        )

    def model(self, model_id: str) -> Model | None:
        """The model of this id, None when the router does not know it."""
        return next((model for model in self.models if model.id == model_id), None)

    def first_model(self, kind: str = "text") -> Model | None:
        """A model of this kind: one that can be served now, before one that cannot."""
        fitting = [model for model in self.models if kind in (model.kind, *model.kinds)]
        return next((model for model in fitting if model.servable), next(iter(fitting), None))


@dataclass(frozen=True, slots=True)
class Quote:
    """A price that holds until it expires. The figures are totals over `jobs` jobs."""

    id: str
    base_fee_msat: int
    offer_msat: int
    multiplier: str
    prompt_tokens: int
    max_tokens: int
    rates: Rates
    jobs: int
    position: int | None
    raw: Mapping[str, Any] = field(repr=False)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Quote:
        queue = raw.get("queue") or {}
        return cls(
            id=must(raw, "quote_id", str),
            base_fee_msat=must(raw, "base_fee_msat", int),
            offer_msat=must(raw, "offer_msat", int),
            multiplier=must(raw, "multiplier", str),
            prompt_tokens=int(raw.get("prompt_tokens", 0)),
            max_tokens=int(raw.get("max_tokens", 0)),
            rates=Rates.from_json(raw.get("fees") or {}),
            jobs=len(raw.get("items") or ()) or 1,
            position=queue.get("position"),
            raw=raw,
        )


@dataclass(frozen=True, slots=True)
class Invoice:
    """What to pay, and the two credentials that the payment will make valid."""

    invoice: str
    payment_hash: str
    amount_msat: int
    l402_token: str = field(repr=False)
    claim_token: str | None = field(repr=False)
    raw: Mapping[str, Any] = field(repr=False)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Invoice:
        claim = raw.get("claim_token")
        return cls(
            invoice=must(raw, "invoice", str),
            payment_hash=must(raw, "payment_hash", str),
            amount_msat=must(raw, "amount_msat", int),
            l402_token=must(raw, "l402_token", str),
            claim_token=claim if isinstance(claim, str) else None,
            raw=raw,
        )


@dataclass(frozen=True, slots=True)
class Job:
    """A job as the router shows it (shape: api.md, section 8). `token` stands in for the payer."""

    id: str
    state: str
    token: str | None = field(default=None, repr=False)
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Job:
        token = raw.get("token")
        return cls(
            id=must(raw, "id", str),
            state=str(raw.get("state", "queued")),
            token=token if isinstance(token, str) else None,
            raw=raw,
        )

    @property
    def ended(self) -> bool:
        return self.state in TERMINAL_STATES

    @property
    def charged_msat(self) -> int:
        return int(self.raw.get("charged_msat") or 0)

    @property
    def refunded_msat(self) -> int:
        return int(self.raw.get("refunded_msat") or 0)

    @property
    def model(self) -> str:
        return str(self.raw.get("model", ""))

    @property
    def position(self) -> int | None:
        return self.raw.get("position")

    @property
    def usage(self) -> Mapping[str, Any]:
        return self.raw.get("usage") or {}

    @property
    def result(self) -> Mapping[str, Any] | None:
        """In OpenAI's shape for the job's kind; None before the end and once it is wiped."""
        return self.raw.get("result")

    @property
    def text(self) -> str:
        """The answer's text; "" when there is none (yet)."""
        choices = (self.result or {}).get("choices") or [{}]
        message = choices[0].get("message") or {}
        return str(message.get("content") or choices[0].get("text") or "")

    @property
    def images(self) -> Sequence[Mapping[str, Any]]:
        """The pictures of an image job, each with `b64_json` or `url`; none for other kinds."""
        data = (self.result or {}).get("data") or []
        return [entry for entry in data if entry.get("b64_json") or entry.get("url")]

    @property
    def credential(self) -> JobToken | None:
        return JobToken(self.token) if self.token else None


@dataclass(frozen=True, slots=True)
class Purchase:
    """A paid quote. `paid_msat` is what left the wallet: 0 when a balance paid.

    `credential` opens the jobs, and the account on which change and refunds lie: keep it.
    """

    quote: Quote
    paid_msat: int
    credential: Credential = field(repr=False)
    jobs: tuple[Job, ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """The ended jobs of a purchase, in the quote's order."""

    purchase: Purchase
    jobs: tuple[Job, ...]
    partial_texts: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def text(self) -> str:
        """The first job's answer."""
        return self.texts[0] if self.jobs else ""

    @property
    def texts(self) -> Sequence[str]:
        """One answer for each job; what had come before its end for one that did not succeed."""
        return [job.text or self.partial_texts.get(job.id, "") for job in self.jobs]

    @property
    def charged_msat(self) -> int:
        return sum(job.charged_msat for job in self.jobs)

    @property
    def refunded_msat(self) -> int:
        return sum(job.refunded_msat for job in self.jobs)

    @property
    def credential(self) -> Credential:
        return self.purchase.credential


@dataclass(frozen=True, slots=True)
class Balance:
    """`held_msat` is set aside for jobs and withdrawals that have not ended."""

    balance_msat: int
    held_msat: int
    raw: Mapping[str, Any] = field(repr=False)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Balance:
        return cls(must(raw, "balance_msat", int), int(raw.get("held_msat", 0)), raw)


@dataclass(frozen=True, slots=True)
class TopUp:
    """A paid top-up. `key` is shown once by the router: None when it had been shown before.

    `credential` is the one of the payment; it alone rotates the key and may always withdraw.
    """

    payment_hash: str
    paid_msat: int
    balance_msat: int
    key: ApiKey | None = field(repr=False)
    credential: Credential = field(repr=False)


def job_list(raw: Mapping[str, Any]) -> tuple[Job, ...]:
    """The `jobs` of an answer. Raises UnexpectedAnswer when they are no list of objects."""
    jobs = raw.get("jobs") or []
    if not isinstance(jobs, list) or not all(isinstance(job, Mapping) for job in jobs):
        raise UnexpectedAnswer("the answer's `jobs` is not a list of objects")
    return tuple(Job.from_json(job) for job in jobs)


def _milli(raw: Mapping[str, Any], name: str) -> int:
    try:
        return parse_multiplier_milli(str(raw.get(name, "1")))
    except ValueError as error:
        raise UnexpectedAnswer(f"`{name}` is not a multiplier") from error
