"""AI Horde's lists of workers, and what an owner may do with its own (AH-13, AH-14, KL-4, KL-8)."""

from __future__ import annotations

import uuid
from typing import Any

from fastapi import APIRouter, Request, Response

from billing import ledger, payees
from billing.errors import BadCredential, BadLightningAddress
from router import pull_records, text_workers, worker_controls
from router.api.answers import answer, core_of, read_object
from router.api.horde_client import satoshi
from router.api.horde_errors import HordeRefusal, bad_key, refusal
from router.api.kobold_worker import address_of
from router.api.workers import resolve_address
from router.core import Core
from router.errors import BadRequest
from router.pull_records import Named
from router.text_workers import TextWorker

router = APIRouter(prefix="/api/v2", tags=["AI Horde"])

MOST_INFO = 1000
# Lists and sums over all workers are queries.
FACTS_PER_MINUTE = 300


@router.get("/workers")
async def workers(request: Request) -> Response:
    """The workers that were there in the last five minutes."""
    core = core_of(request)
    try:
        core.limiter.poll(request, "horde", FACTS_PER_MINUTE)
        if request.query_params.get("type", "text") not in ("text", ""):
            return answer([])
        name = request.query_params.get("name")
        seen = await text_workers.text_workers(core)
        return answer([_worker(worker) for worker in seen if name in (None, worker.name)])
    except Exception as error:
        return refusal(error, request)


@router.get("/workers/name/{name}")
async def by_name(request: Request, name: str) -> Response:
    """One worker by its public name, also one that is away."""
    core = core_of(request)
    try:
        core.limiter.poll(request, "horde", FACTS_PER_MINUTE)
        if "\0" in name:
            raise _nobody(name)
        seen = [w for w in await text_workers.text_workers(core) if w.name == name]
        seen = seen or await text_workers.text_workers(core, name=name)
        if not seen:
            raise _nobody(name)
        return answer(_worker(seen[0]))
    except Exception as error:
        return refusal(error, request)


@router.get("/workers/{worker_id}")
async def by_id(request: Request, worker_id: str) -> Response:
    """One worker by its id, also one that is away."""
    core = core_of(request)
    try:
        core.limiter.poll(request, "horde", FACTS_PER_MINUTE)
        return answer(_worker(await _find(core, worker_id)))
    except Exception as error:
        return refusal(error, request)


def _nobody(named: str) -> HordeRefusal:
    return HordeRefusal(404, "WorkerNotFound", f"Worker with ID '{named[:40]}' not found.")


async def _find(core: Core, worker_id: str) -> TextWorker:
    try:
        wanted = uuid.UUID(worker_id).hex
    except ValueError:
        raise _nobody(worker_id) from None
    seen = await text_workers.text_workers(core, worker_id=wanted)
    if not seen:
        raise _nobody(worker_id)
    return seen[0]


def _worker(worker: TextWorker) -> dict[str, Any]:
    earned = satoshi(worker.earned_msat)
    return {
        "type": "text",
        "name": worker.name,
        "id": str(uuid.UUID(worker.id)),
        "online": worker.online,
        "requests_fulfilled": worker.jobs_done,
        "kudos_rewards": earned,
        "kudos_details": {"generated": earned, "uptime": 0},
        "performance": f"{worker.tokens_per_s:.1f} tokens per second"
        if worker.tokens_per_s
        else "No requests fulfilled yet",
        "threads": worker.slots,
        "uptime": worker.uptime_s,
        "maintenance_mode": worker.draining,
        "info": worker.info,
        "nsfw": True,
        "trusted": True,
        "flagged": False,
        "uncompleted_jobs": worker.jobs_failed,
        "models": [model.id for model in worker.models],
        "team": {"name": None, "id": None},
        "bridge_agent": worker.agent or "unknown:0:unknown",
        "max_length": worker.max_length,
        "max_context_length": worker.context_length,
        "tokens_generated": worker.tokens,
    }


