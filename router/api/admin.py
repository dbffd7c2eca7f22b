"""`/admin/*`: what the operator sees and changes. What a change does is in `router.administration`."""

from __future__ import annotations

import hmac
from dataclasses import fields
from typing import Any

from fastapi import APIRouter, Depends, Request, Response

from billing import fee_schedule, ledger, payout_control, payout_records
from billing.fee_schedule import FeeChange
from billing.fees import Rates
from billing.payout_states import PayoutKind, PayoutState
from router import admin_views, administration
from router.api.answers import answer, core_of, read_object
from router.api.own_door import (
    OwnDoorRoute,
    only,
    page_size,
    query_text,
    short_text,
    whole_number,
)
from router.core import Core
from router.errors import BadRequest, NoSuchThing, Unauthorized
from router.job_states import State
from router.job_views import time_text
from router.rate_limits import ADMIN_FAILURES_PER_MINUTE
from router.runtime_settings import BOUNDS

REASON_MAX = 500
MODEL_MAX = 200
HISTORY = 50
# As `billing.fee_schedule` has it; here only so that the answer names the field.
_HIGHEST_RATE_MSAT = 2_100_000_000_000
_RATE_NAMES = tuple(rate.name for rate in fields(Rates))


async def require_admin(request: Request) -> None:
    """Lets the holder of the admin token through. Raises Unauthorized, TooManyRequests, NoSuchThing.

    Compared in constant time, and wrong ones are counted for each address.
    """
    core = core_of(request)
    token = core.settings.admin_token.get_secret_value()
    if not token:
        raise NoSuchThing("the admin API is off; set SATHERD_ADMIN_TOKEN to turn it on")
    scheme, _, presented = request.headers.get("authorization", "").partition(" ")
    right = hmac.compare_digest(presented.strip().encode(), token.encode())
    if scheme.lower() != "bearer" or not right:
        core.limiter.failed(request, "admin", ADMIN_FAILURES_PER_MINUTE)
        raise Unauthorized("send the admin token as `Authorization: Bearer …`")


router = APIRouter(
    prefix="/admin",
    tags=["admin"],
    route_class=OwnDoorRoute,
    dependencies=[Depends(require_admin)],
)


# --- prices and settings ------------------------------------------------------------------------


@router.get("/fees")
async def show_fees(request: Request) -> Response:
    """The rates in force: the default, the models that have their own, and the default's history."""
    core = core_of(request)
    async with core.database.connection() as connection:
        schedule = await fee_schedule.load(connection)
        history = await fee_schedule.history(connection, model=None, limit=HISTORY)
    models = {model: rates.as_json() for model, rates in sorted(schedule.by_model.items())}
    return answer(
        {
            "default": schedule.default.as_json(),
            "models": models,
            "history": [_fee_change(change) for change in history],
        }
    )


@router.put("/fees")
async def set_default_fees(request: Request) -> Response:
    """Change default rates; those not named stay as they are. The next quote uses them."""
    rates = await administration.set_fees(core_of(request), None, await _rates(request))
    return answer({"model": None, "fees": rates.as_json()})


@router.get("/fees/{model:path}")
async def show_model_fees(request: Request, model: str) -> Response:
    """The rates of one model and their history, newest first."""
    core = core_of(request)
    async with core.database.connection() as connection:
        schedule = await fee_schedule.load(connection)
        history = await fee_schedule.history(connection, model=model, limit=HISTORY)
    return answer(
        {
            "model": model,
            "own": model in schedule.by_model,
            "fees": schedule.rates(model).as_json(),
            "history": [_fee_change(change) for change in history],
        }
    )


@router.put("/fees/{model:path}")
async def set_model_fees(request: Request, model: str) -> Response:
    """Give a model rates of its own; those not named are those it has now."""
    if not 1 <= len(model) <= MODEL_MAX or "\0" in model:
        raise BadRequest(f"a model's id has 1 to {MODEL_MAX} characters", param="model")
    rates = await administration.set_fees(core_of(request), model, await _rates(request))
    return answer({"model": model, "fees": rates.as_json()})


@router.delete("/fees/{model:path}")
async def remove_model_fees(request: Request, model: str) -> Response:
    """Return a model to the default rates."""
    rates = await administration.remove_fees(core_of(request), model)
    return answer({"model": model, "fees": rates.as_json()})


