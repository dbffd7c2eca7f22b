"""Receipts of jobs, and the public keys that they are checked with."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from router import receipts
from router.api.answers import answer, core_of
from router.api.job_access import open_job
from router.api.own_door import OwnDoorRoute

router = APIRouter(tags=["quotes and jobs"], route_class=OwnDoorRoute)
KEYS_CACHED = {"Cache-Control": "public, max-age=300"}


@router.get("/jobs/{job_id}/receipt")
async def get_receipt(request: Request, job_id: str) -> Response:
    """What an ended job cost and which answer it bought, signed by this router (a compact JWS).

    It can be had for as long as the job is on record, also when its texts have been deleted.
    `satherd receipt verify` checks one.
    """
    core = core_of(request)
    # A door's id may stand in the place of the job's; the receipt has the job's own.
    job = await open_job(core, request, job_id)
    async with core.database.connection() as connection:
        row = await receipts.find(connection, job["id"])
    receipt, facts = core.receipts.receipt(row)
    return answer({"receipt": receipt, "facts": facts})


@router.get("/.well-known/jwks.json", tags=["operations"])
async def get_keys(request: Request) -> Response:
    """The public keys of this market's receipts and webhooks, as a JWK set (RFC 7517)."""
    core = core_of(request)
    async with core.database.connection() as connection:
        keys = await receipts.published(connection)
    return answer({"keys": keys}, headers=KEYS_CACHED)
