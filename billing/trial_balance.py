"""The proof of the books: every account's balance from its transfers, and what is wrong with them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# Accounts of one payer, job or worker are shown as one line each kind: by the first two parts of their
# names. A regular expression for each transfer took a minute where there were millions.
_GROUPED = """
with entry as (
    select debit as account, amount_msat as change_msat from ledger_transfers
    union all
    select credit, -amount_msat from ledger_transfers)
select split_part(account, ':', 1) || ':' || split_part(account, ':', 2) as account,
       sum(change_msat)::bigint as balance_msat
from entry group by 1 order by 1"""

_DIFFERENT = """
with entry as (
    select credit as account, amount_msat as change_msat from ledger_transfers
    union all
    select debit, -amount_msat from ledger_transfers),
summed as (
    select account, sum(change_msat)::bigint as balance_msat from entry
    where account like 'liabilities:%' group by account)
select coalesce(s.account, b.account) as account,
       coalesce(s.balance_msat, 0) as summed_msat, coalesce(b.balance_msat, 0) as stored_msat
from summed s full join ledger_balances b on b.account = s.account
where coalesce(s.balance_msat, 0) <> coalesce(b.balance_msat, 0) limit 20"""


@dataclass(frozen=True, slots=True)
class TrialBalance:
    """Debit balances in msat by account (liabilities are negative); they sum to zero."""

    lines: dict[str, int]
    problems: list[str] = field(default_factory=list)

    @property
    def sum_msat(self) -> int:
        return sum(self.lines.values())

    @property
    def in_order(self) -> bool:
        return self.sum_msat == 0 and not self.problems


async def trial_balance(connection: Any) -> TrialBalance:
    """Sum all transfers and compare each liability's stored balance with its own.

    Reads everything in one snapshot: the caller's transaction should be REPEATABLE READ.
    """
    lines = {r["account"]: r["balance_msat"] for r in await connection.fetch(_GROUPED)}
    problems = [
        f"{r['account']}: transfers give {r['summed_msat']} msat, stored are {r['stored_msat']} msat"
        for r in await connection.fetch(_DIFFERENT)
    ]
    return TrialBalance(lines, problems)
