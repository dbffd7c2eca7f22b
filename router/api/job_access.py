"""Who may see a job: the holder of its token, its payer, and whoever a polling door gave its id."""

from __future__ import annotations

from typing import Any

from fastapi import Request

from router.api import payment
from router.api.payment import Payer
from router.core import Core
from router.errors import Forbidden, Unauthorized

_SAY_WHO = "send the job's token as `Authorization: Bearer`, or its payer's credential"


async def open_job(core: Core, request: Request, job_id: str) -> Any:
    """The row of a job that this request may see. Raises NoSuchJob, Unauthorized, Forbidden."""
    for value in (*request.headers.getlist("authorization"), request.headers.get("x-job-token")):
        for presented in (value or "").split()[-1:]:
            if core.jobs.is_token(job_id, presented):
                return await core.jobs.row(job_id)
            for row in await core.door_ids.jobs(presented):
                if row["id"] == job_id:
                    return row
    payer = await payment.identify(core, request, payment.facts(core, "jobs"))
    if payer is None:
        # Clients of polling doors have nothing but an id, which may stand where a job's own does.
        named = await core.door_ids.jobs(job_id)
        if len(named) != 1:
            raise Unauthorized(_SAY_WHO)
        return named[0]
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
        raise Unauthorized(_SAY_WHO)
    return payer
