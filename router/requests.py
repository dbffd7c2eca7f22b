"""From a request body with OpenAI's field names to the jobs it asks for. Pure.

All doors that speak of chat, completions, embeddings and images bring their bodies here, so that a
request is checked, counted and hashed in one way. Unknown fields are ignored. BadRequest names the
field at fault in `param`. What a picture needs is in `router.image_requests`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any

import orjson
from pydantic import ValidationError
from pydantic_core import PydanticSerializationError

from billing.msat import parse_decimal
from billing.outside_url import OutsideRules
from router.conditions import read_conditions
from router.errors import BadRequest
from router.image_requests import check_picture_urls, edit_spec, image_spec
from router.prompt_tokens import prompt_tokens
from router.request_fields import flag, integer
from router.webhook_request import read_webhook
from worker.protocol import (
    TEXT_KINDS,
    ChatSpec,
    CompletionSpec,
    EmbeddingSpec,
    ImageEditSpec,
    ImageSpec,
    JobSpec,
    Kind,
    Sampling,
)

MAX_MODELS = 3
MAX_STOPS = 16
MAX_STOP_BYTES = 500
MAX_INPUTS = 2048
HIGHEST_TOKENS = 100_000_000
# Of all jobs of a request, where there are several of each.
MOST_OF_COPIES = 16 << 20

_SAMPLING = tuple(Sampling.model_fields)
_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})


@dataclass(frozen=True, slots=True)
class Item:
    """One job that is asked for. `spec.max_tokens` is 0 where the client did not say.

    `any_of`: the models of which any may serve it, `*` for all; empty: that of the spec.
    """

    spec: JobSpec
    prompt_tokens: int
    any_of: tuple[str, ...] = ()

    @property
    def models(self) -> tuple[str, ...]:
        return self.any_of or (self.spec.model,)


@dataclass(frozen=True, slots=True)
class Terms:
    """What the client says about money and time. None: it did not say.

    `max_wait_s`: how long a job may wait for a worker; `run_limit_s`: how long it may then take.
    """

    multiplier: Decimal | None = None
    offer_msat: int | None = None
    max_fee_msat: int | None = None
    max_wait_s: int | None = None
    run_limit_s: int | None = None


NO_TERMS = Terms()


@dataclass(frozen=True, slots=True)
class Request:
    """A checked request. `max_tokens` None: the router is to choose.

    `echo`: the door repeats the prompts before the answers (`with_echo_at_the_door`). `webhook`:
    whom to tell of each job's end, as `router.webhook_request` writes it.
    """

    kind: Kind
    items: tuple[Item, ...]
    max_tokens: int | None
    terms: Terms
    request_hash: bytes
    stream: bool = False
    include_usage: bool = False
    base64_embeddings: bool = False
    echo: bool = False
    webhook: str | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds from the settings."""

    max_n: int = 128
    image_prompt_tokens: int = 765
    max_multiplier: int = 1000
    max_wait_s: int = 86_400
    outside: OutsideRules = field(default_factory=OutsideRules)


def parse(kind: Kind, body: Any, limits: Limits, terms: Terms | None = None) -> Request:
    """Check a body. `terms` come from headers and outrank those of the body."""
    if not isinstance(body, Mapping):
        raise BadRequest("the body must be a JSON object")
    terms = _merge(terms or NO_TERMS, _terms(body, limits))
    models = _models(body)
    # Embeddings have no `n`: it is a field that they do not know.
    wanted = {} if kind is Kind.EMBEDDING else body
    count = integer(wanted, "n", low=1, high=limits.max_n, default=1)
    assert count is not None
    max_tokens = _max_tokens(body) if kind in TEXT_KINDS else None
    conditions = read_conditions(body)
    specs = _SPECS[kind](body, models[0], max_tokens or 0)
    if conditions is not None:
        specs = [spec.model_copy(update={"conditions": conditions}) for spec in specs]
    if len(models) * len(specs) * count > limits.max_n:
        raise BadRequest(f"a request makes at most {limits.max_n} jobs", param="n")
    _check_copies(specs, len(models) * count)
    extra = _extra(body)
    # What is counted is the same for every model and every copy.
    counts = [
        prompt_tokens(vars(spec) | extra, image_prompt_tokens=limits.image_prompt_tokens)
        for spec in specs
    ]
    items = tuple(
        Item(for_copy(spec, model, copy), tokens)
        for model in models
        for spec, tokens in zip(specs, counts, strict=True)
        for copy in range(count)
    )
    options = body.get("stream_options")
    return Request(
        kind=kind,
        items=items,
        max_tokens=max_tokens,
        terms=terms,
        request_hash=request_hash(kind, body),
        stream=flag(body, "stream"),
        include_usage=isinstance(options, Mapping) and options.get("include_usage") is True,
        base64_embeddings=kind is Kind.EMBEDDING and _wants_base64(body),
        webhook=read_webhook(body, limits.outside),
    )


