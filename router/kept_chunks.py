"""Keeps in the database what running jobs have said, for readers that come later and for refunds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from router.attempts import RunningAttempt
from router.database import Database
from router.job_stream import JobStream

# A commit that we did not hear of may have stored a shorter text from the same place.
_ADD = """
insert into job_chunks (job_id, n, start, text, tokens)
select * from unnest($1::text[], $2::int[], $3::bigint[], $4::text[], $5::bigint[])
on conflict (job_id, n, start) do update set text = excluded.text, tokens = excluded.tokens"""

# Jobs are locked in the order in which they come, by their ids, as where they end.
_SHOW = """
with given as materialized (
    select t.* from unnest($1::text[], $2::int[], $3::bool[], $4::timestamptz[])
        t(id, attempt, shown, first_token_at)
    cross join lateral (select from jobs where jobs.id = t.id for update) j)
update jobs j set shown = j.shown or t.shown, first_token_at = t.first_token_at from given t
where j.id = t.id and j.attempt = t.attempt and j.state = 'running'"""


@dataclass(frozen=True, slots=True)
class News:
    """What an attempt has said since it was last stored, as it was at one moment: by the time that
    it is stored, the stream may belong to the next attempt."""

    stream: JobStream
    attempt: int
    pieces: int
    start: int
    text: str
    tokens: int
    shown: bool
    first_token_at: datetime | None


def news_of(running: RunningAttempt) -> News:
    """What is to be stored of an attempt now."""
    stream = running.stream
    new = stream.pieces[stream.kept :]
    return News(
        stream,
        running.claimed.attempt,
        len(stream.pieces),
        new[0].start if new else stream.length,
        "".join(piece.text for piece in new),
        running.worker_tokens,
        stream.shown,
        running.first_token_at,
    )


async def keep(database: Database, running: Iterable[RunningAttempt]) -> None:
    """Store what attempts have said, and whether anybody was shown it. Twice is harmless."""
    news = [news_of(r) for r in running if not r.settled and r.stream.has_news]
    news.sort(key=lambda new: new.stream.job_id)
    if not news:
        return
    said = [new for new in news if new.pieces > new.stream.kept]
    async with database.transaction() as connection:
        await connection.execute(
            _ADD,
            [new.stream.job_id for new in said],
            [new.attempt for new in said],
            [new.start for new in said],
            [new.text for new in said],
            [new.tokens for new in said],
        )
        await connection.execute(
            _SHOW,
            [new.stream.job_id for new in news],
            [new.attempt for new in news],
            [new.shown for new in news],
            [new.first_token_at for new in news],
        )
    for new in news:
        new.stream.keep(new.attempt, new.pieces, shown=new.shown)


def joined(rows: Iterable[Any]) -> str:
    """The text of stored chunks in their order: a worker that goes on at another router says all of
    it again, cut otherwise. A delta, which is not stored, leaves a hole."""
    parts, end = [], 0
    for row in rows:
        text = row["text"][max(0, end - row["start"]) :]
        parts.append(text)
        end = max(end, row["start"] + len(row["text"]))
    return "".join(parts)
