"""The usual settlement in one statement: the invoice of an open quote, paid in time and in full.

Whoever paid waits for this. Step by step (`billing.invoices.record_settlement`, then
`router.job_submits.start_quote`) it is sixteen round trips to PostgreSQL; here it is one, which is its
own transaction, and a look at what was bought where this router has not sold it just now. Both ways
make the same rows with the same ids (tests/test_paid_quotes.py holds them side by side), so whoever
comes first by either is the one that counts. What is not the usual case, or fails, has changed nothing,
and goes step by step.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from billing import ledger
from billing.invoice_watcher import Receipt
from billing.invoices import IssuedInvoice
from billing.ledger import Transfer
from billing.sql import one_plan
from router import job_inserts, job_states
from router.database import Database
from router.job_records import Claimed, NewJob, NewQuote, Seat, StartBought
from router.job_states import Event
from router.models import Models

# What this router remembers of what it has sold: the latest, and no long texts.
REMEMBERED = 1_000
REMEMBERED_CHARACTERS = 16_000

_LOOK = """
select i.account_id, j.id, j.kind, j.model, j.choices, j.spec, j.rates,
    j.prompt_tokens, j.max_tokens, j.multiplier_milli, j.prefix
from invoices i join jobs j on j.quote_id = i.reference
where i.payment_hash = $1 and i.state = 'open' and i.purpose = 'quote' and j.state = any($2::text[])"""

# Everything hangs on the two rows that are locked first: without either nothing happens. Then the
# guards are those of the steps; quote and jobs are locked by their ids, whatever their state, as in
# `router.job_store`: by their state, PostgreSQL may look through all that ever were in it. The payer's
# balance changes once, by what the jobs leave of the money; rows come in name order, as they are locked
# elsewhere, and the stream's cursor after them, as in the steps. A transfer that was posted before, or
# a balance below zero, ends it all by a constraint. A job for which a worker keeps a seat starts, as it
# does where it is bought from a balance (`router.job_inserts`).
_START = one_plan("""
with invoice as (
    select reference from invoices
    where payment_hash = $1 and state = 'open' and purpose = 'quote'
        and amount_msat <= $2 and expires_at >= $3 and account_id = $16
    for update),
sold as (
    select q.id, q.state from quotes q join invoice i on q.id = i.reference for update of q),
quote as (select id from sold where state = 'open'),
settled as (
    update invoices set state = 'paid', settled_at = $3, received_msat = $2, next_check_at = null
    from quote where payment_hash = $1),
opened as (
    update quotes q set state = 'paid', request = null from quote where q.id = quote.id),
waiting as (
    select j.id, j.state, j.multiplier_milli from jobs j, quote
    where j.id = any($6::text[]) and j.quote_id = quote.id and j.account_id = $16
    order by j.id for update of j),
before as (
    select l.set, max(q.multiplier_milli) as milli
    from unnest($23::int[], $24::text[]) l(set, lane)
    cross join lateral (select multiplier_milli from queue where queue.lane = l.lane
        order by multiplier_milli desc, seq limit 1) q
    group by l.set),
seated as (
    select k.job_id, k.worker_id
    from unnest($17::text[], $18::text[], $19::int[]) k(job_id, worker_id, set)
    join waiting w on w.id = k.job_id
    where not exists (
        select 1 from before b where b.set = k.set and b.milli >= w.multiplier_milli)),
started as (
    update jobs j set state = case when s.worker_id is null then $4 else 'running' end,
        seq = nextval('queue_seq'), queued_at = now(),
        wait_ends_at = now() + make_interval(secs => j.max_wait_s),
        attempt = case when s.worker_id is null then 0 else 1 end, worker_id = s.worker_id,
        router_id = case when s.worker_id is not null then $20 end,
        commission_ppm = case when s.worker_id is not null then $21::int end,
        lease_ends_at = case when s.worker_id is not null then $22::timestamptz end,
        started_at = case when s.worker_id is not null then now() end
    from waiting w left join seated s on s.job_id = w.id,
        unnest($6::text[], $7::text[], $8::text[]) t(job_id, escrow, hold_id)
    where j.id = w.id and t.job_id = w.id and w.state = any($5::text[])
    returning j.*, t.escrow, t.hold_id),
queued as (
    insert into queue (job_id, lane, multiplier_milli, seq)
    select s.id, l.lane, s.multiplier_milli, s.seq
    from started s join unnest($9::text[], $10::text[]) l(job_id, lane) on l.job_id = s.id
    where s.started_at is null
    on conflict do nothing),
tried as (
    insert into attempts (job_id, n, worker_id, router_id)
    select id, attempt, worker_id, router_id from started where started_at is not null),
posted as (
    insert into ledger_transfers (id, debit, credit, amount_msat, code, reference)
    select $11::text, $12::text, $13::text, $2::bigint, 'received', $1::text from quote
    union all
    select hold_id, $13::text, escrow, held_msat, 'hold', id from started where held_msat > 0),