def _check_copies(specs: list[JobSpec], copies: int) -> None:
    """Each job is stored whole, before anything is paid: a long prompt may not be asked for a hundred
    times. A picture is long and counts little, so that it is not for prices to prevent."""
    if copies == 1:
        return
    try:
        size = sum(len(spec.model_dump_json(exclude_none=True)) for spec in specs)
    except PydanticSerializationError:
        return  # refused by whoever stores it
    if size * copies > MOST_OF_COPIES:
        raise BadRequest(
            f"the jobs of a request have at most {MOST_OF_COPIES} characters together", param="n"
        )


def with_echo_at_the_door(request: Request) -> Request:
    """The same request, its echo taken from the workers: what they repeat would count as output."""
    if not any(isinstance(i.spec, CompletionSpec) and i.spec.echo for i in request.items):
        return request
    items = (
        replace(item, spec=item.spec.model_copy(update={"echo": False})) for item in request.items
    )
    return replace(request, items=tuple(items), echo=True)


def renamed(request: Request, name_of: Callable[[str], str]) -> Request:
    """The same request with its models by other names."""
    if all(name_of(item.spec.model) == item.spec.model for item in request.items):
        return request
    items = (
        replace(item, spec=item.spec.model_copy(update={"model": name_of(item.spec.model)}))
        for item in request.items
    )
    return replace(request, items=tuple(items))


def request_hash(kind: Kind, body: Mapping[str, Any]) -> bytes:
    """SHA-256 of the body in one spelling: the same for the same request, however it was written."""
    return hashlib.sha256(canonical([kind, body])).digest()


def canonical(value: Any) -> bytes:
    """A value of JSON in one spelling."""
    try:
        return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
    except orjson.JSONEncodeError:
        # An integer of more than 64 bits, or half a surrogate pair.
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return text.encode("utf-8", "surrogatepass")


def terms_from(
    *,
    multiplier: str | None = None,
    max_fee_msat: str | None = None,
    max_wait_s: str | None = None,
    limits: Limits,
) -> Terms:
    """Terms from the headers `X-Fee-Multiplier`, `X-Max-Fee-Msat`, `X-Max-Wait-S`."""
    if multiplier is max_fee_msat is max_wait_s is None:
        return NO_TERMS
    named = {
        "fee_multiplier": multiplier,
        "max_fee_msat": _digits(max_fee_msat, "X-Max-Fee-Msat"),
        "max_wait_s": _digits(max_wait_s, "X-Max-Wait-S"),
    }
    return _terms({k: v for k, v in named.items() if v is not None}, limits)


def _digits(text: str | None, name: str) -> int | None:
    if text is None:
        return None
    if not (text.isascii() and text.strip().isdigit() and len(text) < 19):
        raise BadRequest(f"{name} must be a whole number", param=name)
    return int(text)


def _merge(first: Terms, second: Terms) -> Terms:
    if first is NO_TERMS:
        return second

    def pick(name: str) -> Any:
        value = getattr(first, name)
        return getattr(second, name) if value is None else value

    # A multiplier in a header also outranks a total in the body: they say the same thing twice.
    offer_msat = None if first.multiplier is not None else pick("offer_msat")
    return Terms(pick("multiplier"), offer_msat, pick("max_fee_msat"), pick("max_wait_s"))


