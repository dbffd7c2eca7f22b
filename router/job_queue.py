"""All SQL of the queue: add, look for candidates, remove, position, price of a position.

A job has a row in `queue` for each lane it waits in, and only while it waits; its state stands in
`jobs`. Order is multiplier, highest first, then `seq`, which is given once, when a job is first
queued, and kept through bumps and retries. Candidates are read without locks and claimed by a guarded
statement (`router.job_store.claim_many`), so any number of routers may look at once, and the cost of
a look depends on the number of lanes, not of jobs.

Places and prices are not counted here: triggers write what comes and goes to `queue_changes`, each
router follows them from one snapshot of the database to the next, and counts in memory
(`router.queue_counts`; docs/decisions/0008-places-in-memory.md). So a statement puts a job into all of
its lanes, or takes it out of all of them: the change names them together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from billing.sql import one_plan
from router.queue_counts import Change

# How long changes are kept for routers that follow them. One that has not looked for so long, less
# some time for transactions under way, must read the queue anew.
CHANGES_KEPT = timedelta(seconds=60)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A waiting job at the head of a lane. `tried_by`: workers that had it before. `prefix`: what
    its prompt begins with (`router.prompt_prefix`). `rates`, `choices`: what it was quoted, where the
    caller asked for it. `more_lanes`: where else it waits, of one that is not in the queue yet."""

    job_id: str
    lane: str
    multiplier_milli: int
    seq: int
    tried_by: frozenset[str]
    prefix: int | None = None
    rates: str | None = None
    choices: str | None = None
    more_lanes: tuple[str, ...] = ()


_ADD = one_plan("""
insert into queue (job_id, lane, multiplier_milli, seq)
select * from unnest($1::text[], $2::text[], $3::bigint[], $4::bigint[])
on conflict do nothing""")

# Jobs are looked up by their ids alone: seeing their state, the planner may walk the index of all that
# wait, through whatever has waited since it was last swept.
_HEADS = one_plan("""
select h.job_id, h.lane, h.multiplier_milli, h.seq, j.prefix,
       case when $4 then j.rates end as rates, case when $4 then j.choices end as choices,
       case when j.attempt > 0 then
           (select array_agg(worker_id) from attempts a where a.job_id = h.job_id) end as tried_by
from (select q.* from unnest($1::text[], $3::bigint[]) l(lane, floor) cross join lateral
          (select job_id, lane, multiplier_milli, seq from queue where queue.lane = l.lane
           and multiplier_milli >= l.floor order by multiplier_milli desc, seq limit $2) q
      order by q.multiplier_milli desc, q.seq limit $2) h
cross join lateral (select state, prefix, rates, choices, attempt from jobs
    where jobs.id = h.job_id offset 0) j
where j.state = 'queued'
order by h.multiplier_milli desc, h.seq""")

# All rows of the job, so that the change names its lanes together. A claim at the same time goes after
# rows that are updated; of those that come new it would not know.
_MOVE = """
update queue set lane = case when lane = $2 then $3 else lane end
where job_id = $1 and exists (select 1 from queue q where q.job_id = $1 and q.lane = $2)
    and not exists (select 1 from queue q where q.job_id = $1 and q.lane = $3)"""

# The job is written anew with its rows, so that a claim that does not see these passes it over.
_MERGE = """
with gone as (
    delete from queue where job_id = $1
    and exists (select 1 from queue q where q.job_id = $1 and q.lane = $2) returning *),
changed as (
    update jobs set seq = seq where id = $1 and exists (select 1 from gone))
insert into queue (job_id, lane, multiplier_milli, seq)
select distinct job_id, case when lane = $2 then $3 else lane end, multiplier_milli, seq from gone"""

_ALL = """
select lanes, multiplier_milli, array_agg(seq order by seq) as seqs
from (select array_agg(lane order by lane) as lanes, multiplier_milli, seq
      from queue group by multiplier_milli, seq) j
group by lanes, multiplier_milli"""

# A number of a transaction says nothing of when it was committed; snapshots do.
_CHANGES = """
select now.snapshot::text, c.lanes, c.multiplier_milli, c.seqs, c.added
from (select pg_current_snapshot() as snapshot) now
left join queue_changes c
    on c.xact >= pg_snapshot_xmin($1::text::pg_snapshot)::text::bigint
    and c.xact < pg_snapshot_xmax(now.snapshot)::text::bigint
    and not pg_visible_in_snapshot(c.xact::text::xid8, $1::text::pg_snapshot)"""


