"""All SQL of jobs, quotes and attempts that changes state or moves money.

Functions named `…_many` are handlers of the batching writer: they take many rows, run a fixed number
of statements whatever their number, and return one result for each row. Every guard comes from
`router.job_states`; the transfers of a move are posted in the transaction of the move.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, TypeVar

from billing import accounts, ledger
from billing.ledger import Transfer
from billing.settlement import divide
from router import job_queue, job_states
from router.errors import IdempotencyConflict, NotEnoughBalance, QuoteExpired
from router.job_states import Event, State


@dataclass(frozen=True, slots=True)
class NewJob:
    """A priced job. `spec` is the JSON of its JobSpec, `rates` of its Rates."""

    id: str
    index: int
    kind: str
    model: str
    spec: str
    rates: str
    prompt_tokens: int
    max_tokens: int
    base_fee_msat: int
    offer_msat: int
    multiplier_milli: int
    lane: str


@dataclass(frozen=True, slots=True)
class NewQuote:
    """A priced request. `request` is kept with it until its jobs exist."""

    id: str
    request_hash: bytes
    base_fee_msat: int
    offer_msat: int
    max_wait_s: int
    jobs: tuple[NewJob, ...]


@dataclass(frozen=True, slots=True)
class Submission:
    """A request to be paid from a balance and queued now.

    `key_id` names the key only where it has a spending limit. `once` is (scope, key): the same pair
    with the same request is the same submission. `attached_to`: the router whose client takes the
    jobs along when it goes.
    """

    quote: NewQuote
    account_id: str
    key_id: str | None = None
    once: tuple[str, str] | None = None
    attached_to: str | None = None


@dataclass(frozen=True, slots=True)
class Submitted:
    """`repeated`: it had been submitted before, as `quote_id`."""

    quote_id: str
    repeated: bool


@dataclass(frozen=True, slots=True)
class Claim:
    job_id: str
    worker_id: str
    router_id: str
    commission_ppm: int
    lease_ends_at: datetime


@dataclass(frozen=True, slots=True)
class Claimed:
    """A job that is now running on a worker, with all that is needed to settle it."""

    job_id: str
    attempt: int
    worker_id: str
    quote_id: str
    account_id: str
    kind: str
    model: str
    spec: str
    rates: str
    prompt_tokens: int
    max_tokens: int
    held_msat: int
    multiplier_milli: int
    commission_ppm: int
    queued_at: datetime
    started_at: datetime


@dataclass(frozen=True, slots=True)
class Ending:
    """A job's last move. `attempt` None: whichever is current (a cancel, an expiry).

    `charge_msat` is at most what is held; `payee` is the worker's id, None when it is not to be
    paid. `outcome`, `blame` and `error` go into the attempt's record.
    """

    job_id: str
    event: Event
    end_reason: str
    attempt: int | None = None
    charge_msat: int = 0
    payee: str | None = None
    result: str | None = None
    usage: str | None = None
    first_token_at: datetime | None = None
    outcome: str | None = None
    blame: str | None = None
    error: str | None = None
    tokens: int | None = None
    had_chunks: bool = False


@dataclass(frozen=True, slots=True)
class Ended:
    """What the move did; None in place of this: the job was not in a state for it."""

    job_id: str
    state: State
    held_msat: int
    charged_msat: int
    refunded_msat: int
    ended_at: datetime


@dataclass(frozen=True, slots=True)
class GiveBack:
    """A running job whose worker is lost or returned it; it waits again, in its old place."""

    job_id: str
    attempt: int
    lane: str
    outcome: str
    blame: str
    error: str | None = None


_FIND_ONCE = """
select i.scope, i.key, i.request_hash, i.quote_id from idempotency i
join unnest($1::text[], $2::text[]) t(scope, key) on i.scope = t.scope and i.key = t.key"""

_ADD_ONCE = """
insert into idempotency (scope, key, request_hash, quote_id)
select * from unnest($1::text[], $2::text[], $3::bytea[], $4::text[])
on conflict do nothing returning scope, key"""

_ADD_QUOTES = """
insert into quotes (id, account_id, state, request_hash, base_fee_msat, offer_msat, max_wait_s,
    expires_at)
