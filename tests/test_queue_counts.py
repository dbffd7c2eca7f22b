"""Places in memory: the copy of the queue's order, and how it follows the database."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from router import job_queue, job_store
from router.database import Database
from router.job_records import GiveBack
from router.market import Market
from router.models import Models
from router.queue_counts import Change, Drifted, QueueCounts, Step, band
from router.workers import Fleet
from tests.job_tools import LANE, claim, new_job, payer, submit

ALL = frozenset("abc")


def _counts(*changes: Change) -> QueueCounts:
    counts = QueueCounts()
    counts.apply(changes)
    return counts


def _come(lanes: str, milli: int, *seqs: int) -> Change:
    return Change(tuple(lanes), milli, seqs, True)


def _gone(lanes: str, milli: int, *seqs: int) -> Change:
    return Change(tuple(lanes), milli, seqs, False)


def test_a_higher_multiplier_is_never_in_a_lower_band():
    bands = [band(milli) for milli in [*range(70_000), 10**6, 10**9, 10**12]]
    assert bands == sorted(bands)
    assert len(set(bands)) < 1_500


def test_a_place_counts_dearer_jobs_and_equal_ones_that_came_before():
    counts = _counts(_come("a", 2000, 1), _come("a", 1500, 2, 3, 5), _come("a", 1000, 4))
    assert counts.ahead(ALL, 1500, 3) == 2
    assert counts.ahead(ALL, 1500) == 4
    assert counts.ahead(ALL, 1000, 4) == 4
    assert counts.ahead(ALL, 2001) == 0
    assert counts.ahead(frozenset("b"), 1000) == 0


def test_a_job_that_waits_in_several_lanes_is_counted_once():
    counts = _counts(_come("ab", 2000, 1), _come("b", 1000, 2))
    assert counts.ahead(frozenset("ab"), 1000, 2) == 1
    assert counts.ahead(frozenset("a"), 1000) == 1
    assert counts.jobs(ALL) == counts.length == 2


def test_who_comes_and_goes_between_two_looks_leaves_no_trace():
    """A transaction's number does not say when it was committed: changes come in any order."""
    counts = _counts(_gone("a", 1000, 1), _come("a", 1000, 1, 2), _gone("a", 1000, 2))
    assert counts.length == 0
    assert list(counts.steps()) == []


def test_a_job_that_is_given_back_stands_where_it_stood():
    counts = _counts(_come("a", 1000, 1, 2, 3), _gone("a", 1000, 1), _come("a", 1000, 1))
    assert [counts.ahead(ALL, 1000, seq) for seq in (1, 2, 3)] == [0, 1, 2]


@pytest.mark.parametrize("gone", [_gone("a", 1000, 9), _gone("a", 2000, 1), _gone("b", 1000, 1)])
def test_a_change_that_does_not_fit_is_noticed(gone: Change):
    with pytest.raises(Drifted):
        _counts(_come("a", 1000, 1), gone)


def test_places_agree_with_a_plain_count_whatever_happened():
    dice = random.Random(5)
    counts = QueueCounts()
    waiting: list[tuple[tuple[str, ...], int, int]] = []
    for seq in range(2_000):
        job = (
            tuple(dice.choice(("a", "b", "ab", "bc"))),
            dice.choice((1000, 1001, 1500, 9000)),
            seq,
        )
        waiting.append(job)
        counts.apply([Change(job[0], job[1], [seq], True)])
        if dice.random() < 0.4:
            lanes, milli, old = waiting.pop(dice.randrange(len(waiting)))
            counts.apply([Change(lanes, milli, [old], False)])
    for lanes in (frozenset("a"), frozenset("b"), frozenset("c"), ALL):
        mine = [job for job in waiting if not lanes.isdisjoint(job[0])]
        for _, milli, seq in dice.sample(waiting, 20):
            before = sum(1 for _, m, s in mine if m > milli or (m == milli and s < seq))
            assert counts.ahead(lanes, milli, seq) == before
        steps = {m: sum(1 for job in mine if job[1] == m) for m in {job[1] for job in mine}}
        assert counts.dearest(lanes, 3) == sorted(steps.items(), reverse=True)[:3]
        assert counts.jobs(lanes) == len(mine)
    assert counts.length == len(waiting)


def _market(database: Database) -> Market:
    return Market(database, Models(Fleet()))


