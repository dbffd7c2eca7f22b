"""An ending in one statement: the same rows as step by step, and nothing at all where it may not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from billing import accounts, ledger
from billing.ledger import Transfer
from billing.trial_balance import trial_balance
from router import job_endings, job_store, job_submits, plain_endings
from router.database import BatchingWriter, ConnectionBroke, Database
from router.job_records import Claimed, Ended, Ending, GiveBack, Submission
from router.job_states import Event, State
from tests.job_tools import LANE, OFFER_MSAT, claim, new_job, new_quote, payer, state_of, submit
from tests.router_rig import Rig
from tests.test_paid_job import CHAT

PATIENCE_S = 10.0
# Of `claim`.
ROUTER = "r1"
TABLES = ("jobs", "attempts", "job_chunks", "queue", "ledger_transfers", "ledger_balances")
End = Callable[[Any, list[Ending]], Awaitable[list[Ended | None]]]


async def plain(connection: Any, rows: list[Ending]) -> list[Ended | None]:
    return await plain_endings.end_plain(connection, rows, router_id=ROUTER, wipe_after_s=600)


async def steps(connection: Any, rows: list[Ending]) -> list[Ended | None]:
    return await job_endings.end_many(connection, rows, wipe_after_s=600)


async def in_steps(connection: Any, rows: list[Ending]) -> list[Ended | None]:
    async with connection.transaction():
        return await steps(connection, rows)


async def statement(connection: Any, row: Ending) -> dict[str, Ended]:
    """What the statement does by itself, without the steps after it."""
    return await plain_endings._end(connection, [row], ROUTER, 600)


async def running(
    connection: Any, account_id: str, *, key_id: str | None = None, **changes: Any
) -> Claimed:
    quote = new_quote(new_job(**changes))
    await job_submits.submit_bound(connection, [Submission(quote, account_id, key_id)])
    claimed = await claim(connection, quote.jobs[0].id)
    assert claimed is not None
    return claimed


async def committed(database: Database, **changes: Any) -> tuple[str, Claimed]:
    """A payer and his running job."""
    async with database.transaction() as connection:
        account_id = await payer(connection)
        return account_id, await running(connection, account_id, **changes)


def ending(claimed: Claimed, event: Event = Event.FINISH, **changes: Any) -> Ending:
    row = Ending(
        claimed.job_id,
        event,
        "stop",
        attempt=claimed.attempt,
        charge_msat=1001,
        payee="w1",
        result='{"text": "\\u0000 \u20ac"}',
        usage='{"tokens": 3}',
        answer_hash=b"\x00\x01\xff" * 8,
        first_token_at=datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC),
        outcome="succeeded",
        tokens=3,
        router_id=ROUTER,
        claimed=claimed,
    )
    return replace(row, **changes)


async def everything(connection: Any) -> dict[str, list[dict[str, Any]]]:
    return {
        table: sorted(
            (dict(row) for row in await connection.fetch(f"select * from {table}")), key=repr
        )
        for table in TABLES
    }


async def waits_for_a_lock(connection: Any) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not await connection.fetchval(
            "select exists (select from pg_locks where not granted)"
        ):
            await asyncio.sleep(0.01)


async def books_in_order(database: Database) -> bool:
    async with database.transaction("repeatable_read") as connection:
        return (await trial_balance(connection)).in_order


@pytest.fixture
def no_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    async def end_many(*_: Any, **__: Any) -> None:
        raise AssertionError("an ending went step by step")

    monkeypatch.setattr(plain_endings, "end_many", end_many)


CASES: dict[str, tuple[Event, dict[str, Any]]] = {
    "finished": (Event.FINISH, {}),
    "cancelled": (Event.CANCEL, {"blame": "client", "outcome": "cancelled"}),
    "failed with a part": (Event.FAIL, {"blame": "worker", "error": "gone", "outcome": "lost"}),
    "failed with nothing": (
        Event.FAIL,
        {"charge_msat": 0, "result": None, "usage": None, "answer_hash": None},
    ),
    "without a word": (Event.FINISH, {"first_token_at": None, "outcome": None, "tokens": None}),
    "nothing left over": (Event.FINISH, {"charge_msat": OFFER_MSAT}),
    "a worker without pay": (Event.FINISH, {"payee": None}),
    "less than its commission": (Event.FINISH, {"charge_msat": 1}),
    "with chunks": (Event.FINISH, {"had_chunks": True}),
}


@pytest.mark.usefixtures("no_steps")
@pytest.mark.parametrize("event, changes", CASES.values(), ids=list(CASES))
async def test_one_statement_makes_the_rows_of_the_steps(
    database: Database, event: Event, changes: dict[str, Any]
):
    """To the letter: in one transaction, in which the clock stands still."""
    after: dict[End, Any] = {}
    async with database.transaction() as connection:
        client = await payer(connection)
        await submit(connection, client, new_job())
        claims = [await running(connection, account) for account in (client, client, ledger.CHECKS)]
        await connection.execute(
            "insert into job_chunks (job_id, n, start, text, tokens)"
            " select job_id, n, 0, 'said', 1 from attempts"
        )
        # One of them has been paid for something before.
        await ledger.post(
            connection, [Transfer(ledger.LIGHTNING, ledger.worker("w1"), 5, "earned", "before")]
        )
        rows = [ending(claimed, event, **changes) for claimed in claims]
        before = await everything(connection)
        for way in (steps, plain):
            undone = connection.transaction()
            await undone.start()
            ended = await way(connection, rows)
            after[way] = (ended, await everything(connection))
            await undone.rollback()
        assert await everything(connection) == before
    assert all(after[plain][0])
    assert after[plain] == after[steps]
    escrows = [row["account"] for row in after[plain][1]["ledger_balances"]]
    assert not {ledger.escrow(claimed.job_id) for claimed in claims} & set(escrows)


async def _webhook(connection: Any, claimed: Claimed) -> None:
    await connection.execute(
        "update jobs set webhook = $2 where id = $1",
        claimed.job_id,
        json.dumps({"url": "https://x.example", "include_result": False}),
    )


async def _limit(connection: Any, claimed: Claimed) -> None:
    key_id, _ = await accounts.create_key(connection, claimed.account_id, limit_msat=9_000)
    await connection.execute("update jobs set key_id = $2 where id = $1", claimed.job_id, key_id)


async def _resumed(connection: Any, claimed: Claimed) -> None:
    held = [(claimed.job_id, claimed.attempt)]
    soon = datetime.now(UTC) + timedelta(minutes=1)
    assert await job_store.resume_many(connection, "w1", held, router_id="r2", lease_ends_at=soon)


async def _given_back(connection: Any, claimed: Claimed) -> None:
    back = GiveBack(claimed.job_id, claimed.attempt, LANE, "lost", "worker")
    assert await job_store.give_back_many(connection, [back]) == [True]


async def _claimed_anew(connection: Any, claimed: Claimed) -> None:
    await _given_back(connection, claimed)
    assert await claim(connection, claimed.job_id)


async def _cancelled(connection: Any, claimed: Claimed) -> None:
    assert await steps(connection, [Ending(claimed.job_id, Event.CANCEL, "cancelled")]) != [None]


async def _ended(connection: Any, claimed: Claimed) -> None:
    assert await statement(connection, ending(claimed))


async def _dearer(connection: Any, claimed: Claimed) -> None:
    await connection.execute("update jobs set held_msat = held_msat + 1")


async def _other_commission(connection: Any, claimed: Claimed) -> None:
    await connection.execute("update jobs set commission_ppm = 0 where id = $1", claimed.job_id)


async def _other_payer(connection: Any, claimed: Claimed) -> None:
    other = await payer(connection)
    await connection.execute("update jobs set account_id = $2 where id = $1", claimed.job_id, other)


async def _other_escrow(connection: Any, claimed: Claimed) -> None:
    more = Transfer(ledger.LIGHTNING, ledger.escrow(claimed.job_id), 1, "hold", "more")
    await ledger.post(connection, [more])


UNUSUAL = (_webhook, _limit, _other_commission, _other_payer)
NOT_TO_END = (_resumed, _given_back, _claimed_anew, _cancelled, _ended)


@pytest.mark.parametrize("what", [*UNUSUAL, *NOT_TO_END, _dearer, _other_escrow])
async def test_what_is_not_the_usual_case_is_not_touched(database: Database, what: Any):
    _, claimed = await committed(database)
    async with database.transaction() as connection:
        await what(connection, claimed)
    async with database.connection() as connection:
        before = await everything(connection)
        assert await statement(connection, ending(claimed)) == {}
        assert await everything(connection) == before


@pytest.mark.parametrize("what", [*UNUSUAL, *NOT_TO_END])
async def test_what_is_not_the_usual_case_ends_as_step_by_step(database: Database, what: Any):
    after: dict[End, Any] = {}
    async with database.transaction() as connection:
        claimed = await running(connection, await payer(connection))
        other = await running(connection, await payer(connection))
        await what(connection, claimed)
        for way in (steps, plain):
            undone = connection.transaction()
            await undone.start()
            ended = await way(connection, [ending(other), ending(claimed)])
            hooks = await connection.fetch("select job_id from webhooks")
            spent = await connection.fetch("select id, spent_msat from account_keys")
            after[way] = (ended, await everything(connection), hooks, spent)
            await undone.rollback()
    assert after[plain] == after[steps]
    assert [done is not None for done in after[plain][0]] == [True, what not in NOT_TO_END]


async def test_some_endings_are_not_tried_in_one_statement(database: Database):
    _, claimed = await committed(database)
    row = ending(claimed)
    assert plain_endings.is_plain(row, ROUTER)
    second = replace(claimed, attempt=2)
    blamed = ending(second, Event.FAIL, blame="job")
    assert plain_endings.is_plain(replace(blamed, blame="worker"), ROUTER)
    for other in (
        replace(row, claimed=None),
        replace(row, attempt=None),
        replace(row, event=Event.EXPIRE),
        replace(row, router_id=None),
        replace(row, router_id="r2"),
        replace(row, claimed=replace(claimed, held_msat=0), charge_msat=0),
        blamed,
    ):
        assert not plain_endings.is_plain(other, ROUTER), other


async def test_what_costs_nothing_ends_too(database: Database):
    _, claimed = await committed(database, offer_msat=0, base_fee_msat=0)
    async with database.connection() as connection:
        (ended,) = await plain(connection, [ending(claimed, charge_msat=0)])
        assert ended is not None and ended.held_msat == 0
        assert await state_of(connection, claimed.job_id) is State.SUCCEEDED


async def test_an_ending_said_twice_is_settled_once(database: Database):
    """In one batch, and once more after it: as after a commit of which nobody heard."""
    account_id, claimed = await committed(database)
    row = ending(claimed)
    async with database.connection() as connection:
        first, second = await plain(connection, [row, row])
        assert first is not None and second is None
        assert await plain(connection, [row]) == [None]
        assert await ledger.balance_msat(connection, ledger.worker("w1")) == 951
        left = await ledger.balance_msat(connection, ledger.client(account_id))
        assert left == 1_000_000 - 1001
    assert await books_in_order(database)


async def test_money_that_is_in_the_books_already_does_not_move_again(database: Database):
    _, claimed = await committed(database)
    async with database.transaction() as connection:
        escrow, worker = ledger.escrow(claimed.job_id), ledger.worker("w1")
        await connection.execute(
            "insert into ledger_transfers (id, debit, credit, amount_msat, code, reference)"
            " values ($1, $2, $3, 951, 'earned', $4)",
            ledger.transfer_id(claimed.job_id, "earned"),
            escrow,
            worker,
            claimed.job_id,
        )
    async with database.connection() as connection:
        (ended,) = await plain(connection, [ending(claimed)])
        assert ended is not None
        assert await state_of(connection, claimed.job_id) is State.SUCCEEDED
        assert await ledger.balance_msat(connection, worker) == 0
        # What was not posted anew is still where it was.
        assert await ledger.balance_msat(connection, escrow) == 951


@pytest.mark.parametrize("ways", [(plain, plain), (plain, in_steps), (in_steps, plain)])
async def test_of_two_endings_at_the_same_moment_one_counts(
    database: Database, ways: tuple[End, End]
):
    account_id, claimed = await committed(database)
    rows = [ending(claimed), ending(claimed, Event.CANCEL, charge_msat=7)]

    async def end_it(way: End, row: Ending) -> Ended | None:
        async with database.connection() as connection:
            return (await way(connection, [row]))[0]

    async with database.transaction() as connection:
        await connection.execute("select from jobs for update")
        both = [asyncio.create_task(end_it(*pair)) for pair in zip(ways, rows, strict=True)]
        async with asyncio.timeout(PATIENCE_S):
            while await connection.fetchval("select count(*) from pg_locks where not granted") < 2:
                await asyncio.sleep(0.01)
    done = [ended for ended in await asyncio.gather(*both) if ended is not None]
    assert len(done) == 1
    async with database.connection() as connection:
        left = await ledger.balance_msat(connection, ledger.client(account_id))
        assert left == 1_000_000 - done[0].charged_msat
    assert await books_in_order(database)


@pytest.mark.parametrize("what", NOT_TO_END)
async def test_what_was_there_first_is_waited_for_and_counts(database: Database, what: Any):
    _, claimed = await committed(database)

    async def end_it() -> list[Ended | None]:
        async with database.connection() as connection:
            return await plain(connection, [ending(claimed)])

    async with database.transaction() as connection:
        await what(connection, claimed)
        late = asyncio.create_task(end_it())
        await waits_for_a_lock(connection)
        before = await everything(connection)
    assert await late == [None]
    async with database.connection() as connection:
        assert await everything(connection) == before
    assert await books_in_order(database)


@pytest.mark.usefixtures("no_steps")
async def test_a_job_whose_row_has_changed_meanwhile_ends_all_the_same(database: Database):
    """Leases are renewed, and first tokens noted, while jobs end."""
    _, claimed = await committed(database)
    first_token_at = datetime(2026, 1, 1, tzinfo=UTC)

    async def end_it() -> list[Ended | None]:
        async with database.connection() as connection:
            return await plain(connection, [ending(claimed, first_token_at=None)])

    async with database.transaction() as connection:
        await connection.execute(
            "update jobs set lease_ends_at = now(), shown = true, first_token_at = $1",
            first_token_at,
        )
        late = asyncio.create_task(end_it())
        await waits_for_a_lock(connection)
    assert await late != [None]
    async with database.connection() as connection:
        (job,) = await connection.fetch("select * from jobs")
        assert job["shown"] and job["first_token_at"] == first_token_at
        assert job["lease_ends_at"] is None
        assert await connection.fetchval("select outcome from attempts") == "succeeded"
    assert await books_in_order(database)


async def test_balances_that_change_meanwhile_lose_nothing(database: Database):
    account_id, claimed = await committed(database)
    client = ledger.client(account_id)

    async def end_it() -> list[Ended | None]:
        async with database.connection() as connection:
            return await plain(connection, [ending(claimed)])

    async with database.transaction() as connection:
        await ledger.post(connection, [Transfer(client, ledger.LIGHTNING, 40, "withdrawn", "x")])
        late = asyncio.create_task(end_it())
        await waits_for_a_lock(connection)
    assert await late != [None]
    async with database.connection() as connection:
        assert await ledger.balance_msat(connection, client) == 1_000_000 - 1001 - 40
    assert await books_in_order(database)


async def test_two_batches_of_the_same_jobs_do_not_wait_for_each_other(database: Database):
    async with database.transaction() as connection:
        account_id = await payer(connection)
        claims = [await running(connection, account_id) for _ in range(9)]
    claims.sort(key=lambda claimed: claimed.job_id)

    async def end_all(way: End, claims: list[Claimed]) -> int:
        async with database.connection() as connection:
            return sum(map(bool, await way(connection, [ending(c) for c in claims])))

    async with database.transaction() as connection:
        # Both have come to the one in the middle, if each goes its own way.
        await connection.execute("select from jobs where id = $1 for update", claims[4].job_id)
        both = [
            asyncio.create_task(end_all(plain, claims)),
            asyncio.create_task(end_all(in_steps, claims[::-1])),
        ]
        async with asyncio.timeout(PATIENCE_S):
            while await connection.fetchval("select count(*) from pg_locks where not granted") < 2:
                await asyncio.sleep(0.01)
    assert sorted(await asyncio.gather(*both)) == [0, 9]
    assert await books_in_order(database)


async def test_a_crowd_of_endings_of_several_routers_divides_every_escrow_once(database: Database):
    async with database.transaction() as connection:
        payers = [await payer(connection) for _ in range(3)]
        claims = [await running(connection, payers[n % 3]) for n in range(30)]
    writers = [
        BatchingWriter(database, {"end": way}, single=single)
        for way, single in ((plain, ["end"]), (plain, ["end"]), (steps, []))
    ]
    for writer in writers:
        writer.start()
    rows = [ending(claimed, payee=f"w{n % 2}") for n, claimed in enumerate(claims)]
    results = await asyncio.gather(
        *(writer.write("end", row) for row in rows for writer in writers)
    )
    for writer in writers:
        await writer.stop()
    assert sum(result is not None for result in results) == len(claims)
    async with database.connection() as connection:
        for number in range(2):
            earned = await ledger.balance_msat(connection, ledger.worker(f"w{number}"))
            assert earned == 15 * 951
        assert (
            await connection.fetchval(
                "select count(*) from ledger_balances where account like 'liabilities:escrow:%'"
            )
            == 0
        )
    assert await books_in_order(database)


@pytest.mark.parametrize("broken", [False, True])
async def test_what_the_statement_has_done_is_told_though_the_steps_after_it_fail(
    database: Database, monkeypatch: pytest.MonkeyPatch, broken: bool
):
    """Its caller counts it, and whoever's steps failed tries again: all of a batch."""
    async with database.transaction() as connection:
        account_id = await payer(connection)
        first, second = [await running(connection, account_id) for _ in range(2)]
    in_order = job_endings.end_many

    async def fails_once(connection: Any, rows: list[Ending], **options: Any) -> Any:
        monkeypatch.setattr(plain_endings, "end_many", in_order)
        done = await in_order(connection, rows, **options)
        assert done[0] is not None
        raise ConnectionResetError("cut") if broken else ValueError("a step that fails")

    writer = BatchingWriter(database, {"end": plain}, single=["end"])
    rows = [ending(first), replace(ending(second), router_id=None)]
    monkeypatch.setattr(plain_endings, "end_many", fails_once)
    writing = asyncio.gather(*(writer.write("end", row) for row in rows), return_exceptions=True)
    await asyncio.sleep(0)
    writer.start()
    one, other = await writing
    assert isinstance(one, Ended) and one.job_id == first.job_id
    if broken:
        assert isinstance(other, ConnectionBroke)
        other = await writer.write("end", rows[1])
    assert isinstance(other, Ended) and other.job_id == second.job_id
    await writer.stop()
    assert await books_in_order(database)