select *, now() from unnest($1::text[], $2::text[], $3::text[], $4::bytea[], $5::bigint[],
    $6::bigint[], $7::int[])"""

_ADD_JOBS = """
insert into jobs (id, quote_id, index, account_id, key_id, kind, model, state, spec, rates,
    prompt_tokens, max_tokens, base_fee_msat, held_msat, multiplier_milli, max_wait_s, attached_to,
    seq, queued_at, wait_ends_at)
select t.id, t.quote_id, t.index, t.account_id, t.key_id, t.kind, t.model, t.state, t.spec, t.rates,
    t.prompt_tokens, t.max_tokens, t.base_fee_msat, t.held_msat, t.multiplier_milli, t.max_wait_s,
    t.attached_to, n.seq, n.queued_at, n.wait_ends_at
from unnest($1::text[], $2::text[], $3::int[], $4::text[], $5::text[], $6::text[], $7::text[],
    $8::text[], $9::text[], $10::text[], $11::bigint[], $12::bigint[], $13::bigint[], $14::bigint[],
    $15::bigint[], $16::int[], $17::text[])
    with ordinality t(id, quote_id, index, account_id, key_id, kind, model, state, spec, rates,
        prompt_tokens, max_tokens, base_fee_msat, held_msat, multiplier_milli, max_wait_s,
        attached_to, n)
cross join lateral (select
    case when t.state = 'queued' then nextval('queue_seq') end as seq,
    case when t.state = 'queued' then now() end as queued_at,
    now() + make_interval(secs => t.max_wait_s) as wait_ends_at) n
order by t.n
returning id, seq"""

_CLAIM = """
with given as (
    select * from unnest($1::text[], $2::text[], $3::text[], $4::int[], $5::timestamptz[])
        t(job_id, worker_id, router_id, commission_ppm, lease_ends_at)),
free as (
    select id from jobs where id = any($1::text[]) and state = any($6::text[])
    for update skip locked),
claimed as (
    update jobs j set state = $7, attempt = j.attempt + 1, worker_id = g.worker_id,
        router_id = g.router_id, commission_ppm = g.commission_ppm,
        lease_ends_at = g.lease_ends_at, started_at = now(), first_token_at = null
    from given g, free f where j.id = g.job_id and j.id = f.id
    returning j.*),
gone as (delete from queue q using free f where q.job_id = f.id),
tried as (
    insert into attempts (job_id, n, worker_id, router_id)
    select id, attempt, worker_id, router_id from claimed)
select id as job_id, attempt, worker_id, quote_id, account_id, kind, model, spec, rates,
    prompt_tokens, max_tokens, held_msat, multiplier_milli, commission_ppm, queued_at, started_at
from claimed"""

_END = """
update jobs j set state = t.state, ended_at = now(), end_reason = t.end_reason,
    charged_msat = t.charge_msat, result = t.result, usage = t.usage, lease_ends_at = null,
    first_token_at = coalesce(t.first_token_at, j.first_token_at),
    wipe_at = now() + make_interval(secs => $10)
from unnest($1::text[], $2::int[], $3::text[], $4::text[], $5::text[], $6::bigint[], $7::text[],
    $8::text[], $9::timestamptz[])
    t(id, attempt, befores, state, end_reason, charge_msat, result, usage, first_token_at)
where j.id = t.id and j.state = any(string_to_array(t.befores, ' '))
    and (t.attempt is null or j.attempt = t.attempt)
returning j.id, j.state, j.held_msat, j.account_id, j.key_id, j.attempt, j.commission_ppm,
    j.seq, j.ended_at"""

_END_ATTEMPTS = """
update attempts a set ended_at = now(), outcome = t.outcome, blame = t.blame, error = t.error,
    tokens = t.tokens
from unnest($1::text[], $2::int[], $3::text[], $4::text[], $5::text[], $6::bigint[])
    t(job_id, n, outcome, blame, error, tokens)
