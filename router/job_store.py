"""All SQL that brings jobs to workers, and back into the queue: claims, resumptions, give-backs.

Functions named `…_many` are handlers of the batching writer: they take many rows, run a fixed number
of statements whatever their number, and return one result for each row. Every guard comes from
`router.job_states`. Jobs come into being in `router.job_submits` and end in `router.job_endings`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from typing import Any, TypeVar

from billing.sql import one_plan
from router import choices, job_queue, job_states
from router.job_records import Claim, Claimed, Ending, GiveBack, Resumed
from router.job_states import Event

# Jobs are locked by their ids, whatever their state: for the same reason as in `job_queue`'s look. One
# that has changed since this statement began is passed over, like one that is locked: it may have been
# given back meanwhile, and the places that it then has in the queue could not be seen here, and would
# stay there for ever.
_CLAIM = one_plan("""
with given as (
    select * from unnest($1::text[], $2::text[], $3::text[], $4::int[], $5::timestamptz[],
        $8::text[]) t(job_id, worker_id, router_id, commission_ppm, lease_ends_at, model)),
free as (
    select id, state from jobs j
    where id = any($1::text[]) and xmin = (select xmin from jobs seen where seen.id = j.id)
    for update skip locked),
claimed as (
    update jobs j set state = $7, attempt = j.attempt + 1, worker_id = g.worker_id,
        router_id = g.router_id, commission_ppm = g.commission_ppm,
        lease_ends_at = g.lease_ends_at, started_at = now(), first_token_at = null,
        model = case when j.choices is null then j.model else coalesce(g.model, j.model) end,
        rates = case when j.choices is null then j.rates
            else coalesce(j.choices::json ->> g.model, j.choices::json ->> '*', j.rates) end
    from given g, free f where j.id = g.job_id and j.id = f.id and f.state = any($6::text[])
    returning j.*),
gone as (delete from queue q using claimed c where q.job_id = c.id),
tried as (
    insert into attempts (job_id, n, worker_id, router_id)
    select id, attempt, worker_id, router_id from claimed)
select id as job_id, attempt, worker_id, quote_id, account_id, kind, model, spec, rates,
    prompt_tokens, max_tokens, held_msat, multiplier_milli, commission_ppm, queued_at, started_at,
    choices, run_limit_s
from claimed""")


END_ATTEMPTS = """
update attempts a set ended_at = now(), outcome = t.outcome, blame = t.blame, error = t.error
from unnest($1::text[], $2::int[], $3::text[], $4::text[], $5::text[])
    t(job_id, n, outcome, blame, error)
where a.job_id = t.job_id and a.n = t.n and a.ended_at is null"""


# Two workers that fail at one job were both unlucky.
SHIFT_BLAME = """
update attempts set blame = 'job' where job_id = any($1::text[]) and blame = 'worker'"""


_GIVE_BACK = one_plan("""
with given as materialized (
    select t.* from unnest($1::text[], $2::int[], $5::text[]) t(id, attempt, router_id)
    cross join lateral (select from jobs where jobs.id = t.id for update) j)
update jobs j set state = $3, worker_id = null, lease_ends_at = null, started_at = null,
    first_token_at = null, shown = false
from given t
where j.id = t.id and j.attempt = t.attempt and j.state = any($4::text[])
    and (t.router_id is null or j.router_id = t.router_id)
returning j.id, j.multiplier_milli, j.seq""")


_RESUME = """
update jobs j set router_id = $3, lease_ends_at = $4
from unnest($1::text[], $2::int[]) t(id, attempt)
where j.id = t.id and j.attempt = t.attempt and j.state = 'running' and j.worker_id = $5
    and j.cancel_reason is null
