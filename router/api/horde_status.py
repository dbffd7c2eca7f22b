"""AI Horde's facts about the whole: models, performance, heartbeat, modes, users (AH-11…AH-18)."""

from __future__ import annotations

import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter, Request, Response

from billing import ledger
from billing.accounts import Key, hash_secret
from billing.errors import BadCredential
from billing.payout_records import worker_sums
from router import pull_records, text_workers
from router.api.answers import answer, core_of
from router.api.horde_client import satoshi
from router.api.horde_errors import HordeRefusal, refusal
from router.api.horde_workers import FACTS_PER_MINUTE
from router.api.info import software_version
from router.core import Core
from router.database import DatabaseUnavailable
from router.errors import BadRequest, TooManyRequests
from router.models import ModelFacts
from router.pull_records import Named
from router.rate_limits import KEY_FAILURES_PER_MINUTE
from worker.protocol import ModelKind

router = APIRouter(prefix="/api/v2", tags=["AI Horde"])

FRESH_S, REUSE_FACTOR = 2.0, 20

_WAITING = """
select model, count(*) as jobs, sum(max_tokens)::bigint as tokens from jobs
where state = 'queued' and kind in ('chat', 'completion') group by 1"""
_RUNNING = """
select count(*) as jobs, coalesce(sum(max_tokens), 0)::bigint as tokens from jobs
where state = 'running' and kind in ('chat', 'completion')"""

_ALIVE = """
select (select count(*) from jobs where state = 'queued') as queued,
    (select count(*) from jobs where state = 'running') as running"""


class Remembered:
    """Facts that cost some queries and are asked for by everybody: read anew after two seconds, or
    after twenty times as long as it took."""

    def __init__(self, read: Callable[[Core], Awaitable[dict[str, Any]]]) -> None:
        self._read = read
        self._facts: dict[str, Any] = {}
        self._good_until = float("-inf")
        self._of: Core | None = None

    async def get(self, core: Core) -> dict[str, Any]:
        began = time.monotonic()
        if self._of is not core or began > self._good_until:
            self._facts = await self._read(core)
            now = time.monotonic()
            self._of, self._good_until = core, now + max(FRESH_S, REUSE_FACTOR * (now - began))
        return self._facts


async def _read_queue(core: Core) -> dict[str, Any]:
    async with core.database.connection() as connection:
        waiting = await connection.fetch(_WAITING)
        running = await connection.fetchrow(_RUNNING)
    return {
        "minute_tokens": await core.presence.minute_tokens(),
        "models": {row["model"]: (row["jobs"], row["tokens"]) for row in waiting},
        "jobs": sum(row["jobs"] for row in waiting) + running["jobs"],
        "tokens": sum(row["tokens"] for row in waiting) + running["tokens"],
    }


_queue = Remembered(_read_queue)


@router.get("/status/models")
async def models(request: Request) -> Response:
    """The models that are served, with their queues (AH-11); `type` is `image` unless it is said."""
    core = core_of(request)
    try:
        core.limiter.poll(request, "horde", FACTS_PER_MINUTE)
        query = request.query_params
        kind = query.get("type", "image")
        low, high = _count(request, "min_count"), _count(request, "max_count")
        queued = (await _queue.get(core))["models"]
        listed = [
            _model(facts, kind, *queued.get(facts.id, (0, 0)))
            for facts in core.models.facts()
            if facts.workers and facts.kind.value == kind
        ]
        return answer(
            [
                model
                for model in listed
                if (low is None or model["count"] >= low)
                and (high is None or model["count"] <= high)
            ]
        )
    except Exception as error:
        return refusal(error, request)


def _count(request: Request, name: str) -> int | None:
    text = request.query_params.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise BadRequest(f"{name} must be a whole number", param=name)
    return int(text)


def _model(facts: ModelFacts, kind: str, jobs: int, tokens: int) -> dict[str, Any]:
    speed = facts.tokens_per_s or 0.0
    eta = tokens / (speed * facts.workers) if speed else 0
    return {
        "name": facts.id,
        "count": facts.workers,
        "performance": round(speed, 1),
        "queued": float(tokens),
        "jobs": float(jobs),
        "eta": round(eta),
        "type": kind,
    }


@router.get("/status/performance")
async def performance(request: Request) -> Response:
    """How busy the whole is (AH-12, KL-2)."""
    core = core_of(request)
    try:
        core.limiter.poll(request, "horde", FACTS_PER_MINUTE)
        queue = await _queue.get(core)
        here = await text_workers.text_workers(core)
        images = sum(f.workers for f in core.models.facts() if f.kind is ModelKind.IMAGE)
        return answer(
            {
                "queued_requests": 0,
                "queued_text_requests": queue["jobs"],
                "worker_count": images,
                "text_worker_count": len(here),
                "thread_count": images,
                "text_thread_count": sum(worker.slots for worker in here),
                "queued_megapixelsteps": 0,
                "past_minute_megapixelsteps": 0,
                "queued_forms": 0,
                "interrogator_count": 0,
                "interrogator_thread_count": 0,
                "queued_tokens": queue["tokens"],
                "past_minute_tokens": queue["minute_tokens"],
            }
        )
    except Exception as error:
        return refusal(error, request)


