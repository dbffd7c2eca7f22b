"""The usual ending in one statement: that of an attempt of this router, of a job that asks no more.

Every paid job ends once, and mostly like this. Step by step (`router.job_endings`) it is a transaction
of four to six round trips to PostgreSQL; here it is one statement, which is its own transaction. The
attempt has known since its claim what is held, for whom and at which commission, so the escrow is
divided before the database is asked. A job that is otherwise is left as it is, and ends step by step.
Both ways make the same rows with the same ids (tests/test_plain_endings.py holds them side by side).
"""

from __future__ import annotations

from typing import Any

import asyncpg
import orjson

from router import job_states
from router.database import PartlyDone
from router.job_endings import end_many, settle
from router.job_records import Claimed, Ended, Ending
from router.job_states import Event, State

_ENDINGS = frozenset({Event.FINISH, Event.FAIL, Event.CANCEL})

# Each job is looked up and locked by its id, whatever its state, for the reasons in `router.job_store`;
# `lateral`, so that there is one plan for any number of them, and it is not made anew each time.
# Everything hangs on the escrow: only where one is emptied does money go anywhere, and a job end. A job
# with a key's limit or a webhook asks for more than this. Balances are raised in name order, as they
# are locked elsewhere. A transfer that was posted before ends it all by a constraint. Short texts come
# as one JSON: asyncpg looks at the type of each element of an array in Python.
_END = """
with locked as materialized (
    select g.*, j.was, j.holds
    from rows from (
        unnest($1::text[]), unnest($2::text[]), json_to_recordset($3::json) as (
            attempt int, state text, end_reason text, charge_msat bigint, usage text,
            first_token_at timestamptz, answer_hash bytea, outcome text, blame text, error text,
            tokens bigint, held_msat bigint, commission_ppm int, account_id text))
        as g(id, result, attempt, state, end_reason, charge_msat, usage, first_token_at,
            answer_hash, outcome, blame, error, tokens, held_msat, commission_ppm, account_id)
    cross join lateral (
        select state as was,
            attempt = g.attempt and router_id = $5 and account_id = g.account_id
            and held_msat = g.held_msat and commission_ppm = g.commission_ppm
            and key_id is null and webhook is null as holds
        from jobs where id = g.id for update) j),
emptied as (
    delete from ledger_balances b using locked l
    where b.account = 'liabilities:escrow:' || l.id and b.balance_msat = l.held_msat
        and l.was = $7 and l.holds
    returning l.*),
ended as (
    update jobs j set state = e.state, ended_at = now(), end_reason = e.end_reason,
        charged_msat = e.charge_msat, result = e.result, usage = e.usage, lease_ends_at = null,
        first_token_at = coalesce(e.first_token_at, j.first_token_at),
        answer_hash = e.answer_hash, wipe_at = now() + make_interval(secs => $6)
    from emptied e where j.id = e.id
    returning j.id, j.ended_at),
tried as (
    update attempts a set ended_at = now(), outcome = e.outcome, blame = e.blame, error = e.error,
        tokens = e.tokens
    from emptied e where a.job_id = e.id and a.n = e.attempt and a.ended_at is null),
said as (
    delete from job_chunks c
    where c.job_id = any($8::text[]) and c.job_id in (select id from emptied)),
parts as (
    select t.* from json_to_recordset($4::json) as t(
        id text, job_id text, credit text, amount_msat bigint, code text)
    join emptied e on e.id = t.job_id),
posted as (
    insert into ledger_transfers (id, debit, credit, amount_msat, code, reference)
    select id, 'liabilities:escrow:' || job_id, credit, amount_msat, code, job_id from parts),
raised as (
    insert into ledger_balances (account, balance_msat)
    select credit, sum(amount_msat)::bigint from parts
    where starts_with(credit, 'liabilities:') group by credit order by credit
    on conflict (account) do update
        set balance_msat = ledger_balances.balance_msat + excluded.balance_msat)
select id, ended_at from ended"""


