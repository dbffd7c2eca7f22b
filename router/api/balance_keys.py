"""Further keys of an account: made, listed, revoked.

Who may: whoever owns the account, and its keys without a limit. A key with a limit may only revoke
itself; one that may not withdraw makes none that may, and revokes none that may.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from billing import accounts
from billing.accounts import Key
from router.api.answers import answer, core_of, read_object
from router.api.own_door import OwnDoorRoute, flag, only, owner, short_text, whole_number
from router.api.payment import Payer
from router.core import Core
from router.errors import BadRequest, Forbidden, NoSuchThing
from router.job_views import time_text

router = APIRouter(tags=["balance"], route_class=OwnDoorRoute)
LABEL_MAX = 100


@router.get("/balance/keys")
async def list_keys(request: Request) -> Response:
    """The live keys of the account, oldest first. The keys themselves are not kept."""
    core = core_of(request)
    payer = await _manager(core, request)
    async with core.database.connection() as connection:
        keys = await accounts.list_keys(connection, payer.account_id)
    return answer({"keys": [_key_json(key) for key in keys]})


@router.post("/balance/keys")
async def make_key(request: Request) -> Response:
    """Another key of the account, shown this once. `limit_msat` is the most it may spend in all."""
    core = core_of(request)
    payer = await _manager(core, request)
    body = await read_object(request)
    only(body, "label", "limit_msat", "withdraw")
    withdraw = flag(body, "withdraw")
    limit_msat = whole_number(
        body, "limit_msat", low=1, high=core.settings.max_amount_msat, needed=False
    )
    if withdraw and limit_msat is not None:
        raise BadRequest("a key with a limit cannot withdraw", param="withdraw")
    if withdraw:
        await _may_withdraw(core, request)
    label = short_text(body, "label", most=LABEL_MAX)
    async with core.database.transaction() as connection:
        # One at a time for each account, so that its number of keys stays within the limit.
        await connection.execute(
            "select 1 from accounts where id = $1 for update", payer.account_id
        )
        key_id, key = await accounts.create_key(
            connection,
            payer.account_id,
            label=label,
            limit_msat=limit_msat,
            can_withdraw=withdraw,
        )
        made = (await accounts.find_keys(connection, [accounts.hash_secret(key)])).popitem()[1]
    assert made.id == key_id
    return answer({"key": key, **_key_json(made)}, status=201)


@router.delete("/balance/keys/{key_id}")
async def revoke_key(request: Request, key_id: str) -> Response:
    """Make a key useless at once; the account keeps its money."""
    core = core_of(request)
    payer = await owner(core, request, "keys")
    async with core.database.transaction() as connection:
        keys = {key.id: key for key in await accounts.list_keys(connection, payer.account_id)}
        if key_id not in keys:
            raise NoSuchThing("this account has no such key")
        _check_may_revoke(payer, keys[key_id])
        await accounts.revoke_key(connection, payer.account_id, key_id)
    core.keys.forget()
    return answer({"id": key_id, "revoked": True})


def _check_may_revoke(payer: Payer, key: Key) -> None:
    own = payer.key is not None and payer.key.id == key.id
    if own:
        return
    if payer.limited_key_id is not None:
        raise Forbidden("a key with a limit can revoke only itself")
    if key.can_withdraw and not payer.may_withdraw:
        raise Forbidden("only a credential that may withdraw can revoke this key")


async def _manager(core: Core, request: Request) -> Payer:
    payer = await owner(core, request, "keys")
    if payer.limited_key_id is not None:
        raise Forbidden("a key with a limit cannot see or make other keys")
    return payer


async def _may_withdraw(core: Core, request: Request) -> None:
    """A credential that was narrowed to keys must not make itself a way out for the money."""
    payer = await owner(core, request, "withdraw")
    if not payer.may_withdraw:
        raise Forbidden("only a credential that may withdraw can make a key that may")


def _key_json(key: Key) -> dict[str, Any]:
    return {
        "id": key.id,
        "label": key.label,
        "limit_msat": key.limit_msat,
        "spent_msat": key.spent_msat if key.limit_msat is not None else None,
        "withdraw": key.can_withdraw,
        "primary": key.is_primary,
        "created_at": time_text(key.created_at),
    }
