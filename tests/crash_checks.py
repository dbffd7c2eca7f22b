"""What must hold after any crash, once everything is up and nothing is under way any more.

Each check returns what is wrong, in words; an empty list is what everybody wants.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from typing import Any

import httpx

from billing import ledger
from billing.trial_balance import trial_balance
from tests.crash_load import PURSE, Notes
from tests.crash_rig import WORKER_WALLET

# The network shows so many of a wallet's invoices.
MOST_SHOWN = 1000

_JOBS = "select id, state, attempt, router_id from jobs where state in ('queued', 'running')"
_PAYOUTS = """
select p.*, a.state as attempt_state from payouts p
left join payout_attempts a on a.payout_id = p.id and a.state in ('new', 'invoiced', 'submitted')
where p.state in ('planned', 'sending')"""

# A job's escrow is filled by a hold and by bumps, and divided once, to the last msat.
_ESCROWS = """
select j.id, j.state, j.held_msat, j.charged_msat,
    coalesce(sum(t.amount_msat) filter (where t.code = 'hold' or t.code like 'bump-%'), 0) as held,
    coalesce(sum(t.amount_msat) filter (where t.code in ('earned', 'commission')), 0) as charged,
    coalesce(sum(t.amount_msat) filter (where t.code = 'refund'), 0) as refunded,
    count(*) filter (where t.code = 'hold') as holds
from jobs j left join ledger_transfers t on t.reference = j.id
where j.seq is not null group by j.id"""


async def until_quiet(
    connection: Any, *, jobs_s: float = 60, payouts_s: float, payouts_must: bool
) -> None:
    """Wait until no paid job and no payout is under way. Raises AssertionError with what is.

    A payment of which nobody knows, as its process died with it, waits minutes for certainty; with
    `payouts_must` False it may be left under way, and the checks know how to count it.
    """
    await _until_none(connection, _JOBS, jobs_s, must=True)
    await _until_none(connection, _PAYOUTS, payouts_s, must=payouts_must)


async def _until_none(connection: Any, query: str, timeout_s: float, *, must: bool) -> None:
    until = time.monotonic() + timeout_s
    while found := await connection.fetch(f"{query} limit 5"):
        if time.monotonic() > until:
            assert not must, f"under way after {timeout_s} s: {[dict(row) for row in found]}"
            return
        await asyncio.sleep(0.1)


async def opening_msat(network_url: str) -> int:
    """What the operator had in the node before anything was booked."""
    async with httpx.AsyncClient(base_url=network_url, timeout=10, trust_env=False) as network:
        return await _node_msat(network)


async def everything(
    connection: Any, notes: Notes, network_url: str, *, opening_msat: int
) -> list[str]:
    """All checks. The caller has waited for quiet."""
    async with httpx.AsyncClient(base_url=network_url, timeout=10, trust_env=False) as network:
        return [
            *notes.wrong,
            *await books(connection),
            *await escrows(connection),
            *await done_is_done(connection, notes),
            *await once_is_once(connection, notes),
            *await receipts(connection, network),
            *await payouts(connection, network),
            *await node(connection, network, opening_msat),
        ]


async def books(connection: Any) -> list[str]:
    """The ledger sums to zero, stored balances equal transfers, and no escrow is left."""
    async with connection.transaction(isolation="repeatable_read"):
        trial = await trial_balance(connection)
    wrong = list(trial.problems)
    if trial.sum_msat:
        wrong.append(f"the trial balance sums to {trial.sum_msat}")
    sending = sum(
        row["amount_msat"] + (row["fee_cap_msat"] if row["kind"] == "withdrawal" else 0)
        for row in await connection.fetch(_PAYOUTS)
    )
    for name, held in (("liabilities:escrow", 0), ("liabilities:payouts_sending", sending)):
        if trial.lines.get(name, 0) != -held:
            wrong.append(f"{name} is {trial.lines.get(name, 0)} msat, under way are {held} msat")
    return wrong


async def escrows(connection: Any) -> list[str]:
    """Every paid job ended, and what was held for it was divided exactly once."""
    wrong = []
    for row in await connection.fetch(_ESCROWS):
        whole = row["held"] == row["charged"] + row["refunded"] == row["held_msat"]
        if not whole or row["charged"] != row["charged_msat"] or row["holds"] != 1:
            wrong.append(f"job does not add up: {dict(row)}")
    orphans = await connection.fetchval(
        "select count(*) from queue q left join jobs j on j.id = q.job_id"
        " where j.state is distinct from 'queued'"
    )
    if orphans:
        wrong.append(f"{orphans} rows in the queue of jobs that do not wait")
    lost = await connection.fetchval(
        "select count(*) from jobs j where state = 'queued'"
        " and not exists (select 1 from queue q where q.job_id = j.id)"
    )
    if lost:
        wrong.append(f"{lost} jobs wait in no lane")
    open_attempts = await connection.fetchval(
        "select count(*) from attempts a join jobs j on j.id = a.job_id"
        " where a.ended_at is null and j.state <> 'running'"
    )
    if open_attempts:
        wrong.append(f"{open_attempts} attempts have no end though their jobs do not run")
    return wrong


async def done_is_done(connection: Any, notes: Notes) -> list[str]:
    """Every answer a client saw whole is in the database as succeeded, word for word."""
    rows = await connection.fetch(
        "select id, state, result from jobs where id = any($1::text[])", list(notes.answers)
    )
    found = {row["id"]: row for row in rows}
    wrong = []
    for job_id, text in notes.answers.items():
        row = found.get(job_id)
        if row is None or row["state"] != "succeeded":
            wrong.append(f"answered but {row and row['state']}: job {job_id}")
        elif json.loads(row["result"])["choices"][0]["message"]["content"] != text:
            wrong.append(f"answered with other words than are stored: job {job_id}")
    return wrong


async def once_is_once(connection: Any, notes: Notes) -> list[str]:
    """One Idempotency-Key or credential: one job; and what was paid for was not lost."""
    wrong = [f"{name}: jobs {jobs}" for name, jobs in notes.once.items() if len(jobs) != 1]
    for credential in notes.credentials:
        rows = await connection.fetch(
            "select j.state, i.received_msat from invoices i"
            " join quotes q on q.payment_hash = i.payment_hash"
            " join jobs j on j.quote_id = q.id where i.payment_hash = $1",
            credential.payment_hash,
        )
        if not rows or rows[0]["received_msat"] is None:
            wrong.append(f"paid and not credited: {credential.payment_hash}")
        elif credential.ended == "answered" and [r["state"] for r in rows] != ["succeeded"]:
            states = [r["state"] for r in rows]
            wrong.append(f"answered, jobs {states}: {credential.payment_hash}")
    return wrong


async def receipts(connection: Any, network: httpx.AsyncClient) -> list[str]:
    """What arrived in the router's wallet is credited, each invoice once."""
    arrived = {
        record["payment_hash"]: record["amount_received_msat"]
        for record in await _received(network, "router")
    }
    booked = {
        row["reference"]: row["amount_msat"]
        for row in await connection.fetch(
            "select reference, amount_msat from ledger_transfers where code = 'received'"
        )
    }
    return [] if arrived == booked else [f"receipts differ: {_difference(arrived, booked)}"]


