"""`satherd balance` and `satherd pay`: the account behind a key; paying with simulated money."""

from __future__ import annotations

import json
import os
import time
from typing import Annotated

import typer

from cli.options import Key, RouterUrl, explain_errors, open_client, stderr
from cli.router_location import find_router_url
from cli.wallets import money
from client import SimulatedWallet
from client.challenge import invoice_amount_msat

WITHDRAWAL_WAIT_S = 30.0

balance_app = typer.Typer(
    help="The account behind a key: show it, top it up, give out keys, withdraw.",
    invoke_without_command=True,
)
keys_app = typer.Typer(help="Further keys on the account.", no_args_is_help=True)
balance_app.add_typer(keys_app, name="keys")


@balance_app.callback()
def balance(
    context: typer.Context,
    key: Annotated[str | None, typer.Option(help="As for `show`.")] = None,
    router_url: RouterUrl = None,
) -> None:
    """The account behind a key: show it (the default), top it up, give out keys, withdraw."""
    if context.invoked_subcommand is None:
        show(key or os.environ.get("SATHERD_KEY"), router_url)
    elif key is not None:
        # Ignored, it would let `topup` pay into a new account instead of the key's.
        raise typer.BadParameter(f"give --key after `{context.invoked_subcommand}`")


@balance_app.command()
def show(key: Key = None, router_url: RouterUrl = None) -> None:
    """Print what the account holds, and what is held for jobs that have not ended."""
    with explain_errors(), open_client(find_router_url(router_url), key) as (client, info):
        balance = client.balance()
        typer.echo(
            json.dumps(
                {
                    "balance_msat": balance.balance_msat,
                    "held_msat": balance.held_msat,
                    "simulated": info.simulated,
                }
            )
        )


@balance_app.command()
def topup(
    amount_msat: Annotated[int, typer.Argument(min=1, help="How much, in msat.")],
    key: Key = None,
    router_url: RouterUrl = None,
) -> None:
    """Pay into the key's account, or into a new one, whose key is printed this once.

    The JSON also holds the credential of the payment, which can rotate the key and withdraw.
    """
    with explain_errors(), open_client(find_router_url(router_url), key) as (client, info):
        paid = client.top_up(amount_msat)
        stderr.print(f"Paid {money(paid.paid_msat, simulated=info.simulated)}.", style="dim")
        new_key = paid.key.as_text() if paid.key else None
        typer.echo(
            json.dumps(
                {
                    "key": new_key,
                    "balance_msat": paid.balance_msat,
                    "payment_hash": paid.payment_hash,
                    "credential": paid.credential.as_text(),
                    "simulated": info.simulated,
                }
            )
        )


@balance_app.command()
def rotate(
    payment_hash: Annotated[str, typer.Argument(help="Of the top-up that made the key.")],
    key: Key = None,
    router_url: RouterUrl = None,
) -> None:
    """Replace a key that may have leaked: prints the new one, and the old one is dead.

    --key is the credential of the top-up, as `satherd balance topup` printed it.
    """
    with explain_errors(), open_client(find_router_url(router_url), key) as (client, _):
        new_key = client.rotate(payment_hash)
        typer.echo(json.dumps({"key": new_key.as_text()}))


@keys_app.command("list")
def list_keys(key: Key = None, router_url: RouterUrl = None) -> None:
    """Print the account's keys, without the keys themselves: the router does not have them."""
    with explain_errors(), open_client(find_router_url(router_url), key) as (client, _):
        typer.echo(json.dumps(client.keys()))


@keys_app.command("create")
def create_key(
    key: Key = None,
    limit_msat: Annotated[int | None, typer.Option(min=1, help="The most it may spend.")] = None,
    withdraw: Annotated[bool, typer.Option("--withdraw", help="It may withdraw.")] = False,
    router_url: RouterUrl = None,
) -> None:
    """Make another key on the account and print it, this once."""
    with explain_errors(), open_client(find_router_url(router_url), key) as (client, _):
        made = client.create_key(limit_msat=limit_msat, withdraw=withdraw)
        typer.echo(json.dumps({"key": made.as_text()}))


@keys_app.command("delete")
def delete_key(
    key_id: Annotated[str, typer.Argument(help="As `list` shows it.")],
    key: Key = None,
    router_url: RouterUrl = None,
) -> None:
    """Make a key useless; the account keeps its money."""
    with explain_errors(), open_client(find_router_url(router_url), key) as (client, _):
        client.delete_key(key_id)


@balance_app.command()
def withdraw(
    key: Key = None,
    invoice: Annotated[str | None, typer.Option(help="A BOLT11 invoice to pay.")] = None,
    address: Annotated[str | None, typer.Option(help="A Lightning address or LNURL.")] = None,
    amount_msat: Annotated[int | None, typer.Option(min=1, help="With --address.")] = None,
    router_url: RouterUrl = None,
) -> None:
    """Take money out, to an invoice or a Lightning address; the routing fee is yours.

    Prints how it ended, or how it stands after half a minute: a payment on its way is not lost.
    Without --amount-msat everything goes to the address.
    """
    with explain_errors(), open_client(find_router_url(router_url), key) as (client, _):
        started = client.withdraw(invoice=invoice, address=address, amount_msat=amount_msat)
        shown = started
        gives_up_at = time.monotonic() + WITHDRAWAL_WAIT_S
        while shown.get("state") not in ("paid", "failed") and time.monotonic() < gives_up_at:
            time.sleep(0.5)
            shown = client.withdrawal(str(started["id"]))
        typer.echo(json.dumps(dict(shown)))
    if shown.get("state") == "failed":
        raise typer.Exit(1)


def pay(
    invoice: Annotated[str, typer.Argument(help="A BOLT11 invoice of the simulated network.")],
    router_url: RouterUrl = None,
) -> None:
    """Pay an invoice with simulated money; prints JSON with the preimage.

    Works only where the router's Lightning network is the simulated one.
    """
    with explain_errors():
        paid = SimulatedWallet(find_router_url(router_url)).pay(invoice)
        typer.echo(json.dumps({"amount_msat": invoice_amount_msat(invoice), **paid}))
