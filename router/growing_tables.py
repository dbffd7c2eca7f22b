"""New plans for tables that grow: PostgreSQL keeps the plans of our hot statements (`billing.sql`).

A plan that was made while a table was all but empty reads it from end to end, and would do so until
autovacuum gathers statistics a minute later: in a market that has just opened, thousands of rows for
each job by then. New statistics have every plan made anew.
"""

from __future__ import annotations

from typing import Any

# What paid jobs are looked up in.
TABLES = (
    "jobs",
    "attempts",
    "quotes",
    "queue",
    "job_chunks",
    "ledger_balances",
    "ledger_transfers",
    "invoices",
    "account_keys",
    "idempotency",
)
# From this size on, in pages of 8 KiB, autovacuum is soon enough: no plan reads all of such a table.
MOST_PAGES = 1_000

_GROWN = """
select c.relname from pg_class c where c.oid = any($1::text[]::regclass[]) and c.relpages < $2
    and pg_relation_size(c.oid) / current_setting('block_size')::int > 2 * greatest(c.relpages, 1)"""


async def analyze(connection: Any) -> list[str]:
    """Gather the statistics of small tables that have grown to twice their size since the last time;
    returns their names. One that somebody else is looking after is left to him."""
    grown = [row["relname"] for row in await connection.fetch(_GROWN, TABLES, MOST_PAGES)]
    for table in grown:
        await connection.execute(f"analyze (skip_locked) {table}")
    return grown
