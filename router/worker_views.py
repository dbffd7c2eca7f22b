"""What workers see: their own earnings, payouts, record and skips; and the bare numbers of all."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any

from billing import ledger, payees, payout_control, payout_records
from billing.payees import PayeeAddress, PayeeStatus
from billing.payout_records import PayoutRecord
from billing.payout_settings import PayoutSettings
from billing.payout_states import PayoutState
from router.core import Core
from router.far_calls import NoAnswer
from router.job_views import time_text
from router.queenbee_models import INFER
from router.sessions import capabilities_of
from router.skips import Skip, skips
from router.workers import Worker, hash_worker_key
from worker.protocol import ServedModel

PAYOUTS_SHOWN = 20
EVENTS_SHOWN = 20
_EVENTS_LOOKED_AT = 1000

# Of the latest attempts only: a worker that never fails must not make us read all it ever did.
_EVENTS = """
(select coalesce(ended_at, started_at) as at, outcome as code, error as message, null as facts
 from (select * from attempts where worker_id = $1 order by started_at desc limit $2) latest
 where blame = 'worker' order by started_at desc limit $3)
union all
(select at, code, null, facts from worker_events where worker_id = $1 order by at desc limit $3)
order by at desc limit $3"""


_WORKER = """
select w.*, (select count(*) from jobs j where j.state = 'running' and j.worker_id = w.id) as running
from workers w where """
# How long the router that a worker is connected to may think about how it is.
ELSEWHERE_S = 2.0


async def find(core: Core, worker_key: str) -> Any:
    """The row of the worker that holds this key; None when there is none."""
    async with core.database.connection() as connection:
        return await connection.fetchrow(_WORKER + "w.key_hash = $1", hash_worker_key(worker_key))


async def find_by_id(core: Core, worker_id: str) -> Any:
    async with core.database.connection() as connection:
        return await connection.fetchrow(_WORKER + "w.id = $1", worker_id)


async def own_view(core: Core, row: Any) -> dict[str, Any]:
    """All that a worker's owner may know of it (`GET /workers/me`), as its router knows it."""
    if core.fleet.get(row["id"]) is None and core.presence.is_connected(row):
        with suppress(NoAnswer):
            router_id = row["router_id"]
            return await core.far_calls.ask(
                router_id, "worker-view", row["id"], within_s=ELSEWHERE_S
            )
    return await own_view_here(core, row)


async def own_view_here(core: Core, row: Any) -> dict[str, Any]:
    """The same, as this router knows it."""
    worker_id, now = row["id"], core.clock()
    live = core.fleet.get(worker_id)
    await core.market.refresh()
    async with core.database.transaction("repeatable_read") as connection:
        sums = await payout_records.worker_sums(connection, worker_id)
        page = await payout_records.list_payouts(
            connection, account=ledger.worker(worker_id), limit=PAYOUTS_SHOWN
        )
        address = await payees.get_address(connection, worker_id, now=now)
        owed_since = await connection.fetchval(
            "select owed_since from payees where id = $1", worker_id
        )
        control = await payout_control.control_state(connection)
        events = await connection.fetch(_EVENTS, worker_id, _EVENTS_LOOKED_AT, EVENTS_SHOWN)
    due_at = next_due_at(
        core.payouts.settings, address, owed_msat=sums.pending_msat, owed_since=owed_since, now=now
    )
    blocked = _blocked(address, control.paused_why, control.blocked, now)
    next_payout: dict[str, Any] = {
        "due_at": time_text(due_at),
        "threshold_msat": core.payouts.settings.threshold_msat,
    }
    if blocked is not None:
        next_payout["blocked"] = blocked
    if address is not None and address.held_until is not None and address.held_until > now:
        next_payout["held_until"] = time_text(address.held_until)
    return {
        "worker_id": worker_id,
        "name": row["name"],
        "online": core.presence.is_connected(row),
        "banned": row["banned_at"] is not None,
        "draining": row["draining"],
        "slots": live.slots if live else row["slots"],
        "busy": len(live.busy) if live else row["running"],
        **address_view(address),
        "earned_msat": sums.earned_msat,
        "paid_msat": sums.paid_msat,
        "pending_msat": sums.pending_msat,
        "sending_msat": sums.sending_msat,
        "next_payout": next_payout,
        "payouts": [_payout(record) for record in page.payouts],
        "models": _models(row, live),
        "jobs_done": row["jobs_done"] + (live.done if live else 0),
        "jobs_failed": row["jobs_failed"] + (live.failed if live else 0),
        "tokens": row["tokens"] + (live.tokens if live else 0),
        "reputation": {
            "score": round(live.standing.score if live else row["reliability"] * row["quality"], 4),
            "reliability": round(live.reliability if live else row["reliability"], 4),
            "quality": round(live.standing.quality if live else row["quality"], 4),
            "events": [_event(event) for event in events],
        },
        "skips": [skip.as_json() for skip in _skips(core, row, live)],
        "network": core.node.network,
        "simulated": core.node.simulated,
    }


def address_view(address: PayeeAddress | None) -> dict[str, Any]:
    """Where a worker is paid, and the change that is waiting, if one is."""
    view: dict[str, Any] = {
        "ln_url": address.ln_url if address else None,
        "payable": address is not None and address.ln_url is not None,
        "address_status": (address.status if address else PayeeStatus.UNPAID).value,
    }
    if address is not None and address.failure_code is not None:
        view["address_failure"] = address.failure_code
        view["next_try_at"] = time_text(address.next_try_at)
    if address is not None and address.next_ln_url_at is not None:
        view["next_ln_url"] = address.next_ln_url
        view["next_ln_url_at"] = time_text(address.next_ln_url_at)
    return view


