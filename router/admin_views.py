"""What an admin sees: workers, jobs without their texts, the books beside the node, the audit."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from billing import ledger
from billing.fees import format_multiplier
from billing.lightning import BackendError, NodeBalance
from billing.payout_records import PayoutRecord
from billing.trial_balance import trial_balance
from router.core import Core
from router.job_views import TIMES, time_text
from router.paging import read_cursor, write_cursor


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a list, newest first. `cursor` None: there are no more."""

    rows: list[dict[str, Any]]
    cursor: str | None

    def as_json(self, name: str) -> dict[str, Any]:
        return {name: self.rows, "cursor": self.cursor}


_LAST_ID = (1 << 63) - 1

_WORKERS = """
select w.*, p.ln_url, p.next_ln_url, p.next_ln_url_at, p.failure_code, p.failing_since,
       coalesce(b.balance_msat, 0) as pending_msat,
       (select count(*) from jobs j where j.state = 'running' and j.worker_id = w.id) as running
from workers w
left join payees p on p.id = w.id
left join ledger_balances b on b.account = $4 || w.id
where (w.created_at, w.id) < ($1, $2)
order by w.created_at desc, w.id desc limit $3"""

_JOBS = """
select j.id, j.quote_id, j.account_id, j.kind, j.model, j.state, j.attempt, j.prompt_tokens,
       j.max_tokens, j.base_fee_msat, j.held_msat, j.multiplier_milli, j.seq, j.charged_msat,
       j.commission_ppm, j.worker_id, j.router_id, j.created_at, j.queued_at, j.started_at,
       j.first_token_at, j.ended_at, j.end_reason, j.wiped
from jobs j
where ($1::text is null or j.state = $1) and ($2::text is null or j.model = $2)
  and ($3::text is null or j.worker_id = $3
       or exists (select 1 from attempts a where a.job_id = j.id and a.worker_id = $3))
  and (j.created_at, j.id) < ($4, $5) and j.created_at <= $4
order by j.created_at desc, j.id desc limit $6"""


async def workers_page(core: Core, connection: Any, *, cursor: str | None, limit: int) -> Page:
    """All workers that ever registered. `online` means: connected to some router of this market."""
    at, last_id = read_cursor(cursor)
    rows = await connection.fetch(_WORKERS, at, last_id, limit + 1, ledger.worker(""))
    return _page(rows, limit, [_worker(core, row) for row in rows[:limit]])


async def jobs_page(
    connection: Any,
    *,
    state: str | None,
    model: str | None,
    worker_id: str | None,
    cursor: str | None,
    limit: int,
) -> Page:
    """Jobs with their attempts and what went wrong with them; never what was asked or answered.

    `worker_id` finds all jobs that a worker has tried.
    """
    at, last_id = read_cursor(cursor)
    rows = await connection.fetch(_JOBS, state, model, worker_id, at, last_id, limit + 1)
    ids = [row["id"] for row in rows[:limit]]
    attempts: dict[str, list[dict[str, Any]]] = {job_id: [] for job_id in ids}
    for row in await connection.fetch(
        "select * from attempts where job_id = any($1::text[]) order by job_id, n", ids
    ):
        attempts[row["job_id"]].append(_attempt(row))
    given = {
        row["reference"]: row["amount_msat"]
        for row in await connection.fetch(
            "select reference, amount_msat from ledger_transfers where id = any($1::text[])",
            [ledger.transfer_id(job_id, "goodwill") for job_id in ids],
        )
    }
    shown = [_job(row, attempts[row["id"]], given.get(row["id"], 0)) for row in rows[:limit]]
    return _page(rows, limit, shown)


async def audit_page(connection: Any, *, cursor: str | None, limit: int) -> Page:
    """All changes by admins, newest first."""
    _, last_id = read_cursor(cursor)
    rows = await connection.fetch(
        "select * from audit where id < $1 order by id desc limit $2",
        int(last_id) if re.fullmatch("[0-9]{1,18}", last_id) else _LAST_ID,
        limit + 1,
    )
    return _page(rows, limit, [_change(row) for row in rows[:limit]], at="at")


async def books(core: Core) -> dict[str, Any]:
    """The trial balance, which must be zero, beside what the node says it holds.

    What is in HTLCs on its way out is ours until it has arrived, for the books as for the node.
    """
    node, error = await _node_balance(core)
    async with core.database.transaction("repeatable_read") as connection:
        trial = await trial_balance(connection)
    booked_msat = trial.lines.get(ledger.LIGHTNING, 0)
    held_msat = None if node is None else node.held_msat
    liabilities = sum(v for name, v in trial.lines.items() if name.startswith("liabilities:"))
    return {
        "in_order": trial.in_order,
        "sum_msat": trial.sum_msat,
        "lines": trial.lines,
        "problems": trial.problems,
        "owed_msat": -liabilities,
        "node": {
            "spendable_msat": node.spendable_msat if node else None,
            "pending_msat": node.pending_msat if node else None,
            "reserve_msat": node.reserve_msat if node else None,
            "receivable_msat": node.receivable_msat if node else None,
            "held_msat": held_msat,
            "error": error,
        },
        "booked_msat": booked_msat,
        # More than is booked is the operator's own money, which he has not booked; less is missing.
        "difference_msat": None if held_msat is None else held_msat - booked_msat,
        "at": time_text(core.clock()),
        "network": core.node.network,
        "simulated": core.node.simulated,
    }


