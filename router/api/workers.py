"""Workers over HTTP: their own earnings and record, their address, and the bare numbers of all."""

from __future__ import annotations

import base64
from typing import Any

from fastapi import APIRouter, Request, Response

from billing import payees
from billing.errors import BadCredential, BadLightningAddress
from billing.lightning_address import PayTerms
from router import pull_records, worker_controls, worker_views
from router.api.answers import answer, core_of, read_object
from router.api.own_door import OwnDoorRoute, only, query_text, short_text
from router.core import Core
from router.door_ids import Door
from router.errors import BadRequest, Unauthorized
from router.rate_limits import KEY_FAILURES_PER_MINUTE

router = APIRouter(tags=["workers"], route_class=OwnDoorRoute)
LN_URL_MAX = 2000


@router.get("/workers/me")
async def show_me(request: Request) -> Response:
    """What this worker has earned, was paid and will be paid; its record; why it got no job."""
    core = core_of(request)
    return answer(await worker_views.own_view(core, await _me(core, request)))


@router.put("/workers/me/ln_url")
async def change_address(request: Request) -> Response:
    """Say where this worker is to be paid; null or "": nowhere.

    The address is asked for its terms first, and a bad one is refused. A first address counts at
    once, a change after an hour, so that whoever steals the key can be noticed.
    """
    core = core_of(request)
    row = await _me(core, request)
    body = await read_object(request)
    only(body, "ln_url")
    if "ln_url" not in body:
        raise BadRequest("ln_url is needed; null stands for no address", param="ln_url")
    text = short_text(body, "ln_url", most=LN_URL_MAX)
    ln_url = None
    if text is not None:
        ln_url, _ = await resolve_address(core, text, on_behalf_of=row["key_hash"].hex())
    async with core.database.transaction() as connection:
        address = await payees.set_address(connection, row["id"], ln_url, now=core.clock())
    live = core.fleet.get(row["id"])
    if live is not None:
        worker_controls.paid_at(live, address.ln_url)
    else:
        core.relay.tell_changed()
    return answer({"worker_id": row["id"], **worker_views.address_view(address)})


@router.post("/workers/me/drain")
async def drain(request: Request) -> Response:
    """Take no more jobs; what is being worked on is finished, and the connection stays."""
    return await _set_draining(request, True)


@router.post("/workers/me/resume")
async def resume(request: Request) -> Response:
    """Take jobs again."""
    return await _set_draining(request, False)


async def _set_draining(request: Request, draining: bool) -> Response:
    core = core_of(request)
    row = await _me(core, request)
    async with core.database.transaction() as connection:
        await worker_controls.set_draining(connection, row["id"], draining)
    worker_controls.apply_draining(core, row["id"], draining)
    return answer({"worker_id": row["id"], "draining": draining})


@router.post("/worker/check-address")
async def check_address(request: Request) -> Response:
    """Whether an address could be paid, before a worker is started with it."""
    core = core_of(request)
    body = await read_object(request)
    only(body, "ln_url")
    text = short_text(body, "ln_url", most=LN_URL_MAX)
    if text is None:
        raise BadRequest("ln_url must be a Lightning address or an LNURL", param="ln_url")
    core.limiter.address_check(request)
    ln_url, terms = await resolve_address(
        core, text, on_behalf_of=f"client {core.limiter.client(request)}"
    )
    return answer(
        {
            "ok": True,
            "ln_url": ln_url,
            "min_sendable_msat": terms.min_sendable_msat,
            "max_sendable_msat": terms.max_sendable_msat,
        }
    )


@router.get("/worker/stats")
async def stats(request: Request) -> Response:
    """How many workers are idle (`connected`) and how many are busy (QB-R17)."""
    return answer(worker_views.stats(core_of(request)))


@router.get("/worker/detail")
async def detail(request: Request) -> Response:
    """The market's connected workers without their identities (QB-R18). `?query=` is a worker's
    public id or, of a QueenBee worker, its verified public key.

    A worker key is no query here: it would stand in the URL, and so in somebody's log. Anything
    else (QueenBee's `user`, `uid:…`) finds nobody.
    """
    return answer(await worker_views.detail(core_of(request), query_text(request, "query")))


async def _me(core: Core, request: Request) -> Any:
    """The row of the worker whose key this request brings. Raises Unauthorized.

    A worker that polls has a name and a secret in place of a key: `Authorization: Basic`.
    """
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    row = await worker_views.find(core, key.strip()) if scheme.lower() == "bearer" else None
    if scheme.lower() == "basic":
        row = await _by_name(core, key)
    if row is None:
        core.limiter.failed(request, "worker key", KEY_FAILURES_PER_MINUTE)
        raise Unauthorized("send the worker key as `Authorization: Bearer …`")
    return row


async def _by_name(core: Core, encoded: str) -> Any:
    """The row of the worker that polls by this name and secret; None when there is none."""
    try:
        name, _, secret = base64.b64decode(encoded, validate=True).decode().partition(":")
        named = await pull_records.find(core.database, name=name) if "\0" not in name else None
        if named is None:
            return None
        if named.door is Door.HORDE:
            owner_hash = pull_records.owner_of_key(secret)
        else:
            owner_hash = await core.pull_gate.passwords.owner(name, secret)
    except (ValueError, BadCredential):
        return None
    if owner_hash != named.owner_hash:
        return None
    return await worker_views.find_by_id(core, named.worker_id)


async def resolve_address(core: Core, text: str, *, on_behalf_of: str) -> tuple[str, PayTerms]:
    """An address in its one spelling, and the terms that its server gives. Raises
    BadLightningAddress."""
    payee = core.addresses.parse(text)
    if payee is None:
        raise BadLightningAddress("not_understood", "this is no address to pay to")
    return payee.text, await core.addresses.resolve(payee, on_behalf_of=on_behalf_of)