async def _rates(request: Request) -> dict[str, int]:
    body = await read_object(request)
    only(body, *_RATE_NAMES)
    if not body:
        raise BadRequest(f"name at least one of {', '.join(_RATE_NAMES)}")
    found: dict[str, int] = {}
    for name in body:
        value = whole_number(body, name, low=0, high=_HIGHEST_RATE_MSAT)
        assert value is not None
        found[name] = value
    return found


def _fee_change(change: FeeChange) -> dict[str, Any]:
    return {
        "fees": change.rates.as_json() if change.rates else None,
        "at": time_text(change.changed_at),
        "who": change.changed_by,
    }


@router.get("/settings")
async def show_settings(request: Request) -> Response:
    """What may be changed while the router runs, and within which bounds."""
    core = core_of(request)
    async with core.database.connection() as connection:
        await core.runtime.load(connection)
    return answer(_settings(core))


@router.put("/settings")
async def change_settings(request: Request) -> Response:
    """Change settings by name; all of them or, when one is wrong, none."""
    core = core_of(request)
    await administration.change_settings(core, await read_object(request))
    return answer(_settings(core))


def _settings(core: Core) -> dict[str, Any]:
    return {
        "settings": core.runtime.as_json(),
        "bounds": {name: list(bounds) for name, bounds in BOUNDS.items()},
        "paused": core.runtime.paused,
    }


@router.post("/pause")
async def pause(request: Request) -> Response:
    """Make no new quotes; what is paid still runs. Clients are told `message`."""
    body = await read_object(request)
    only(body, "message")
    message = short_text(body, "message", most=REASON_MAX) or administration.PAUSED_MESSAGE
    await administration.pause(core_of(request), message)
    return answer({"paused": message})


@router.post("/resume")
async def resume(request: Request) -> Response:
    """Make quotes again."""
    await administration.pause(core_of(request), None)
    return answer({"paused": None})


# --- workers and jobs ---------------------------------------------------------------------------


@router.get("/workers")
async def list_workers(request: Request) -> Response:
    """All workers, newest first, with what they do now and what they are owed."""
    core = core_of(request)
    cursor, limit = query_text(request, "cursor"), page_size(request)
    async with core.database.connection() as connection:
        page = await admin_views.workers_page(core, connection, cursor=cursor, limit=limit)
    return answer(page.as_json("workers"))


@router.post("/workers/{worker_id}/ban")
async def ban_worker(request: Request, worker_id: str) -> Response:
    """Send a worker away, now and whenever it comes back; what it has earned stays owed."""
    body = await read_object(request)
    only(body, "reason")
    reason = short_text(body, "reason", most=REASON_MAX)
    await administration.ban(core_of(request), worker_id, reason)
    return answer({"id": worker_id, "banned": True, "ban_reason": reason})


@router.post("/workers/{worker_id}/unban")
async def unban_worker(request: Request, worker_id: str) -> Response:
    await administration.unban(core_of(request), worker_id)
    return answer({"id": worker_id, "banned": False})


@router.post("/workers/{worker_id}/drain")
async def drain_worker(request: Request, worker_id: str) -> Response:
    """Give a worker no more jobs; it finishes what it has, and stays connected."""
    await administration.drain(core_of(request), worker_id, True)
    return answer({"id": worker_id, "draining": True})


@router.post("/workers/{worker_id}/resume")
async def resume_worker(request: Request, worker_id: str) -> Response:
    """Give a worker jobs again."""
    await administration.drain(core_of(request), worker_id, False)
    return answer({"id": worker_id, "draining": False})


@router.get("/jobs")
async def list_jobs(request: Request) -> Response:
    """Jobs, newest first, with every attempt and its error. `?state=`, `?model=`, `?worker=`."""
    state = query_text(request, "state")
    if state is not None and state not in set(State):
        raise BadRequest(f"state must be one of {', '.join(State)}", param="state")
    limit = page_size(request)
    async with core_of(request).database.connection() as connection:
        page = await admin_views.jobs_page(
            connection,
            state=state,
            model=query_text(request, "model"),
            worker_id=query_text(request, "worker"),
            cursor=query_text(request, "cursor"),
            limit=limit,
        )
    return answer(page.as_json("jobs"))


