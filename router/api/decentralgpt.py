"""The DecentralGPT node's own paths: projects register, clients discover and call (DG-6 ... DG-13).

A project may be registered by a program on the router's own machine, which has to come to us directly:
no header that a proxy writes counts, whoever is trusted otherwise, and a web page that sends a browser
here is no program. Anybody else needs a worker key, which then owns the project.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute

from router import workers
from router.api.answers import answer, core_of, noted, read_object
from router.api.decentralgpt_shapes import SUCCESS, envelope, node_status
from router.api.errors import Problem
from router.api.leaving import ClientGone
from router.api.openai import AnswerFailed, bought_answer
from router.api.purchase import PaymentRequired, Style, payment_body
from router.core import Core
from router.errors import BadRequest, Forbidden, Unauthorized
from router.project_requests import (
    MAX_NAME,
    Project,
    read_cid,
    read_model,
    read_name,
    read_project,
)
from router.sessions import RefusedWorker
from worker.protocol import Kind

OK: dict[str, Any] = {"code": 0, "message": "ok"}
MOST_LISTED = 1000
CONNECTED = 1
# Whoever sends one of these speaks for somebody else, or is a browser that a web page speaks through.
_NOT_DIRECT = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "via", "origin")
# Refusals of a worker that are no matter of what was written.
_NOT_ALLOWED = frozenset({"not_loopback", "own_port", "http_workers_off", "banned"})


class NodeRoute(APIRoute):
    """A route whose errors are answered as a node of that system does (DG-11)."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                return await handler(request)
            except PaymentRequired as due:
                problem = Problem("payment_required", "pay the invoice and repeat the request", {})
                body = {**envelope(problem), **payment_body(core_of(request), due)}
                return answer(body, status=402, challenges=due.offer.challenges)
            except AnswerFailed as failed:
                return _refused(failed.problem, failed.headers)
            except ClientGone:
                return Response(status_code=499)
            except RefusedWorker as refused:
                return _refused(_problem_of(refused))
            except Exception as error:
                return _refused(noted(error, request))

        return handle


router = APIRouter(prefix="/api/v0", tags=["DecentralGPT"], route_class=NodeRoute)


def _refused(problem: Problem, headers: dict[str, str] | None = None) -> Response:
    more = {**(headers or {}), **problem.headers}
    return answer(envelope(problem), status=node_status(problem), headers=more)


def _problem_of(refused: RefusedWorker) -> Problem:
    said = refused.answer
    if said.code in _NOT_ALLOWED:
        return Problem("forbidden", said.message, {})
    return Problem("draining" if said.code == "draining" else "bad_request", said.message, {})


# --- registering --------------------------------------------------------------------------------


@router.post("/ai/project/register")
async def register_project(request: Request) -> Response:
    """Let the models of a project serve, or change it to this: `{"project", "models": [{"model",
    "api", "type", "cid"}]}` (DG-6)."""
    core, owner, body = await _owned(request)
    project = _allowed(request, read_project(body))
    await core.far_projects.register(project, owner, own_ports=_own_ports(request))
    return answer(OK)


@router.post("/ai/project/unregister")
async def unregister_project(request: Request) -> Response:
    """Take a project out (DG-7)."""
    core, owner, body = await _owned(request)
    await core.far_projects.unregister(read_name(body), owner)
    return answer(OK)


@router.post("/ai/model/register")
async def register_model(request: Request) -> Response:
    """Add one model to a project, or change it there (DG-13)."""
    core, owner, body = await _owned(request)
    one = _allowed(request, Project(read_name(body), (read_model(body),)))
    await core.far_projects.add_model(one, owner, own_ports=_own_ports(request))
    return answer(OK)


@router.post("/ai/model/unregister")
async def unregister_model(request: Request) -> Response:
    """Take one model out of a project; with the last one, the project (DG-13)."""
    core, owner, body = await _owned(request)
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise BadRequest("model must be the name of a model", param="model")
    await core.far_projects.remove_model(read_name(body), model, read_cid(body), owner)
    return answer(OK)


async def _owned(request: Request) -> tuple[Core, bytes | None, dict[str, Any]]:
    """Who registers, and what. Raises Unauthorized, Forbidden, BadRequest, TooManyRequests."""
    core = core_of(request)
    owner = owner_of(request)
    # It may make us ask an address of theirs, like the check of one.
    core.limiter.address_check(request)
    return core, owner, await read_object(request)


