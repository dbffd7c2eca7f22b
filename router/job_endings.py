"""All SQL that ends jobs and divides the money held for them, step by step.

`end_many` is a handler of the batching writer, and ends jobs in every state and for every reason.
Most endings are of one kind, which `router.plain_endings` writes in one statement; what that has left
comes here. Both make the same rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any

from billing import accounts, ledger
from billing.ledger import Transfer
from billing.settlement import divide
from router import job_queue, job_states, webhook_store
from router.job_records import Ended, Ending
from router.job_states import Event, State
from router.job_store import END_ATTEMPTS, in_rounds, shift_blame

# Jobs are locked in the order in which they are given, as `router.plain_endings` does: left to itself,
# PostgreSQL would take them in whatever order its plan has.
_END = """
with given as materialized (
    select t.* from unnest($1::text[], $2::int[], $3::text[], $4::text[], $5::text[], $6::bigint[],
        $7::text[], $8::text[], $9::timestamptz[], $10::bytea[], $12::text[], $13::text[],
        $14::text[], $15::bigint[], $16::text[])
        t(id, attempt, befores, state, end_reason, charge_msat, result, usage, first_token_at,
            answer_hash, outcome, blame, error, tokens, router_id)
    cross join lateral (select from jobs where jobs.id = t.id for update) j),
ended as (
    update jobs j set state = t.state, ended_at = now(), end_reason = t.end_reason,
        charged_msat = t.charge_msat, result = t.result, usage = t.usage, lease_ends_at = null,
        first_token_at = coalesce(t.first_token_at, j.first_token_at),
        answer_hash = t.answer_hash, wipe_at = now() + make_interval(secs => $11)
    from given t
    where j.id = t.id and j.state = any(string_to_array(t.befores, ' '))
        and (t.attempt is null or j.attempt = t.attempt)
        and (t.router_id is null or j.router_id = t.router_id or j.state <> 'running')
    returning j.id, j.state, j.held_msat, j.account_id, j.key_id, j.attempt, j.commission_ppm,
        j.seq, j.webhook, j.ended_at),
tried as (
    update attempts a set ended_at = now(), outcome = t.outcome, blame = t.blame, error = t.error,
        tokens = t.tokens
    from ended e join given t on t.id = e.id
    where a.job_id = e.id and a.n = e.attempt and a.ended_at is null)
select * from ended"""


async def end_many(
    connection: Any, rows: list[Ending], *, wipe_after_s: float
) -> list[Ended | None]:
    """End jobs and divide their escrows, once each. None: not in a state for this event.

    Their texts are wiped `wipe_after_s` later.
    """
    return await in_rounds(rows, partial(_end_round, connection, wipe_after_s))


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
        [row.answer_hash for row in rows],
        float(wipe_after_s),
        [row.outcome or row.end_reason for row in rows],
        [row.blame for row in rows],
        [row.error for row in rows],
        [row.tokens for row in rows],
        [row.router_id for row in rows],
    )
    moved = {r["id"]: r for r in ended}
    done = [(row, moved.get(row.job_id)) for row in rows]
    happened = [(row, now) for row, now in done if now is not None]
    if happened:
        await _end_late_attempts(connection, happened)
        await _clear(connection, happened)
        await ledger.post(connection, [t for row, now in happened for t in _transfers(row, now)])
        await _raise_limits(connection, happened)
    return [None if now is None else _ended(row, now) for row, now in done]


async def expire_unpaid(
    connection: Any, quote_ids: Sequence[str], *, wipe_after_s: float
) -> list[str]:
    """End the jobs of quotes that will not be started any more; returns their ids.

    In the transaction that closes the quotes: nobody would look for these jobs again.
    """
    jobs = await connection.fetch(
        "select id from jobs where quote_id = any($1::text[]) and state = $2 order by id for update",
        list(quote_ids),
        State.AWAITING_PAYMENT.value,
    )
    endings = [Ending(job["id"], Event.EXPIRE, "quote_expired") for job in jobs]
    if endings:
        await end_many(connection, endings, wipe_after_s=wipe_after_s)
    return [ending.job_id for ending in endings]


async def _end_late_attempts(connection: Any, happened: list[tuple[Ending, Any]]) -> None:
    """End attempts whose claim was committed while an ending that knew of none waited for the job's
    row: for the statement that ended the job, the row of the attempt was not there yet."""
    late = [
        (row, now["attempt"]) for row, now in happened if row.attempt is None and now["attempt"]
    ]
    if late:
        await connection.execute(
            END_ATTEMPTS,
            [row.job_id for row, _ in late],
            [attempt for _, attempt in late],
            [row.outcome or row.end_reason for row, _ in late],
            [row.blame for row, _ in late],
            [row.error for row, _ in late],
        )


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


def _transfers(row: Ending, now: Any) -> list[Transfer]:
    return settle(
        row,
        escrow_msat=_escrow_msat(now),
        commission_ppm=now["commission_ppm"] or 0,
        account_id=now["account_id"],
    )


def settle(
    row: Ending, *, escrow_msat: int, commission_ppm: int, account_id: str
) -> list[Transfer]:
    """The transfers that divide a job's escrow; some may be of 0 msat. Pure."""
    parts = divide(
        escrow_msat=escrow_msat,
        charge_msat=row.charge_msat,
        commission_ppm=commission_ppm,
        payable=row.payee is not None,
    )
    to = [
        (ledger.worker(row.payee or ""), parts.worker_msat, "earned"),
        (ledger.ROUTER_FEES, parts.router_msat, "commission"),
        (ledger.payer(account_id), parts.refund_msat, "refund"),
    ]
    escrow = ledger.escrow(row.job_id)
    return [Transfer(escrow, account, msat, code, row.job_id) for account, msat, code in to]


async def _clear(connection: Any, happened: list[tuple[Ending, Any]]) -> None:
    """Bring what hangs on ended jobs in line: queue, blame, chunks, webhooks."""
    waited = [row.job_id for row, _ in happened if row.event in (Event.CANCEL, Event.EXPIRE)]
    if waited:
        await job_queue.remove(connection, waited)
    await shift_blame(connection, [(r.job_id, now["attempt"], r.blame) for r, now in happened])
    said = [row.job_id for row, _ in happened if row.had_chunks]
    if said:
        await connection.execute("delete from job_chunks where job_id = any($1::text[])", said)
    hooks = [
        (row.job_id, now["webhook"])
        for row, now in happened
        # A job that was never paid for calls nobody: quotes are free, and would be a way to knock.
        if now["webhook"] and now["seq"] is not None
    ]
    if hooks:
        await webhook_store.add(connection, hooks)


async def _raise_limits(connection: Any, happened: list[tuple[Ending, Any]]) -> None:
    """Give back to keys what their jobs did not cost.

    After the refunds, which lock the accounts of these keys: so do submissions, before they spend.
    """
    given_back: dict[str, int] = defaultdict(int)
    for row, now in happened:
        refund_msat = _escrow_msat(now) - row.charge_msat
        if now["key_id"] and refund_msat:
            given_back[now["key_id"]] += refund_msat
    for key_id, amount_msat in given_back.items():
        await accounts.spend(connection, key_id, -amount_msat)