async def test_an_ending_whose_commit_was_not_heard_of_is_counted_all_the_same(
    router: Rig, monkeypatch: pytest.MonkeyPatch
):
    write = BatchingWriter.write
    lost: list[Ending] = []

    async def unheard(self: BatchingWriter, kind: str, row: Any) -> Any:
        result = await write(self, kind, row)
        if kind == "end" and not lost:
            lost.append(row)
            raise ConnectionBroke("after the commit")
        return result

    monkeypatch.setattr(BatchingWriter, "write", unheard)
    async with router.worker() as worker:
        for _ in range(2):
            asked = asyncio.create_task(
                router.http.post("/v1/chat/completions", json=CHAT, headers=await router.bearer())
            )
            await worker.serve()
            assert (await asked).status_code == 200
    assert len(lost) == 1
    tally = router.core.attempts.tally
    assert dict(tally.ended) == {("succeeded", "stop"): 2}
    charged = await router.query("select sum(charged_msat) from jobs")
    assert tally.charged_msat == charged[0][0] > 0


async def test_an_ending_holds_no_balance_while_a_give_back_waits_for_its_job(router: Rig):
    """Or it would wait for whoever holds that job and wants the balance: a router that ends it."""
    database, write = router.core.database, router.core.writer.write
    async with database.transaction() as connection:
        account_id = await payer(connection)
        ended, back = [await running(connection, account_id) for _ in range(2)]
    async with database.transaction() as connection:
        await connection.execute("select from jobs where id = $1 for update", back.job_id)
        writes = [
            asyncio.create_task(write("end", ending(ended))),
            asyncio.create_task(
                write("give_back", GiveBack(back.job_id, back.attempt, LANE, "lost", "worker"))
            ),
        ]
        await waits_for_a_lock(connection)
        async with asyncio.timeout(PATIENCE_S):
            assert await writes[0] is not None
        await ledger.lock_balances(connection, [ledger.client(account_id)])
    assert await writes[1]
    assert (await router.books()).in_order


@pytest.mark.usefixtures("no_steps")
async def test_a_router_takes_the_short_way(router: Rig):
    async with router.worker() as worker:
        asked = asyncio.create_task(
            router.http.post("/v1/chat/completions", json=CHAT, headers=await router.bearer())
        )
        await worker.serve()
        assert (await asked).status_code == 200
    assert [row["state"] for row in await router.query("select state from jobs")] == ["succeeded"]
    assert (await router.books()).in_order
