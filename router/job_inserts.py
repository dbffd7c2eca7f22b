"""The rows of new jobs: with their quotes and places, and with the hold of their money where all of it
can be one statement."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from billing import ledger
from billing.ledger import Transfer
from router.job_records import Submission
from router.job_states import State

# Jobs that are queued get their places with their rows, in all of their lanes at once.
_ADD_IF = """
with {before}quoted as (
    insert into quotes (id, account_id, state, request_hash, base_fee_msat, offer_msat, max_wait_s,
        expires_at)
    select *, now() from unnest($1::text[], $2::text[], $3::text[], $4::bytea[], $5::bigint[],
        $6::bigint[], $7::int[]){only_if}),
added as (
    insert into jobs (id, quote_id, index, account_id, key_id, kind, model, state, spec, rates,
        prompt_tokens, max_tokens, base_fee_msat, held_msat, multiplier_milli, max_wait_s,
        attached_to, choices, webhook, prefix, run_limit_s, seq, queued_at, wait_ends_at)
    select t.id, t.quote_id, t.index, t.account_id, t.key_id, t.kind, t.model, t.state, t.spec,
        t.rates, t.prompt_tokens, t.max_tokens, t.base_fee_msat, t.held_msat, t.multiplier_milli,
        t.max_wait_s, t.attached_to, t.choices, t.webhook, t.prefix, t.run_limit_s,
        n.seq, n.queued_at, n.wait_ends_at
    from unnest($8::text[], $9::text[], $10::int[], $11::text[], $12::text[], $13::text[],
        $14::text[], $15::text[], $16::text[], $17::text[], $18::bigint[], $19::bigint[],
        $20::bigint[], $21::bigint[], $22::bigint[], $23::int[], $24::text[], $25::text[],
        $26::text[], $27::bigint[], $28::int[])
        with ordinality t(id, quote_id, index, account_id, key_id, kind, model, state, spec, rates,
            prompt_tokens, max_tokens, base_fee_msat, held_msat, multiplier_milli, max_wait_s,
            attached_to, choices, webhook, prefix, run_limit_s, n)
    cross join lateral (select
        case when t.state = 'queued' then nextval('queue_seq') end as seq,
        case when t.state = 'queued' then now() end as queued_at,
        now() + make_interval(secs => t.max_wait_s) as wait_ends_at) n{only_if}
    order by t.n
    returning id, multiplier_milli, seq),
placed as (
    insert into queue (job_id, lane, multiplier_milli, seq)
    select a.id, l.lane, a.multiplier_milli, a.seq
    from added a join unnest($29::text[], $30::text[]) l(job_id, lane) on l.job_id = a.id
    where a.seq is not null
    on conflict do nothing)
select count(*) from added"""

# The payers' rows are locked in name order, and what is read of them then is the latest; unless each
# covers what is drawn on it, nothing happens at all. The jobs are new, and so are their escrows.
_HOLD = """locked as (
    select b.account, b.balance_msat, g.msat
    from ledger_balances b
    join unnest($31::text[], $32::bigint[]) g(account, msat) on g.account = b.account
    order by b.account for update of b),
covered as (
    select count(*) = cardinality($31::text[]) as all_of_them from locked
    where balance_msat >= msat),
held as (
    select t.* from unnest($33::text[], $34::text[], $35::text[], $36::bigint[], $37::text[])
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

_ADD = _ADD_IF.format(before="", only_if="")
_ADD_COVERED = _ADD_IF.format(before=_HOLD, only_if="\n    where (select all_of_them from covered)")


async def add(connection: Any, rows: list[Submission], state: State) -> None:
    """Insert jobs; those that are queued also get their quotes' rows and their places."""
    await connection.execute(_ADD, *_columns(rows, state))


async def add_covered(connection: Any, rows: list[Submission]) -> bool:
    """Hold, insert and queue, if all payers have what is drawn on them; else nothing."""
    drawn: dict[str, int] = defaultdict(int)
    holds: list[Transfer] = []
    for row in rows:
        for job in row.quote.jobs:
            drawn[ledger.client(row.account_id)] += job.offer_msat
            if job.offer_msat > 0:
                holds.append(hold(row.account_id, job.id, job.offer_msat))
    added = await connection.fetchval(
        _ADD_COVERED,
        *_columns(rows, State.QUEUED),
        list(drawn),
        list(drawn.values()),
        [t.id for t in holds],
        [t.debit for t in holds],
        [t.credit for t in holds],
        [t.amount_msat for t in holds],
        [t.reference for t in holds],
    )
    return added > 0


def _columns(rows: list[Submission], state: State) -> list[list[Any]]:
    quotes = [row for row in rows if state is State.QUEUED]
    pairs = [(row, job) for row in rows for job in row.quote.jobs]
    places = [(job.id, lane) for _, job in pairs for lane in job.lanes]
    return [
        [row.quote.id for row in quotes],
        [row.account_id for row in quotes],
        ["paid"] * len(quotes),
        [row.quote.request_hash for row in quotes],
        [row.quote.base_fee_msat for row in quotes],
        [row.quote.offer_msat for row in quotes],
        [row.quote.max_wait_s for row in quotes],
        [job.id for _, job in pairs],
        [row.quote.id for row, _ in pairs],
        [job.index for _, job in pairs],
        [row.account_id for row, _ in pairs],
        [row.key_id for row, _ in pairs],
        [job.kind for _, job in pairs],
        [job.model for _, job in pairs],
        [state.value] * len(pairs),
        [job.spec for _, job in pairs],
        [job.rates for _, job in pairs],
        [job.prompt_tokens for _, job in pairs],
        [job.max_tokens for _, job in pairs],
        [job.base_fee_msat for _, job in pairs],
        [job.offer_msat for _, job in pairs],
        [job.multiplier_milli for _, job in pairs],
        [row.quote.max_wait_s for row, _ in pairs],
        [row.attached_to for row, _ in pairs],
        [job.choices for _, job in pairs],
        [job.webhook for _, job in pairs],
        [job.prefix for _, job in pairs],
        [job.run_limit_s for _, job in pairs],
        [job_id for job_id, _ in places],
        [lane for _, lane in places],
    ]


def hold(account_id: str, job_id: str, amount_msat: int) -> Transfer:
    return Transfer(ledger.payer(account_id), ledger.escrow(job_id), amount_msat, "hold", job_id)
