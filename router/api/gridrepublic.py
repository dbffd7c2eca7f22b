"""The GridRepublic door: jobs of one or several prompts, asked for until they are done.

Polling is streaming there: `log` is the answer so far. The ids are capabilities (`router.door_ids`):
whoever has one may read, cancel and raise its job at `/jobs/{id}`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request, Response

from router import requests
from router.api import purchase
from router.api.answers import answer, core_of, noted, read_object
from router.api.errors import Problem
from router.api.purchase import PaymentRequired, Style, payment_body
from router.core import Core
from router.door_ids import Door
from router.errors import BadRequest, NoSuchJob
from router.gridrepublic_jobs import read_job, show_job
from router.job_states import State
from router.kept_chunks import joined
from worker.protocol import Kind

router = APIRouter(tags=["GridRepublic"])

MAX_IDS = 128
_STYLE = Style(polls=True)
# Fields of our own that a submission may have beside those of that system.
_OURS = ("max_tokens", "fee_multiplier", "offer_msat", "max_fee_msat", "webhook")


@router.post("/remotejobs/v2/jobs")
async def submit(request: Request) -> Response:
    """Buy jobs: one for each input and each model of `tag` (GR-1, GR-4, GR-7)."""
    core = core_of(request)
    try:
        core.limiter.job(request)
        body = await read_object(request)
        wanted = _wanted(core, request, body)
        bought = await purchase.buy(core, request, wanted, _STYLE)
        indexes = list(range(len(bought.job_ids)))
        ids = await core.door_ids.issue(Door.GRIDREPUBLIC, bought.quote_id, indexes=indexes)
        headers = {"X-Satherd-Job": ",".join(bought.job_ids)}
        return answer({"success": True, "ids": ids}, headers=headers)
    except PaymentRequired as due:
        problem = Problem("payment_required", "pay the invoice and repeat the request", {})
        return _refused(problem, payment_body(core, due), challenges=due.offer.challenges)
    except Exception as error:
        return _refused(noted(error, request))


@router.get("/remotejobs/v2/jobs/{ids}")
async def status(request: Request, ids: str) -> Response:
    """How jobs stand, by their comma-separated ids (GR-5)."""
    core = core_of(request)
    try:
        wanted = list(dict.fromkeys(part.strip() for part in ids.split(",") if part.strip()))
        if not 1 <= len(wanted) <= MAX_IDS:
            raise BadRequest(f"ask for 1 to {MAX_IDS} ids")
        found = await core.door_ids.jobs_of_each(wanted, Door.GRIDREPUBLIC)
        if not found:
            raise NoSuchJob("Job not found")
        unknown = [door_id for door_id in wanted if door_id not in found]
        rows = [row for rows in found.values() for row in rows]
        await core.jobs.touch(*(row["id"] for row in rows), wipe_after_s=core.settings.wipe_after_s)
        jobs = {
            door_id: await _shown(core, found[door_id][0]) for door_id in wanted if door_id in found
        }
        more = {"unknown": unknown} if unknown else {}
        return answer({"success": True, "jobs": jobs, **more})
    except Exception as error:
        return _refused(noted(error, request))


def error_body(problem: Problem) -> dict[str, Any]:
    """An error in this dialect."""
    return {"success": False, "error": problem.message, "code": problem.code}


def _refused(
    problem: Problem,
    said: dict[str, Any] | None = None,
    challenges: Sequence[str] = (),
) -> Response:
    body = {**error_body(problem), **(said or {})}
    return answer(body, status=problem.status, headers=problem.headers, challenges=challenges)


def _wanted(core: Core, request: Request, body: dict[str, Any]) -> requests.Request:
    job = read_job(body, most_s=core.limits.max_wait_s)
    if len(job.models) * len(job.inputs) > core.limits.max_n:
        raise BadRequest(f"a request makes at most {core.limits.max_n} jobs", param="commandLine")
    pairs = [(model, text) for model in job.models for text in job.inputs]
    each = [_asked(core, request, body, model, text) for model, text in pairs]
    first = each[0]
    # `hours` is a deadline: for a worker to come, and then for the answer (GR-8).
    terms = replace(
        first.terms,
        max_wait_s=first.terms.max_wait_s or job.run_limit_s,
        run_limit_s=job.run_limit_s,
    )
    return replace(
        first,
        items=tuple(item for asked in each for item in asked.items),
        terms=terms,
        request_hash=requests.request_hash(Kind.CHAT, body),
    )


def _asked(
    core: Core, request: Request, body: dict[str, Any], model: str, text: str
) -> requests.Request:
    ours = {name: body[name] for name in _OURS if name in body}
    asked = {"model": model, "messages": [{"role": "user", "content": text}], **ours}
    return purchase.parse(core, request, Kind.CHAT, asked)


async def _shown(core: Core, row: Any) -> dict[str, Any]:
    position = None
    if row["state"] == State.QUEUED:
        position = (await core.jobs.place(row)).position
    log = await _said_so_far(core, row) if row["state"] == State.RUNNING else ""
    return show_job(row, log=log, position=position, now=core.clock())


async def _said_so_far(core: Core, row: Any) -> str:
    """What a running job has said: from memory, or where another router runs it from the database."""
    stream = core.jobs.hub.get(row["id"])
    if stream is not None and stream.attempt == row["attempt"] and stream.pieces:
        # Somebody is being given it: what is charged if the worker is lost depends on that.
        stream.shown = True
        return stream.text()
    async with core.database.connection() as connection:
        said = await connection.fetch(
            "select start, text from job_chunks where job_id = $1 and n = $2 order by start",
            row["id"],
            row["attempt"],
        )
    return joined(said)