where a.job_id = t.job_id and a.n = t.n and a.ended_at is null"""

_GIVE_BACK = """
update jobs j set state = $3, worker_id = null, lease_ends_at = null, started_at = null,
    first_token_at = null, shown = false
from unnest($1::text[], $2::int[]) t(id, attempt)
where j.id = t.id and j.attempt = t.attempt and j.state = any($4::text[])
returning j.id, j.multiplier_milli, j.seq"""


async def submit_many(connection: Any, rows: list[Submission]) -> list[Any]:
    """Hold the money, store quote and jobs, queue them. Results: Submitted, or an error each.

    Errors: NotEnoughBalance, IdempotencyConflict; nothing has then changed for that row.
    """
    results: list[Any] = [None] * len(rows)
    await _find_repeated(connection, rows, results)
    # One of those that are the same submission goes first; the others follow it, and cost nothing.
    twins = _twins(rows, results)
    for i, first in twins.items():
        results[i] = rows[first]
    await _refuse_uncovered(connection, rows, results)
    await _reserve_once(connection, rows, results)
    fresh = [row for row, result in zip(rows, results, strict=True) if result is None]
    if fresh:
        await _store_quotes(connection, fresh)
        await _queue_new(
            connection, [(row, job) for row in fresh for job in row.quote.jobs], State.QUEUED
        )
    results = [
        result or Submitted(row.quote.id, repeated=False)
        for row, result in zip(rows, results, strict=True)
    ]
    for i, first in twins.items():
        results[i] = _as_its_twin(rows[first], results[first], rows[i])
    return results


def _twins(rows: list[Submission], results: list[Any]) -> dict[int, int]:
    """Rows that are the same submission as an earlier row of the batch, and which."""
    first: dict[tuple[str, str], int] = {}
    twins = {}
    for i, row in enumerate(rows):
        if results[i] is None and row.once and first.setdefault(row.once, i) != i:
            twins[i] = first[row.once]
    return twins


def _as_its_twin(first: Submission, result: Any, row: Submission) -> Any:
    if isinstance(result, Submitted):
        return _repeated(first.quote.request_hash, result.quote_id, row)
    return result


async def find_submitted(connection: Any, once: tuple[str, str], request_hash: bytes) -> str | None:
    """The quote that was submitted as `once`. Raises IdempotencyConflict: for another request."""
    before = await connection.fetchrow(_FIND_ONCE, [once[0]], [once[1]])
    if before is None:
        return None
    _check_same(before["request_hash"], request_hash)
    return before["quote_id"]


def _check_same(before: bytes, now: bytes) -> None:
    if before != now:
        raise IdempotencyConflict("this Idempotency-Key was used for another request")


async def _find_repeated(connection: Any, rows: list[Submission], results: list[Any]) -> None:
    named = [row.once for row in rows if row.once]
    if not named:
        return
    found = {
        (r["scope"], r["key"]): r
        for r in await connection.fetch(_FIND_ONCE, *(list(c) for c in zip(*named, strict=True)))
    }
    for i, row in enumerate(rows):
        before = found.get(row.once) if row.once else None
        if before is not None:
            results[i] = _repeated(before["request_hash"], before["quote_id"], row)


def _repeated(request_hash: bytes, quote_id: str, row: Submission) -> Any:
    try:
        _check_same(request_hash, row.quote.request_hash)
    except IdempotencyConflict as conflict:
        return conflict
    return Submitted(quote_id, repeated=True)


async def _refuse_uncovered(connection: Any, rows: list[Submission], results: list[Any]) -> None:
    # A running sum for each account: several rows of one batch may draw on the same balance.
    # What one row is refused, a later and smaller one may still have.
    wanted = {ledger.client(row.account_id) for row, r in zip(rows, results, strict=True) if not r}
    left = await ledger.lock_balances(connection, wanted)
    for i, row in enumerate(rows):
        if results[i] is not None:
            continue
        account = ledger.client(row.account_id)
        balance = left.get(account, 0)
        if row.quote.offer_msat > balance:
            results[i] = NotEnoughBalance(
                "the balance does not cover this request",
                balance_msat=balance,
                fee_msat=row.quote.offer_msat,
            )
        elif row.key_id and not await accounts.spend(connection, row.key_id, row.quote.offer_msat):
            results[i] = NotEnoughBalance(
                "the spending limit of this key does not cover this request",
                balance_msat=balance,
                fee_msat=row.quote.offer_msat,
            )
        else:
            left[account] = balance - row.quote.offer_msat


async def _reserve_once(connection: Any, rows: list[Submission], results: list[Any]) -> None:
    named = [
        (*row.once, row.quote.request_hash, row.quote.id)
        for row, result in zip(rows, results, strict=True)
        if result is None and row.once
    ]
    if not named:
        return
    columns = [list(column) for column in zip(*named, strict=True)]
    free = {(r["scope"], r["key"]) for r in await connection.fetch(_ADD_ONCE, *columns)}
    for i, row in enumerate(rows):
        if results[i] is not None or row.once is None or row.once in free:
            continue
        # Another router took the pair between our look and our insert.
        if row.key_id:
            await accounts.spend(connection, row.key_id, -row.quote.offer_msat)
        taken = await connection.fetchrow(_FIND_ONCE, [row.once[0]], [row.once[1]])
        results[i] = _repeated(taken["request_hash"], taken["quote_id"], row)


async def _store_quotes(connection: Any, rows: list[Submission]) -> None:
    await connection.execute(
        _ADD_QUOTES,
        [row.quote.id for row in rows],
        [row.account_id for row in rows],
        ["paid"] * len(rows),
        [row.quote.request_hash for row in rows],
        [row.quote.base_fee_msat for row in rows],
        [row.quote.offer_msat for row in rows],
        [row.quote.max_wait_s for row in rows],
    )


async def _queue_new(connection: Any, pairs: list[tuple[Submission, NewJob]], state: State) -> None:
    """Insert jobs; those that are queued also get their place and their escrow."""
    rows = [
        (
            job.id,
            row.quote.id,
            job.index,
            row.account_id,
            row.key_id,
            job.kind,
            job.model,
            state.value,
            job.spec,
            job.rates,
            job.prompt_tokens,
            job.max_tokens,
            job.base_fee_msat,
            job.offer_msat,
            job.multiplier_milli,
            row.quote.max_wait_s,
            row.attached_to,
        )
        for row, job in pairs
    ]
    added = await connection.fetch(_ADD_JOBS, *(list(c) for c in zip(*rows, strict=True)))
    if state is not State.QUEUED:
        return
    seqs = {r["id"]: r["seq"] for r in added}
    await job_queue.add(
        connection, [(job.id, job.lane, job.multiplier_milli, seqs[job.id]) for _, job in pairs]
    )
    await ledger.post(
        connection, [_hold(row.account_id, job.id, job.offer_msat) for row, job in pairs]
    )


def _hold(account_id: str, job_id: str, amount_msat: int) -> Transfer:
    return Transfer(ledger.client(account_id), ledger.escrow(job_id), amount_msat, "hold", job_id)


async def store_awaiting(
    connection: Any, quote: NewQuote, account_id: str, *, key_id: str | None = None
) -> None:
    """Keep the jobs of a quote until `start_quote`, or until it expires."""
    submission = Submission(quote, account_id, key_id)
    await _queue_new(connection, [(submission, job) for job in quote.jobs], State.AWAITING_PAYMENT)


async def start_quote(connection: Any, quote_id: str, *, lanes: dict[str, str]) -> list[str]:
    """Queue the awaiting jobs of an open quote, holding the money; returns the jobs' ids.

    `lanes` gives each job its lane. Raises QuoteExpired when the quote is no longer open, and
    InsufficientFunds from the ledger; the transaction must then be rolled back.
    """
    opened = await connection.fetchval(
        "update quotes set state = 'paid', request = null where id = $1 and state = 'open'"
        " returning id",
        quote_id,
    )
    if opened is None:
        raise QuoteExpired("this quote has been used or has expired", quote_id=quote_id)
    jobs = await connection.fetch(
        "update jobs set state = $2, seq = nextval('queue_seq'), queued_at = now(),"
        " wait_ends_at = now() + make_interval(secs => max_wait_s)"
        " where quote_id = $1 and state = any($3::text[])"
        " returning id, account_id, held_msat, multiplier_milli, seq",
        quote_id,
        job_states.MOVES[Event.PAY][1].value,
        job_states.before(Event.PAY),
    )
    await job_queue.add(
        connection, [(j["id"], lanes[j["id"]], j["multiplier_milli"], j["seq"]) for j in jobs]
    )
    await ledger.post(connection, [_hold(j["account_id"], j["id"], j["held_msat"]) for j in jobs])
    return [j["id"] for j in jobs]


Row = TypeVar("Row", Claim, Ending, GiveBack)
Result = TypeVar("Result")


async def _in_rounds(
    rows: Sequence[Row], do: Callable[[list[Row]], Awaitable[Sequence[Result]]]
) -> list[Result]:
    """Do something for all rows, in rounds in which no job comes twice.

    Given two rows for one job, PostgreSQL would move it once, for a row of its own choosing, and
    nobody could tell for which: a client might be refunded for an answer that he has.
    """
    results: dict[int, Result] = {}
    left = dict(enumerate(rows))
    while left:
        first = {row.job_id: place for place, row in reversed(left.items())}
        places = sorted(first.values())
        for place, result in zip(places, await do([left.pop(p) for p in places]), strict=True):
            results[place] = result
    return [results[place] for place in range(len(rows))]


async def claim_many(connection: Any, rows: list[Claim]) -> list[Claimed | None]:
    """Start jobs on workers. None for a job that another claim took, or that waits no more."""
    return await _in_rounds(rows, partial(_claim_round, connection))


async def _claim_round(connection: Any, rows: list[Claim]) -> list[Claimed | None]:
    claimed = await connection.fetch(
        _CLAIM,
        [row.job_id for row in rows],
        [row.worker_id for row in rows],
        [row.router_id for row in rows],
        [row.commission_ppm for row in rows],
        [row.lease_ends_at for row in rows],
        job_states.before(Event.CLAIM),
        job_states.MOVES[Event.CLAIM][1].value,
    )
    by_id = {r["job_id"]: Claimed(**r) for r in claimed}
    return [by_id.get(row.job_id) for row in rows]


async def end_many(
    connection: Any, rows: list[Ending], *, wipe_after_s: float
) -> list[Ended | None]:
    """End jobs and divide their escrows, once each. None: not in a state for this event.

    Their texts are wiped `wipe_after_s` later.
    """
    return await _in_rounds(rows, partial(_end_round, connection, wipe_after_s))


async def _end_round(
    connection: Any, wipe_after_s: float, rows: list[Ending]
) -> list[Ended | None]:
    ended = await connection.fetch(
        _END,
        [row.job_id for row in rows],
        [row.attempt for row in rows],
        [" ".join(job_states.before(row.event)) for row in rows],
        [job_states.MOVES[row.event][1].value for row in rows],
        [row.end_reason for row in rows],
        [row.charge_msat for row in rows],
        [row.result for row in rows],
        [row.usage for row in rows],
        [row.first_token_at for row in rows],
        float(wipe_after_s),
    )
    moved = {r["id"]: r for r in ended}
    done = [(row, moved.get(row.job_id)) for row in rows]
    happened = [(row, now) for row, now in done if now is not None]
    if happened:
        await _clear(connection, happened)
        await ledger.post(connection, [t for row, now in happened for t in _settle(row, now)])
    return [None if now is None else _ended(row, now) for row, now in done]


async def expire_unpaid(
    connection: Any, quote_ids: Sequence[str], *, wipe_after_s: float
) -> list[str]:
    """End the jobs of quotes that will not be started any more; returns their ids.

    In the transaction that closes the quotes: nobody would look for these jobs again.
    """
    jobs = await connection.fetch(
        "select id from jobs where quote_id = any($1::text[]) and state = $2 for update",
        list(quote_ids),
        State.AWAITING_PAYMENT.value,
    )
    endings = [Ending(job["id"], Event.EXPIRE, "quote_expired") for job in jobs]
    if endings:
        await end_many(connection, endings, wipe_after_s=wipe_after_s)
    return [ending.job_id for ending in endings]


def _ended(row: Ending, now: Any) -> Ended:
    held_msat = _escrow_msat(now)
    return Ended(
        row.job_id,
        State(now["state"]),
        held_msat,
        row.charge_msat,
        held_msat - row.charge_msat,
        now["ended_at"],
    )


def _escrow_msat(now: Any) -> int:
    # A job that was never queued was never paid for: nothing is held, whatever was offered.
    return now["held_msat"] if now["seq"] is not None else 0


def _settle(row: Ending, now: Any) -> list[Transfer]:
    parts = divide(
        escrow_msat=_escrow_msat(now),
        charge_msat=row.charge_msat,
        commission_ppm=now["commission_ppm"] or 0,
        payable=row.payee is not None,
    )
    to = [
        (ledger.worker(row.payee or ""), parts.worker_msat, "earned"),
        (ledger.ROUTER_FEES, parts.router_msat, "commission"),
        (ledger.client(now["account_id"]), parts.refund_msat, "refund"),
    ]
    escrow = ledger.escrow(row.job_id)
    return [Transfer(escrow, account, msat, code, row.job_id) for account, msat, code in to]


async def _clear(connection: Any, happened: list[tuple[Ending, Any]]) -> None:
    """Bring what hangs on ended jobs in line: queue, attempts, chunks, limits of keys."""
    waited = [row.job_id for row, _ in happened if row.event in (Event.CANCEL, Event.EXPIRE)]
    if waited:
        await job_queue.remove(connection, waited)
    tried = [
        (r.job_id, now["attempt"], r.outcome or r.end_reason, r.blame, r.error, r.tokens)
        for r, now in happened
        if now["attempt"] > 0
    ]
    if tried:
        await _end_attempts(connection, tried)
    said = [row.job_id for row, _ in happened if row.had_chunks]
    if said:
        await connection.execute("delete from job_chunks where job_id = any($1::text[])", said)
    given_back: dict[str, int] = defaultdict(int)
    for row, now in happened:
        if now["key_id"]:
            given_back[now["key_id"]] += _escrow_msat(now) - row.charge_msat
    for key_id, amount_msat in given_back.items():
        await accounts.spend(connection, key_id, -amount_msat)


async def give_back_many(connection: Any, rows: list[GiveBack]) -> list[bool]:
    """Queue running jobs again. False for one that is not running this attempt any more."""
    return await _in_rounds(rows, partial(_give_back_round, connection))


async def _give_back_round(connection: Any, rows: list[GiveBack]) -> list[bool]:
    moved = {
        r["id"]: r
        for r in await connection.fetch(
            _GIVE_BACK,
            [row.job_id for row in rows],
            [row.attempt for row in rows],
            job_states.MOVES[Event.GIVE_BACK][1].value,
            job_states.before(Event.GIVE_BACK),
        )
    }
    back = [row for row in rows if row.job_id in moved]
    if back:
        await job_queue.add(
            connection,
            [
                (r.job_id, r.lane, moved[r.job_id]["multiplier_milli"], moved[r.job_id]["seq"])
                for r in back
            ],
        )
        await _end_attempts(
            connection, [(r.job_id, r.attempt, r.outcome, r.blame, r.error, None) for r in back]
        )
        await connection.execute(
            "delete from job_chunks where job_id = any($1::text[])", [r.job_id for r in back]
        )
    return [row.job_id in moved for row in rows]


async def _end_attempts(connection: Any, rows: Sequence[tuple]) -> None:
    await connection.execute(_END_ATTEMPTS, *(list(column) for column in zip(*rows, strict=True)))
