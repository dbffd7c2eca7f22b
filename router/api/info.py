"""`GET /info`: prices, models, the queue. Public and cheap: what it reads is kept in memory."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import APIRouter, Request, Response

from billing.fee_schedule import FeeSchedule
from billing.fees import Rates, format_multiplier
from billing.msat import MSAT_PER_SAT, ceil_div
from router import choices
from router.api.answers import answer, core_of
from router.api.own_door import OwnDoorRoute
from router.core import Core
from router.job_views import time_text
from router.lanes import ANY_MODEL
from router.prompt_tokens import BYTES_PER_TOKEN

router = APIRouter(tags=["prices"], route_class=OwnDoorRoute)


def software_version() -> str:
    try:
        return version("satherd")
    except PackageNotFoundError:
        return "0"


@router.get("/info")
async def info(request: Request) -> Response:
    """What this router charges, what it serves, and what a place in its queue costs now."""
    core = core_of(request)
    return answer({**await _info(core), "server_time": time_text(core.clock())})


async def _info(core: Core) -> dict[str, Any]:
    await core.market.refresh()
    schedule = await core.quotes.fees.now()
    default, settings = schedule.default, core.settings
    length = core.market.queue_length
    models = [_model(core, facts, schedule.rates(facts.id)) for facts in core.models.facts()]
    return {
        "name": settings.name,
        "version": software_version(),
        "network": core.node.network,
        "simulated": core.node.simulated,
        "fees": default.as_json(),
        "base_fee": satoshi_text(default.prompt_fee_msat * 1_000_000),
        "token_fee": satoshi_text(default.output_msat_per_mtok),
        "last_multiplier": last_multiplier(core),
        "queue_length": length,
        "prompt_token_rule": f"ceil(utf8_bytes/{BYTES_PER_TOKEN})",
        "image_prompt_tokens": settings.image_prompt_tokens,
        "default_max_tokens": settings.default_max_tokens,
        "default_max_wait_s": settings.default_max_wait_s,
        "max_n": settings.max_n,
        "max_multiplier": str(settings.max_multiplier),
        "min_amount_msat": settings.min_amount_msat,
        "commission_ppm": settings.commission_ppm,
        "quote_ttl_s": settings.quote_ttl_s,
        "wipe_after_s": settings.wipe_after_s,
        "paused": core.runtime.paused,
        "contact": settings.contact,
        "terms": settings.terms,
        "herder": herder_block(core, dearest_rates(core, schedule)),
        "models": models,
    }


def dearest_rates(core: Core, schedule: FeeSchedule) -> Rates:
    """What a prompt costs at most, whichever text model answers it."""
    rates = choices.rates_of((ANY_MODEL,), schedule, known=core.models.text_models()).values()
    return Rates(
        prompt_fee_msat=max(rate.prompt_fee_msat for rate in rates),
        input_msat_per_mtok=max(rate.input_msat_per_mtok for rate in rates),
        output_msat_per_mtok=max(rate.output_msat_per_mtok for rate in rates),
    )


def herder_block(core: Core, rates: Rates) -> dict[str, str]:
    """The six values of Llama-Herder (LH-9), in satoshi. Base-Fee has a satoshi of headroom, so that
    the fee its client computes and rounds down is never short."""
    return {
        "Name": core.settings.name,
        "Version": software_version(),
        "Base-Fee": str(ceil_div(rates.prompt_fee_msat, MSAT_PER_SAT) + 1),
        "Token-Fee": satoshi_text(rates.output_msat_per_mtok),
        "Last-Multiplier": last_multiplier(core),
        "Queue-Length": str(core.market.queue_length),
    }


def last_multiplier(core: Core) -> str:
    """That of the last job charged; 1.000 while nothing waits, so that prices do not only climb
    (E23)."""
    lasts = core.market.last_multiplier_milli.values()
    return format_multiplier(max(lasts, default=1000) if core.market.queue_length else 1000)


def _model(core: Core, facts: Any, rates: Rates) -> dict[str, Any]:
    return {
        "id": facts.id,
        "kind": facts.kind.value,
        "kinds": [kind.value for kind in facts.kinds],
        "fees": rates.as_json(),
        "workers": facts.workers,
        "idle_workers": facts.idle_workers,
        "context_length": facts.context_length,
        "max_tokens": facts.max_tokens,
        "tokens_per_s": round(facts.tokens_per_s, 1) if facts.tokens_per_s else None,
        **core.market.model_queue(facts.kind, facts.id),
    }


def satoshi_text(msat_per_million: int) -> str:
    """An amount in msat per million as a decimal of satoshi for one, without trailing zeros."""
    whole, part = divmod(msat_per_million, MSAT_PER_SAT * 1_000_000)
    return f"{whole}.{part:09d}".rstrip("0").rstrip(".")
