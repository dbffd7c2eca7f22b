"""`satherd ledger check`: proves the books from the database, whether or not a router runs; with
`--node` it asks the Lightning node what it holds as well."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import asyncpg
import typer

from billing import ledger
from billing.errors import BillingError
from billing.lightning import NodeBalance
from billing.lightning.connect import connect
from billing.one_network import said_by_books
from billing.trial_balance import TrialBalance, trial_balance
from cli.admin_access import fail, screen, table
from cli.router_location import data_dir, simulated_url
from cli.settings_flags import BadSettings, complain, read_settings
from router.embedded_postgres import EmbeddedPostgresError, reach
from router.settings import Settings, backend_settings

root = typer.Typer(no_args_is_help=True, add_completion=False)
app = typer.Typer(no_args_is_help=True, help="The books of a router.")
root.add_typer(app, name="ledger")

CONNECT_S = 15


@root.callback()
def _satherd() -> None:
    """Satherd's operator commands."""


@app.callback()
def _ledger() -> None:
    """The books of a router, read from its database."""


def run(arguments: Sequence[str]) -> int:
    """Run it; the exit status of a failure comes as SystemExit."""
    root(args=list(arguments), prog_name="satherd")
    return 0


@app.command()
def check(
    directory: Annotated[
        Path | None,
        typer.Option("--data-dir", help="Whose embedded database; else SATHERD_DATA_DIR."),
    ] = None,
    database_url: Annotated[
        str | None,
        typer.Option(
            envvar="SATHERD_DATABASE_URL", show_envvar=True, help="A PostgreSQL of your own."
        ),
    ] = None,
    node: Annotated[
        bool,
        typer.Option("--node", help="Also ask the Lightning node that the settings name."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Sum all transfers, and compare each stored balance with its own.

    Exit status 0: the books are in order. 1: they are not, and it says what is wrong. 2: they could
    not be read.
    """
    # A data directory that is named outranks a variable that is set for other commands.
    url = None if directory is not None else database_url
    try:
        books, network = asyncio.run(_read(url, data_dir(directory) / "postgres"))
    except EmbeddedPostgresError as error:
        raise fail(str(error), 2) from error
    except asyncpg.UndefinedTableError as error:
        raise fail("this database holds no books: has a router ever used it?", 2) from error
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, ValueError) as error:
        raise fail(f"the database cannot be read: {error}", 2) from error
    held = _ask_node(directory) if node else None
    _show_json(books, network, held) if as_json else _show(books, network, held)
    if not books.in_order:
        for problem in _problems(books):
            print(f"error: {problem}", file=sys.stderr)
        raise typer.Exit(1)


async def _read(database_url: str | None, folder: Path) -> tuple[TrialBalance, str | None]:
    """The books, and the network whose money they are of."""
    async with _where(database_url, folder) as url:
        connection = await asyncpg.connect(url, timeout=CONNECT_S)
        try:
            # One snapshot: transfers that are posted meanwhile are wholly in it, or not at all.
            async with connection.transaction(isolation="repeatable_read", readonly=True):
                return await trial_balance(connection), await said_by_books(connection)
        finally:
            await connection.close()


@asynccontextmanager
async def _where(database_url: str | None, folder: Path) -> AsyncIterator[str]:
    if database_url is not None:
        yield database_url
    else:
        async with reach(folder) as url:
            yield url


def _ask_node(directory: Path | None) -> NodeBalance:
    """What the node says it holds. Ends the program where it does not say."""
    try:
        settings = read_settings(Settings, [], prog="satherd ledger check")
        if settings.simulated and settings.simulated_url is None:
            settings.simulated_url = simulated_url(data_dir(directory))
        return asyncio.run(_balance(settings))
    except BadSettings as error:
        raise typer.Exit(complain(error)) from error
    except (BillingError, ValueError) as error:
        raise fail(f"the node does not say what it holds: {error}", 2) from error


async def _balance(settings: Settings) -> NodeBalance:
    backend = connect(settings.lightning, **backend_settings(settings))
    try:
        return await backend.balance()
    finally:
        await backend.aclose()


def _both_sides(books: TrialBalance, held: NodeBalance) -> list[tuple[str, int]]:
    """The node's side, the books' side, and what lies between."""
    booked_msat = books.lines.get(ledger.LIGHTNING, 0)
    return [
        ("the node can send", held.spendable_msat),
        ("it has on its way out", held.pending_msat),
        ("it has in reserves, or away", held.reserve_msat),
        ("so it holds", held.held_msat),
        ("booked as there", booked_msat),
        ("difference", held.held_msat - booked_msat),
    ]


def _explained(difference_msat: int) -> str:
    if difference_msat == 0:
        return "The node holds what is booked."
    if difference_msat > 0:
        return (
            "More than is booked: money of the operator's (`satherd admin ledger book deposit`), or a"
            " payment that is moving at this moment."
        )
    return (
        "Less than is booked: what channels have cost (`satherd admin ledger book node_fee`), a"
        " withdrawal of the operator's, a payment that is moving at this moment, or money missing."
    )


def _problems(books: TrialBalance) -> list[str]:
    if books.sum_msat == 0:
        return books.problems
    return [f"debits and credits differ by {books.sum_msat} msat", *books.problems]


def _show(books: TrialBalance, network: str | None, held: NodeBalance | None) -> None:
    rows = [
        (name, value if value > 0 else None, -value if value < 0 else None)
        for name, value in books.lines.items()
        if value
    ]
    debits = sum(value for value in books.lines.values() if value > 0)
    credits = -sum(value for value in books.lines.values() if value < 0)
    console = screen()
    title = f"the books, of {network}" if network else None
    console.print(table(title, ("account", "debit msat", "credit msat"), rows))
    console.print(f"\ndebits {debits} msat, credits {credits} msat, difference {books.sum_msat}")
    if books.in_order:
        console.print("[green]The books are in order.[/green]")
    if held is not None:
        sides = _both_sides(books, held)
        console.print("", table(None, ("node and books", "msat"), sides))
        console.print(_explained(sides[-1][1]), soft_wrap=True)


def _show_json(books: TrialBalance, network: str | None, held: NodeBalance | None) -> None:
    answer: dict[str, Any] = {
        "network": network,
        "in_order": books.in_order,
        "sum_msat": books.sum_msat,
        "lines": books.lines,
        "problems": _problems(books),
    }
    if held is not None:
        booked_msat = books.lines.get(ledger.LIGHTNING, 0)
        answer["node"] = {
            "spendable_msat": held.spendable_msat,
            "pending_msat": held.pending_msat,
            "reserve_msat": held.reserve_msat,
            "receivable_msat": held.receivable_msat,
            "held_msat": held.held_msat,
        }
        answer["booked_msat"] = booked_msat
        answer["difference_msat"] = held.held_msat - booked_msat
    typer.echo(json.dumps(answer))
