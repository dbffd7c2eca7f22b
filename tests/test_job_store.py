"""Many submits, claims and endings in one statement: each as if it were alone, and no msat lost."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Any

import pytest

from billing import accounts, ledger
from billing.trial_balance import trial_balance
from router import job_endings, job_records, job_store, job_submits, plain_endings
from router.database import Database
from router.errors import IdempotencyConflict, NotEnoughBalance
from router.job_records import Claimed, Ending, GiveBack, Submission, Submitted
from router.job_states import FINAL, Event, State
from tests.job_tools import (
    LANE,
    OFFER_MSAT,
    claim,
    end,
    job_in,
    new_job,
    new_quote,
    payer,
    state_of,
)

FUNDS = 60_000
HASH, OTHER = b"\x01" * 32, b"\x02" * 32


async def submit(connection: Any, *rows: Submission) -> list[Any]:
    return await job_submits.submit_bound(connection, list(rows))


def order(account_id: str, *, key: str = "k", request: bytes = HASH, **more: Any) -> Submission:
    return Submission(new_quote(request=request), account_id, once=(account_id, key), **more)


async def held(connection: Any, account_id: str) -> int:
    return await ledger.balance_msat(connection, ledger.client(account_id))


async def test_of_one_batch_only_what_the_balance_covers_is_queued(database: Database):
    async with database.transaction() as connection:
        poor, rich = await payer(connection, 4000), await payer(connection, 100_000)
        rows = [Submission(new_quote(), poor) for _ in range(3)]
        dear = Submission(new_quote(new_job(offer_msat=3000), new_job(index=1)), poor)
        other = Submission(new_quote(), rich)
        results = await submit(connection, dear, *rows, other)
        # What the dear one was refused, smaller ones behind it still get.
        assert [type(result) for result in results] == [
            NotEnoughBalance,
            Submitted,
            Submitted,
            NotEnoughBalance,
            Submitted,
        ]
        assert results[3].facts["balance_msat"] == 1000
        assert results[3].facts["fee_msat"] == OFFER_MSAT
        assert await held(connection, poor) == 1000
        assert await connection.fetchval("select count(*) from jobs") == 3


async def test_the_same_order_twice_in_one_batch_is_one_and_another_under_its_name_none(
    database: Database,
):
    async with database.transaction() as connection:
        account_id = await payer(connection)
        first, same = order(account_id), order(account_id)
        changed = order(account_id, request=OTHER)
        results = await submit(connection, first, same, changed)
        assert results[0] == Submitted(first.quote.id, repeated=False)
        assert results[1] == Submitted(first.quote.id, repeated=True)
        assert isinstance(results[2], IdempotencyConflict)
        # And in a later batch.
        later = await submit(connection, order(account_id), order(account_id, request=OTHER))
        assert later[0] == Submitted(first.quote.id, repeated=True)
        assert isinstance(later[1], IdempotencyConflict)
        assert await connection.fetchval("select count(*) from jobs") == 1
        assert await held(connection, account_id) == 1_000_000 - OFFER_MSAT


async def test_the_same_order_many_times_needs_the_balance_for_one(database: Database):
    async with database.transaction() as connection:
        account_id = await payer(connection, OFFER_MSAT)
        results = await submit(connection, *(order(account_id) for _ in range(20)))
        assert all(isinstance(result, Submitted) for result in results)
        assert [result.repeated for result in results] == [False] + [True] * 19
        assert len({result.quote_id for result in results}) == 1
        assert await held(connection, account_id) == 0
        # Refused together, too.
        both = await submit(connection, order(account_id, key="x"), order(account_id, key="x"))
        assert all(isinstance(result, NotEnoughBalance) for result in both)


async def test_an_ending_and_a_submission_of_the_same_key_do_not_wait_for_each_other(
    database: Database,
):
    async with database.transaction() as connection:
        account_id = await payer(connection)
        key_id, _ = await accounts.create_key(connection, account_id, limit_msat=9 * OFFER_MSAT)
        running = Submission(new_quote(), account_id, key_id)
        await submit(connection, running)
        job_id = running.quote.jobs[0].id
        assert await claim(connection, job_id)

    async def end_it() -> Any:
        async with database.transaction() as connection:
            return await end(connection, Ending(job_id, Event.FINISH, "stop", 1, charge_msat=1000))

    async with database.transaction() as connection:
        # What a submission does first.
        await ledger.lock_balances(connection, [ledger.client(account_id)])
        ending = asyncio.create_task(end_it())
        async with asyncio.timeout(10):
            while not await connection.fetchval(
                "select exists (select from pg_locks where not granted)"
            ):
                await asyncio.sleep(0)
        # And what it does then: were the ending there before it, PostgreSQL would end one of them.
        (done,) = await submit(connection, Submission(new_quote(), account_id, key_id))
        assert isinstance(done, Submitted)
    assert await ending
    async with database.connection() as connection:
        (key,) = await accounts.list_keys(connection, account_id)
        assert key.spent_msat == 1000 + OFFER_MSAT


@pytest.mark.parametrize("moves", ["endings", "give-backs"])
async def test_two_that_move_the_same_jobs_in_another_order_do_not_wait_for_each_other(
    database: Database, moves: str
):
    async with database.transaction() as connection:
        account_id = await payer(connection)
        ids = sorted([(await job_in(connection, State.RUNNING, account_id)).id for _ in range(9)])

    async def move(ids: list[str]) -> int:
        async with database.transaction() as connection:
            if moves == "endings":
                rows = [Ending(job_id, Event.CANCEL, "cancelled", 1) for job_id in ids]
                done = await job_endings.end_many(connection, rows, wipe_after_s=600)
            else:
                backs = [GiveBack(job_id, 1, LANE, "lost", "worker") for job_id in ids]
                done = await job_store.give_back_many(connection, backs)
            return sum(map(bool, done))

    async with database.transaction() as connection:
        # Both have come to the one in the middle, if each goes its own way.
        await connection.execute("select from jobs where id = $1 for update", ids[4])
        both = [asyncio.create_task(move(ids)), asyncio.create_task(move(ids[::-1]))]
        async with asyncio.timeout(10):
            while await connection.fetchval("select count(*) from pg_locks where not granted") < 2:
                await asyncio.sleep(0.01)
    assert sorted(await asyncio.gather(*both)) == [0, 9]


async def test_an_order_that_could_not_be_paid_may_be_repeated_once_it_can(database: Database):
    async with database.transaction() as connection:
        account_id = await payer(connection, 100)
        (refused,) = await submit(connection, order(account_id))
        assert isinstance(refused, NotEnoughBalance)
        more = ledger.Transfer(
            ledger.LIGHTNING, ledger.client(account_id), OFFER_MSAT, "received", "later"
        )
        await ledger.post(connection, [more])
        (done,) = await submit(connection, order(account_id))
        assert isinstance(done, Submitted) and not done.repeated


async def test_a_keys_limit_counts_what_is_held_and_forgets_what_came_back(database: Database):
    async with database.transaction() as connection:
        account_id = await payer(connection)
        key_id, _ = await accounts.create_key(connection, account_id, limit_msat=2 * OFFER_MSAT)
        rows = [Submission(new_quote(), account_id, key_id) for _ in range(3)]
        results = await submit(connection, *rows)
        assert [type(result) for result in results] == [Submitted, Submitted, NotEnoughBalance]
        first, second = (row.quote.jobs[0].id for row in rows[:2])
        assert await claim(connection, first)
        assert await end(connection, Ending(first, Event.FINISH, "stop", 1, charge_msat=1000))
        assert await end(connection, Ending(second, Event.CANCEL, "cancelled"))
        (key,) = await accounts.list_keys(connection, account_id)
        assert key.spent_msat == 1000
        repeated = Submission(new_quote(request=HASH), account_id, key_id, (account_id, "k"))
        again = Submission(new_quote(request=HASH), account_id, key_id, (account_id, "k"))
        assert [type(r) for r in await submit(connection, repeated, again)] == [Submitted] * 2
        (key,) = await accounts.list_keys(connection, account_id)
        assert key.spent_msat == 1000 + OFFER_MSAT  # the repeated one is counted once


async def test_a_claim_that_came_too_late_changes_nothing_for_those_beside_it(database: Database):
    async with database.transaction() as connection:
        account_id = await payer(connection)
        rows = [Submission(new_quote(), account_id) for _ in range(3)]
        await submit(connection, *rows)
        ids = [row.quote.jobs[0].id for row in rows]
        assert await end(connection, Ending(ids[1], Event.CANCEL, "cancelled"))
        claims = [
            job_records.Claim(job_id, f"w{i}", "r", 0, await _soon(connection))
            for i, job_id in enumerate([*ids, "nowhere"])
        ]
        claimed = await job_store.claim_many(connection, claims)
        assert [c and c.job_id for c in claimed] == [ids[0], None, ids[2], None]
        assert [c and c.worker_id for c in claimed] == ["w0", None, "w2", None]


async def _soon(connection: Any) -> Any:
    return await connection.fetchval("select now() + interval '1 minute'")


@pytest.mark.parametrize("seed", range(4))
async def test_whatever_happens_in_whatever_order_no_msat_is_lost(database: Database, seed: int):
    """E6-3 in small: random events on random jobs, in batches, told of twice."""
    dice = random.Random(seed)
    async with database.transaction() as connection:
        payers = [await payer(connection, FUNDS) for _ in range(3)]
        keys = {a: (await accounts.create_key(connection, a, limit_msat=9000))[0] for a in payers}
    jobs: list[str] = []
    claims: dict[str, Claimed] = {}
    happened: Counter[str] = Counter()
    for _ in range(150):
        async with database.transaction() as connection:
            done = await _something(connection, dice, payers, keys, jobs, claims)
            happened.update(done)
    async with database.transaction("repeatable_read") as connection:
        books = await trial_balance(connection)
        assert books.in_order, books.problems
        await _agrees(connection, payers, keys)
    assert {"submit", "claim", "give_back", "finish", "fail", "cancel"} <= happened.keys(), happened


async def _something(
    connection: Any,
    dice: random.Random,
    payers: list[str],
    keys: dict[str, str],
    jobs: list[str],
    claims: dict[str, Claimed],
) -> list[str]:
    """One turn: new jobs, or an event for some jobs, which may be the wrong one for them."""
    if dice.random() < 0.3 or not jobs:
        rows = []
        for _ in range(dice.randint(1, 3)):
            account_id = dice.choice(payers)
            key_id = keys[account_id] if dice.random() < 0.5 else None
            rows.append(Submission(new_quote(new_job(spec="{}")), account_id, key_id))
        rows.sort(key=job_submits.is_plain)
        plain = [row for row in rows if job_submits.is_plain(row)]
        bound = rows[: len(rows) - len(plain)]
        results = await job_submits.submit_bound(connection, bound)
        results += await job_submits.submit_plain(connection, plain) if plain else []
        for row, result in zip(rows, results, strict=True):
            if isinstance(result, Submitted):
                jobs.append(row.quote.jobs[0].id)
        return ["submit"]
    some = [dice.choice(jobs) for _ in range(dice.randint(1, 4))]
    what = dice.choice(
        ["claim"] * 4 + ["give_back", "finish", "finish", "fail", "cancel", "expire"]
    )
    if what == "claim":
        moved = [await claim(connection, job, dice.choice("ab")) for job in some]
        claims |= {claimed.job_id: claimed for claimed in moved if claimed is not None}
    elif what == "give_back":
        backs = [GiveBack(job, dice.randint(1, 2), LANE, "lost", "worker") for job in set(some)]
        moved = await job_store.give_back_many(connection, backs)
    else:
        endings = [
            Ending(
                job,
                Event(what),
                what,
                attempt=dice.choice([None, 1, 1, 2]),
                charge_msat=await _charge(connection, dice, job, what),
                payee=dice.choice([None, "a", "b"]),
                result="{}",
                had_chunks=dice.random() < 0.5,
                router_id="r1",
                claimed=claims.get(job),
            )
            for job in some
        ]
        moved = await plain_endings.end_plain(connection, endings, router_id="r1", wipe_after_s=1)
    return [what] if any(moved) else []


async def _charge(connection: Any, dice: random.Random, job_id: str, what: str) -> int:
    # What is charged was asked of a running job; anything else ends for nothing.
    running = await state_of(connection, job_id) is State.RUNNING
    return dice.randint(0, OFFER_MSAT) if running and what != "expire" else 0


async def _agrees(connection: Any, payers: list[str], keys: dict[str, str]) -> None:
    """Balances, escrows, limits and the queue are what the jobs' rows say."""
    rows = await connection.fetch("select * from jobs")
    for row in rows:
        escrow = await ledger.balance_msat(connection, ledger.escrow(row["id"]))
        waits = await connection.fetchval("select count(*) from queue where job_id = $1", row["id"])
        assert escrow == (0 if State(row["state"]) in FINAL else row["held_msat"])
        assert waits == (1 if row["state"] == State.QUEUED else 0)
        tries = await connection.fetchval(
            "select count(*) from attempts where job_id = $1", row["id"]
        )
        assert tries == row["attempt"]
    for account_id in payers:
        own = [row for row in rows if row["account_id"] == account_id]
        assert await held(connection, account_id) == FUNDS - sum(map(_out_msat, own))
        limited = [row for row in own if row["key_id"] == keys[account_id]]
        spent = await connection.fetchval(
            "select spent_msat from account_keys where id = $1", keys[account_id]
        )
        assert spent == sum(map(_out_msat, limited))
        assert spent <= 9000


def _out_msat(row: Any) -> int:
    """What a job has taken from its payer: its charge, or all that is held while it lives."""
    return row["held_msat"] if row["charged_msat"] is None else row["charged_msat"]
