"""The queue in SQL: order, candidates, places, and moves between lanes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from router import job_queue, job_store, job_submits
from router.database import Database
from router.job_records import Ending, GiveBack, Submission
from router.job_states import Event
from tests.job_tools import LANE, claim, end, new_job, new_quote, payer, submit
from tests.router_rig import MODEL, running_rig


async def _queue(
    connection: Any, account_id: str, *multipliers: int, lane: str = LANE
) -> list[str]:
    """Queue one job after the other; their ids."""
    jobs = [new_job(multiplier_milli=milli, lane=lane) for milli in multipliers]
    for job in jobs:
        await submit(connection, account_id, job)
    return [job.id for job in jobs]


async def _order(connection: Any, *lanes: str) -> list[str]:
    heads = await job_queue.heads(connection, lanes or (LANE,), most=100)
    return [head.job_id for head in heads]


async def test_the_queue_is_ordered_by_multiplier_and_then_by_time(database: Database):
    """LH-4, E6-7: equal multipliers keep the order in which they came."""
    async with database.transaction() as connection:
        account_id = await payer(connection)
        a, b, c, d, e = await _queue(connection, account_id, 1000, 2000, 1000, 2000, 1001)
        assert await _order(connection) == [b, d, e, a, c]


async def test_jobs_of_one_batch_keep_the_order_of_the_batch(database: Database):
    async with database.transaction() as connection:
        account_id = await payer(connection)
        quotes = [new_quote(new_job(), new_job(index=1)) for _ in range(20)]
        await job_submits.submit_bound(connection, [Submission(q, account_id) for q in quotes])
        assert await _order(connection) == [job.id for quote in quotes for job in quote.jobs]


async def test_the_order_holds_over_several_lanes(database: Database):
    async with database.transaction() as connection:
        account_id = await payer(connection)
        (cheap,) = await _queue(connection, account_id, 1000, lane="a")
        (dear,) = await _queue(connection, account_id, 3000, lane="b")
        (middle,) = await _queue(connection, account_id, 2000, lane="a")
        assert await _order(connection, "a", "b") == [dear, middle, cheap]
        assert await _order(connection, "a") == [middle, cheap]
        assert await _order(connection, "c") == []
        heads = await job_queue.heads(connection, ["a", "b"], most=2)
        assert [head.job_id for head in heads] == [dear, middle]


async def test_a_bumped_job_keeps_its_time_among_equals(database: Database):
    async with database.transaction() as connection:
        account_id = await payer(connection)
        first, second, third = await _queue(connection, account_id, 1000, 2000, 1000)
        await job_queue.reprice(connection, first, 2000)
        await job_queue.reprice(connection, third, 2000)
        assert await _order(connection) == [first, second, third]


async def test_a_job_that_is_given_back_has_its_old_place(database: Database):
    async with database.transaction() as connection:
        account_id = await payer(connection)
        first, second = await _queue(connection, account_id, 1000, 1000)
        assert await claim(connection, first, "w1")
        assert await _order(connection) == [second]
        back = GiveBack(first, 1, LANE, "lost", "worker")
        assert await job_store.give_back_many(connection, [back]) == [True]
        assert await _order(connection) == [first, second]
        head = (await job_queue.heads(connection, [LANE], most=1))[0]
        assert head.tried_by == frozenset({"w1"})


async def test_only_one_of_two_claims_gets_a_job(database: Database):
    async with database.transaction() as connection:
        account_id = await payer(connection)
        (job_id,) = await _queue(connection, account_id, 1000)

    async def one(worker_id: str) -> bool:
        async with database.transaction() as connection:
            return await claim(connection, job_id, worker_id) is not None

    won = await asyncio.gather(*(one(f"w{i}") for i in range(5)))
    assert sorted(won) == [False, False, False, False, True]
    async with database.connection() as connection:
        assert await connection.fetchval("select count(*) from attempts") == 1
        assert await job_queue.length(connection) == 0


async def test_ended_jobs_are_out_of_the_queue(database: Database):
    async with database.transaction() as connection:
        account_id = await payer(connection)
        cancelled, expired, left = await _queue(connection, account_id, 1000, 1000, 1000)
        assert await end(connection, Ending(cancelled, Event.CANCEL, "cancelled"))
        assert await end(connection, Ending(expired, Event.EXPIRE, "max_wait"))
        assert await _order(connection) == [left]


async def test_a_move_takes_all_the_lanes_of_a_job_along(database: Database):
    """It waits in one lane for each model that it accepts; places count it once."""
    async with database.transaction() as connection:
        await job_queue.add(connection, [("j", "a", 1000, 7), ("j", "b", 1000, 7)])
        await job_queue.move(connection, "j", "b", "c")
        assert await _order(connection, "b") == []
        await job_queue.move(connection, "j", "a", "c")
        rows = await connection.fetch("select lane, multiplier_milli, seq from queue")
        assert [tuple(row) for row in rows] == [("c", 1000, 7)]


async def test_a_move_finds_a_job_only_in_the_lane_it_was_seen_in(database: Database):
    async with database.transaction() as connection:
        account_id = await payer(connection)
        (job_id,) = await _queue(connection, account_id, 1000)
        await job_queue.move(connection, job_id, "not here", "there")
        assert await _order(connection) == [job_id]
        await job_queue.move(connection, job_id, LANE, "there")
        assert await _order(connection) == []
        assert await _order(connection, "there") == [job_id]


@pytest.mark.parametrize("taken_by", ["a claim", "a cancel"])
async def test_a_job_that_is_taken_while_it_is_moved_waits_nowhere(
    database: Database, taken_by: str
):
    """What is left of it in the new lane could never be claimed, and it could not be given back."""
    async with database.transaction() as connection:
        account_id = await payer(connection)
        (job_id,) = await _queue(connection, account_id, 1000)

    async def take() -> Any:
        async with database.transaction() as connection:
            if taken_by == "a claim":
                return await claim(connection, job_id, "w1")
            return await end(connection, Ending(job_id, Event.CANCEL, "cancelled"))

    async with database.transaction() as connection:
        await job_queue.move_waiting(connection, [(job_id, LANE, "there")])
        taking = asyncio.create_task(take())
        # As long as it takes to have asked: it waits for this transaction, or has found nothing.
        async with database.connection() as looking:
            while not taking.done() and not await looking.fetchval(
                "select exists (select from pg_locks where not granted)"
            ):
                await asyncio.sleep(0.01)
    taken = await taking is not None
    async with database.connection() as connection:
        assert await _order(connection, "there") == ([] if taken else [job_id])
        assert await job_queue.length(connection) == (0 if taken else 1)


async def test_a_job_that_was_left_in_a_lane_can_be_given_back(database: Database):
    """Whatever left it there: else nobody could ever end it, and its escrow would stay."""
    async with database.transaction() as connection:
        account_id = await payer(connection)
        (job_id,) = await _queue(connection, account_id, 1000)
        assert await claim(connection, job_id, "w1")
        await job_queue.add(connection, [(job_id, LANE, 1000, 1)])
        back = GiveBack(job_id, 1, LANE, "lost", "worker")
        assert await job_store.give_back_many(connection, [back]) == [True]
        assert await _order(connection) == [job_id]


async def test_a_claim_goes_after_a_job_whose_move_it_did_not_see(database: Database):
    """The move is committed after the claim has looked: it is one row still, and not a new one."""
    async with database.transaction() as connection:
        account_id = await payer(connection)
        (job_id,) = await _queue(connection, account_id, 1000)

    async def claimed() -> bool:
        async with database.transaction() as connection:
            return await claim(connection, job_id, "w1") is not None

    async with database.transaction() as connection:
        await job_queue.move(connection, job_id, LANE, "there")
        claiming = asyncio.create_task(claimed())
        async with database.connection() as looking:
            while not claiming.done() and not await looking.fetchval(
                "select exists (select from pg_locks where not granted)"
            ):
                await asyncio.sleep(0.01)
    assert await claiming
    async with database.connection() as connection:
        assert await job_queue.length(connection) == 0


@pytest.mark.parametrize("meanwhile", ["given back", "moved together"])
async def test_a_claim_passes_over_a_job_whose_new_places_it_does_not_see(
    database: Database, monkeypatch: pytest.MonkeyPatch, meanwhile: str
):
    """They were committed between the claim's look and its lock: it would leave them behind."""
    look = job_store._CLAIM
    for before, after in [
        ("free as (", "pause as materialized (select pg_advisory_xact_lock(7)), free as ("),
        ("where id = any", "where exists (select from pause) and id = any"),
    ]:
        assert look.count(before) == 1
        look = look.replace(before, after)
    two = new_job(multiplier_milli=1000, more_lanes=("there",))
    async with database.transaction() as connection:
        await submit(connection, await payer(connection), two)
        if meanwhile == "given back":
            assert await claim(connection, two.id, "w1")

    async def claim_late() -> Any:
        async with database.connection() as connection:
            return await claim(connection, two.id, "w2")

    async with database.connection() as holding, holding.transaction():
        await holding.execute("select pg_advisory_xact_lock(7)")
        with monkeypatch.context() as patch:
            patch.setattr(job_store, "_CLAIM", look)
            claiming = asyncio.create_task(claim_late())
            async with asyncio.timeout(10):
                while not await holding.fetchval(
                    "select exists (select from pg_locks where not granted)"
                ):
                    await asyncio.sleep(0.01)
        async with database.transaction() as connection:
            if meanwhile == "given back":
                back = GiveBack(two.id, 1, LANE, "lost", "worker", more_lanes=("there",))
                assert await job_store.give_back_many(connection, [back]) == [True]
            else:
                await job_queue.move_waiting(connection, [(two.id, LANE, "there")])
    assert await claiming is None
    async with database.connection() as connection:
        assert await _order(connection, "there") == [two.id]
        # And it can be claimed still.
        assert await claim(connection, two.id, "w3")
        assert await job_queue.length(connection) == 0


async def test_adding_nothing_is_harmless(database: Database):
    async with database.transaction() as connection:
        await job_queue.add(connection, [])
        assert await job_queue.length(connection) == 0


async def test_new_edges_move_waiting_jobs_to_where_a_new_worker_looks(
    tmp_path: Path, database_url: str
):
    """The job waits in a coarse lane that a long worker drains; a shorter one that it fits comes."""
    async with running_rig(tmp_path, database_url) as rig:
        long = [{"id": MODEL, "kind": "text", "context_length": 8192, "max_tokens": 4096}]
        short = [{"id": MODEL, "kind": "text", "context_length": 3000, "max_tokens": 1000}]
        async with rig.worker(models=long) as busy:
            key = await rig.bearer()
            body = {"model": MODEL, "prompt": "x" * 4000, "max_tokens": 900, "kind": "completion"}
            await rig.http.post("/jobs", json=body, headers=key)
            await busy.job()
            waiting = (await rig.http.post("/jobs", json=body, headers=key)).json()["jobs"][0]
            async with rig.worker(models=short) as newcomer:
                await rig.core.maintenance.finer_lanes()
                assert (await newcomer.job())["job_id"] == waiting["id"]
