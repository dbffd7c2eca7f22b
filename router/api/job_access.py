"""Who may see a job: the holder of its token, or its payer."""

from __future__ import annotations

from typing import Any

from fastapi import Request

from router.api import payment
from router.api.payment import Payer
from router.core import Core
from router.errors import Forbidden, Unauthorized


async def open_job(core: Core, request: Request, job_id: str) -> Any:
    """The row of a job that this request may see. Raises NoSuchJob, Unauthorized, Forbidden."""
    for value in (*request.headers.getlist("authorization"), request.headers.get("x-job-token")):
        presented = (value or "").split()[-1:]
        if presented and core.jobs.is_token(job_id, presented[0]):
            return await core.jobs.row(job_id)
    payer = await payer_of(core, request, "jobs")
    row = await core.jobs.row(job_id)
    if row["account_id"] != payer.account_id:
        raise Forbidden("this job belongs to somebody else")
    # Whoever holds a job's token may have raised it: that payment opens this job, not its account's.
    if not payer.owns_account and (payer.reference or "").partition(":")[0] != job_id:
        raise Forbidden("this payment was for another job")
    return row


async def payer_of(core: Core, request: Request, capability: str) -> Payer:
    """Who pays, of a request that must bring a credential. Raises Unauthorized, BadCredential."""
    payer = await payment.identify(core, request, payment.facts(core, capability))
    if payer is None:
        raise Unauthorized(
            "send the job's token as `Authorization: Bearer`, or its payer's credential"
        )
    return payer