def owner_of(request: Request) -> bytes | None:
    """The owner that a request speaks for: its worker key, or None for this machine.

    Raises Forbidden, Unauthorized.
    """
    given = request.headers.get("authorization")
    if given is None:
        if not _is_direct(request):
            raise Forbidden("only programs on this machine may register without a worker key")
        return None
    scheme, _, key = given.partition(" ")
    key = key.strip()
    if scheme.lower() != "bearer" or not 32 <= len(key) <= 128:
        raise Unauthorized("send a worker key of 32 to 128 characters as `Authorization: Bearer …`")
    return workers.hash_worker_key(key)


def _allowed(request: Request, project: Project) -> Project:
    """The project, if whoever registers may name its servers.

    What listens on this machine is not a stranger's to sell, key or no key: only programs on this
    machine may name it. Raises Forbidden.
    """
    if project.is_local and not _is_direct(request):
        raise Forbidden("only programs on this machine may register servers on it")
    return project


def _is_direct(request: Request) -> bool:
    return comes_directly(request.client.host if request.client else "", request.headers)


def comes_directly(peer: str, headers: Mapping[str, str]) -> bool:
    """Whether a program on this machine is at the other end of the connection itself."""
    try:
        address = ipaddress.ip_address(peer)
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address.is_loopback and not any(name in headers for name in _NOT_DIRECT)


def _own_ports(request: Request) -> frozenset[int]:
    server = request.scope.get("server")
    return frozenset({server[1]}) if server and server[1] else frozenset()


# --- discovery ----------------------------------------------------------------------------------


@router.get("/ai/projects/list")
@router.post("/ai/projects/list", include_in_schema=False)
async def list_projects(request: Request) -> Response:
    """The names of the projects here (DG-13)."""
    asked = await _asked(request)
    names = await core_of(request).projects.names(_number(asked, 100))
    return answer({**OK, "data": names})


@router.get("/ai/projects/models")
@router.post("/ai/projects/models", include_in_schema=False)
async def list_models(request: Request) -> Response:
    """The models of a project (DG-13)."""
    asked = await _asked(request)
    models = await core_of(request).projects.models(read_name(asked), _number(asked, 100))
    return answer({**OK, "data": models})


@router.get("/ai/projects/peers")
@router.post("/ai/projects/peers", include_in_schema=False)
async def list_peers(request: Request) -> Response:
    """Who serves a model of a project: our workers, by their public ids (DG-13).

    They are on the machine of a router, so there is no latency to speak of.
    """
    asked = await _asked(request)
    model = asked.get("model")
    if not isinstance(model, str) or not 0 < len(model) <= MAX_NAME:
        raise BadRequest("model must be the name of a model", param="model")
    found = await core_of(request).projects.peers(read_name(asked), model, _number(asked, 20))
    peers = [
        {"node_id": worker_id, "connectivity": CONNECTED, "latency": 0, "idle": free}
        for worker_id, free in found
    ]
    return answer({**OK, "data": peers})


async def _asked(request: Request) -> dict[str, Any]:
    """Query parameters, or in older versions a body."""
    body = await read_object(request) if request.method == "POST" else {}
    return {**body, **request.query_params}


def _number(asked: Mapping[str, Any], default: int) -> int:
    text = str(asked.get("number", default))
    if not (text.isascii() and text.isdigit() and 1 <= len(text) <= 9 and int(text) > 0):
        raise BadRequest("number must be a positive whole number", param="number")
    return min(int(text), MOST_LISTED)


# --- calling ------------------------------------------------------------------------------------


@router.post("/chat/completion")
async def chat_by_node(request: Request) -> Response:
    """A chat answer (DG-12). `node_id` is a wish of clients that choose their node; here the market
    chooses. `wallet`, `signature` and `hash` identify nobody here: paying does."""
    return await _chat(request, "node_id", "project")


@router.post("/chat/completion/proxy")
async def chat_by_project(request: Request) -> Response:
    """The same without a node."""
    return await _chat(request, "project")


async def _chat(request: Request, *needed: str) -> Response:
    core = core_of(request)
    core.limiter.job(request)
    body = await read_object(request)
    for name in needed:
        if not isinstance(body.get(name), str) or not body[name]:
            raise BadRequest(f"{name} must not be empty", param=name)
    return await bought_answer(core, request, Kind.CHAT, body, _in_data, Style(attached=True))


def _in_data(_kind: Kind, body: dict[str, Any]) -> dict[str, Any]:
    """An answer as clients of both ages read it: the older ones look into `data`."""
    data = {name: body[name] for name in ("created", "choices", "usage")}
    return {**SUCCESS, **body, "data": data}
