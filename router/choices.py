"""Jobs that any of several models may serve: which, at what rates, and what the worker is told. Pure.

Such a job waits in a lane of each of its models and is claimed once. It is priced at the dearest of
them, so that its escrow covers every one, and charged at the rates of the one that serves it. Its
`choices` are JSON: the name of each model, in the order of the request, to the text of its rates. The
name `*` (`lanes.ANY_MODEL`) stands for every model that has no rates of its own there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence

from billing import fees
from billing.fee_schedule import FeeSchedule
from billing.fees import Rates
from router.lanes import ANY_MODEL


def rates_of(
    models: Sequence[str], schedule: FeeSchedule, *, known: Iterable[str]
) -> dict[str, Rates]:
    """What each of these models costs; with ANY_MODEL, every one of `known` that has own rates."""
    if ANY_MODEL in models:
        own = {model: schedule.rates(model) for model in known if model in schedule.by_model}
        return {ANY_MODEL: schedule.default, **own}
    return {model: schedule.rates(model) for model in models}


def dearest(rates: dict[str, Rates], *, prompt_tokens: int, max_tokens: int) -> str:
    """The model that such a job costs most with; the first of several that cost the same."""
    return max(
        rates,
        key=lambda model: fees.base_fee_msat(
            rates[model], prompt_tokens=prompt_tokens, max_tokens=max_tokens
        ),
    )


def write(rates: dict[str, Rates], text_of: Callable[[Rates], str]) -> str:
    """The `choices` of a job."""
    return json.dumps({model: text_of(of_model) for model, of_model in rates.items()})


def models_of(choices: str) -> list[str]:
    """The models whose lanes a job with these choices waits in."""
    named: Iterable[str] = json.loads(choices)
    return [ANY_MODEL] if ANY_MODEL in named else list(named)


def spec_for(spec: str, model: str) -> str:
    """A job's spec for the worker that serves it with `model`."""
    return json.dumps(json.loads(spec) | {"model": model}, ensure_ascii=False)
