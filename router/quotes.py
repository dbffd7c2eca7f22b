"""Quotes: what a request costs, held for ten minutes; invoices for them; what paying one starts.

open ── invoice paid in time, or started from a balance ──▶ paid      its jobs are queued
  │ └── paid too late, or too little ────────────────────▶ late      credited to the account
  ▼
expired                                                               its text is deleted
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from functools import lru_cache
from typing import Any

from pydantic_core import PydanticSerializationError

from billing import accounts, fee_schedule, fees, invoices
from billing.fee_schedule import FeeSchedule
from billing.fees import ONE_MILLI, Rates
from billing.invoice_watcher import InvoiceWatcher
from billing.invoices import Credit, IssuedInvoice, Purpose
from billing.lightning import LightningBackend
from billing.msat import ceil_to_sat
from router import choices, demands, job_endings, job_submits
from router.database import Database
from router.errors import (
    BadRequest,
    Conflict,
    FeeTooHigh,
    NoSuchQuote,
    QuoteExpired,
    RouterError,
    UnknownModel,
)
from router.job_records import NewJob, NewQuote
from router.lanes import ANY_MODEL
from router.models import Models
from router.paid_quotes import PaidQuotes
from router.prompt_prefix import prefix_of
from router.requests import Item, Request
from router.settings import Settings
from worker.protocol import IMAGE_KINDS, TEXT_KINDS, JobSpec

log = logging.getLogger(__name__)

FEES_FRESH_S = 1.0


@dataclass(frozen=True, slots=True)
class StoredQuote:
    """A quote as the database has it; `quote` is None once its jobs exist or its text is gone."""

    id: str
    state: str
    account_id: str | None
    request_hash: bytes
    base_fee_msat: int
    offer_msat: int
    payment_hash: str | None
    max_wait_s: int
    created_at: datetime
    expires_at: datetime
    quote: NewQuote | None


@lru_cache(maxsize=1_000)
def _rates_text(rates: Rates) -> str:
    return json.dumps(rates.as_json())


class Fees:
    """The rates in force. A change made here is seen at once, one made elsewhere within a second."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._schedule: FeeSchedule | None = None
        self._read_at = 0.0

    async def now(self) -> FeeSchedule:
        if self._schedule is None or time.monotonic() - self._read_at > FEES_FRESH_S:
            async with self._database.connection() as connection:
                self._schedule = await fee_schedule.load(connection)
            self._read_at = time.monotonic()
        return self._schedule

    def forget(self) -> None:
        """Read again before the next quote."""
        self._schedule = None