# From one lane to the next along the index: as many steps as there are lanes, whatever waits in them.
_LANES = """
with recursive lanes as (
    (select lane from queue order by lane limit 1)
    union all
    select (select q.lane from queue q where q.lane > l.lane order by q.lane limit 1)
    from lanes l where l.lane is not null)
select lane from lanes where lane is not null"""


async def add(connection: Any, rows: Sequence[tuple[str, str, int, int]]) -> None:
    """Put jobs in lanes: (job id, lane, multiplier in thousandths, seq)."""
    if rows:
        await connection.execute(_ADD, *(list(column) for column in zip(*rows, strict=True)))


async def remove(connection: Any, job_ids: Sequence[str]) -> None:
    """Take jobs out of all their lanes. Safe to repeat."""
    await connection.execute("delete from queue where job_id = any($1::text[])", list(job_ids))


async def heads(
    connection: Any, lanes: Sequence[str], *, most: int, floors: Sequence[int] | None = None
) -> list[Candidate]:
    """The first `most` jobs over the given lanes, in the order of the queue.

    `floors`: of each lane, the multiplier in thousandths down to which it is looked at; the jobs then
    bring what they were quoted, since they may have been at other rates than today's.
    """
    rows = await connection.fetch(
        _HEADS, lanes, most, floors or [0] * len(lanes), floors is not None
    )
    return [
        Candidate(
            row["job_id"],
            row["lane"],
            row["multiplier_milli"],
            row["seq"],
            frozenset(row["tried_by"] or ()),
            row["prefix"],
            row["rates"],
            row["choices"],
        )
        for row in rows
    ]


async def waiting_lanes(connection: Any) -> list[str]:
    """The lanes in which anything waits."""
    return [row["lane"] for row in await connection.fetch(_LANES)]


async def reprice(connection: Any, job_id: str, multiplier_milli: int) -> None:
    """Move a waiting job to another multiplier; it keeps its time."""
    await connection.execute(
        "update queue set multiplier_milli = $2 where job_id = $1", job_id, multiplier_milli
    )


async def move(connection: Any, job_id: str, from_lane: str, to_lane: str) -> None:
    """Let a waiting job wait in another lane, unless it has been claimed meanwhile."""
    if await connection.execute(_MOVE, job_id, from_lane, to_lane) == "UPDATE 0":
        # It waits in the other lane already, or not at all.
        await connection.execute(_MERGE, job_id, from_lane, to_lane)


async def move_waiting(connection: Any, moves: Sequence[tuple[str, str, str]]) -> None:
    """Move jobs that were seen waiting: (job id, from lane, to lane).

    Their rows in `jobs` are locked first, as claims and endings do: a claim that takes a job out of
    its lanes while it is moved would not see the new one, and leave the job waiting there for ever.
    """
    waiting = await connection.fetch(
        "select id from jobs where id = any($1::text[]) and state = 'queued' order by id for update",
        sorted({job_id for job_id, _, _ in moves}),
    )
    ids = {row["id"] for row in waiting}
    for job_id, from_lane, to_lane in moves:
        if job_id in ids:
            await move(connection, job_id, from_lane, to_lane)


async def read_all(connection: Any) -> tuple[str, list[Change]]:
    """The whole queue as one set of changes, and the snapshot it was read in.

    In a repeatable-read transaction, so that both are of the same moment. Costs as much as there are
    jobs.
    """
    snapshot = await connection.fetchval("select pg_current_snapshot()::text")
    rows = await connection.fetch(_ALL)
    return snapshot, [
        Change(tuple(row["lanes"]), row["multiplier_milli"], row["seqs"], True) for row in rows
    ]


async def read_changes(connection: Any, snapshot: str) -> tuple[str, list[Change]]:
    """What was committed since `snapshot`, and the snapshot to ask for next."""
    rows = await connection.fetch(_CHANGES, snapshot)
    return rows[0]["snapshot"], [
        Change(tuple(row["lanes"]), row["multiplier_milli"], row["seqs"], row["added"])
        for row in rows
        if row["lanes"] is not None
    ]


async def forget_changes(connection: Any) -> None:
    """Delete changes that everybody has seen."""
    await connection.execute(
        "delete from queue_changes where at < clock_timestamp() - $1::interval", CHANGES_KEPT
    )


async def length(connection: Any) -> int:
    """How many jobs wait."""
    return await connection.fetchval("select count(distinct job_id) from queue")


async def specs_of(connection: Any, candidates: Sequence[Candidate]) -> dict[str, str]:
    """What waiting jobs ask, as JSON, by job; without those that wait no more."""
    rows = await connection.fetch(
        "select id, spec from jobs where id = any($1::text[]) and spec is not null",
        [candidate.job_id for candidate in candidates],
    )
    return {row["id"]: row["spec"] for row in rows}
