"""Options that several commands share, and how their errors are shown."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console

from cli.wallets import CLI_PATIENCE, read_credential, wallet_for
from client import Client, Info
from client.errors import SatherdError

stderr = Console(stderr=True, highlight=False, soft_wrap=True)

RouterUrl = Annotated[
    str | None,
    typer.Option(
        help="The router; else SATHERD_ROUTER_URL, else the one that `satherd up` runs here."
    ),
]
Key = Annotated[
    str | None,
    typer.Option(
        envvar="SATHERD_KEY",
        show_envvar=True,
        help="A prepaid key (sk-…) or a payment's credential; @FILE reads it from a file.",
    ),
]


@contextmanager
def open_client(router_url: str, key: str | None) -> Iterator[tuple[Client, Info]]:
    """A client that pays as its user can: with the key, or with the wallet that fits the router."""
    credential = read_credential(key) if key else None
    with Client(router_url, patience=CLI_PATIENCE) as asking:
        info = asking.info()
    wallet = wallet_for(info, router_url, stderr)
    with Client(router_url, key=credential, wallet=wallet, patience=CLI_PATIENCE) as client:
        yield client, info


@contextmanager
def explain_errors() -> Iterator[None]:
    """Show an error of the client in one line, with its code and facts, and exit with 1."""
    try:
        yield
    except SatherdError as error:
        plain = {name: value for name, value in error.facts.items() if _is_plain(value)}
        facts = ", ".join(f"{name}: {value}" for name, value in plain.items())
        stderr.print(f"error: {error.message} [{error.code}]", markup=False, style="red")
        if facts:
            stderr.print(facts, markup=False, style="dim")
        raise typer.Exit(1) from error
    except ValueError as error:
        stderr.print(f"error: {error}", markup=False, style="red")
        raise typer.Exit(2) from error


def _is_plain(value: object) -> bool:
    return isinstance(value, str | int | float) and len(str(value)) <= 100