async def _queue(database: Database, *multipliers: int) -> list[str]:
    jobs = [new_job(multiplier_milli=milli) for milli in multipliers]
    async with database.transaction() as connection:
        account_id = await payer(connection)
        for job in jobs:
            await submit(connection, account_id, job)
    return [job.id for job in jobs]


async def _seen(market: Market) -> dict[int, int]:
    market.touch()
    await market.refresh()
    return {step.multiplier_milli: step.jobs for step in market.counts.steps()}


async def _rows(connection: Any) -> dict[int, int]:
    rows = await connection.fetch("select multiplier_milli, count(*) from queue group by 1")
    return {row[0]: row[1] for row in rows}


async def test_two_routers_follow_all_that_happens_to_the_queue(database: Database):
    """Comes, is claimed, given back, bumped and moved: each router sees it, whoever did it."""
    first, second = _market(database), _market(database)
    assert await _seen(first) == {}
    one, two, three = await _queue(database, 1000, 1000, 2000)
    assert await _seen(first) == await _seen(second) == {1000: 2, 2000: 1}
    async with database.transaction() as connection:
        assert await claim(connection, one, "w1")
    assert await _seen(first) == {1000: 1, 2000: 1}
    async with database.transaction() as connection:
        await job_store.give_back_many(connection, [GiveBack(one, 1, LANE, "lost", "worker")])
        await job_queue.reprice(connection, two, 3000)
        await job_queue.move(connection, three, LANE, "elsewhere")
    assert await _seen(first) == await _seen(second) == {1000: 1, 2000: 1, 3000: 1}
    steps = sorted(second.counts.steps(), key=lambda step: step.multiplier_milli)
    assert steps[1] == Step(("elsewhere",), 2000, 1)
    async with database.transaction() as connection:
        await job_queue.remove(connection, [one, two, three])
    assert await _seen(first) == await _seen(second) == {}


async def test_a_transaction_that_commits_late_is_not_missed(database: Database):
    """Its number is lower than that of one that was seen before it was committed."""
    market = _market(database)
    async with database.transaction() as late:
        account_id = await payer(late)
        await submit(late, account_id, new_job(multiplier_milli=5000))
        await _queue(database, 1000)
        assert await _seen(market) == {1000: 1}
        await _queue(database, 1000)
        assert await _seen(market) == {1000: 2}
    assert await _seen(market) == {1000: 2, 5000: 1}


async def test_a_router_that_has_not_looked_for_long_reads_the_queue_anew(database: Database):
    market = _market(database)
    await _queue(database, 1000)
    assert await _seen(market) == {1000: 1}
    await _queue(database, 2000)
    async with database.transaction() as connection:
        await connection.execute("update queue_changes set at = at - interval '2 minutes'")
        await job_queue.forget_changes(connection)
        assert await connection.fetchval("select count(*) from queue_changes") == 0
    market._read_at -= 31
    assert await _seen(market) == {1000: 1, 2000: 1}


async def test_a_copy_that_is_wrong_is_made_anew(database: Database, caplog):
    market = _market(database)
    await _queue(database, 1000)
    assert await _seen(market) == {1000: 1}
    market.counts.apply([Change((LANE,), 1000, [10**9], True)])
    async with database.transaction() as connection:
        await connection.execute("delete from queue_changes")
        await connection.execute(
            "insert into queue_changes (lanes, multiplier_milli, seqs, added)"
            " values (array[$1], 7000, array[1], false)",
            LANE,
        )
    assert await _seen(market) == {1000: 1}
    assert "read anew" in caplog.text


async def test_the_copy_is_right_while_many_change_the_queue_at_once(database: Database):
    market = _market(database)

    async def churn(seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(10):
            ids = await _queue(database, *dice.choices((1000, 1500, 4000), k=3))
            async with database.transaction() as connection:
                await job_queue.remove(connection, dice.sample(ids, 2))
            await _seen(market)

    await asyncio.gather(*(churn(seed) for seed in range(4)))
    async with database.connection() as connection:
        rows = await _rows(connection)
    async with asyncio.timeout(20):
        # Whatever else is under way in this PostgreSQL may hold up what can be seen for a moment.
        while await _seen(market) != rows:
            await asyncio.sleep(0.01)
    assert sum(rows.values()) == market.queue_length == 40