def _terms(body: Mapping[str, Any], limits: Limits) -> Terms:
    multiplier = None
    if body.get("fee_multiplier") is not None:
        try:
            multiplier = parse_decimal(body["fee_multiplier"])
        except ValueError as error:
            raise BadRequest(f"fee_multiplier: {error}", param="fee_multiplier") from None
        if not 1 <= multiplier <= limits.max_multiplier:
            raise BadRequest(
                f"fee_multiplier must lie between 1 and {limits.max_multiplier}",
                param="fee_multiplier",
            )
    offer_msat = integer(body, "offer_msat", low=0, high=10**18)
    if multiplier is not None and offer_msat is not None:
        raise BadRequest("give fee_multiplier or offer_msat, not both", param="offer_msat")
    return Terms(
        multiplier=multiplier,
        offer_msat=offer_msat,
        max_fee_msat=integer(body, "max_fee_msat", low=0, high=10**18),
        max_wait_s=integer(body, "max_wait_s", low=1, high=limits.max_wait_s),
    )


def _models(body: Mapping[str, Any]) -> list[str]:
    models: Any = body.get("models")
    if models is None:
        models = [body.get("model")]
    if not isinstance(models, list) or not 1 <= len(models) <= MAX_MODELS:
        raise BadRequest(f"models must be a list of 1 to {MAX_MODELS} names", param="models")
    if not all(isinstance(m, str) and 0 < len(m) <= 200 for m in models):
        raise BadRequest("model must be the name of a model", param="model")
    if len(set(models)) != len(models):
        raise BadRequest("models must differ", param="models")
    return models


def _max_tokens(body: Mapping[str, Any]) -> int | None:
    for name in ("max_completion_tokens", "max_tokens"):
        if body.get(name) is not None:
            return integer(body, name, low=1, high=HIGHEST_TOKENS)
    return None


def _chat(body: Mapping[str, Any], model: str, max_tokens: int) -> list[JobSpec]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages must be a list with at least one message", param="messages")
    for message in messages:
        _check_message(message)
    if not any(_says_something(message) for message in messages):
        raise BadRequest("the prompt is empty", param="messages")
    fields: dict[str, Any] = {"messages": messages}
    for name, shape in (("tools", list), ("response_format", Mapping)):
        if body.get(name) is not None:
            if not isinstance(body[name], shape):
                raise BadRequest(f"{name} has the wrong type", param=name)
            fields[name] = body[name]
    if body.get("tool_choice") is not None:
        fields["tool_choice"] = body["tool_choice"]
    return [_build(ChatSpec, body, model, max_tokens, fields)]


def _check_message(message: Any) -> None:
    if not isinstance(message, (dict, Mapping)) or message.get("role") not in _ROLES:
        raise BadRequest("each message needs a role: system, user or assistant", param="messages")
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            if isinstance(part, (dict, Mapping)):
                check_picture_urls(part)
            elif not isinstance(part, str):
                raise BadRequest("content parts must be objects", param="messages")
    elif content is not None and not isinstance(content, str):
        raise BadRequest("content must be text or a list of parts", param="messages")


