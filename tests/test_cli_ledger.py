"""`satherd ledger check`: in order, out of order, unreadable."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from billing import ledger
from billing.ledger import Transfer
from cli.main import main
from router.database import Database


def run(*arguments: str) -> int:
    try:
        return main(["ledger", "check", *arguments])
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 1


async def check(*arguments: str) -> int:
    """The exit status; it runs an event loop of its own, so it wants a thread of its own."""
    return await asyncio.to_thread(run, *arguments)


@pytest.fixture
async def booked(database: Database) -> Database:
    """1000 msat were received for a client, of which a job holds 600."""
    async with database.transaction() as connection:
        await ledger.post(
            connection,
            [
                Transfer(ledger.LIGHTNING, ledger.client("a"), 1000, "received", "hash"),
                Transfer(ledger.client("a"), ledger.escrow("j"), 600, "hold", "j"),
            ],
        )
    return database


async def test_books_in_order_are_status_0(
    booked: Database, database_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await check("--database-url", database_url) == 0
    shown = capsys.readouterr()
    assert "assets:lightning" in shown.out
    assert "debits 1000 msat, credits 1000 msat, difference 0" in shown.out
    assert "The books are in order." in shown.out
    assert shown.err == ""


async def test_the_books_as_json(
    booked: Database, database_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await check("--database-url", database_url, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {
        "network": None,  # no router has used these
        "in_order": True,
        "sum_msat": 0,
        "lines": {
            "assets:lightning": 1000,
            "liabilities:client": -400,
            "liabilities:escrow": -600,
        },
        "problems": [],
    }


async def test_a_stored_balance_that_is_not_the_sum_of_its_transfers_is_named(
    booked: Database, database_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async with booked.connection() as connection:
        await connection.execute(
            "update ledger_balances set balance_msat = 401 where account = $1", ledger.client("a")
        )
    assert await check("--database-url", database_url) == 1
    shown = capsys.readouterr()
    assert "error: liabilities:client:a: transfers give 400 msat, stored are 401 msat" in shown.err
    assert "in order" not in shown.out
    assert await check("--database-url", database_url, "--json") == 1
    assert json.loads(capsys.readouterr().out)["in_order"] is False


async def test_a_balance_without_any_transfer_is_named(
    booked: Database, database_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async with booked.connection() as connection:
        await connection.execute(
            "insert into ledger_balances (account, balance_msat) values ($1, 5)",
            ledger.worker("w"),
        )
    assert await check("--database-url", database_url) == 1
    assert "liabilities:worker:w: transfers give 0 msat, stored are 5 msat" in (
        capsys.readouterr().err
    )


async def test_the_variable_says_which_database_unless_a_folder_is_named(
    booked: Database,
    database_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SATHERD_DATABASE_URL", database_url)
    assert await check() == 0
    capsys.readouterr()
    assert await check("--data-dir", str(tmp_path)) == 2
    assert f"error: there is no database in {tmp_path}/postgres" in capsys.readouterr().err


async def test_a_database_without_books_cannot_be_read(
    postgres_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await check("--database-url", postgres_url) == 2
    assert "this database holds no books" in capsys.readouterr().err
    assert await check("--database-url", f"postgresql:///x?host={tmp_path}") == 2
    assert "error: the database cannot be read" in capsys.readouterr().err
