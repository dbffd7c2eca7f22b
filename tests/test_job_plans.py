"""How PostgreSQL goes about the statements that each paid job waits for: to the jobs by their ids.

The indexes of jobs that wait hold whatever has waited since they were last swept, which under load is
thousands of rows for each that waits still.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest

from billing import ledger
from router import job_inserts, job_queue, job_store, plain_endings
from router.database import Database
from router.job_records import Submission
from tests.job_tools import LANE, claim, new_job, new_quote, payer, submit

ENDED = 3000
_LOOK: list[Any] = [[LANE], 16, [0], False]
_TAKE: list[Any] = [["a", "b"], ["w"] * 2, ["r"] * 2, [0] * 2, [datetime.now(UTC)] * 2]
_TAKE += [["queued"], "running", [None] * 2]
_GIVE: list[Any] = [["a", "b"], [1, 1], "queued", ["running"], ["r", "r"]]
_END: list[Any] = [["a", "b"], ["{}"] * 2, '[{"attempt": 1}, {"attempt": 1}]', "[]", "r", 600.0]
_END += ["running", []]


def scans(plan: dict[str, Any]) -> Iterator[str]:
    """How the table of jobs is read: by which indexes, or from one end to the other."""
    index = plan.get("Index Name", "")
    if index.startswith("jobs_"):
        yield index
    elif plan["Node Type"] == "Seq Scan" and plan["Relation Name"] == "jobs":
        yield "all of it"
    for part in plan.get("Plans", ()):
        yield from scans(part)


async def one_of_many_waits(connection: Any) -> None:
    waiting = new_job()
    await submit(connection, await payer(connection), waiting)
    names = await connection.fetch(
        "select quote_ident(attname) as name from pg_attribute where attrelid = 'jobs'::regclass"
        " and attnum > 0 and not attisdropped and attname not in ('id', 'state')"
    )
    others = ", ".join(row["name"] for row in names)
    await connection.execute(
        f"insert into jobs (id, state, {others}) select id || '-' || n, 'succeeded', {others}"
        f" from jobs, generate_series(1, {ENDED}) n"
    )


async def plan_of(connection: Any, statement: str, values: list[Any], kind: str) -> dict[str, Any]:
    """The plan for these values, or the one that is kept for any values: an explanation that is given
    values is always of the former."""
    if kind == "custom":
        prepared = await connection.prepare(statement)
        (explained,) = await prepared.explain(*values)
    else:
        await connection.execute("set local plan_cache_mode = force_generic_plan")
        await connection.execute(f"prepare kept as {statement}")
        unknown = ", ".join(["null"] * len(values))
        text = await connection.fetchval(f"explain (format json) execute kept ({unknown})")
        await connection.execute("deallocate kept")
        (explained,) = json.loads(text)
    return explained["Plan"]


@pytest.mark.parametrize("kind", ["custom", "generic"])
@pytest.mark.parametrize(
    "statement, values",
    [
        (job_queue._HEADS, _LOOK),
        (job_store._CLAIM, _TAKE),
        (job_store._GIVE_BACK, _GIVE),
        (plain_endings._END, _END),
    ],
    ids=["look", "claim", "give back", "ending"],
)
async def test_jobs_are_looked_up_by_their_ids_alone(
    database: Database, statement: str, values: list[Any], kind: str
):
    async with database.transaction() as connection:
        await one_of_many_waits(connection)
        await connection.execute("analyze jobs")
        plan = await plan_of(connection, statement, values, kind)
    assert set(scans(plan)) == {"jobs_pkey"}


async def test_what_is_run_for_one_row_or_many_is_not_planned_anew_each_time(database: Database):
    """Planning takes as long as running it: PostgreSQL tries five times, and then keeps one plan."""
    async with database.transaction() as connection:
        poor = await payer(connection, 1)
        row = Submission(new_quote(), poor)
        transfer = ledger.Transfer(ledger.LIGHTNING, ledger.client(poor), 1, "received", poor)
        for _ in range(12):
            assert not await job_inserts.add_covered(connection, [row])
            assert not await job_queue.heads(connection, [LANE], most=16)
            assert await claim(connection, "nothing") is None
            await ledger.post(connection, [transfer])
        plans = await connection.fetch(
            "select statement, custom_plans, generic_plans from pg_prepared_statements"
            " where statement = any($1)",
            [job_inserts._ADD_COVERED, job_queue._HEADS, job_store._CLAIM, ledger._POST],
        )
    assert len(plans) == 4
    for plan in plans:
        assert plan["custom_plans"] <= 6 and plan["generic_plans"] >= 6, plan["statement"][:200]