class Quotes:
    """Makes quotes and keeps them."""

    def __init__(
        self,
        database: Database,
        settings: Settings,
        models: Models,
        backend: LightningBackend,
        watcher: InvoiceWatcher,
        paid: PaidQuotes,
        *,
        network: str,
        clock: Callable[[], datetime],
    ) -> None:
        self._database = database
        self._settings = settings
        self._models = models
        self._backend = backend
        self._watcher = watcher
        self._paid = paid
        self._network = network
        self._clock = clock
        self.fees = Fees(database)

    async def price(
        self,
        request: Request,
        *,
        budget_msat: int | None = None,
        may_wait: bool = False,
        anyhow: bool = False,
    ) -> NewQuote:
        """What a request costs now. Nothing is stored.

        `budget_msat`: the payer's balance. It shortens an answer whose length the client left open,
        as the client's own offer and limit do. `anyhow`: also what no worker can do that was ever
        seen here, since one may come (AH-4). Raises BadRequest, UnknownModel, PromptTooLong,
        NoWorker, FeeTooHigh.
        """
        if any(item.spec.model == ANY_MODEL and not item.any_of for item in request.items):
            # The sign for every model is no model: it would be had at nobody's price.
            raise UnknownModel("* is not the name of a model", model=ANY_MODEL)
        schedule = await self.fees.now()
        may_wait = may_wait or request.terms.max_wait_s is not None
        lengths = self._lengths(request, may_wait, anyhow)
        if request.max_tokens is None:
            lengths = self._within(request, schedule, lengths, budget_msat)
        bases = [
            fees.base_fee_msat(
                self._dearest(schedule, item, length)[1],
                prompt_tokens=item.prompt_tokens,
                max_tokens=length,
                images=int(request.kind in IMAGE_KINDS),
            )
            for item, length in zip(request.items, lengths, strict=True)
        ]
        offers = self._offers(request, bases)
        most = request.terms.max_fee_msat
        if most is not None and sum(offers) > most:
            raise FeeTooHigh(
                f"the fee is {sum(offers)} msat, over your limit of {most} msat",
                fee_msat=sum(offers),
                max_fee_msat=most,
            )
        if sum(offers) > self._settings.max_amount_msat:
            raise BadRequest("the fee of this request is over what this router accepts")
        jobs = tuple(
            self._job(request, index, length, base, offer, schedule)
            for index, (length, base, offer) in enumerate(zip(lengths, bases, offers, strict=True))
        )
        return NewQuote(
            id=accounts.new_id(),
            request_hash=request.request_hash,
            base_fee_msat=sum(bases),
            offer_msat=sum(offers),
            max_wait_s=request.terms.max_wait_s or self._settings.default_max_wait_s,
            jobs=jobs,
        )

    def _lengths(self, request: Request, may_wait: bool, anyhow: bool) -> list[int]:
        """The answer length of each item; those that are alike are looked at once."""
        known: dict[Any, int] = {}
        lengths: list[int] = []
        for item in request.items:
            alike = (item.models, item.prompt_tokens, demands.of_spec(item.spec))
            if alike not in known:
                known[alike] = self._length(request, item, may_wait, anyhow)
            lengths.append(known[alike])
        return lengths

    def _length(self, request: Request, item: Item, may_wait: bool, anyhow: bool) -> int:
        try:
            return self._models.fit_any(
                request.kind,
                item.models,
                prompt_tokens=item.prompt_tokens,
                max_tokens=request.max_tokens,
                default_max_tokens=self._settings.default_max_tokens,
                may_wait=may_wait,
                demand=demands.of_spec(item.spec),
            )
        except RouterError:
            if not anyhow:
                raise
            return request.max_tokens or self._settings.default_max_tokens

    def _within(
        self,
        request: Request,
        schedule: FeeSchedule,
        lengths: list[int],
        balance_msat: int | None,
    ) -> list[int]:
        """Answer lengths that the payer's balance, offer and limit buy, at least one token each."""
        terms = request.terms
        bounds = [balance_msat, terms.offer_msat, terms.max_fee_msat]
        budgets = [bound for bound in bounds if bound is not None]
        if not budgets or request.kind not in TEXT_KINDS:
            return lengths
        # One msat of each job is left for the rounding of its offer.
        budget_msat = max(0, min(budgets) - len(lengths)) if terms.multiplier else min(budgets)
        each_msat = int(budget_msat / (terms.multiplier or Decimal(1))) // len(lengths)
        return [
            max(
                1,
                min(
                    length,
                    fees.affordable_max_tokens(
                        self._dearest(schedule, item, length)[1],
                        prompt_tokens=item.prompt_tokens,
                        budget_msat=each_msat,
                    ),
                ),
            )
            for item, length in zip(request.items, lengths, strict=True)
        ]

    def _offers(self, request: Request, bases: list[int]) -> list[int]:
        """Each job's offer; a given total is divided in proportion to the base fees."""
        terms = request.terms
        if terms.offer_msat is None:
            if terms.multiplier is None:
                return bases
            return [fees.offer_for_multiplier_msat(base, terms.multiplier) for base in bases]
        total = sum(bases)
        if terms.offer_msat < total:
            raise BadRequest(
                f"the base fee is {total} msat; offer_msat must be at least that",
                param="offer_msat",
                base_fee_msat=total,
            )
        most = max(total, 1) * self._settings.max_multiplier
        if terms.offer_msat > most:
            raise BadRequest(f"offer_msat may be at most {most}", param="offer_msat")
        offers = [terms.offer_msat * base // max(total, 1) for base in bases]
        offers[0] += terms.offer_msat - sum(offers)
        return offers

    def _job(
        self,
        request: Request,
        index: int,
        max_tokens: int,
        base_msat: int,
        offer_msat: int,
        schedule: FeeSchedule,
    ) -> NewJob:
        item = request.items[index]
        model, rates = self._dearest(schedule, item, max_tokens)
        spec = item.spec
        if (spec.max_tokens, spec.model) != (max_tokens, model):
            spec = spec.model_copy(update={"max_tokens": max_tokens, "model": model})
        demand = demands.of_spec(item.spec)
        lane, *more_lanes = [
            self._models.lane(
                request.kind,
                name,
                prompt_tokens=item.prompt_tokens,
                max_tokens=max_tokens,
                demand=demand,
            )
            for name in item.models
        ]
        return NewJob(
            id=accounts.new_id(),
            index=index,
            kind=request.kind.value,
            model=spec.model,
            spec=_as_json(spec),
            rates=_rates_text(rates),
            prompt_tokens=item.prompt_tokens,
            max_tokens=max_tokens,
            base_fee_msat=base_msat,
            offer_msat=offer_msat,
            multiplier_milli=max(ONE_MILLI, fees.multiplier_milli(offer_msat, base_msat)),
            lane=lane,
            more_lanes=tuple(more_lanes),
            choices=self._choices(schedule, item),
            webhook=request.webhook,
            prefix=prefix_of(spec),
            run_limit_s=request.terms.run_limit_s,
        )

    def _dearest(self, schedule: FeeSchedule, item: Item, max_tokens: int) -> tuple[str, Rates]:
        """The model of an item, of several the dearest, with its rates."""
        if not item.any_of:
            return item.spec.model, schedule.rates(item.spec.model)
        rates = choices.rates_of(item.any_of, schedule, known=self._models.text_models())
        model = choices.dearest(rates, prompt_tokens=item.prompt_tokens, max_tokens=max_tokens)
        return model, rates[model]

    def _choices(self, schedule: FeeSchedule, item: Item) -> str | None:
        if not item.any_of:
            return None
        known = self._models.text_models()
        return choices.write(choices.rates_of(item.any_of, schedule, known=known), _rates_text)

    async def store(self, quote: NewQuote) -> StoredQuote:
        """Keep a quote until it expires; nothing is owed."""
        async with self._database.transaction() as connection:
            return await self._store(connection, quote, None)

    async def _store(
        self,
        connection: Any,
        quote: NewQuote,
        account_id: str | None,
        *,
        payment_hash: str | None = None,
    ) -> StoredQuote:
        """Insert a quote; with its texts, unless it has an invoice: then its jobs are rows, too."""
        texts = None if payment_hash else json.dumps([asdict(job) for job in quote.jobs])
        now = self._clock()
        expires_at = now + timedelta(seconds=self._settings.quote_ttl_s)
        await connection.execute(
            "insert into quotes (id, account_id, state, request, request_hash, base_fee_msat,"
            " offer_msat, max_wait_s, created_at, expires_at, payment_hash)"
            " values ($1, $2, 'open', $3, $4, $5, $6, $7, $8, $9, $10)",
            quote.id,
            account_id,
            texts,
            quote.request_hash,
            quote.base_fee_msat,
            quote.offer_msat,
            quote.max_wait_s,
            now,
            expires_at,
            payment_hash,
        )
        return StoredQuote(
            id=quote.id,
            state="open",
            account_id=account_id,
            request_hash=quote.request_hash,
            base_fee_msat=quote.base_fee_msat,
            offer_msat=quote.offer_msat,
            payment_hash=payment_hash,
            max_wait_s=quote.max_wait_s,
            created_at=now,
            expires_at=expires_at,
            quote=quote,
        )

    async def get(self, quote_id: str) -> StoredQuote:
        """A stored quote. Raises NoSuchQuote."""
        async with self._database.connection() as connection:
            row = await connection.fetchrow("select * from quotes where id = $1", quote_id)
        if row is None:
            raise NoSuchQuote("there is no such quote", quote_id=quote_id)
        return stored_quote(row)

    async def by_payment_hash(self, payment_hash: str) -> StoredQuote | None:
        async with self._database.connection() as connection:
            row = await connection.fetchrow(
                "select * from quotes where payment_hash = $1", payment_hash
            )
        return stored_quote(row) if row else None

    async def issue(self, quote: NewQuote, *, account_id: str | None = None) -> IssuedInvoice:
        """Store a fresh quote together with an invoice for it (a 402's way).

        `account_id`: the payer that is to be credited; None makes a new one.
        """
        issued = await self._request(quote)
        async with self._database.transaction() as connection:
            account_id = account_id or await accounts.create_account(connection)
            stored = await self._store(connection, quote, account_id, payment_hash=issued[0])
            invoice = await self._sell(connection, stored, quote, account_id, issued)
        self._paid.remember(invoice, quote)
        return invoice

    async def issue_for(self, quote_id: str) -> IssuedInvoice:
        """An invoice for a stored, open quote. Raises QuoteExpired; a quote has one invoice."""
        stored = await self.get(quote_id)
        self._check_open(stored)
        assert stored.quote is not None
        issued = await self._request(stored.quote, until=stored.expires_at)
        async with self._database.transaction() as connection:
            row = await connection.fetchrow(
                "select * from quotes where id = $1 for update", quote_id
            )
            stored = stored_quote(row)
            self._check_open(stored)
            assert stored.quote is not None
            account_id = await accounts.create_account(connection)
            # The jobs are rows from here on, so the quote's own copy of the texts can go.
            await connection.execute(
                "update quotes set account_id = $2, payment_hash = $3, request = null where id = $1",
                quote_id,
                account_id,
                issued[0],
            )
            invoice = await self._sell(connection, stored, stored.quote, account_id, issued)
        self._paid.remember(invoice, stored.quote)
        return invoice

    def _check_open(self, stored: StoredQuote) -> None:
        if stored.state != "open" or stored.expires_at <= self._clock():
            raise QuoteExpired("this quote has been used or has expired", quote_id=stored.id)
        if stored.payment_hash is not None or stored.quote is None:
            raise Conflict("this quote has an invoice already", quote_id=stored.id)

    async def _request(
        self, quote: NewQuote, *, until: datetime | None = None
    ) -> tuple[str, str, int, datetime]:
        amount_msat = max(ceil_to_sat(quote.offer_msat), self._settings.min_amount_msat)
        left_s = self._settings.quote_ttl_s
        if until is not None:
            left_s = max(1, int((until - self._clock()).total_seconds()))
        payment_hash, bolt11, expires_at = await invoices.request_invoice(
            self._backend,
            amount_msat=amount_msat,
            description=f"{self._settings.name} quote {quote.id[:8]}",
            expiry_s=left_s,
            network=self._network,
        )
        return payment_hash, bolt11, amount_msat, expires_at

    async def _sell(
        self,
        connection: Any,
        stored: StoredQuote,
        quote: NewQuote,
        account_id: str,
        issued: tuple[str, str, int, datetime],
    ) -> IssuedInvoice:
        """Keep the jobs of a quote and the invoice for it."""
        payment_hash, bolt11, amount_msat, expires_at = issued
        await job_submits.store_awaiting(connection, quote, account_id)
        return await invoices.store_invoice(
            connection,
            payment_hash=payment_hash,
            bolt11=bolt11,
            amount_msat=amount_msat,
            account_id=account_id,
            purpose=Purpose.QUOTE,
            reference=stored.id,
            expires_at=min(expires_at, stored.expires_at),
            first_check_at=self._watcher.first_check_at(),
        )

    async def issue_bump(self, job: Any, *, offer_msat: int, missing_msat: int) -> IssuedInvoice:
        """An invoice for what is missing to raise a waiting job to a total of `offer_msat`."""
        amount_msat = max(ceil_to_sat(missing_msat), self._settings.min_amount_msat)
        payment_hash, bolt11, expires_at = await invoices.request_invoice(
            self._backend,
            amount_msat=amount_msat,
            description=f"{self._settings.name} bump",
            expiry_s=self._settings.quote_ttl_s,
            network=self._network,
        )
        async with self._database.transaction() as connection:
            return await invoices.store_invoice(
                connection,
                payment_hash=payment_hash,
                bolt11=bolt11,
                amount_msat=amount_msat,
                account_id=job["account_id"],
                purpose=Purpose.BUMP,
                reference=f"{job['id']}:{offer_msat}",
                expires_at=expires_at,
                first_check_at=self._watcher.first_check_at(),
            )

    async def start_from_balance(self, quote_id: str, account_id: str, key_id: str | None) -> None:
        """Queue a stored quote's jobs at the payer's cost. Raises QuoteExpired, InsufficientFunds."""
        async with self._database.transaction() as connection:
            row = await connection.fetchrow(
                "select * from quotes where id = $1 for update", quote_id
            )
            if row is None:
                raise NoSuchQuote("there is no such quote", quote_id=quote_id)
            stored = stored_quote(row)
            if stored.state == "paid" and stored.account_id == account_id:
                return
            self._check_open(stored)
            assert stored.quote is not None
            await connection.execute(
                "update quotes set account_id = $2 where id = $1", quote_id, account_id
            )
            await job_submits.store_awaiting(connection, stored.quote, account_id, key_id=key_id)
            await job_submits.start_quote(
                connection, quote_id, lanes={job.id: job.lanes for job in stored.quote.jobs}
            )

    async def on_credit(self, connection: Any, credit: Credit) -> list[str]:
        """A quote's invoice was credited, in this transaction: queue its jobs if it was in time.

        Returns the ids of the jobs queued.
        """
        if credit.state is not invoices.State.PAID:
            await self._mark_late(connection, credit.reference)
            return []
        jobs = await connection.fetch(
            "select id, kind, model, choices, spec, prompt_tokens, max_tokens from jobs"
            " where quote_id = $1",
            credit.reference,
        )
        lanes = {job["id"]: self._models.lanes_of(job) for job in jobs}
        try:
            return await job_submits.start_quote(connection, credit.reference, lanes=lanes)
        except QuoteExpired:
            await self._mark_late(connection, credit.reference)
            return []

    async def _mark_late(self, connection: Any, quote_id: str) -> None:
        await connection.execute(
            "update quotes set state = 'late', request = null"
            " where id = $1 and state in ('open', 'expired')",
            quote_id,
        )
        await job_endings.expire_unpaid(
            connection, [quote_id], wipe_after_s=self._settings.wipe_after_s
        )


def _as_json(spec: JobSpec) -> str:
    try:
        return spec.model_dump_json(exclude_none=True)
    except PydanticSerializationError:
        # Within a text there may be JSON of its own, with half a surrogate pair.
        raise BadRequest(
            "the request is nested too deeply, or a text in it is no Unicode"
        ) from None


def stored_quote(row: Any) -> StoredQuote:
    quote = None
    if row["request"] is not None:
        quote = NewQuote(
            id=row["id"],
            request_hash=row["request_hash"],
            base_fee_msat=row["base_fee_msat"],
            offer_msat=row["offer_msat"],
            max_wait_s=row["max_wait_s"],
            jobs=tuple(NewJob(**job) for job in json.loads(row["request"])),
        )
    return StoredQuote(
        id=row["id"],
        state=row["state"],
        account_id=row["account_id"],
        request_hash=row["request_hash"],
        base_fee_msat=row["base_fee_msat"],
        offer_msat=row["offer_msat"],
        payment_hash=row["payment_hash"],
        max_wait_s=row["max_wait_s"],
        created_at=row["created_at"],
        expires_at=row["expires_at"],
        quote=quote,
    )
