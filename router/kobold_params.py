"""KoboldAI's `params` as our jobs have them, and back. Pure.

The Kobold and Horde doors bring their bodies here. What our protocol has a name for becomes sampling;
the other samplers of KoboldAI and KoboldCpp travel with the job (`CompletionSpec.kobold`) to engines
that know them. Whatever else a client sends is ignored (KL-5): it would reach an engine unchecked, and
some of it is prompt that nobody has counted (`memory`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from router import requests
from router.errors import BadRequest
from router.lanes import ANY_MODEL
from router.request_fields import integer
from router.requests import Limits, Request, Terms
from worker.protocol import CompletionSpec, Kind

DEFAULT_LENGTH = 80
MAX_MODELS = 50
MAX_STOPS, MAX_STOPS_CHARACTERS = 128, 2000

# KoboldAI's names, and ours.
_SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "rep_pen": "repeat_penalty",
    "presence_penalty": "presence_penalty",
    "sampler_seed": "seed",
}
# Samplers that only engines of this family have (AH-2; mirostat, dry and xtc are KoboldCpp's).
_CARRIED = frozenset(
    {
        "rep_pen_range",
        "rep_pen_slope",
        "tfs",
        "top_a",
        "typical",
        "smoothing_factor",
        "dynatemp_range",
        "dynatemp_exponent",
        "sampler_order",
        "use_default_badwordsids",
        "singleline",
        "frmtadsnsp",
        "frmtrmblln",
        "frmtrmspch",
        "frmttriminc",
        "mirostat",
        "mirostat_tau",
        "mirostat_eta",
        "dry_multiplier",
        "dry_base",
        "dry_allowed_length",
        "xtc_threshold",
        "xtc_probability",
        "nsigma",
    }
)
_WHOLE = frozenset({"top_k", "sampler_seed"})
_MOST_ITEMS = 64


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a dialect allows: answers of a request, and tokens of an answer."""

    most_n: int
    least_length: int = 1
    most_length: int = requests.HIGHEST_TOKENS
    least_context: int = 1


def parse(
    door: str,
    body: Mapping[str, Any],
    *,
    params: Mapping[str, Any],
    models: Any,
    bounds: Bounds,
    limits: Limits,
    terms: Terms,
    worker: str | None = None,
) -> Request:
    """The jobs of a request, `n` of them, each for any of `models` (none named: for any at all).

    `worker`: the id of the only one that may have them. Raises BadRequest that names the field of
    `params` at fault.
    """
    prompt = body.get("prompt")
    if not isinstance(prompt, str) or not prompt:
        raise BadRequest("the prompt is empty", param="prompt")
    count = integer(params, "n", low=1, high=min(bounds.most_n, limits.max_n), default=1)
    length = integer(
        params,
        "max_length",
        low=bounds.least_length,
        high=bounds.most_length,
        default=DEFAULT_LENGTH,
    )
    wanted = _models(models)
    plain: dict[str, Any] = {
        "model": wanted[0],
        "prompt": prompt,
        "n": count,
        "max_tokens": length,
        **_sampling(params),
        **{
            name: body[name] for name in ("fee_multiplier", "webhook") if body.get(name) is not None
        },
    }
    if worker is not None:
        plain["gpu_filter"] = {"worker_id": worker}
    if params.get("fee_multiplier") is not None:
        # Some clients let people add to `params` and to nothing else.
        plain.setdefault("fee_multiplier", params["fee_multiplier"])
    parsed = requests.parse(Kind.COMPLETION, plain, limits, terms)
    stops = stop_sequences(params)
    carried = _carried(params) | _context(params, bounds)
    changes: dict[str, Any] = {"stop": stops, "kobold": carried or None}
    any_of: tuple[str, ...] = () if len(wanted) == 1 and wanted[0] != ANY_MODEL else wanted
    items = tuple(
        replace(item, spec=item.spec.model_copy(update=changes), any_of=any_of)
        for item in parsed.items
    )
    return replace(parsed, items=items, request_hash=_hash(door, body))


def _models(models: Any) -> tuple[str, ...]:
    if models is None or models == []:
        return (ANY_MODEL,)
    if not isinstance(models, list) or len(models) > MAX_MODELS:
        raise BadRequest(f"models must be a list of at most {MAX_MODELS} names", param="models")
    for model in models:
        if not isinstance(model, str) or not 0 < len(model) <= 200 or not model.isprintable():
            raise BadRequest("models must be a list of names", param="models")
    return tuple(dict.fromkeys(models))


def _sampling(params: Mapping[str, Any]) -> dict[str, Any]:
    sampling: dict[str, Any] = {}
    for name, ours in _SAMPLING.items():
        value = params.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise BadRequest(f"{name} must be a number", param=name)
        if name in _WHOLE and isinstance(value, float) and value.is_integer():
            value = int(value)
        sampling[ours] = value
    # KoboldAI says "no seed" with a negative one.
    if sampling.get("seed", 0) < 0:
        del sampling["seed"]
    return sampling


def stop_sequences(params: Mapping[str, Any]) -> list[str]:
    """The distinct stop strings, in order. Raises BadRequest."""
    stops = params.get("stop_sequence")
    if stops is None:
        return []
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise BadRequest("stop_sequence must be a list of texts", param="stop_sequence")
    distinct = list(dict.fromkeys(stop for stop in stops if stop))
    if len(distinct) > MAX_STOPS or sum(map(len, distinct)) > MAX_STOPS_CHARACTERS:
        raise BadRequest(
            f"at most {MAX_STOPS} stop sequences of {MAX_STOPS_CHARACTERS} characters together",
            param="stop_sequence",
        )
    return distinct


def _carried(params: Mapping[str, Any]) -> dict[str, Any]:
    return {name: params[name] for name in _CARRIED if _is_plain(params.get(name))}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return len(value) <= _MOST_ITEMS and all(isinstance(item, int) for item in value)
    return isinstance(value, bool | int | float)


def _context(params: Mapping[str, Any], bounds: Bounds) -> dict[str, Any]:
    """How much context the client asks a worker to have, if it says so (both spellings exist)."""
    for name in ("max_context_length", "max_content_length"):
        if params.get(name) is not None:
            return {
                "max_context_length": integer(
                    params, name, low=bounds.least_context, high=requests.HIGHEST_TOKENS
                )
            }
    return {}


def _hash(door: str, body: Mapping[str, Any]) -> bytes:
    return hashlib.sha256(requests.canonical([door, body])).digest()


def payload(spec: CompletionSpec, *, prompt: str, stops: list[str], context: int) -> dict[str, Any]:
    """A job as a worker of these dialects generates it: KoboldAI's params with the prompt inside,
    and one answer (KC-2, AH-7). `context`: what the worker has, where the client asked for nothing."""
    given = dict(spec.kobold or {})
    sampled = spec.sampling.model_dump(exclude_none=True)
    named = {theirs: sampled[ours] for theirs, ours in _SAMPLING.items() if ours in sampled}
    asked = given.pop("max_context_length", None)
    told: dict[str, Any] = {
        **given,
        **named,
        "prompt": prompt,
        "n": 1,
        "max_length": spec.max_tokens,
        "max_context_length": min(asked, context) if asked else context,
    }
    if stops:
        told["stop_sequence"] = stops
    return told
