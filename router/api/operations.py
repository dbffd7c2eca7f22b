"""Health and metrics, for whatever keeps this router alive. Open to all: no secrets, no ids."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any

import asyncpg
from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from billing.lightning import BackendError
from router.api.answers import NO_STORE, answer, core_of
from router.api.info import software_version
from router.api.own_door import OwnDoorRoute
from router.core import Core
from router.database import DatabaseUnavailable
from router.metrics import Metrics

router = APIRouter(tags=["operations"], route_class=OwnDoorRoute)
PATIENCE_S = 3.0
FRESH_S = 1.0
OK = "ok"


@dataclass(slots=True)
class Readiness:
    """The last look, kept for a second: asking is open to all, and the node is not theirs to ask."""

    lock: asyncio.Lock
    parts: dict[str, str]
    read_at: float = float("-inf")

    async def look(self, core: Core) -> dict[str, str]:
        async with self.lock:
            if time.monotonic() - self.read_at > FRESH_S:
                self.parts = await parts(core)
                self.read_at = time.monotonic()
            return self.parts


@router.get("/health/live")
async def live(request: Request) -> Response:
    """This process answers."""
    return answer({"live": True})


@router.get("/health/ready")
async def ready(request: Request) -> Response:
    """Whether a paid prompt can be sold here now; 503 says which part is not ready."""
    core = core_of(request)
    readiness = _kept(request, "readiness", lambda: Readiness(asyncio.Lock(), {}))
    found = dict(await readiness.look(core))
    if core.draining:
        found["router"] = "draining"
    # Without the bus a router goes on with what is its own and by the database: to take it, and all
    # others with it, out of service would be the worse outage.
    is_ready = all(state == OK for part, state in found.items() if part != "bus")
    body = {
        "ready": is_ready,
        "degraded": is_ready and found["bus"] != OK,
        "parts": found,
        "network": core.node.network,
        "simulated": core.node.simulated,
    }
    headers = {} if is_ready else {"Retry-After": "5"}
    return answer(body, status=200 if is_ready else 503, headers=headers)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    core = core_of(request)
    kept: Metrics = _kept(request, "metrics", lambda: Metrics(core, software_version()))
    return Response(await kept.text(), media_type=CONTENT_TYPE_LATEST, headers=NO_STORE)


def _kept(request: Request, name: str, make: Any) -> Any:
    """What belongs to this application, made when it is first wanted."""
    state = request.app.state
    if not hasattr(state, name):
        setattr(state, name, make())
    return getattr(state, name)


async def parts(core: Core) -> dict[str, str]:
    """The state of each part that a sale needs: `ok`, or a word for what is the matter."""
    database, lightning = await asyncio.gather(_database(core), _lightning(core))
    return {
        "database": database,
        "lightning": lightning,
        "settlements": _settlements(core),
        "dispatcher": _dispatcher(core),
        "bus": OK if core.relay.bus.up else "away",
        "router": OK,
    }


async def _database(core: Core) -> str:
    try:
        async with asyncio.timeout(PATIENCE_S), core.database.connection() as connection:
            await connection.fetchval("select 1")
    except (DatabaseUnavailable, TimeoutError, asyncpg.PostgresError):
        return "unavailable"
    return OK


async def _lightning(core: Core) -> str:
    try:
        async with asyncio.timeout(PATIENCE_S):
            node = await core.backend.node_info()
    except (BackendError, TimeoutError):
        return "unavailable"
    return OK if node.synced else "not_synced"


def _settlements(core: Core) -> str:
    # A node that does not push is polled, and the poll is alive as long as the process.
    return OK if core.watcher.stream_alive or not core.watcher.pushed else "stream_lost"


def _dispatcher(core: Core) -> str:
    return OK if core.dispatcher.alive else "stopped"
