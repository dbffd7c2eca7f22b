"""The OpenAI door: chat, completions, embeddings, models; streaming and not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from router import requests
from router.api import openai_shapes as shapes
from router.api import purchase
from router.api.answers import answer, core_of, noted, read_json
from router.api.decentralgpt_shapes import SUCCESS
from router.api.errors import Problem
from router.api.forms import is_form, read_form
from router.api.leaving import ClientGone
from router.api.openai_stream import AnswerStream
from router.api.purchase import AT_ONCE, PaymentRequired, Purchase, Style, payment_body
from router.api.short_ways import client_line
from router.api.sse import EventStream
from router.api.waiting import abandon, outcomes
from router.core import Core
from router.errors import BadRequest, NoSuchThing
from router.job_views import Outcome
from router.models import ModelFacts
from worker.protocol import TEXT_KINDS, Kind, ModelKind

router = APIRouter(tags=["OpenAI"])

_DECENTRALGPT = frozenset({Kind.CHAT, Kind.IMAGE, Kind.IMAGE_EDIT})
_CALLED_AT = {
    ModelKind.TEXT: "/v1/chat/completions",
    ModelKind.EMBEDDING: "/v1/embeddings",
    ModelKind.IMAGE: "/v1/images/generations",
    ModelKind.IMAGE_EDIT: "/v1/images/edits",
}


@router.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    """A chat answer, paid by key, credential or on demand."""
    return await _serve(request, Kind.CHAT)


@router.post("/v1/completions")
async def completions(request: Request) -> Response:
    """Continuations of one or several prompts."""
    return await _serve(request, Kind.COMPLETION)


@router.post("/v1/embeddings")
async def embeddings(request: Request) -> Response:
    """A vector for each input; as base64 when asked."""
    return await _serve(request, Kind.EMBEDDING)


@router.post("/v1/images/generations")
async def images(request: Request) -> Response:
    """Pictures of a prompt; `n` of them are as many jobs."""
    return await _serve(request, Kind.IMAGE)


@router.post("/v1/images/edits")
async def image_edits(request: Request) -> Response:
    """A picture changed as a prompt says: JSON with a URL or data URL, or OpenAI's multipart form."""
    return await _serve(request, Kind.IMAGE_EDIT)


# By their paths, for `router.api.shortcut`.
HANDLERS = {
    "/v1/chat/completions": chat_completions,
    "/v1/completions": completions,
    "/v1/embeddings": embeddings,
}


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    """The models of this market, in OpenAI's form with DecentralGPT's fields beside."""
    core = core_of(request)
    models = [_model(request, facts) for facts in core.models.facts()]
    return answer({"object": "list", "project": core.settings.name, "data": models})


@router.get("/v1/models/{model:path}")
async def get_model(request: Request, model: str) -> Response:
    """One of them."""
    core = core_of(request)
    for facts in core.models.facts():
        if facts.id == model:
            return answer(_model(request, facts))
    missing = NoSuchThing(f"the model {model!r} does not exist", param="model")
    return error_answer(noted(missing, request))


def _model(request: Request, facts: ModelFacts) -> dict[str, Any]:
    """One model; `model` and `url`, where it is called, are DecentralGPT's (DG-5)."""
    core = core_of(request)
    base = (core.settings.public_url or str(request.base_url)).rstrip("/")
    return {
        "id": facts.id,
        "object": "model",
        "created": 0,
        "owned_by": core.settings.name.lower(),
        "model": facts.id,
        "url": base + _CALLED_AT[facts.kind],
    }


async def _serve(request: Request, kind: Kind) -> Response:
    core = core_of(request)
    try:
        core.limiter.job(request)
        body = await _body(request, kind)
        return await bought_answer(core, request, kind, body, with_success)
    except PaymentRequired as due:
        return payment_answer(core, due)
    except ClientGone:
        return Response(status_code=499)
    except AnswerFailed as failed:
        return error_answer(failed.problem, failed.headers)
    except Exception as error:
        return error_answer(noted(error, request))


async def _body(request: Request, kind: Kind) -> Any:
    if kind is Kind.IMAGE_EDIT and is_form(request):
        return await read_form(request)
    return await read_json(request)


def payment_answer(core: Core, due: PaymentRequired) -> Response:
    """402 in this dialect."""
    problem = Problem("payment_required", "pay the invoice and repeat the request", {})
    body = shapes.error_body(problem, payment_body(core, due))
    return answer(body, status=402, challenges=due.offer.challenges)


def error_answer(problem: Problem, headers: dict[str, str] | None = None) -> Response:
    """An error in this dialect."""
    more = {**(headers or {}), **problem.headers}
    return answer(shapes.error_body(problem), status=problem.status, headers=more)


class AnswerFailed(Exception):
    """The jobs were bought, and brought no answer."""

    def __init__(self, problem: Problem, headers: dict[str, str] | None = None) -> None:
        super().__init__(problem.code)
        self.problem = problem
        self.headers = headers or {}


def with_success(kind: Kind, body: dict[str, Any]) -> dict[str, Any]:
    """An answer with what DecentralGPT's clients look at first (DG-1, DG-3, DG-4)."""
    return {**SUCCESS, **body} if kind in _DECENTRALGPT else body


async def bought_answer(
    core: Core,
    request: Request,
    kind: Kind,
    body: Any,
    shape: Callable[[Kind, dict[str, Any]], dict[str, Any]],
    style: Style = AT_ONCE,
) -> Response:
    """Buy what a body asks for, and answer with it: as a stream, or whole as `shape` makes it.

    Raises PaymentRequired, AnswerFailed, ClientGone, and what reading and buying raise.
    """
    wanted = requests.with_echo_at_the_door(purchase.parse(core, request, kind, body))
    if kind is Kind.EMBEDDING and len(wanted.items) > 1:
        raise BadRequest("the vectors of one answer come from one model", param="models")
    bought = await purchase.buy(core, request, wanted, style)
    if wanted.stream and kind in TEXT_KINDS:
        return await _streamed(core, request, wanted, bought)
    ended = await outcomes(core, request, bought)
    jobs = list(zip(bought.job_ids, ended, strict=True))
    headers = shapes.answer_headers(jobs)
    if not any(shapes.answered(outcome) for outcome in ended):
        raise AnswerFailed(shapes.job_problem(ended[0], bought.job_ids[0]), headers)
    return answer(shape(kind, _whole(wanted, jobs)), headers=headers)


def _whole(wanted: requests.Request, jobs: Sequence[tuple[str, Outcome]]) -> dict[str, Any]:
    body = shapes.combined(wanted.kind, jobs)
    if wanted.echo:
        body = shapes.with_echoes(body, [item.spec for item in wanted.items])
    if wanted.base64_embeddings:
        body = shapes.base64_vectors(body)
    return body


async def _streamed(
    core: Core, request: Request, wanted: requests.Request, bought: Purchase
) -> Response:
    stream = AnswerStream(core, wanted, bought, client_line(request.scope))
    try:
        problem = await stream.first_output()
    except BaseException:
        await stream.close()
        abandon(core, bought)
        raise
    if problem is not None:
        await stream.close()
        raise AnswerFailed(problem)
    return EventStream(
        stream.chunks(),
        headers={"X-Satherd-Job": ",".join(bought.job_ids)},
        on_gone=lambda: abandon(core, bought),
    )
