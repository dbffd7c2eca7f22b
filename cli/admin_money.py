"""`satherd admin ledger`, and the payments of the node that the books do not know."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.text import Text

from cli.admin_access import Access, fail, segment, table
from cli.admin_work import Id, Reason, payouts_app

ledger_app = typer.Typer(
    invoke_without_command=True,
    help="The trial balance, and what the node says it holds. Exit status 1: not in order.",
)

_KINDS = ("deposit", "withdrawal", "node_fee", "unassigned")


@ledger_app.callback()
def ledger(context: typer.Context) -> None:
    """The trial balance, and what the Lightning node says it holds. Exit status 1: not in order."""
    if context.invoked_subcommand is None:
        _show(context.obj)


def _show(access: Access) -> None:
    answer = access.get("/ledger")
    rows = [
        (name, value if value > 0 else None, -value if value < 0 else None)
        for name, value in answer["lines"].items()
        if value
    ]
    rows.append(("sum", answer["sum_msat"], None))
    node = answer["node"]
    simulated = " (simulated money)" if answer["simulated"] else ""
    facts = [
        ("the node holds", node["held_msat"]),
        ("booked as there", answer["booked_msat"]),
        ("difference", answer["difference_msat"]),
        ("owed to clients and workers", answer["owed_msat"]),
    ]
    access.show(
        answer,
        table(f"trial balance{simulated}", ("account", "debit msat", "credit msat"), rows),
        "",
        table(None, ("the node's side", "msat"), facts),
        *([f"the node did not say what it holds: {node['error']}"] if node["error"] else []),
        *(Text(f"not in order: {problem}", style="red") for problem in answer["problems"]),
    )
    if not answer["in_order"]:
        raise typer.Exit(1)


@ledger_app.command("book")
def book(
    context: typer.Context,
    kind: Annotated[str, typer.Argument(help=f"{', '.join(_KINDS)}.")],
    amount_msat: Annotated[int | None, typer.Argument(min=1, help="How much.")] = None,
    difference: Annotated[
        bool, typer.Option("--difference", help="All that the node holds beyond the books.")
    ] = False,
    account: Annotated[
        str | None, typer.Option(help="Of an unassigned receipt: the account whose it is.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="A name for it; the same again changes nothing.")
    ] = None,
    reason: Reason = None,
) -> None:
    """Book what only the operator knows: his money in the node, and what channels cost.

    deposit: it came in (`--difference`: the opening capital). withdrawal: it left. node_fee: a
    channel or a transaction on chain. unassigned: a receipt without an invoice finds its owner.
    """
    access: Access = context.obj
    if kind not in _KINDS:
        raise fail(f"{kind!r} is none of {', '.join(_KINDS)}", 2)
    if (amount_msat is None) != difference:
        raise fail("give either an amount in msat or --difference", 2)
    if difference:
        amount_msat = _difference_msat(access, kind)
    answer = access.post(
        "/ledger/book",
        kind=kind,
        amount_msat=amount_msat,
        account=account,
        reference=reference,
        reason=reason,
    )
    words = "booked" if answer["booked"] else "was booked before, nothing has changed"
    access.show(answer, f"{amount_msat} msat {answer['debit']} / {answer['credit']}: {words}")


def _difference_msat(access: Access, kind: str) -> int:
    if kind not in ("deposit", "withdrawal", "node_fee"):
        raise fail("--difference is for deposit, withdrawal and node_fee", 2)
    answer = access.get("/ledger")
    more_msat = answer["difference_msat"]
    if more_msat is None:
        raise fail("the node does not say what it holds")
    if kind != "deposit":
        more_msat = -more_msat
    if more_msat <= 0:
        raise fail(f"there is no such difference: it is {answer['difference_msat']} msat")
    return more_msat


@ledger_app.command("reconcile")
def reconcile(context: typer.Context) -> None:
    """Compare the node's own history with the books now, as is done at each start and daily."""
    access: Access = context.obj
    answer = access.post("/ledger/reconcile")
    facts = [(name.replace("_", " "), answer[name]) for name in _FOUND]
    access.show(answer, table(f"compared since {answer['since']}", ("found", ""), facts))


_FOUND = ("receipts", "unknown_payments", "held_msat", "booked_msat", "difference_msat")


@payouts_app.command("unknown")
def list_unknown(context: typer.Context) -> None:
    """Payments of the node that the books do not know. While one is not confirmed, none is sent."""
    access: Access = context.obj
    answer = access.get("/payouts/unknown")
    heads = ("payment hash", "sent", "amount msat", "fee msat", "state", "confirmed as")
    access.show(answer, table(None, heads, [_row(one) for one in answer["payments"]]))


def _row(payment: dict[str, Any]) -> tuple[Any, ...]:
    return (
        payment["payment_hash"],
        payment["sent_at"],
        payment["amount_msat"],
        payment["fee_msat"],
        payment["state"],
        payment["account"] or "NOT CONFIRMED",
    )


@payouts_app.command("confirm")
def confirm(
    context: typer.Context,
    payment: Id,
    worker: Annotated[
        str | None, typer.Option(help="It was this worker's payout: owed that much less.")
    ] = None,
    account: Annotated[
        str | None, typer.Option(help="It was this client's withdrawal: owed that much less.")
    ] = None,
) -> None:
    """Say whose an unknown payment was; without an option, the operator's own."""
    access: Access = context.obj
    if worker is not None and account is not None:
        raise fail("it was one or the other: --worker or --account", 2)
    path = f"/payouts/unknown/{segment(payment)}/confirm"
    answer = access.post(path, worker=worker, account=account)
    later = "" if answer["booked"] else "; it is booked when it has succeeded"
    access.show(answer, f"{payment} is {answer['account']}'s{later}")
