"""All SQL of the queue: add, look for candidates, remove, position, price of a position.

A job has a row in `queue` for each lane it waits in, and only while it waits; its state stands in
`jobs`. Order is multiplier, highest first, then `seq`, which is given once, when a job is first
queued, and kept through bumps and retries. Candidates are read without locks and claimed by a guarded
statement (`router.job_store.claim_many`), so any number of routers may look at once, and the cost of
a look depends on the number of lanes, not of jobs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Candidate:
    """A waiting job at the head of a lane. `tried_by`: workers that had it before."""

    job_id: str
    lane: str
    multiplier_milli: int
    seq: int
    tried_by: frozenset[str]


@dataclass(frozen=True, slots=True)
class Step:
    """How many jobs wait in a lane at one multiplier."""

    lane: str
    multiplier_milli: int
    jobs: int


_ADD = """
insert into queue (job_id, lane, multiplier_milli, seq)
select * from unnest($1::text[], $2::text[], $3::bigint[], $4::bigint[])"""

_HEADS = """
select h.job_id, h.lane, h.multiplier_milli, h.seq,
       case when j.attempt > 0 then
           (select array_agg(worker_id) from attempts a where a.job_id = h.job_id) end as tried_by
from (select q.* from unnest($1::text[]) l(lane) cross join lateral
          (select job_id, lane, multiplier_milli, seq from queue where queue.lane = l.lane
           order by multiplier_milli desc, seq limit $2) q
      order by q.multiplier_milli desc, q.seq limit $2) h
join jobs j on j.id = h.job_id and j.state = 'queued'
order by h.multiplier_milli desc, h.seq"""

_AHEAD = """
select count(distinct job_id) from queue where lane = any($1::text[])
and (multiplier_milli > $2 or (multiplier_milli = $2 and seq < $3))"""


async def add(connection: Any, rows: Sequence[tuple[str, str, int, int]]) -> None:
    """Put jobs in lanes: (job id, lane, multiplier in thousandths, seq)."""
    if not rows:
        return
    if rows:
        await connection.execute(_ADD, *(list(column) for column in zip(*rows, strict=True)))


async def remove(connection: Any, job_ids: Sequence[str]) -> None:
    """Take jobs out of all their lanes. Safe to repeat."""
    await connection.execute("delete from queue where job_id = any($1::text[])", list(job_ids))


async def heads(connection: Any, lanes: Sequence[str], *, most: int) -> list[Candidate]:
    """The first `most` jobs over the given lanes, in the order of the queue."""
    rows = await connection.fetch(_HEADS, lanes, most)
    return [
        Candidate(
            row["job_id"],
            row["lane"],
            row["multiplier_milli"],
            row["seq"],
            frozenset(row["tried_by"] or ()),
        )
        for row in rows
    ]


async def reprice(connection: Any, job_id: str, multiplier_milli: int) -> None:
    """Move a waiting job to another multiplier; it keeps its time."""
    await connection.execute(
        "update queue set multiplier_milli = $2 where job_id = $1", job_id, multiplier_milli
    )


async def move(connection: Any, job_id: str, from_lane: str, to_lane: str) -> None:
    """Let a waiting job wait in another lane, unless it has been claimed meanwhile."""
    await connection.execute(
        "update queue set lane = $3 where job_id = $1 and lane = $2", job_id, from_lane, to_lane
    )


async def ahead(connection: Any, lanes: Sequence[str], *, multiplier_milli: int, seq: int) -> int:
    """How many jobs in these lanes come before one with this multiplier and seq."""
    return await connection.fetchval(_AHEAD, list(lanes), multiplier_milli, seq)


async def steps(connection: Any) -> list[Step]:
    """The whole queue as counts by lane and multiplier."""
    rows = await connection.fetch(
        "select lane, multiplier_milli, count(*) as jobs from queue group by 1, 2"
    )
    return [Step(row["lane"], row["multiplier_milli"], row["jobs"]) for row in rows]


async def length(connection: Any) -> int:
    """How many jobs wait."""
    return await connection.fetchval("select count(distinct job_id) from queue")