async def _node_balance(core: Core) -> tuple[NodeBalance | None, str | None]:
    try:
        return await core.backend.balance(), None
    except BackendError as error:
        return None, error.code


def payout_view(record: PayoutRecord) -> dict[str, Any]:
    """A payout as the admin sees it, with its proof."""
    return {
        "id": record.id,
        "kind": record.kind.value,
        "owner": record.owner_id,
        "target": record.target,
        "state": record.state.value,
        "amount_msat": record.amount_msat,
        "fee_cap_msat": record.fee_cap_msat,
        "fee_msat": record.fee_msat,
        "error": record.error_code,
        "attempts": record.attempts,
        "attempt_state": record.attempt_state.value if record.attempt_state else None,
        "payment_hash": record.payment_hash,
        "preimage": record.preimage,
        "alert": record.alert.value if record.alert else None,
        "created_at": time_text(record.created_at),
        "submitted_at": time_text(record.submitted_at),
        "last_checked_at": time_text(record.last_checked_at),
        "next_try_at": time_text(record.next_try_at),
        "ended_at": time_text(record.ended_at),
    }


def _page(rows: list[Any], limit: int, shown: list[dict[str, Any]], at: str = "created_at") -> Page:
    last = rows[limit - 1] if len(rows) > limit else None
    return Page(shown, write_cursor(last[at], str(last["id"])) if last else None)


def _worker(core: Core, row: Any) -> dict[str, Any]:
    live = core.fleet.get(row["id"])
    session = core.gate.sessions.get(row["id"])
    return {
        "id": row["id"],
        "name": row["name"],
        "online": core.presence.is_connected(row),
        "router": row["router_id"],
        "banned": row["banned_at"] is not None,
        "ban_reason": row["ban_reason"],
        "draining": row["draining"],
        "models": json.loads(row["models"]),
        "hardware": json.loads(row["hardware"]),
        "slots": live.slots if live else row["slots"],
        "busy": len(live.busy) if live else row["running"],
        "jobs_done": row["jobs_done"] + (live.done if live else 0),
        "jobs_failed": row["jobs_failed"] + (live.failed if live else 0),
        "tokens": row["tokens"] + (live.tokens if live else 0),
        "reliability": round(live.reliability if live else row["reliability"], 4),
        "quality": round(row["quality"], 4),
        "speeds": live.speeds if live else json.loads(row["speeds"]),
        "dropped_frames": session.dropped_frames if session else 0,
        "ln_url": row["ln_url"],
        "next_ln_url": row["next_ln_url"],
        "next_ln_url_at": time_text(row["next_ln_url_at"]),
        "address_failure": row["failure_code"],
        "failing_since": time_text(row["failing_since"]),
        "pending_msat": row["pending_msat"],
        "created_at": time_text(row["created_at"]),
        "last_seen_at": time_text(row["last_seen_at"]),
    }


def _job(row: Any, attempts: list[dict[str, Any]], goodwill_msat: int) -> dict[str, Any]:
    was_paid = row["seq"] is not None
    charged_msat = row["charged_msat"]
    return {
        "id": row["id"],
        "quote_id": row["quote_id"],
        "account": row["account_id"],
        "kind": row["kind"],
        "model": row["model"],
        "state": row["state"],
        "attempt": row["attempt"],
        "prompt_tokens": row["prompt_tokens"],
        "max_tokens": row["max_tokens"],
        "base_fee_msat": row["base_fee_msat"],
        "multiplier": format_multiplier(row["multiplier_milli"]),
        "held_msat": row["held_msat"] if was_paid else 0,
        "charged_msat": charged_msat,
        "refunded_msat": row["held_msat"] - charged_msat
        if was_paid and charged_msat is not None
        else None,
        "goodwill_msat": goodwill_msat,
        "commission_ppm": row["commission_ppm"],
        "worker": row["worker_id"],
        "router": row["router_id"],
        **{name: time_text(row[name]) for name in TIMES},
        "end_reason": row["end_reason"],
        "wiped": row["wiped"],
        "attempts": attempts,
    }


def _attempt(row: Any) -> dict[str, Any]:
    return {
        "n": row["n"],
        "worker": row["worker_id"],
        "router": row["router_id"],
        "started_at": time_text(row["started_at"]),
        "ended_at": time_text(row["ended_at"]),
        "outcome": row["outcome"],
        "blame": row["blame"],
        "error": row["error"],
        "tokens": row["tokens"],
    }


def _change(row: Any) -> dict[str, Any]:
    return {
        "id": row["id"],
        "at": time_text(row["at"]),
        "who": row["who"],
        "action": row["action"],
        "subject": row["subject"],
        "before": json.loads(row["before"]) if row["before"] else None,
        "after": json.loads(row["after"]) if row["after"] else None,
    }