def _says_something(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    parts = content if isinstance(content, list) else [content]
    return any(map(_part_says_something, parts)) or bool(message.get("tool_calls"))


def _part_says_something(part: Any) -> bool:
    if isinstance(part, (dict, Mapping)):
        # Anything but text, an image for instance, is something.
        return bool(part.get("text")) or part.get("type", "text") != "text"
    return bool(part)


def _completion(body: Mapping[str, Any], model: str, max_tokens: int) -> list[JobSpec]:
    prompt = body.get("prompt")
    prompts = prompt if isinstance(prompt, list) and prompt and not _is_tokens(prompt) else [prompt]
    suffix = body.get("suffix")
    if suffix is not None and not isinstance(suffix, str):
        raise BadRequest("suffix must be text", param="suffix")
    fields = {"suffix": suffix, "echo": flag(body, "echo")}
    if fields["echo"] and not all(isinstance(p, str) for p in prompts):
        raise BadRequest("echo needs prompts of text: token ids are not read here", param="echo")
    return [
        _build(
            CompletionSpec,
            body,
            model,
            max_tokens,
            fields | {"prompt": _text_or_tokens(p, "prompt")},
        )
        for p in prompts
    ]


def _embedding(body: Mapping[str, Any], model: str, _max_tokens: int) -> list[JobSpec]:
    given = body.get("input")
    inputs = given if isinstance(given, list) and given and not _is_tokens(given) else [given]
    if len(inputs) > MAX_INPUTS:
        raise BadRequest(f"input has at most {MAX_INPUTS} entries", param="input")
    texts = [_text_or_tokens(text, "input") for text in inputs]
    return [EmbeddingSpec(model=model, input=texts)]


def _wants_base64(body: Mapping[str, Any]) -> bool:
    wanted = body.get("encoding_format")
    if wanted not in (None, "float", "base64"):
        raise BadRequest("encoding_format must be float or base64", param="encoding_format")
    return wanted == "base64"


def _image(body: Mapping[str, Any], _model: str, _max_tokens: int) -> list[JobSpec]:
    return [image_spec(body)]


def _image_edit(body: Mapping[str, Any], _model: str, _max_tokens: int) -> list[JobSpec]:
    return [edit_spec(body)]


_SPECS = {
    Kind.CHAT: _chat,
    Kind.COMPLETION: _completion,
    Kind.EMBEDDING: _embedding,
    Kind.IMAGE: _image,
    Kind.IMAGE_EDIT: _image_edit,
}


def _is_tokens(value: list[Any]) -> bool:
    return all(isinstance(t, int) and not isinstance(t, bool) for t in value)


def _is_token_id(name: Any) -> bool:
    return isinstance(name, str) and name.isascii() and name.isdigit() and len(name) <= 10


def _text_or_tokens(value: Any, param: str) -> str | list[int]:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value and _is_tokens(value):
        if not all(0 <= t < 2**31 for t in value):
            raise BadRequest("token ids must not be negative", param=param)
        return value
    raise BadRequest(f"{param} must be text or token ids, and not empty", param=param)


def _build(
    shape: type[ChatSpec] | type[CompletionSpec],
    body: Mapping[str, Any],
    model: str,
    max_tokens: int,
    fields: dict[str, Any],
) -> Any:
    sampling = {name: body[name] for name in _SAMPLING if body.get(name) is not None}
    biases = sampling.get("logit_bias")
    if isinstance(biases, Mapping) and not all(map(_is_token_id, biases)):
        raise BadRequest("logit_bias: its names must be token ids", param="logit_bias")
    try:
        return shape(
            model=model,
            max_tokens=max_tokens,
            stop=_stops(body),
            stream=flag(body, "stream"),
            sampling=Sampling.model_validate(sampling, strict=True),
            **fields,
        )
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        param = str(first["loc"][0]) if first["loc"] else None
        raise BadRequest(f"{param}: {first['msg']}", param=param) from None


def _stops(body: Mapping[str, Any]) -> list[str]:
    stop = body.get("stop")
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(s, str) for s in stops):
        raise BadRequest("stop must be text or a list of texts", param="stop")
    stops = [s for s in stops if s]
    if len(stops) > MAX_STOPS or any(len(s.encode()) > MAX_STOP_BYTES for s in stops):
        raise BadRequest(
            f"at most {MAX_STOPS} stop strings of {MAX_STOP_BYTES} bytes", param="stop"
        )
    return stops


def for_copy(spec: JobSpec, model: str, copy: int) -> JobSpec:
    """The spec for one of n answers: with a seed, each answer gets its own."""
    changed: dict[str, Any] = {} if spec.model == model else {"model": model}
    if copy and isinstance(spec, ImageSpec | ImageEditSpec) and spec.seed is not None:
        changed["seed"] = _seed_of_copy(spec.seed, copy)
    elif copy and isinstance(spec, ChatSpec | CompletionSpec) and spec.sampling.seed is not None:
        seed = _seed_of_copy(spec.sampling.seed, copy)
        changed["sampling"] = spec.sampling.model_copy(update={"seed": seed})
    return spec.model_copy(update=changed) if changed else spec


def _seed_of_copy(seed: int, copy: int) -> int:
    # Within 64 bits, which is what the protocol carries.
    return seed + (copy if seed < 2**62 else -copy)


def _extra(body: Mapping[str, Any]) -> dict[str, Any]:
    # Counted by the public rule although no engine of ours reads them from the spec.
    return {name: body[name] for name in ("functions", "grammar") if body.get(name) is not None}
