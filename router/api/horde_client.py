"""AI Horde's text door, for clients: prompts, their status, and who serves (AH-1…AH-18, KL-*).

The `apikey` is a prepaid key, `kudos` are satoshi. Its workers have a file of their own.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request, Response

from billing.msat import MSAT_PER_SAT
from router import kobold_params, pull_records, requests, text_workers
from router.api import payment, purchase
from router.api.answers import answer, core_of, read_object
from router.api.horde_errors import HordeRefusal, refusal
from router.api.polling import POLLED, Progress, progress
from router.core import Core
from router.door_ids import Door, as_uuid, normal_id
from router.errors import BadRequest, NoSuchThing
from router.job_records import NewQuote
from router.job_states import State
from router.kobold_params import Bounds
from router.text_workers import public_name

router = APIRouter(prefix="/api/v2", tags=["AI Horde"])

# AH-2, AH-20.
BOUNDS = Bounds(most_n=20, least_length=16, most_length=4096, least_context=80)
STATUS_PER_MINUTE = 60
DEFAULT_CONTEXT = 2048
SAMPLER_KINDS = 7
_NOBODY = (
    "Warning: No available workers can fulfill this request. It will expire in {minutes} minutes."
    " Consider reducing the amount of tokens to generate."
)


def satoshi(msat: int) -> float:
    """An amount as this dialect's clients are shown it."""
    return msat / MSAT_PER_SAT


@router.post("/generate/text/async")
async def generate(request: Request) -> Response:
    """Queue a prompt, `n` times; with `dry_run` only its price (AH-1)."""
    core = core_of(request)
    try:
        core.limiter.job(request)
        body = await read_object(request)
        wanted = await _wanted(core, request, body)
        if body.get("dry_run") is True:
            quote = await _price(core, request, wanted)
            return answer({"kudos": satoshi(quote.offer_msat)})
        bought = await purchase.buy(core, request, wanted, POLLED)
        (door_id,) = await core.door_ids.issue(Door.HORDE, bought.quote_id, indexes=[None])
        rows = await core.jobs.of_quote(bought.quote_id)
        told: dict[str, Any] = {
            "id": as_uuid(door_id),
            "kudos": satoshi(sum(row["held_msat"] for row in rows)),
        }
        if not _servable(core, rows):
            minutes = -(-rows[0]["max_wait_s"] // 60)
            told["message"] = _NOBODY.format(minutes=minutes)
        headers = {"X-Satherd-Job": ",".join(bought.job_ids)}
        return answer(told, status=202, headers=headers)
    except Exception as error:
        return refusal(error, request)


async def _price(core: Core, request: Request, wanted: requests.Request) -> NewQuote:
    payer = await payment.identify(core, request, payment.facts(core, "quotes"), apikey=True)
    return await core.quotes.price(wanted, anyhow=payer is not None and payer.key is not None)


def _servable(core: Core, rows: list[Any]) -> bool:
    """Whether a worker is connected that could do these jobs; they are all alike."""
    lanes = core.models.lanes_of(rows[0])
    return any(core.fleet.draining_lane(lane) for lane in lanes)


async def _wanted(core: Core, request: Request, body: dict[str, Any]) -> requests.Request:
    params = {} if body.get("params") is None else body["params"]
    if not isinstance(params, Mapping):
        raise BadRequest("params must be an object", param="params")
    _check(body, params)
    return kobold_params.parse(
        Door.HORDE,
        body,
        params=params,
        models=body.get("models"),
        bounds=BOUNDS,
        limits=core.limits,
        terms=purchase.terms(core, request),
        worker=await _only_worker(core, body.get("workers")),
    )


def _check(body: Mapping[str, Any], params: Mapping[str, Any]) -> None:
    """What this dialect has return codes for (AH-3). Raises HordeRefusal."""
    prompt = body.get("prompt")
    if not isinstance(prompt, str) or not prompt:
        raise HordeRefusal(400, "MissingPrompt", "You cannot specify an empty prompt.")
    length, context = params.get("max_length"), params.get("max_context_length")
    if _over(length, kobold_params.DEFAULT_LENGTH, context, DEFAULT_CONTEXT):
        raise HordeRefusal(
            400,
            "TokenOverflow",
            "You cannot request more tokens than your context length.",
        )
    order = params.get("sampler_order")
    if order and (not isinstance(order, list) or len({str(o) for o in order}) < SAMPLER_KINDS):
        raise HordeRefusal(
            400,
            "MissingFullSamplerOrder",
            "When sending a custom sampler order, you need to specify all possible samplers in the"
            " order",
        )
    stops = params.get("stop_sequence")
    if isinstance(stops, list):
        distinct = {str(stop) for stop in stops}
        if len(distinct) > kobold_params.MAX_STOPS:
            raise HordeRefusal(
                400,
                "TooManyStopSequences",
                "Too many stop sequences specified (max allowed is 128).",
            )
        if sum(map(len, distinct)) > kobold_params.MAX_STOPS_CHARACTERS:
            raise HordeRefusal(
                400,
                "ExcessiveStopSequence",
                "Your total stop sequence length exceeds the allowed limit (2000 chars).",
            )


def _over(length: Any, default_length: int, context: Any, default_context: int) -> bool:
    numbers = [
        default if value is None else value
        for value, default in ((length, default_length), (context, default_context))
    ]
    if not all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers):
        return False  # its type is refused later, by its name
    return numbers[0] > numbers[1]