@router.post("/jobs/{job_id}/refund")
async def refund_job(request: Request, job_id: str) -> Response:
    """Give back what a job was charged, or `amount_msat` of it, at the router's cost; once."""
    core = core_of(request)
    body = await read_object(request)
    only(body, "amount_msat", "reason")
    amount_msat = whole_number(
        body, "amount_msat", low=1, high=core.settings.max_amount_msat, needed=False
    )
    reason = short_text(body, "reason", most=REASON_MAX)
    given_msat = await administration.refund(core, job_id, amount_msat, reason)
    return answer({"id": job_id, "goodwill_msat": given_msat, "simulated": core.node.simulated})


# --- money --------------------------------------------------------------------------------------


@router.get("/payouts")
async def list_payouts(request: Request) -> Response:
    """Payouts and withdrawals, newest first, with what keeps them from being paid.

    `?state=`, `?kind=worker|withdrawal`, `?worker=`.
    """
    core = core_of(request)
    state, kind = query_text(request, "state"), query_text(request, "kind")
    if state is not None and state not in set(PayoutState):
        raise BadRequest(f"state must be one of {', '.join(PayoutState)}", param="state")
    if kind is not None and kind not in set(PayoutKind):
        raise BadRequest(f"kind must be one of {', '.join(PayoutKind)}", param="kind")
    worker_id = query_text(request, "worker")
    limit = page_size(request)
    async with core.database.connection() as connection:
        page = await payout_records.list_payouts(
            connection,
            account=ledger.worker(worker_id) if worker_id else None,
            kind=PayoutKind(kind) if kind else None,
            state=PayoutState(state) if state else None,
            cursor=query_text(request, "cursor"),
            limit=limit,
        )
        control = await payout_control.control_state(connection)
        open_ones = await payout_records.unresolved(connection, now=core.clock())
    return answer(
        {
            "payouts": [admin_views.payout_view(record) for record in page.payouts],
            "cursor": page.cursor,
            "paused": control.paused_why,
            "paused_at": time_text(control.paused_at),
            "blocked": control.blocked.value if control.blocked else None,
            "blocked_since": time_text(control.blocked_since),
            "unresolved": {
                "count": open_ones.count,
                "amount_msat": open_ones.amount_msat,
                "oldest_age_s": open_ones.oldest_age_s,
                "alerts": {alert.value: count for alert, count in open_ones.alerts.items()},
            },
            "simulated": core.node.simulated,
        }
    )


@router.post("/payouts/pause")
async def pause_payouts(request: Request) -> Response:
    """Send nothing more; what is on its way is still looked up."""
    body = await read_object(request)
    only(body, "reason")
    reason = short_text(body, "reason", most=REASON_MAX) or "paused by the admin"
    await administration.pause_payouts(core_of(request), reason)
    return answer({"paused": True})


@router.post("/payouts/resume")
async def resume_payouts(request: Request) -> Response:
    await administration.pause_payouts(core_of(request), None)
    return answer({"paused": False})


@router.post("/payouts/{payout_id}/retry")
async def retry_payout(request: Request, payout_id: str) -> Response:
    """Do the next thing for this payout now; a failed one stays failed, and its money is back."""
    await administration.retry_payout(core_of(request), payout_id)
    return answer({"id": payout_id, "retried": True})


@router.post("/payouts/{payout_id}/decide")
async def decide_payout(request: Request, payout_id: str) -> Response:
    """Say how a payout has ended that waits for a person who has looked at the node.

    `preimage` and `fee_msat`: it was paid; `"failed": true`: it was not, and never will be.
    """
    core = core_of(request)
    body = await read_object(request)
    only(body, "preimage", "fee_msat", "failed")
    preimage = short_text(body, "preimage", most=64)
    if (preimage is None) == (body.get("failed") is not True):
        raise BadRequest('give either the preimage, or "failed": true')
    fee_msat = whole_number(
        body, "fee_msat", low=0, high=core.settings.max_amount_msat, needed=False
    )
    state = await administration.decide_payout(core, payout_id, preimage, fee_msat or 0)
    return answer({"id": payout_id, "state": state.value})


@router.get("/ledger")
async def show_books(request: Request) -> Response:
    """The trial balance, which must be zero, beside what the node says it holds."""
    return answer(await admin_views.books(core_of(request)))


@router.get("/audit")
async def list_changes(request: Request) -> Response:
    """Every change: who, when, before, after; newest first."""
    limit = page_size(request)
    async with core_of(request).database.connection() as connection:
        page = await admin_views.audit_page(
            connection, cursor=query_text(request, "cursor"), limit=limit
        )
    return answer(page.as_json("changes"))