def is_plain(row: Ending, router_id: str) -> bool:
    """Whether an ending may be tried in one statement. The database has the last word."""
    claimed = row.claimed
    return (
        claimed is not None
        and row.event in _ENDINGS
        and row.attempt == claimed.attempt
        and row.router_id == router_id
        # Without a fee there is no escrow to hang on.
        and claimed.held_msat > 0
        # The blame of earlier attempts is shifted as well.
        and not (row.blame == "job" and claimed.attempt > 1)
    )


async def end_plain(
    connection: Any, rows: list[Ending], *, router_id: str, wipe_after_s: float
) -> list[Ended | None]:
    """As `end_many` does: those that are plain in one statement, then what is left step by step.

    A handler of the batching writer. Without a transaction around it, what the statement has done stays
    done when a step fails, and is told in a PartlyDone.
    """
    first: dict[str, int] = {}
    for place, row in enumerate(rows):
        if is_plain(row, router_id):
            first.setdefault(row.job_id, place)
    ended: dict[str, Ended] = {}
    if first:
        # By their ids, so that two that want the same jobs wait for each other in one order.
        plain = [rows[first[job_id]] for job_id in sorted(first)]
        try:
            ended = await _end(connection, plain, router_id, wipe_after_s)
        except asyncpg.IntegrityConstraintViolationError:
            # Nothing was changed: the steps post what is not there yet.
            if connection.is_in_transaction():
                raise
    results: dict[int, Ended | None] = {first[job_id]: done for job_id, done in ended.items()}
    left = [place for place in range(len(rows)) if place not in results]
    if left:
        is_done = bool(results) and not connection.is_in_transaction()
        try:
            async with connection.transaction():
                steps = await end_many(
                    connection, [rows[place] for place in left], wipe_after_s=wipe_after_s
                )
        except Exception as error:
            if is_done:
                raise PartlyDone(dict(results)) from error
            raise
        results |= zip(left, steps, strict=True)
    return [results[place] for place in range(len(rows))]


async def _end(
    connection: Any, rows: list[Ending], router_id: str, wipe_after_s: float
) -> dict[str, Ended]:
    """What has ended, by its id."""
    pairs = [(row, row.claimed) for row in rows if row.claimed is not None]
    done = await connection.fetch(
        _END,
        [row.job_id for row in rows],
        [row.result for row in rows],
        orjson.dumps([_given(row, claimed) for row, claimed in pairs]).decode(),
        orjson.dumps([t for row, claimed in pairs for t in _transfers(row, claimed)]).decode(),
        router_id,
        float(wipe_after_s),
        State.RUNNING.value,
        [row.job_id for row in rows if row.had_chunks],
    )
    ended_at = {job["id"]: job["ended_at"] for job in done}
    return {
        row.job_id: Ended(
            row.job_id,
            job_states.MOVES[row.event][1],
            claimed.held_msat,
            row.charge_msat,
            claimed.held_msat - row.charge_msat,
            ended_at[row.job_id],
        )
        for row, claimed in pairs
        if row.job_id in ended_at
    }


def _given(row: Ending, claimed: Claimed) -> dict[str, Any]:
    answer_hash = row.answer_hash
    return {
        "attempt": row.attempt,
        "state": job_states.MOVES[row.event][1],
        "end_reason": row.end_reason,
        "charge_msat": row.charge_msat,
        "usage": row.usage,
        "first_token_at": row.first_token_at,
        "answer_hash": None if answer_hash is None else "\\x" + answer_hash.hex(),
        "outcome": row.outcome or row.end_reason,
        "blame": row.blame,
        "error": row.error,
        "tokens": row.tokens,
        "held_msat": claimed.held_msat,
        "commission_ppm": claimed.commission_ppm,
        "account_id": claimed.account_id,
    }


def _transfers(row: Ending, claimed: Claimed) -> list[dict[str, Any]]:
    transfers = settle(
        row,
        escrow_msat=claimed.held_msat,
        commission_ppm=claimed.commission_ppm,
        account_id=claimed.account_id,
    )
    return [
        {
            "id": t.id,
            "job_id": row.job_id,
            "credit": t.credit,
            "amount_msat": t.amount_msat,
            "code": t.code,
        }
        for t in transfers
        if t.amount_msat > 0
    ]
