"""`/admin`: prices, settings, the books, the audit. What a change does: `router.administration`."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from fastapi import Request, Response

from billing import fee_schedule
from billing.fee_schedule import FeeChange
from billing.fees import Rates
from router import admin_views, administration
from router.api.admin_access import REASON_MAX, admin_router
from router.api.answers import answer, core_of, read_object
from router.api.own_door import only, page_size, query_text, short_text, whole_number
from router.core import Core
from router.errors import BadRequest
from router.job_views import time_text
from router.runtime_settings import BOUNDS

MODEL_MAX = 200
HISTORY = 50
# As `billing.fee_schedule` has it; here only so that the answer names the field.
_HIGHEST_RATE_MSAT = 2_100_000_000_000
_RATE_NAMES = tuple(rate.name for rate in fields(Rates))

router = admin_router()


@router.get("/fees")
async def show_fees(request: Request) -> Response:
    """The rates in force: the default with its history, and the models that have their own."""
    core = core_of(request)
    async with core.database.connection() as connection:
        schedule = await fee_schedule.load(connection)
        history = await fee_schedule.history(connection, model=None, limit=HISTORY)
    models = {model: rates.as_json() for model, rates in sorted(schedule.by_model.items())}
    return answer(
        {
            "default": schedule.default.as_json(),
            "models": models,
            "history": [_fee_change(change) for change in history],
        }
    )


@router.put("/fees")
async def set_default_fees(request: Request) -> Response:
    """Change default rates; those not named stay as they are. The next quote uses them."""
    rates = await administration.set_fees(core_of(request), None, await _rates(request))
    return answer({"model": None, "fees": rates.as_json()})


@router.get("/fees/{model:path}")
async def show_model_fees(request: Request, model: str) -> Response:
    """The rates of one model and their history, newest first."""
    core = core_of(request)
    async with core.database.connection() as connection:
        schedule = await fee_schedule.load(connection)
        history = await fee_schedule.history(connection, model=model, limit=HISTORY)
    return answer(
        {
            "model": model,
            "own": model in schedule.by_model,
            "fees": schedule.rates(model).as_json(),
            "history": [_fee_change(change) for change in history],
        }
    )


@router.put("/fees/{model:path}")
async def set_model_fees(request: Request, model: str) -> Response:
    """Give a model rates of its own; those not named are those it has now."""
    if not 1 <= len(model) <= MODEL_MAX or "\0" in model:
        raise BadRequest(f"a model's id has 1 to {MODEL_MAX} characters", param="model")
    rates = await administration.set_fees(core_of(request), model, await _rates(request))
    return answer({"model": model, "fees": rates.as_json()})


@router.delete("/fees/{model:path}")
async def remove_model_fees(request: Request, model: str) -> Response:
    """Return a model to the default rates."""
    rates = await administration.remove_fees(core_of(request), model)
    return answer({"model": model, "fees": rates.as_json()})


async def _rates(request: Request) -> dict[str, int]:
    body = await read_object(request)
    only(body, *_RATE_NAMES)
    if not body:
        raise BadRequest(f"name at least one of {', '.join(_RATE_NAMES)}")
    found: dict[str, int] = {}
    for name in body:
        value = whole_number(body, name, low=0, high=_HIGHEST_RATE_MSAT)
        assert value is not None
        found[name] = value
    return found


def _fee_change(change: FeeChange) -> dict[str, Any]:
    return {
        "fees": change.rates.as_json() if change.rates else None,
        "at": time_text(change.changed_at),
        "who": change.changed_by,
    }


@router.get("/settings")
async def show_settings(request: Request) -> Response:
    """What may be changed while the router runs, and within which bounds."""
    core = core_of(request)
    async with core.database.connection() as connection:
        await core.runtime.load(connection)
    return answer(_settings(core))


@router.put("/settings")
async def change_settings(request: Request) -> Response:
    """Change settings by name; all of them or, when one is wrong, none."""
    core = core_of(request)
    await administration.change_settings(core, await read_object(request))
    return answer(_settings(core))


def _settings(core: Core) -> dict[str, Any]:
    return {
        "settings": core.runtime.as_json(),
        "bounds": {name: list(bounds) for name, bounds in BOUNDS.items()},
        "paused": core.runtime.paused,
    }


@router.post("/pause")
async def pause(request: Request) -> Response:
    """Make no new quotes; what is paid still runs. Clients are told `message`."""
    body = await read_object(request)
    only(body, "message")
    message = short_text(body, "message", most=REASON_MAX) or administration.PAUSED_MESSAGE
    await administration.pause(core_of(request), message)
    return answer({"paused": message})


@router.post("/resume")
async def resume(request: Request) -> Response:
    """Make quotes again."""
    await administration.pause(core_of(request), None)
    return answer({"paused": None})


@router.get("/audit")
async def list_changes(request: Request) -> Response:
    """Every change: who, when, before, after; newest first."""
    limit = page_size(request)
    async with core_of(request).database.connection() as connection:
        page = await admin_views.audit_page(
            connection, cursor=query_text(request, "cursor"), limit=limit
        )
    return answer(page.as_json("changes"))
