"""Workers that write text as doors list them: all that were seen in the last five minutes, at any
router, or one by its id or name (KC-8, KC-9, AH-13)."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from billing import ledger
from router.core import Core
from router.lanes import answer_limit
from worker.protocol import ModelKind, ServedModel

# Without a sign of life for so long, a worker is away (KC-8, AH-34). Whole seconds, counted by the
# database: a part of a duration wraps after a day (E3-28).
STALE_AFTER = timedelta(seconds=300)

_WORKERS = """
select w.*, p.name as pull_name, p.door, p.info, p.agent, p.shown_as,
    coalesce((select b.balance_msat from ledger_balances b where b.account = $1 || w.id), 0)
    + coalesce((select sum(o.amount_msat)::bigint from payouts o where o.account = $1 || w.id
        and o.state in ('planned', 'sending', 'paid')), 0) as earned_msat
from workers w left join pull_workers p on p.worker_id = w.id
where w.banned_at is null and ($2::text is null or w.id = $2)
    and ($3::text is null or p.name = $3) and ($4::timestamptz is null or w.last_seen_at > $4)
order by w.created_at, w.id limit 1000"""


@dataclass(frozen=True, slots=True)
class TextWorker:
    """One worker as the public may see it. `models` are those that write text, at least one."""

    id: str
    name: str
    models: list[ServedModel]
    slots: int
    online: bool
    draining: bool
    jobs_done: int
    jobs_failed: int
    tokens: int
    tokens_per_s: float | None
    earned_msat: int
    uptime_s: int
    info: str | None = None
    agent: str | None = None
    owner: str | None = None

    @property
    def max_length(self) -> int:
        return max(map(answer_limit, self.models))

    @property
    def context_length(self) -> int:
        return max(model.context_length for model in self.models)


def public_name(name: str | None, worker_id: str) -> str:
    """What others see of a worker's name: not the address that may be in it."""
    return (name or "").partition("@")[0].strip() or f"worker-{worker_id[:8]}"


async def text_workers(
    core: Core, *, worker_id: str | None = None, name: str | None = None
) -> list[TextWorker]:
    """Those that are there; by id or name also one that is away."""
    now = core.clock()
    since = None if worker_id or name else now - STALE_AFTER
    async with core.database.connection() as connection:
        rows = await connection.fetch(_WORKERS, ledger.worker(""), worker_id, name, since)
    seen = (_text_worker(core, row, now) for row in rows)
    return [worker for worker in seen if worker is not None]


def _text_worker(core: Core, row: Any, now: datetime) -> TextWorker | None:
    live = core.fleet.get(row["id"])
    models = live.models if live else map(ServedModel.model_validate, json.loads(row["models"]))
    texts = [model for model in models if model.kind is ModelKind.TEXT]
    if not texts:
        return None
    speeds = live.speeds if live else json.loads(row["speeds"])
    return TextWorker(
        id=row["id"],
        name=public_name(row["pull_name"] or row["name"], row["id"]),
        models=texts,
        slots=row["slots"],
        online=now - row["last_seen_at"] < STALE_AFTER,
        draining=row["draining"],
        jobs_done=row["jobs_done"] + (live.done if live else 0),
        jobs_failed=row["jobs_failed"] + (live.failed if live else 0),
        tokens=row["tokens"] + (live.tokens if live else 0),
        tokens_per_s=max(speeds.values(), default=None),
        earned_msat=row["earned_msat"],
        uptime_s=int(time.monotonic() - live.connected_at) if live else 0,
        info=row["info"],
        agent=row["agent"],
        owner=row["shown_as"],
    )


async def contributions(core: Core) -> dict[str, int]:
    """Tokens written, by the public name of the workers' owners (KC-10)."""
    async with core.database.connection() as connection:
        rows = await connection.fetch(
            "select p.shown_as, w.id, w.tokens from pull_workers p join workers w"
            " on w.id = p.worker_id where p.shown_as is not null order by 1"
        )
    given: dict[str, int] = {}
    for row in rows:
        live = core.fleet.get(row["id"])
        tokens = row["tokens"] + (live.tokens if live else 0)
        given[row["shown_as"]] = given.get(row["shown_as"], 0) + tokens
    return given
