"""All SQL of webhooks. A row is written in the transaction that ends its job, so none is forgotten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from billing.accounts import new_id
from router.webhook_request import stored_webhook

_ADD = """
insert into webhooks (id, job_id, account_id, url, include_result, state)
select t.id, t.job_id, j.account_id, t.url, t.include_result, 'pending'
from unnest($1::text[], $2::text[], $3::text[], $4::bool[]) t(id, job_id, url, include_result)
join jobs j on j.id = t.job_id
on conflict (job_id) do nothing"""

# One step along the index for each payer, however many webhooks they have.
_PAYERS = """
with recursive payers (account_id, n) as (
    (select account_id, 1 from webhooks where state = 'pending' and account_id > $1
     order by account_id limit 1)
    union all
    select (select w.account_id from webhooks w
            where w.state = 'pending' and w.account_id > p.account_id
            order by w.account_id limit 1), p.n + 1
    from payers p where p.account_id is not null and p.n < $2)
select account_id from payers where account_id is not null"""

# The first of each payer first, then the second of each, and so on. Whoever takes a row makes it due
# again for the case that he dies over it.
_TAKE = """
with due as (
    select d.id from unnest($1::text[], $2::int[]) p(account_id, most)
    cross join lateral (
        select id, next_try_at, row_number() over (order by next_try_at) as turn from (
            select id, next_try_at from webhooks
            where state = 'pending' and account_id = p.account_id and next_try_at <= $3
            order by next_try_at limit $5) first) d
    where d.turn <= p.most order by d.turn, d.next_try_at limit $5)
update webhooks set tries = tries + 1, next_try_at = $4 where id in
    (select id from webhooks where id in (select id from due) and state = 'pending'
        and next_try_at <= $3 for update skip locked)
returning *"""


async def add(connection: Any, hooks: Sequence[tuple[str, str]]) -> None:
    """Remember whom to tell of ended jobs: (job id, `jobs.webhook`)."""
    asked = [(job_id, stored_webhook(text)) for job_id, text in hooks]
    await connection.execute(
        _ADD,
        [new_id() for _ in asked],
        [job_id for job_id, _ in asked],
        [hook.url for _, hook in asked],
        [hook.include_result for _, hook in asked],
    )


async def payers(connection: Any, *, after: str, most: int) -> list[str]:
    """Payers with webhooks that have not been told of yet, in the order of their ids."""
    rows = await connection.fetch(_PAYERS, after, most)
    return [row["account_id"] for row in rows]


async def take_due(
    connection: Any,
    shares: Mapping[str, int],
    *,
    now: datetime,
    due_again_at: datetime,
    most: int,
) -> list[Any]:
    """Webhooks to be called now, each by one router only until `due_again_at`. `shares`: how many of
    each payer at most."""
    return await connection.fetch(
        _TAKE, list(shares), list(shares.values()), now, due_again_at, most
    )


async def note(
    connection: Any,
    hook_id: str,
    *,
    state: str,
    status: int | None,
    error: str | None,
    next_try_at: datetime,
) -> None:
    """What came of a call. Its URL, which may be its owner's secret, goes when it is of no more use."""
    await connection.execute(
        "update webhooks set state = $2, last_status = $3, last_error = $4, next_try_at = $5,"
        " url = case when $2 = 'pending' then url end where id = $1 and state = 'pending'",
        hook_id,
        state,
        status,
        error,
        next_try_at,
    )


async def state_of(connection: Any, job_id: str) -> dict[str, Any] | None:
    """What a job's payer is shown of its webhook."""
    row = await connection.fetchrow("select * from webhooks where job_id = $1", job_id)
    if row is None:
        return None
    return {
        "state": row["state"],
        "tries": row["tries"],
        "last_status": row["last_status"],
        "last_error": row["last_error"],
    }