async def payouts(connection: Any, network: httpx.AsyncClient) -> list[str]:
    """What arrived in the wallets of workers and clients is what the ledger has paid, once each."""
    arrived = {
        record["payment_hash"]: record["amount_received_msat"]
        for wallet in (WORKER_WALLET, PURSE)
        for record in await _received(network, wallet)
    }
    rows = await connection.fetch(
        "select p.id, p.state, p.amount_msat, a.payment_hash from payouts p"
        " join payout_attempts a on a.payout_id = p.id and a.state = 'succeeded'"
    )
    paid = {row["payment_hash"]: row["amount_msat"] for row in rows}
    unknown = {
        row["payment_hash"]
        for row in await connection.fetch(
            "select payment_hash from payout_attempts where state = 'submitted'"
        )
    }
    certain = {name: amount for name, amount in arrived.items() if name not in unknown}
    wrong = [] if certain == paid else [f"payouts differ: {_difference(certain, paid)}"]
    twice = [payout for payout, n in Counter(row["id"] for row in rows).items() if n > 1]
    wrong += [f"payout {payout} was paid twice" for payout in twice]
    wrong += [f"payout {r['id']} is {r['state']}, paid" for r in rows if r["state"] != "paid"]
    audit = (await network.get("/v1/audit")).json()
    if not audit["balances"]:
        wrong.append(f"the network itself has lost money: {audit}")
    return wrong


async def node(connection: Any, network: httpx.AsyncClient, opening_msat: int) -> list[str]:
    """The node holds what it held at first and what the books say came in since."""
    if await connection.fetch(_PAYOUTS):
        return []
    booked = await ledger.balance_msat(connection, ledger.LIGHTNING)
    held = await _node_msat(network) - opening_msat
    return [] if booked == held else [f"the node holds {held} msat, the books say {booked}"]


async def _node_msat(network: httpx.AsyncClient) -> int:
    return (await network.get("/v1/wallets/router")).json()["balance_msat"]


async def _received(network: httpx.AsyncClient, wallet: str) -> list[dict[str, Any]]:
    answer = await network.get(f"/v1/wallets/{wallet}")
    if answer.status_code != 200:
        return []
    received = [record for record in answer.json()["received"] if record["state"] == "settled"]
    assert len(answer.json()["received"]) < MOST_SHOWN, "more than the network shows: a shorter run"
    return received


def _difference(left: dict[str, int], right: dict[str, int]) -> str:
    return (
        f"only at the network {sorted(left.keys() - right.keys())[:5]},"
        f" only in the books {sorted(right.keys() - left.keys())[:5]},"
        f" amounts {[(k, left[k], right[k]) for k in left.keys() & right if left[k] != right[k]]}"
    )
