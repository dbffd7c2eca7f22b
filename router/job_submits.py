"""All SQL that brings jobs into being: submitting from a balance, and starting a paid quote.

`submit_plain` and `submit_bound` are handlers of the batching writer: they take many rows, run a fixed
number of statements whatever their number, and return one result for each row. The hold is posted in
the transaction that queues the job.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from billing import accounts, ledger
from router import job_inserts, job_queue, job_states
from router.errors import IdempotencyConflict, NotEnoughBalance, QuoteExpired
from router.job_records import (
    NewQuote,
    Seat,
    Submission,
    Submitted,
)
from router.job_states import Event, State

_FIND_ONCE = """
select i.scope, i.key, i.request_hash, i.quote_id from idempotency i
join unnest($1::text[], $2::text[]) t(scope, key) on i.scope = t.scope and i.key = t.key"""


_ADD_ONCE = """
insert into idempotency (scope, key, request_hash, quote_id)
select * from unnest($1::text[], $2::text[], $3::bytea[], $4::text[])
on conflict do nothing returning scope, key"""


def is_plain(row: Submission) -> bool:
    """Whether only the payer's balance decides on a submission: no key's limit, no repetition."""
    return row.key_id is None and row.once is None and row.account_id != ledger.CHECKS


async def submit_plain(
    connection: Any, rows: list[Submission], seats: Sequence[Seat] = ()
) -> list[Any]:
    """As `submit_bound` does, for rows that are plain: one statement, where all are covered.

    Jobs that have a seat start with it, unless others go before them.
    """
    if added := await job_inserts.add_covered(connection, rows, seats):
        claims = {seat.claim.job_id: seat.claim for seat in seats}
        return [
            Submitted(row.quote.id, False, job_inserts.claimed_at_once(row, claims, added))
            for row in rows
        ]
    async with connection.transaction():
        return await submit_bound(connection, rows)


async def submit_bound(connection: Any, rows: list[Submission]) -> list[Any]:
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
        await job_inserts.add(connection, fresh, State.QUEUED)
        holds = [
            job_inserts.hold(row.account_id, job.id, job.offer_msat)
            for row in fresh
            for job in row.quote.jobs
        ]
        await ledger.post(connection, holds, locked=True)
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
        if results[i] is not None or row.account_id == ledger.CHECKS:
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


async def store_awaiting(
    connection: Any, quote: NewQuote, account_id: str, *, key_id: str | None = None
) -> None:
    """Keep the jobs of a quote until `start_quote`, or until it expires."""
    await job_inserts.add(
        connection, [Submission(quote, account_id, key_id)], State.AWAITING_PAYMENT
    )


async def start_quote(
    connection: Any, quote_id: str, *, lanes: Mapping[str, Sequence[str]]
) -> list[str]:
    """Queue the awaiting jobs of an open quote, holding the money; returns the jobs' ids.

    `lanes` gives each job its lanes. Raises QuoteExpired when the quote is no longer open, and
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
        connection,
        [
            (job["id"], lane, job["multiplier_milli"], job["seq"])
            for job in jobs
            for lane in lanes[job["id"]]
        ],
    )
    await ledger.post(
        connection, [job_inserts.hold(j["account_id"], j["id"], j["held_msat"]) for j in jobs]
    )
    return [j["id"] for j in jobs]
