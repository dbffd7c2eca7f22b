"""`/admin`: workers, jobs and payouts. What a change does is in `router.administration`."""

from __future__ import annotations

from fastapi import Request, Response

from billing import ledger, payout_control, payout_records
from billing.payout_states import PayoutKind, PayoutState
from router import admin_views, administration
from router.api.admin_access import REASON_MAX, admin_router
from router.api.answers import answer, core_of, read_object
from router.api.own_door import only, page_size, query_text, short_text, whole_number
from router.errors import BadRequest
from router.job_states import State
from router.job_views import time_text

router = admin_router()


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
    """Let a worker connect again that was banned."""
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
            "unknown_payments": control.unknown_payments,
            "unknown_msat": control.unknown_msat,
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
    """Send again what is due. What nobody has confirmed (`/payouts/unknown`) still pauses it."""
    why = await administration.pause_payouts(core_of(request), None)
    return answer({"paused": why is not None, "reason": why})


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