async def _only_worker(core: Core, named: Any) -> str | None:
    """The worker that a request is for, of those that there are (AH-3). Raises HordeRefusal."""
    if not named:
        return None
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise BadRequest("workers must be a list of ids", param="workers")
    # Each is looked up: no more than the first two that differ say how it ends.
    ids: list[str] = []
    for name in list(dict.fromkeys(named))[:2]:
        try:
            found = await text_workers.text_workers(core, worker_id=uuid.UUID(name).hex)
        except ValueError:
            found = []
        if not found:
            raise HordeRefusal(404, "WorkerNotFound", f"Worker with ID '{name[:40]}' not found.")
        ids.append(found[0].id)
    if len(set(ids)) > 1:
        # Left out, the others would be what the client did not want; so it is said.
        raise BadRequest("here a request can be for one worker, or for all", param="workers")
    return ids[0]


# --- status -------------------------------------------------------------------------------------


@router.get("/generate/text/status/{request_id}")
async def status(request: Request, request_id: str) -> Response:
    """How far a request is, and its answers (AH-5); the id is all that is needed."""
    core = core_of(request)
    try:
        if (named := normal_id(request_id)) is not None:
            # What is no id is not counted, and not kept in memory either.
            core.limiter.poll(request, f"horde-status-{named}", STATUS_PER_MINUTE)
        at = await _progress(core, request_id)
        return answer(await _status(core, at), headers=at.headers())
    except Exception as error:
        return refusal(error, request)


@router.delete("/generate/text/status/{request_id}")
async def cancel(request: Request, request_id: str) -> Response:
    """Cancel what waits; the status as it was is the answer (AH-6).

    What a worker writes at this moment is stopped where it can be, and charged as it stands; a worker
    that pulls its jobs cannot be told, finishes, and is paid.
    """
    core = core_of(request)
    try:
        at = await _progress(core, request_id)
        before = await _status(core, at)
        for row in at.rows:
            if State(row["state"]) is State.QUEUED or await _can_be_stopped(core, row):
                await core.jobs.cancel(row["id"])
        return answer(before, headers=at.headers())
    except Exception as error:
        return refusal(error, request)


async def _can_be_stopped(core: Core, row: Any) -> bool:
    """Whether a job runs at a worker that can be told, at whichever router that is."""
    if State(row["state"]) is not State.RUNNING:
        return False
    worker = core.fleet.get(row["worker_id"])
    if worker is not None:
        return not worker.pulls
    return await pull_records.find(core.database, worker_id=row["worker_id"]) is None


async def _progress(core: Core, request_id: str) -> Progress:
    rows = await core.door_ids.jobs(request_id, Door.HORDE)
    say = f"Text Waiting Prompt (Status) with ID '{request_id[:40]}' not found."
    try:
        return await progress(core, rows, say=say)
    except NoSuchThing:
        raise HordeRefusal(404, "RequestNotFound", say) from None


async def _status(core: Core, at: Progress) -> dict[str, Any]:
    answers = at.answers()
    names = await _names(core, [row["worker_id"] for row, _, _ in answers])
    return {
        "finished": at.finished,
        "processing": at.processing,
        "restarted": at.restarted,
        "waiting": at.waiting,
        "done": at.done,
        "faulted": at.done and not answers,
        "wait_time": at.wait_s,
        "queue_position": at.position,
        "kudos": satoshi(at.charged_msat),
        # What is paid for waits until its time is over: a client that gave up would have paid for
        # nothing (KL-10).
        "is_possible": True,
        "generations": [
            {
                "text": text,
                "seed": 0,
                "gen_metadata": [],
                "worker_id": str(uuid.UUID(row["worker_id"])),
                "worker_name": names[row["worker_id"]],
                "model": row["model"],
                "state": "ok",
            }
            for row, _, text in answers
        ],
    }


async def _names(core: Core, worker_ids: list[str]) -> dict[str, str]:
    if not worker_ids:
        return {}
    async with core.database.connection() as connection:
        rows = await connection.fetch(
            "select w.id, coalesce(p.name, w.name) as name from workers w"
            " left join pull_workers p on p.worker_id = w.id where w.id = any($1::text[])",
            worker_ids,
        )
    known = {row["id"]: row["name"] for row in rows}
    return {worker_id: public_name(known.get(worker_id), worker_id) for worker_id in worker_ids}
