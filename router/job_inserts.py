"""The rows of new jobs: with their quotes and places, and with the hold of their money, and with the
claims of workers that have a seat for them, where all of it can be one statement."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from billing import ledger
from billing.ledger import Transfer
from billing.sql import one_plan
from router.job_records import Claim, Claimed, NewJob, Seat, Submission
from router.job_states import State

# Jobs that are queued get their places with their rows, in all of their lanes at once. One for which a
# worker keeps a seat starts instead, unless something that waits in that worker's lanes goes before it.
_ADD_IF = """
with {before}sold as (
    select * from unnest($1::text[], $2::text[], $3::text[], $4::bytea[], $5::bigint[],
        $6::bigint[], $7::int[], $8::text[])
        q(id, account_id, key_id, request_hash, base_fee_msat, offer_msat, max_wait_s,
            attached_to){only_if}),
quoted as (
    insert into quotes (id, account_id, state, request_hash, base_fee_msat, offer_msat, max_wait_s,
        expires_at)
    select id, account_id, 'paid', request_hash, base_fee_msat, offer_msat, max_wait_s, now()
    from sold where $9 = 'queued'),
waiting as (
    select l.set, max(q.multiplier_milli) as milli
    from unnest($34::int[], $35::text[]) l(set, lane)
    cross join lateral (select multiplier_milli from queue where queue.lane = l.lane
        order by multiplier_milli desc, seq limit 1) q
    group by l.set),
added as (
    insert into jobs (id, quote_id, index, account_id, key_id, kind, model, state, spec, rates,
        prompt_tokens, max_tokens, base_fee_msat, held_msat, multiplier_milli, max_wait_s,
        attached_to, choices, webhook, prefix, run_limit_s, seq, queued_at, wait_ends_at,
        attempt, worker_id, router_id, commission_ppm, lease_ends_at, started_at)
    select t.id, t.quote_id, t.index, q.account_id, q.key_id, t.kind, t.model,
        case when s.worker_id is null then $9 else 'running' end, t.spec,
        t.rates, t.prompt_tokens, t.max_tokens, t.base_fee_msat, t.held_msat, t.multiplier_milli,
        q.max_wait_s, q.attached_to, t.choices, t.webhook, t.prefix, t.run_limit_s,
        n.seq, n.queued_at, now() + make_interval(secs => q.max_wait_s),
        case when s.worker_id is null then 0 else 1 end, s.worker_id, s.router_id,
        s.commission_ppm, s.lease_ends_at, s.started_at
    from unnest($10::text[], $11::text[], $12::int[], $13::text[], $14::text[], $15::text[],
        $16::text[], $17::bigint[], $18::bigint[], $19::bigint[], $20::bigint[], $21::bigint[],
        $22::text[], $23::text[], $24::bigint[], $25::int[])
        with ordinality t(id, quote_id, index, kind, model, spec, rates, prompt_tokens, max_tokens,
            base_fee_msat, held_msat, multiplier_milli, choices, webhook, prefix, run_limit_s, n)
    join sold q on q.id = t.quote_id
    left join lateral (
        select k.worker_id, $31::text as router_id, $32::int as commission_ppm,
            $33::timestamptz as lease_ends_at, now() as started_at
        from unnest($28::text[], $29::text[], $30::int[]) k(job_id, worker_id, set)
        where k.job_id = t.id and not exists (
            select 1 from waiting w where w.set = k.set and w.milli >= t.multiplier_milli)) s on true
    cross join lateral (select
        -- Of its row, or it would be taken once for all rows.
        case when $9 = 'queued' and t.n > 0 then nextval('queue_seq') end as seq,
        case when $9 = 'queued' then now() end as queued_at) n
    order by t.n
    returning id, state, multiplier_milli, seq, worker_id, router_id, started_at),
placed as (
    insert into queue (job_id, lane, multiplier_milli, seq)
    select a.id, l.lane, a.multiplier_milli, a.seq
    from added a join unnest($26::text[], $27::text[]) l(job_id, lane) on l.job_id = a.id
    where a.state = 'queued'
    on conflict do nothing),
tried as (
    insert into attempts (job_id, n, worker_id, router_id)
    select id, 1, worker_id, router_id from added where state = 'running')
select id, started_at from added"""

# The payers' rows are locked in name order, and what is read of them then is the latest; unless each
# covers what is drawn on it, nothing happens at all. The jobs are new, and so are their escrows.
_HOLD = """locked as (
    select b.account, b.balance_msat, g.msat
    from ledger_balances b
    join unnest($36::text[], $37::bigint[]) g(account, msat) on g.account = b.account
    order by b.account for update of b),
covered as (
    select count(*) = cardinality($36::text[]) as all_of_them from locked
    where balance_msat >= msat),
held as (
    select t.* from unnest($38::text[], $39::text[], $40::text[], $41::bigint[], $42::text[])
        t(id, payer, escrow, msat, job_id)
    where (select all_of_them from covered)),
posted as (
    insert into ledger_transfers (id, debit, credit, amount_msat, code, reference)
    select id, payer, escrow, msat, 'hold', job_id from held),
