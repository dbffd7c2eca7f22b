"""The KoboldAI-cluster door, for clients: prompts, their answers, and who serves (KC-1…KC-15).

Its workers have a file of their own. What differs from 2022: a prompt is paid for, by a prepaid key in
`apikey` or `Authorization`; and the position stands beside the counts.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request, Response

from billing.errors import BadCredential
from router import door_ids, kobold_params, text_workers
from router.api import purchase
from router.api.answers import answer, core_of, noted, read_object
from router.api.errors import Problem
from router.api.leaving import ClientGone
from router.api.polling import POLLED, WAITED_FOR, Progress, progress
from router.api.purchase import PaymentRequired, Purchase, Style, payment_body
from router.api.waiting import outcomes
from router.core import Core
from router.door_ids import Door, as_uuid
from router.errors import BadRequest, NoSuchThing
from router.kobold_params import Bounds
from router.rate_limits import KEY_FAILURES_PER_MINUTE
from router.text_workers import TextWorker
from worker.protocol import ModelKind

router = APIRouter(tags=["KoboldAI-cluster"])

# KC-11. Whoever has a key pays for every prompt: only the limit of all doors holds for them.
PER_MINUTE, PROMPTS_PER_MINUTE, STATUS_PER_MINUTE = 90, 10, 30
MAX_NAME = 100


@router.post("/generate/prompt")
@router.post("/generate/async")
async def generate(request: Request) -> Response:
    """Queue a prompt, `n` times; the id to ask for its answers with (KC-1, KC-2)."""
    core = core_of(request)
    try:
        bought = await _buy(core, request, await read_object(request), POLLED)
        return answer({"id": await _issue(core, request, bought)}, headers=_headers(bought))
    except Exception as error:
        return refusal(error, request)


@router.post("/generate/sync")
async def generate_and_wait(request: Request) -> Response:
    """Queue a prompt and wait for its answers: a list of texts (KC-15)."""
    core = core_of(request)
    try:
        bought = await _buy(core, request, await read_object(request), WAITED_FOR)
        await _issue(core, request, bought)
        await outcomes(core, request, bought)
        at = await progress(core, await core.jobs.of_quote(bought.quote_id), say="ID not found")
        texts = [text for _, _, text in at.answers()]
        if not texts:
            return answer("Prompt Request Expired", status=500, headers=at.headers())
        return answer(texts, headers=at.headers())
    except ClientGone:
        return Response(status_code=499)
    except Exception as error:
        return refusal(error, request)


@router.get("/generate/prompt/{prompt_id}")
async def status(request: Request, prompt_id: str) -> Response:
    """How many answers there are, are being written and wait, and the texts (KC-4)."""
    core = core_of(request)
    try:
        core.limiter.poll(request, "kobold-status", STATUS_PER_MINUTE)
        rows = await core.door_ids.jobs(prompt_id, Door.KOBOLD)
        at = await progress(core, rows, say="ID not found")
        return answer(_status(at), headers=at.headers())
    except Exception as error:
        return refusal(error, request)


def _status(at: Progress) -> dict[str, Any]:
    return {
        "finished": at.finished,
        "processing": at.processing,
        "waiting": at.waiting,
        "done": at.done,
        "generations": [text for _, _, text in at.answers()],
        "queue_position": at.position,
    }


async def _buy(core: Core, request: Request, body: dict[str, Any], style: Style) -> Purchase:
    core.limiter.job(request)
    if not (request.headers.get("apikey") or request.headers.get("authorization")):
        core.limiter.poll(request, "kobold-prompt", PROMPTS_PER_MINUTE)
    for name in ("prompt", "username"):
        if not isinstance(body.get(name), str) or not body[name]:
            raise BadRequest(
                "Missing required parameter in the JSON body or the post body or the query string",
                param=name,
            )
    username_of(body)
    params = {} if body.get("params") is None else body["params"]
    if not isinstance(params, Mapping):
        raise BadRequest("params must be an object", param="params")
    wanted = kobold_params.parse(
        Door.KOBOLD,
        body,
        params=params,
        models=body.get("models"),
        bounds=Bounds(most_n=core.limits.max_n),
        limits=core.limits,
        terms=purchase.terms(core, request),
    )
    return await purchase.buy(core, request, wanted, style)


def username_of(body: Mapping[str, Any]) -> str:
    """The name that is shown in public; nothing else hangs on it. Raises BadRequest."""
    name = body.get("username")
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise BadRequest(
            f"username must be a name of at most {MAX_NAME} characters", param="username"
        )
    return name


async def _issue(core: Core, request: Request, bought: Purchase) -> str:
    name = username_of(await read_object(request))
    (door_id,) = await core.door_ids.issue(
        Door.KOBOLD, bought.quote_id, indexes=[None], shown_as=name
    )
    return as_uuid(door_id)


def _headers(bought: Purchase) -> dict[str, str]:
    return {"X-Satherd-Job": ",".join(bought.job_ids)}


# --- who serves, and who has used and given what ------------------------------------------------


@router.get("/servers")
async def servers(request: Request) -> Response:
    """The workers that are connected and write text (KC-8)."""
    core = core_of(request)
    try:
        core.limiter.poll(request, "kobold", PER_MINUTE)
        seen = await text_workers.text_workers(core)
        return answer([_server(worker) for worker in seen])
    except Exception as error:
        return refusal(error, request)


@router.get("/servers/{server_id}")
async def server(request: Request, server_id: str) -> Response:
    """One worker, also one that is away (KC-9)."""
    core = core_of(request)
    try:
        core.limiter.poll(request, "kobold", PER_MINUTE)
        try:
            wanted = uuid.UUID(server_id).hex
        except ValueError:
            raise NoSuchThing("Not found") from None
        seen = await text_workers.text_workers(core, worker_id=wanted)
        if not seen:
            raise NoSuchThing("Not found")
        return answer(_server(seen[0]))
    except Exception as error:
        return refusal(error, request)


def _server(worker: TextWorker) -> dict[str, Any]:
    speed = worker.tokens_per_s
    return {
        "name": worker.name,
        "id": str(uuid.UUID(worker.id)),
        "model": worker.models[0].id,
        "max_length": worker.max_length,
        "max_content_length": worker.context_length,
        "tokens_generated": worker.tokens,
        "requests_fulfilled": worker.jobs_done,
        "latest_performance": f"{1 / speed:.3g} seconds per token"
        if speed
        else "No requests fulfiled yet",
    }


@router.get("/usage")
async def usage(request: Request) -> Response:
    """Prompt tokens by user name, of the answers given (KC-10)."""
    core = core_of(request)
    try:
        core.limiter.poll(request, "kobold", PER_MINUTE)
        async with core.database.connection() as connection:
            return answer(await door_ids.use_by_name(connection))
    except Exception as error:
        return refusal(error, request)


@router.get("/contributions")
async def contributions(request: Request) -> Response:
    """Tokens written by the workers of each user name (KC-10)."""
    core = core_of(request)
    try:
        core.limiter.poll(request, "kobold", PER_MINUTE)
        return answer(await text_workers.contributions(core))
    except Exception as error:
        return refusal(error, request)


@router.get("/models")
async def models(request: Request) -> Response:
    """How many connected workers serve each model of text (KC-15)."""
    core = core_of(request)
    try:
        core.limiter.poll(request, "kobold", PER_MINUTE)
        counts: Counter[str] = Counter()
        for facts in core.models.facts():
            if facts.kind is ModelKind.TEXT and facts.workers:
                counts[facts.id] = facts.workers
        return answer(dict(counts))
    except Exception as error:
        return refusal(error, request)


# --- errors -------------------------------------------------------------------------------------

# Where the dialect answers with a bare text.
_BARE = frozenset({"not_found"})


def refusal(error: Exception, request: Request) -> Response:
    """An error as flask-restful says it: `{"message": text or {field: text}}`, or a bare text."""
    core = core_of(request)
    if isinstance(error, PaymentRequired):
        body = {"message": "pay the invoice and repeat the request", **payment_body(core, error)}
        return answer(body, status=402, challenges=error.offer.challenges)
    if isinstance(error, BadCredential):
        try:
            core.limiter.failed(request, "key", KEY_FAILURES_PER_MINUTE)
        except Exception as throttled:
            error = throttled
    problem = noted(error, request)
    return answer(error_body(problem), status=problem.status, headers=problem.headers)


def error_body(problem: Problem) -> Any:
    """An error of ours in that shape."""
    if problem.code in _BARE:
        return problem.message
    facts = {name: value for name, value in problem.facts.items() if name != "param"}
    named = problem.facts.get("param")
    message = {named: problem.message} if isinstance(named, str) else problem.message
    return {"message": message, "code": problem.code, **facts}
