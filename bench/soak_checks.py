"""What must hold at the end of a soak, by the node's own history and by the books."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.soak_trouble import Trouble
from billing import ledger
from billing.trial_balance import trial_balance
from tests.regtest.network import LightningNetwork
from tests.regtest.router_process import RouterProcess

_PAID = """
select p.id, p.account, p.amount_msat, p.fee_msat, p.fee_cap_msat, a.payment_hash, a.submissions
from payouts p join payout_attempts a on a.payout_id = p.id and a.state = 'succeeded'
where p.state = 'paid'"""


@dataclass(slots=True)
class Findings:
    """`wrong` is what must not be; `facts` are lines to print."""

    facts: list[tuple[str, str]] = field(default_factory=list)
    books: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def must(self, holds: bool, words: str) -> None:
        if not holds:
            self.wrong.append(words)

    def show(self, console: Console) -> None:
        table = Table("account", "msat", title="the books")
        for account, amount_msat in sorted(self.books.items()):
            table.add_row(account, f"{amount_msat:,}")
        table.add_row("sum", f"{sum(self.books.values()):,}")
        console.print(table)
        for name, words in self.facts:
            console.print(f"{name:<28} {words}", highlight=False, soft_wrap=True)
        for words in self.wrong:
            console.print(f"WRONG: {words}")
        if not self.wrong:
            console.print("Everything left once, and the books say what the node says.")


async def everything(
    router: RouterProcess,
    network: LightningNetwork,
    earned: dict[str, int],
    trouble: Trouble,
    *,
    seconds: float,
) -> Findings:
    found = Findings()
    paid = await router.connection.fetch(_PAID)
    sent = [one for one in await network.router.history() if one["amount_msat"] < 0]
    received = [one for one in await network.router.history() if one["amount_msat"] > 0]
    await _books(found, router, sent, received, paid)
    _payouts(found, paid, sent)
    await _workers(found, router, network, earned, paid)
    attempts = await router.connection.fetch(
        "select state, count(*) from payout_attempts group by 1"
    )
    found.facts += [
        ("payouts paid", f"{len(paid)} in {seconds:.0f} s, {len(paid) / seconds:.2f} a second"),
        ("attempts", ", ".join(f"{row['state']} {row['count']}" for row in attempts)),
        ("trouble", trouble.words()),
        ("given to the node again", str(sum(row["submissions"] > 1 for row in paid))),
    ]
    return found


async def _books(
    found: Findings,
    router: RouterProcess,
    sent: list[dict[str, Any]],
    received: list[dict[str, Any]],
    paid: list[Any],
) -> None:
    books = await trial_balance(router.connection)
    found.books = dict(books.lines)
    found.must(books.in_order, f"the books are not in order: {books}")
    left_msat = -sum(one["amount_msat"] for one in sent)
    booked_msat = await router.connection.fetchval(
        "select sum(amount_msat)::bigint from ledger_transfers where credit = $1", ledger.LIGHTNING
    )
    came_msat = sum(one["amount_msat"] for one in received)
    holds_msat = books.lines[ledger.LIGHTNING]
    found.facts += [
        ("left the node, its history", f"{left_msat:,} msat in {len(sent)} payments"),
        ("left, by the ledger", f"{booked_msat:,} msat"),
        ("came in, its history", f"{came_msat:,} msat"),
        ("fees above their cap", _fees(paid)),
    ]
    found.must(left_msat == booked_msat, f"{left_msat} left the node and {booked_msat} the books")
    found.must(
        came_msat - left_msat == holds_msat, f"the books say that the node holds {holds_msat}"
    )
    under_way = await router.connection.fetch(
        "select id, state from payouts where state in ('planned', 'sending')"
    )
    found.must(not under_way, f"still under way: {[dict(row) for row in under_way]}")


def _fees(paid: list[Any]) -> str:
    above = sum(row["fee_msat"] > row["fee_cap_msat"] for row in paid)
    most = max((row["fee_msat"] for row in paid), default=0)
    return f"{above}, the highest fee {most} msat (Electrum 4.3.4 takes no limit from us)"


def _payouts(found: Findings, paid: list[Any], sent: list[dict[str, Any]]) -> None:
    by_hash = {one["payment_hash"]: one for one in sent}
    found.must(len(by_hash) == len(sent), "a hash is in the node's history twice")
    ours = {row["payment_hash"] for row in paid}
    found.must(ours == by_hash.keys(), f"the node paid {len(by_hash)} hashes, and we {len(ours)}")
    for row in paid:
        left_msat = -by_hash.get(row["payment_hash"], {}).get("amount_msat", 0)
        found.must(
            left_msat == row["amount_msat"] + row["fee_msat"],
            f"payout {row['id']}: {left_msat} msat left for {row['amount_msat']}+{row['fee_msat']}",
        )


async def _workers(
    found: Findings,
    router: RouterProcess,
    network: LightningNetwork,
    earned: dict[str, int],
    paid: list[Any],
) -> None:
    """By the workers' own node: it takes an invoice twice, so that twice would be seen."""
    worker_got = {one["payment_hash"]: one["amount_msat"] for one in await network.worker.history()}
    for row in paid:
        got_msat = worker_got.pop(row["payment_hash"], 0)
        found.must(
            got_msat == row["amount_msat"],
            f"payout {row['id']}: the worker got {got_msat} of {row['amount_msat']} msat",
        )
    found.must(
        not worker_got, f"the workers' node got {len(worker_got)} payments that none ordered"
    )
    balances = await router.connection.fetch("select account, balance_msat from ledger_balances")
    owed = {row["account"]: row["balance_msat"] for row in balances}
    for name, earned_msat in earned.items():
        account = ledger.worker(name)
        paid_msat = sum(row["amount_msat"] for row in paid if row["account"] == account)
        owed_msat = owed.get(account, 0)
        found.must(
            paid_msat + owed_msat == earned_msat,
            f"{name} earned {earned_msat} msat, was paid {paid_msat} and is owed {owed_msat}",
        )