opened as (
    insert into ledger_balances (account, balance_msat)
    select escrow, msat from held order by escrow),
lowered as (
    update ledger_balances b set balance_msat = b.balance_msat - l.msat
    from locked l where b.account = l.account and (select all_of_them from covered)),
"""

_ADD = one_plan(_ADD_IF.format(before="", only_if=""))
_ADD_COVERED = one_plan(
    _ADD_IF.format(before=_HOLD, only_if="\n    where (select all_of_them from covered)")
)


async def add(connection: Any, rows: list[Submission], state: State) -> None:
    """Insert jobs; those that are queued also get their quotes' rows and their places."""
    await connection.execute(_ADD, *_columns(rows, state, ()))


async def add_covered(
    connection: Any, rows: list[Submission], seats: Sequence[Seat] = ()
) -> dict[str, datetime | None]:
    """Hold, insert and queue or start, if all payers have what is drawn on them; else nothing.

    Returns all jobs by their ids, with when they started, None for those that wait; empty: nothing.
    """
    drawn: dict[str, int] = defaultdict(int)
    holds: list[Transfer] = []
    for row in rows:
        for job in row.quote.jobs:
            drawn[ledger.client(row.account_id)] += job.offer_msat
            if job.offer_msat > 0:
                holds.append(hold(row.account_id, job.id, job.offer_msat))
    added = await connection.fetch(
        _ADD_COVERED,
        *_columns(rows, State.QUEUED, seats),
        list(drawn),
        list(drawn.values()),
        [t.id for t in holds],
        [t.debit for t in holds],
        [t.credit for t in holds],
        [t.amount_msat for t in holds],
        [t.reference for t in holds],
    )
    return dict(added)


def claimed_at_once(
    row: Submission, claims: Mapping[str, Claim], added: Mapping[str, datetime | None]
) -> tuple[Claimed, ...]:
    """What `add_covered` has started of a submission; `claims` by their jobs."""
    return tuple(
        _claimed(row, job, claims[job.id], at)
        for job in row.quote.jobs
        if (at := added[job.id]) is not None
    )


def _claimed(row: Submission, job: NewJob, claim: Claim, at: datetime) -> Claimed:
    return Claimed(
        job_id=job.id,
        attempt=1,
        worker_id=claim.worker_id,
        quote_id=row.quote.id,
        account_id=row.account_id,
        kind=job.kind,
        model=job.model,
        spec=job.spec,
        rates=job.rates,
        prompt_tokens=job.prompt_tokens,
        max_tokens=job.max_tokens,
        held_msat=job.offer_msat,
        multiplier_milli=job.multiplier_milli,
        commission_ppm=claim.commission_ppm,
        queued_at=at,
        started_at=at,
        choices=job.choices,
        run_limit_s=job.run_limit_s,
    )


def _columns(rows: list[Submission], state: State, seats: Sequence[Seat]) -> list[Any]:
    pairs = [(row, job) for row in rows for job in row.quote.jobs]
    places = [(job.id, lane) for _, job in pairs for lane in job.lanes]
    return [
        [row.quote.id for row in rows],
        [row.account_id for row in rows],
        [row.key_id for row in rows],
        [row.quote.request_hash for row in rows],
        [row.quote.base_fee_msat for row in rows],
        [row.quote.offer_msat for row in rows],
        [row.quote.max_wait_s for row in rows],
        [row.attached_to for row in rows],
        state.value,
        [job.id for _, job in pairs],
        [row.quote.id for row, _ in pairs],
        [job.index for _, job in pairs],
        [job.kind for _, job in pairs],
        [job.model for _, job in pairs],
        [job.spec for _, job in pairs],
        [job.rates for _, job in pairs],
        [job.prompt_tokens for _, job in pairs],
        [job.max_tokens for _, job in pairs],
        [job.base_fee_msat for _, job in pairs],
        [job.offer_msat for _, job in pairs],
        [job.multiplier_milli for _, job in pairs],
        [job.choices for _, job in pairs],
        [job.webhook for _, job in pairs],
        [job.prefix for _, job in pairs],
        [job.run_limit_s for _, job in pairs],
        [job_id for job_id, _ in places],
        [lane for _, lane in places],
        *seat_columns(seats),
    ]


def seat_columns(seats: Sequence[Seat]) -> list[Any]:
    """Seats as a statement takes them: job, worker, number of a set of lanes for each; what all have
    in common, since they are of one router and one moment; and the lanes of the sets, by number."""
    drained = {seat.drains: number for number, seat in enumerate(seats)}
    probes = [(number, lane) for lanes, number in drained.items() for lane in lanes]
    first = seats[0].claim if seats else None
    return [
        [seat.claim.job_id for seat in seats],
        [seat.claim.worker_id for seat in seats],
        [drained[seat.drains] for seat in seats],
        first.router_id if first else None,
        first.commission_ppm if first else None,
        first.lease_ends_at if first else None,
        [number for number, _ in probes],
        [lane for _, lane in probes],
    ]


def hold(account_id: str, job_id: str, amount_msat: int) -> Transfer:
    return Transfer(ledger.payer(account_id), ledger.escrow(job_id), amount_msat, "hold", job_id)
