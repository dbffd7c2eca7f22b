"""The ledger: two accounts a transfer, posted once, liabilities never below zero."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest

from billing import ledger
from billing.errors import InsufficientFunds
from billing.ledger import LIGHTNING, Transfer
from billing.trial_balance import trial_balance
from router.database import Database

ALICE = ledger.client("alice")


def paid(amount_msat: int, reference: str = "hash-1", account: str = ALICE) -> Transfer:
    return Transfer(LIGHTNING, account, amount_msat, "received", reference)


async def test_a_transfer_moves_the_amount_once_however_often_it_is_posted(database: Database):
    for _ in range(3):
        async with database.transaction() as connection:
            await ledger.post(connection, [paid(1500)])
    async with database.connection() as connection:
        assert await ledger.balance_msat(connection, ALICE) == 1500
        assert await ledger.balance_msat(connection, LIGHTNING) == 1500
        assert (await trial_balance(connection)).in_order


async def test_a_liability_cannot_go_below_zero_and_nothing_moves(database: Database):
    async with database.transaction() as connection:
        await ledger.post(connection, [paid(1000)])
    hold = Transfer(ALICE, ledger.escrow("job"), 1001, "hold", "job")
    with pytest.raises(InsufficientFunds) as refused:
        async with database.transaction() as connection:
            await ledger.post(connection, [hold])
    assert (refused.value.needed_msat, refused.value.balance_msat) == (1001, 1000)
    async with database.connection() as connection:
        assert await ledger.balance_msat(connection, ALICE) == 1000
        assert await ledger.entries(connection, ledger.escrow("job")) == []


async def test_an_escrow_that_is_empty_leaves_no_row_but_keeps_its_history(database: Database):
    async with database.transaction() as connection:
        await ledger.post(connection, [paid(1000)])
        await ledger.post(connection, [Transfer(ALICE, ledger.escrow("j"), 700, "hold", "j")])
        await ledger.post(connection, [Transfer(ledger.escrow("j"), ALICE, 700, "refund", "j")])
        stored = await connection.fetch("select account from ledger_balances")
        assert [row["account"] for row in stored] == [ALICE]
        assert [e.change_msat for e in await ledger.entries(connection, ledger.escrow("j"))] in (
            [-700, 700],
            [700, -700],
        )
        assert (await trial_balance(connection)).in_order


async def test_many_posts_at_once_on_the_same_accounts_neither_deadlock_nor_lose(
    database: Database,
):
    async def move(n: int) -> None:
        async with database.transaction() as connection:
            names = [ledger.client(f"c{i}") for i in (range(5) if n % 2 else range(4, -1, -1))]
            await ledger.post(connection, [paid(10, f"r{n}-{a}", a) for a in names])

    await asyncio.gather(*(move(n) for n in range(40)))
    async with database.connection() as connection:
        for i in range(5):
            assert await ledger.balance_msat(connection, ledger.client(f"c{i}")) == 400


@pytest.mark.parametrize("amount_msat", [-1, -1_000_000])
async def test_a_negative_transfer_moves_nothing(database: Database, amount_msat: int):
    async with database.transaction() as connection:
        assert await ledger.post(connection, [paid(amount_msat)]) == set()
    async with database.connection() as connection:
        assert await ledger.balance_msat(connection, ALICE) == 0


async def test_the_trial_balance_names_a_stored_balance_that_was_tampered_with(database: Database):
    async with database.transaction() as connection:
        await ledger.post(connection, [paid(1000)])
        await connection.execute("update ledger_balances set balance_msat = 999")
        result = await trial_balance(connection)
    assert not result.in_order
    assert "999" in result.problems[0]


async def test_the_database_itself_refuses_a_negative_balance(database: Database):
    async with database.connection() as connection:
        with pytest.raises(asyncpg.CheckViolationError):
            await connection.execute("insert into ledger_balances values ('liabilities:x', -1)")