raised as (
    insert into ledger_balances (account, balance_msat)
    select account, msat from (
        select $13::text, $2::bigint - (select coalesce(sum(held_msat), 0)::bigint from started)
        from quote
        union all
        select escrow, held_msat from started where held_msat > 0) t(account, msat)
    order by account
    on conflict (account) do update
        set balance_msat = ledger_balances.balance_msat + excluded.balance_msat
    returning account),
followed as (
    insert into node_cursors (backend, cursor)
    select $14::text, $15::text where $15::text is not null and exists (select 1 from raised)
    on conflict (backend) do update set cursor = excluded.cursor)
select s.id as job_id, s.attempt, s.worker_id, s.quote_id, s.account_id, s.kind, s.model, s.spec,
    s.rates, s.prompt_tokens, s.max_tokens, s.held_msat, s.multiplier_milli, s.commission_ppm,
    s.queued_at, s.started_at, s.choices, s.run_limit_s
from quote left join started s on true""")


@dataclass(frozen=True, slots=True)
class _Sold:
    """What is needed of a job that another router has sold, or this one some time ago."""

    id: str
    kind: str
    model: str
    choices: str | None
    spec: str
    rates: str
    prompt_tokens: int
    max_tokens: int
    multiplier_milli: int
    prefix: int | None


@dataclass(frozen=True, slots=True)
class Started:
    """The jobs of a paid quote, and whether any of them has to wait."""

    job_ids: list[str]
    waits: bool


class PaidQuotes:
    """Starts quotes whose invoices were paid. `start_bought`: `Dispatcher.start_bought`."""

    def __init__(self, database: Database, models: Models, start_bought: StartBought) -> None:
        self._database = database
        self._models = models
        self._start_bought = start_bought
        # By payment hash: the payer's account, and the jobs. None of it changes before they start.
        self._sold: OrderedDict[str, tuple[str, Sequence[NewJob | _Sold]]] = OrderedDict()

    def remember(self, issued: IssuedInvoice, quote: NewQuote) -> None:
        """An invoice was made for a quote: most are paid within seconds, or never."""
        if quote.characters <= REMEMBERED_CHARACTERS:
            self._sold[issued.payment_hash] = (issued.account_id, quote.jobs)
        if len(self._sold) > REMEMBERED:
            self._sold.popitem(last=False)

    async def start(self, receipt: Receipt) -> Started | None:
        """Credit a receipt and start the jobs that it pays for; returns once that is committed.

        None: it is not the usual case, and nothing was changed. Raises DatabaseUnavailable, and what
        PostgreSQL refuses; then nothing was changed either, unless the connection broke.
        """
        sold = self._sold.pop(receipt.payment_hash, None)
        rows: list[Any] = []
        async with self._database.connection() as connection:
            account_id, jobs = sold or await _look(connection, receipt.payment_hash)
            if not jobs:
                return None
            lanes = {job.id: self._models.lanes_of(job) for job in jobs}

            async def buy(seats: Sequence[Seat]) -> list[Claimed]:
                rows[:] = await _start(connection, receipt, account_id, lanes, seats)
                return [Claimed(**row) for row in rows if row["started_at"] is not None]

            await self._start_bought([(job, lanes[job.id]) for job in jobs], buy)
        if not rows:
            return None
        return Started(
            [row["job_id"] for row in rows if row["job_id"] is not None],
            any(row["started_at"] is None for row in rows),
        )


async def _look(connection: Any, payment_hash: str) -> tuple[str, Sequence[_Sold]]:
    """The payer's account and the waiting jobs of an open invoice; no jobs where it is none."""
    rows = await connection.fetch(_LOOK, payment_hash, job_states.before(Event.PAY))
    sold = [_Sold(*list(row)[1:]) for row in rows]
    return (rows[0]["account_id"] if rows else ""), sold


async def _start(
    connection: Any,
    receipt: Receipt,
    account_id: str,
    lanes: dict[str, list[str]],
    seats: Sequence[Seat],
) -> list[Any]:
    client = ledger.client(account_id)
    received = Transfer(
        ledger.LIGHTNING, client, receipt.received_msat, "received", receipt.payment_hash
    )
    places = [(job_id, lane) for job_id in lanes for lane in lanes[job_id]]
    return await connection.fetch(
        _START,
        receipt.payment_hash,
        receipt.received_msat,
        receipt.settled_at,
        job_states.MOVES[Event.PAY][1].value,
        job_states.before(Event.PAY),
        list(lanes),
        [ledger.escrow(job_id) for job_id in lanes],
        [ledger.transfer_id(job_id, "hold") for job_id in lanes],
        [job_id for job_id, _ in places],
        [lane for _, lane in places],
        received.id,
        received.debit,
        client,
        receipt.backend,
        receipt.cursor,
        account_id,
        *job_inserts.seat_columns(seats),
    )
