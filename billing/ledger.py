"""The double-entry ledger: accounts, transfers, balances.

A transfer moves `amount_msat` from a debit account to a credit account in the sense of bookkeeping:
a liability (what we owe somebody) grows by credits and shrinks by debits; an asset the other way
round. Accounts are names; docs/money.md lists them with an example for each transfer.

    assets:lightning                      what our node holds for us
    liabilities:client:{account}          a payer's balance
    liabilities:escrow:{job}              held for one job
    liabilities:worker:{worker}           earned, not yet sent
    liabilities:payouts_sending           on its way out
    liabilities:unassigned                receipts that match no invoice of ours
    income:router_fees   expenses:routing_fees   expenses:goodwill   expenses:node_fees
    expenses:checks                       jobs that the operator buys to check workers
    equity:operator                       the operator's own money in the node

A transfer's id is made by its caller from what it is about (`transfer_id`), so posting it twice is
harmless. Nothing is edited: a mistake is put right by another transfer. Only liabilities keep a
stored balance, which a CHECK holds at zero or above; the others are sums.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from billing.errors import InsufficientFunds
from billing.sql import one_plan

LIGHTNING = "assets:lightning"
SENDING = "liabilities:payouts_sending"
UNASSIGNED = "liabilities:unassigned"
ROUTER_FEES = "income:router_fees"
ROUTING_FEES = "expenses:routing_fees"
GOODWILL = "expenses:goodwill"
NODE_FEES = "expenses:node_fees"
CHECKS = "expenses:checks"
OPERATOR = "equity:operator"

_LIABILITY = "liabilities:"
_ESCROW = "liabilities:escrow:"


def client(account_id: str) -> str:
    return f"liabilities:client:{account_id}"


def payer(account_id: str) -> str:
    """What a job is paid from, and what is left of its escrow returns to.

    One that checks workers has no payer: in place of his account stands the operator's expense.
    """
    return account_id if account_id == CHECKS else client(account_id)


def escrow(job_id: str) -> str:
    return _ESCROW + job_id


def worker(worker_id: str) -> str:
    return f"liabilities:worker:{worker_id}"


def transfer_id(reference: str, code: str) -> str:
    """The id of the transfer `code` about `reference`: the same always, so that it posts once."""
    return hashlib.sha256(f"{code}\0{reference}".encode()).hexdigest()[:32]


class Transfer(NamedTuple):
    """One movement. `reference` is the job, invoice or payout; `code` says what it is for."""

    debit: str
    credit: str
    amount_msat: int
    code: str
    reference: str

    @property
    def id(self) -> str:
        return transfer_id(self.reference, self.code)


@dataclass(frozen=True, slots=True)
class Entry:
    """A transfer as it looks from one account: positive when it grew a liability."""

    transfer_id: str
    code: str
    reference: str
    change_msat: int
    other_account: str


# Of transfers that were posted before nothing moves again. An escrow lives as long as its job: its row
# goes when it is empty, its transfers stay. Whoever lowers a balance holds its row, so that what is
# read here is what is changed; rows are raised in name order, as they are locked.
_POST = one_plan("""
with posted as (
    insert into ledger_transfers (id, debit, credit, amount_msat, code, reference)
    select * from unnest($1::text[], $2::text[], $3::text[], $4::bigint[], $5::text[], $6::text[])
    on conflict (id) do nothing
    returning id, debit, credit, amount_msat),
changes as (
    select account, sum(msat)::bigint as msat
    from (select debit as account, -amount_msat as msat from posted
          union all select credit, amount_msat from posted) entry
    where starts_with(account, 'liabilities:') group by account),
lower as (
    select c.account, -c.msat as msat, coalesce(b.balance_msat, 0) as held_msat,
        starts_with(c.account, 'liabilities:escrow:') and b.balance_msat = -c.msat as empties
    from changes c left join ledger_balances b on b.account = c.account where c.msat < 0),
raised as (
    insert into ledger_balances (account, balance_msat)
    select account, msat from changes where msat > 0 order by account
    on conflict (account) do update
        set balance_msat = ledger_balances.balance_msat + excluded.balance_msat),
emptied as (
    delete from ledger_balances b using lower l where b.account = l.account and l.empties),
lowered as (
    update ledger_balances b set balance_msat = b.balance_msat - l.msat
    from lower l where b.account = l.account and not l.empties and l.held_msat >= l.msat)
select id, null as short, null::bigint as msat, null::bigint as held_msat from posted
union all
select null, account, msat, held_msat from lower where held_msat < msat""")

_LOCK = one_plan("""
select account, balance_msat from ledger_balances where account = any($1::text[])
order by account for update""")


async def post(connection: Any, transfers: Sequence[Transfer], *, locked: bool = False) -> set[str]:
    """Post transfers in the caller's transaction; returns the ids that were not there before.

    `locked`: the caller has locked what is lowered (`lock_balances`). An escrow needs no lock: only
    who holds the row of its job lowers it. Transfers of 0 msat are left out. Safe to repeat. Raises
    InsufficientFunds when a liability would go below zero; the transaction must then be rolled back.
    """
    wanted = {t.id: t for t in transfers if t.amount_msat > 0}
    if not wanted:
        return set()
    rows = wanted.values()
    if not locked and any(_needs_lock(t.debit) for t in rows):
        await lock_balances(connection, [name for t in rows for name in (t.debit, t.credit)])
    done = await connection.fetch(
        _POST,
        list(wanted),
        [t.debit for t in rows],
        [t.credit for t in rows],
        [t.amount_msat for t in rows],
        [t.code for t in rows],
        [t.reference for t in rows],
    )
    for row in done:
        if row["short"] is not None:
            raise InsufficientFunds(row["short"], row["msat"], row["held_msat"])
    return {row["id"] for row in done}


def _needs_lock(account: str) -> bool:
    return account.startswith(_LIABILITY) and not account.startswith(_ESCROW)


async def lock_balances(connection: Any, accounts: Iterable[str]) -> dict[str, int]:
    """Stored balances in msat, locked until the transaction ends, in name order."""
    rows = await connection.fetch(_LOCK, sorted(set(accounts)))
    return {row["account"]: row["balance_msat"] for row in rows}


async def balance_msat(connection: Any, account: str) -> int:
    """What a liability holds; for any other account its debits less its credits."""
    if account.startswith(_LIABILITY):
        return (
            await connection.fetchval(
                "select balance_msat from ledger_balances where account = $1", account
            )
            or 0
        )
    return await connection.fetchval(
        "select coalesce(sum(case when debit = $1 then amount_msat else -amount_msat end), 0)::bigint"
        " from ledger_transfers where debit = $1 or credit = $1",
        account,
    )


async def entries(connection: Any, account: str, *, limit: int = 100) -> list[Entry]:
    """The latest transfers of an account, newest first."""
    rows = await connection.fetch(
        "select * from ledger_transfers where debit = $1 or credit = $1"
        " order by created_at desc, id limit $2",
        account,
        limit,
    )
    return [
        Entry(
            row["id"],
            row["code"],
            row["reference"],
            row["amount_msat"] if row["credit"] == account else -row["amount_msat"],
            row["debit"] if row["credit"] == account else row["credit"],
        )
        for row in rows
    ]