def next_due_at(
    settings: PayoutSettings,
    address: PayeeAddress | None,
    *,
    owed_msat: int,
    owed_since: datetime | None,
    now: datetime,
) -> datetime | None:
    """When what is owed will be sent, as far as it depends on this worker; None: not in sight."""
    if address is None or address.ln_url is None or owed_msat < settings.smallest_batch_msat:
        return None
    due_at = now
    if owed_msat < settings.threshold_msat:
        due_at = (owed_since or now) + timedelta(seconds=settings.interval_s)
    return max(due_at, address.next_try_at or due_at, address.held_until or due_at)


def _blocked(
    address: PayeeAddress | None,
    paused_why: str | None,
    blocked: payout_control.Blocked | None,
    now: datetime,
) -> str | None:
    if address is None or address.ln_url is None:
        return "no_address"
    if paused_why is not None:
        return "payouts_paused"
    if address.held_until is not None and address.held_until > now:
        return "checks_failed"
    return blocked.value if blocked else address.failure_code


def _payout(record: PayoutRecord) -> dict[str, Any]:
    view: dict[str, Any] = {
        "id": record.id,
        "state": record.state.value,
        "amount_msat": record.amount_msat,
        "fee_msat": record.fee_msat,
        "payment_hash": record.payment_hash,
        "at": time_text(record.at),
    }
    if record.state is PayoutState.PAID:
        view["preimage"] = record.preimage
    if record.error_code is not None:
        view["error"] = record.error_code
    return view


def _models(row: Any, live: Worker | None) -> list[dict[str, Any]]:
    speeds = live.speeds if live else json.loads(row["speeds"])
    return [
        {**model, "tokens_per_s": round(speeds[model["id"]], 1) if model["id"] in speeds else None}
        for model in json.loads(row["models"])
    ]


def _event(row: Any) -> dict[str, Any]:
    # The error is the worker's own words, or ours about it: its owner may read them.
    event = {"at": time_text(row["at"]), "code": row["code"], "message": row["message"]}
    return event | ({"facts": json.loads(row["facts"])} if row["facts"] else {})


def _skips(core: Core, row: Any, live: Worker | None) -> list[Skip]:
    """Everything that keeps a worker from getting jobs, for `GET /workers/me`."""
    found = skips(live, core.market.counts.steps())
    if row["banned_at"] is not None:
        found = [Skip("banned", sum(s.count for s in found), {"reason": row["ban_reason"]})]
    if live is not None:
        lost = core.attempts.given.to_others(live)
        found += [lost] if lost else []
    # These two stop what would come, so there is nothing to count.
    if core.runtime.paused is not None:
        found.append(Skip("paused", 0, {"message": core.runtime.paused}))
    if core.draining:
        found.append(Skip("router_stops"))
    return found


# --- the bare numbers (QB-R17, QB-R18) ----------------------------------------------------------


def stats(core: Core) -> dict[str, int]:
    """How many workers are idle and how many are busy; `connected` counts only the idle (QB-R17)."""
    here = [worker for worker in core.fleet.all() if not worker.asks_elsewhere]
    elsewhere = core.fleet.elsewhere()
    busy = sum(1 for worker in here if worker.busy) + sum(w.busy_workers for w in elsewhere)
    return {
        "connected": len(here) + sum(w.stands_for for w in elsewhere) - busy,
        "busy": busy,
    }


# Those at other routers are named in the database some seconds after they have come.
_DETAILS = """
select w.id, w.router_id, w.hardware, w.models, w.speeds, w.jobs_done,
    exists (select 1 from jobs j where j.state = 'running' and j.worker_id = w.id) as busy
from workers w where w.id = any($1::text[]) or w.router_id is not null and w.router_id <> $2
    and ($3::text is null or w.id = $3 or w.hardware ->> 'pubkey' = $3)"""


async def detail(core: Core, name: str | None) -> list[dict[str, Any]]:
    """What the market's workers are, without who they are (QB-R18). `name`: a public id or a verified
    key; None: all of them."""
    here = {w.id: w for w in core.fleet.all() if name is None or name in w.traits.names}
    async with core.database.connection() as connection:
        rows = await connection.fetch(_DETAILS, list(here), core.router_id, name)
    return [
        _detail(row, here.get(row["id"]))
        for row in rows
        if row["id"] in here or core.presence.is_connected(row)
    ]


def _detail(row: Any, live: Worker | None) -> dict[str, Any]:
    hardware = json.loads(row["hardware"])
    speeds = live.speeds if live else json.loads(row["speeds"])
    return {
        "worker_version": hardware.get("worker_version"),
        "capabilities": sorted(live.traits.capabilities if live else _capabilities(row, hardware)),
        "gpu_cnt": hardware.get("nv_gpu_count")
        or max(len(hardware.get(cards) or ()) for cards in ("nv_gpus", "cl_gpus", "web_gpus")),
        "perf": round(max(speeds.values()), 1) if speeds else None,
        "cnt": row["jobs_done"] + (live.done if live else 0),
        "busy": bool(live.busy) if live else row["busy"],
    }


def _capabilities(row: Any, hardware: dict[str, Any]) -> Iterable[str]:
    """As its record tells them: in its words, or by what it serves."""
    models = [ServedModel.model_validate(model) for model in json.loads(row["models"])]
    said = hardware.get("capabilities")
    return said if said is not None else capabilities_of(models) or {INFER}