async def _own(core: Core, request: Request, worker_id: str) -> Named:
    """The worker, if the apikey is its owner's. Raises HordeRefusal, BadCredential."""
    owner_hash = pull_records.owner_of_key(request.headers.get("apikey", ""))
    found = await _find(core, worker_id)
    named = await pull_records.find(core.database, worker_id=found.id)
    if named is None or named.owner_hash != owner_hash:
        raise HordeRefusal(
            403, "WrongCredentials", "You are not allowed to change somebody else's worker."
        )
    return named


@router.put("/workers/{worker_id}")
async def change(request: Request, worker_id: str) -> Response:
    """`maintenance` (it gets no jobs), `info`, and `ln_url`, where to pay it."""
    core = core_of(request)
    try:
        named = await _own(core, request, worker_id)
        body = await read_object(request)
        changed = await _changed(core, named, body)
        if not changed:
            raise HordeRefusal(
                400, "NoWorkerModSelected", "Please select at least one change to make."
            )
        return answer(changed)
    except BadCredential:
        return bad_key(request)
    except BadLightningAddress as error:
        return refusal(HordeRefusal(400, "BadLightningAddress", str(error)), request)
    except Exception as error:
        return refusal(error, request)


async def _changed(core: Core, named: Named, body: dict[str, Any]) -> dict[str, Any]:
    changed: dict[str, Any] = {}
    maintenance, info = body.get("maintenance"), body.get("info")
    if maintenance is not None and not isinstance(maintenance, bool):
        raise BadRequest("maintenance must be true or false", param="maintenance")
    if info is not None and (not isinstance(info, str) or len(info) > MOST_INFO or "\0" in info):
        raise BadRequest(f"info must be a text of at most {MOST_INFO} characters", param="info")
    if body.get("name") not in (None, named.name):
        raise BadRequest("a worker's name is the one that it pops with", param="name")
    address = address_of(body)
    if address is not None:
        address, _ = await resolve_address(core, address, on_behalf_of=named.owner_hash.hex())
    async with core.database.transaction() as connection:
        if maintenance is not None:
            await worker_controls.set_draining(connection, named.worker_id, maintenance)
            changed["maintenance"] = maintenance
        if info is not None:
            await pull_records.describe(connection, named.worker_id, info)
            changed["info"] = info
        if address is not None:
            set_now = await payees.set_address(
                connection, named.worker_id, address, now=core.clock()
            )
            changed["ln_url"] = set_now.next_ln_url or set_now.ln_url
    if maintenance is not None:
        worker_controls.apply_draining(core, named.worker_id, maintenance)
    return changed


@router.delete("/workers/{worker_id}")
async def remove(request: Request, worker_id: str) -> Response:
    """Give up a worker and its name. Not while it has a job, or money and no address for it."""
    core = core_of(request)
    try:
        named = await _own(core, request, worker_id)
        session = core.pull_gate.session_of(named.worker_id)
        if await pull_records.has_job(core.database, named.worker_id):
            raise HordeRefusal(
                423,
                "Locked",
                "This worker has a job; wait until it is done, or put it to maintenance.",
            )
        async with core.database.transaction() as connection:
            owed = await ledger.balance_msat(connection, ledger.worker(named.worker_id))
            paid_at = await payees.get_address(connection, named.worker_id, now=core.clock())
            if owed > 0 and (paid_at is None or paid_at.ln_url is None):
                raise HordeRefusal(
                    423, "Locked", "This worker has earned something: say where to pay it (ln_url)."
                )
            await pull_records.give_up(connection, named.worker_id)
        if session is not None:
            session.cut("given up by its owner", blame="nobody")
        return answer({"deleted_id": str(uuid.UUID(named.worker_id)), "deleted_name": named.name})
    except BadCredential:
        return bad_key(request)
    except Exception as error:
        return refusal(error, request)