@router.get("/status/heartbeat")
async def heartbeat(request: Request) -> Response:
    """Whether this router is well (AH-16)."""
    core = core_of(request)
    try:
        core.limiter.poll(request, "horde", FACTS_PER_MINUTE)
    except TooManyRequests as error:
        return refusal(error, request)
    try:
        async with core.database.connection() as connection:
            queued, running = await connection.fetchrow(_ALIVE)
    except DatabaseUnavailable:
        return answer({"message": "DOWN", "version": software_version()}, status=503)
    full = queued >= core.settings.max_queue
    return answer(
        {
            "message": "OVERLOADED" if full else "OK",
            "version": software_version(),
            "queue": queued,
            "threads": 1,
            "active_count": running,
            "db_connection": True,
        }
    )


@router.get("/status/modes")
async def modes(request: Request) -> Response:
    """Whether new work is taken (AH-17)."""
    core = core_of(request)
    return answer(
        {
            "maintenance_mode": core.runtime.paused is not None or core.draining,
            "invite_only_mode": False,
            "raid_mode": False,
        }
    )


@router.get("/find_user")
async def find_user(request: Request) -> Response:
    """Whose key this is: what it can spend, as `kudos`, and its workers (AH-15, KL-8)."""
    core = core_of(request)
    try:
        core.limiter.poll(request, "horde", FACTS_PER_MINUTE)
        return answer(await _user(core, request))
    except Exception as error:
        return refusal(error, request)


async def _user(core: Core, request: Request) -> dict[str, Any]:
    """The owner of the key in `apikey`: a payer, or of workers, or both. Raises HordeRefusal."""
    presented = request.headers.get("apikey", "")
    nobody = HordeRefusal(404, "UserNotFound", "User with api_key '…' not found.")
    key: Key | None = None
    workers: list[Named] = []
    try:
        workers = await pull_records.owned(core.database, pull_records.owner_of_key(presented))
        key = await core.keys.find(presented)
    except BadCredential:
        if not workers:
            core.limiter.failed(request, "key", KEY_FAILURES_PER_MINUTE)
            raise nobody from None
    return await _described(core, key, workers)


async def _described(core: Core, key: Key | None, workers: list[Named]) -> dict[str, Any]:
    ids = [worker.worker_id for worker in workers]
    async with core.database.connection() as connection:
        balance_msat = 0
        if key is not None:
            balance_msat = await ledger.balance_msat(connection, ledger.client(key.account_id))
        waiting = await connection.fetchval(
            "select count(*) from jobs where account_id = $1 and state in ('queued', 'running')",
            key.account_id if key else "",
        )
        earned_msat = sum([(await worker_sums(connection, id)).earned_msat for id in ids])
        tokens, done = await connection.fetchrow(
            "select coalesce(sum(tokens), 0)::bigint, coalesce(sum(jobs_done), 0)::bigint"
            " from workers where id = any($1::text[])",
            ids,
        )
    since = key.created_at if key else core.clock()
    alias = (key.label if key else None) or "anonymous"
    # The number in a name is public: it says nothing about the key or the account.
    number = int.from_bytes(hash_secret(key.id if key else "".join(ids))[:4], "big")
    fulfilled = {"text": done}
    return {
        "username": f"{alias}#{number}",
        "id": number,
        "kudos": satoshi(balance_msat),
        "kudos_details": {
            "accumulated": satoshi(earned_msat),
            "gifted": 0.0,
            "donated": 0.0,
            "admin": 0.0,
            "received": 0.0,
            "recurring": 0.0,
            "awarded": 0.0,
        },
        "concurrency": core.limits.max_n,
        "waiting": waiting,
        "worker_invited": 0,
        "moderator": False,
        "trusted": True,
        "flagged": False,
        "vpn": False,
        "service": False,
        "pseudonymous": True,
        "suspicious": 0,
        "worker_count": len(ids),
        "worker_ids": [str(uuid.UUID(worker_id)) for worker_id in ids],
        "sharedkey_ids": [],
        "account_age": int((core.clock() - since).total_seconds()),
        "usage": {"megapixelsteps": 0.0, "requests": 0},
        "contributions": {"megapixelsteps": 0.0, "fulfillments": done},
        "records": {
            "usage": {"megapixelsteps": 0.0, "tokens": 0},
            "contribution": {"megapixelsteps": 0.0, "tokens": tokens},
            "fulfillment": {"image": 0, "interrogation": 0, **fulfilled},
            "request": {"image": 0, "interrogation": 0, "text": 0},
        },
    }