returning j.id as job_id, j.*"""


CLAIMED = tuple(Claimed.__dataclass_fields__)

Row = TypeVar("Row", Claim, Ending, GiveBack)


Result = TypeVar("Result")


async def in_rounds(
    rows: Sequence[Row], do: Callable[[list[Row]], Awaitable[Sequence[Result]]]
) -> list[Result]:
    """Do something for all rows, in rounds in which no job comes twice.

    Given two rows for one job, PostgreSQL would move it once, for a row of its own choosing, and
    nobody could tell for which: a client might be refunded for an answer that he has. In each round
    jobs come by their ids, so that two that want the same ones wait for each other in one order.
    """
    results: dict[int, Result] = {}
    left = dict(enumerate(rows))
    while left:
        first = {row.job_id: place for place, row in reversed(left.items())}
        places = [first[job_id] for job_id in sorted(first)]
        for place, result in zip(places, await do([left.pop(p) for p in places]), strict=True):
            results[place] = result
    return [results[place] for place in range(len(rows))]


async def claim_many(connection: Any, rows: list[Claim]) -> list[Claimed | None]:
    """Start jobs on workers. None for a job that another claim took, or that waits no more."""
    return await in_rounds(rows, partial(_claim_round, connection))


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
        [row.model for row in rows],
    )
    by_id = {r["job_id"]: _claimed(r) for r in claimed}
    return [by_id.get(row.job_id) for row in rows]


def _claimed(row: Any) -> Claimed:
    claimed = Claimed(**row)
    if claimed.choices is None:
        return claimed
    # What the worker is sent names the model that it is to use.
    return replace(claimed, spec=choices.spec_for(claimed.spec, claimed.model))


async def resume_many(
    connection: Any,
    worker_id: str,
    held: Sequence[tuple[str, int]],
    *,
    router_id: str,
    lease_ends_at: datetime,
) -> list[Resumed]:
    """Let a worker go on here with the (job, attempt)s that it brings along; those that it may.

    What has been taken from it, has ended or is to be cancelled is left as it is. From the commit on
    nothing that the router before says of these jobs changes them.
    """
    if not held:
        return []
    rows = await connection.fetch(
        _RESUME,
        [job_id for job_id, _ in held],
        [attempt for _, attempt in held],
        router_id,
        lease_ends_at,
        worker_id,
    )
    return [
        Resumed(
            Claimed(**{name: row[name] for name in CLAIMED}), row["shown"], row["first_token_at"]
        )
        for row in rows
    ]


async def give_back_many(connection: Any, rows: list[GiveBack]) -> list[bool]:
    """Queue running jobs again. False for one that is not running this attempt any more."""
    return await in_rounds(rows, partial(_give_back_round, connection))


async def _give_back_round(connection: Any, rows: list[GiveBack]) -> list[bool]:
    moved = {
        r["id"]: r
        for r in await connection.fetch(
            _GIVE_BACK,
            [row.job_id for row in rows],
            [row.attempt for row in rows],
            job_states.MOVES[Event.GIVE_BACK][1].value,
            job_states.before(Event.GIVE_BACK),
            [row.router_id for row in rows],
        )
    }
    back = [row for row in rows if row.job_id in moved]
    if back:
        await job_queue.add(
            connection,
            [
                (r.job_id, lane, moved[r.job_id]["multiplier_milli"], moved[r.job_id]["seq"])
                for r in back
                for lane in (r.lane, *r.more_lanes)
            ],
        )
        await connection.execute(
            END_ATTEMPTS,
            [r.job_id for r in back],
            [r.attempt for r in back],
            [r.outcome for r in back],
            [r.blame for r in back],
            [r.error for r in back],
        )
        await shift_blame(connection, [(r.job_id, r.attempt, r.blame) for r in back])
        await connection.execute(
            "delete from job_chunks where job_id = any($1::text[])", [r.job_id for r in back]
        )
    return [row.job_id in moved for row in rows]


async def shift_blame(connection: Any, ended: Sequence[tuple[str, int, str | None]]) -> None:
    """Blame jobs for all their attempts, if (job, attempt, blame) says that it was the job."""
    shifted = [job_id for job_id, n, blame in ended if blame == "job" and n > 1]
    if shifted:
        await connection.execute(SHIFT_BLAME, shifted)
