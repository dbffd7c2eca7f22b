"""The public price rules, as a client computes them before it asks anybody. Pure; amounts in msat.

    prompt tokens   ceil(counted UTF-8 bytes / 4) + images x image_prompt_tokens
    base fee        prompt_fee + input x prompt_tokens + output x max_tokens       rounded up, once
    offer           base fee x multiplier                                          rounded up
    invoice         offer                                            rounded up to whole satoshis

What counts as a byte is said in `counted_bytes`. Test vectors: tests/vectors/pricing.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal, InvalidOperation
from typing import Any

MTOK = 1_000_000
ONE_MILLI = 1000
MSAT_PER_SAT = 1000
BYTES_PER_TOKEN = 4
DEFAULT_IMAGE_PROMPT_TOKENS = 765
MAX_MULTIPLIER_MILLI = 1_000_000


@dataclass(frozen=True, slots=True)
class Rates:
    """What a model costs; `_per_mtok` is for a million tokens."""

    prompt_fee_msat: int
    input_msat_per_mtok: int
    output_msat_per_mtok: int
    image_fee_msat: int = 0

    @classmethod
    def from_json(cls, fees: Mapping[str, Any]) -> Rates:
        """The `fees` object of `/info` or of a quote; rates that it lacks are 0."""
        return cls(
            prompt_fee_msat=int(fees.get("prompt_fee_msat", 0)),
            input_msat_per_mtok=int(fees.get("input_msat_per_mtok", 0)),
            output_msat_per_mtok=int(fees.get("output_msat_per_mtok", 0)),
            image_fee_msat=int(fees.get("image_fee_msat", 0)),
        )


def prompt_tokens(
    request: Mapping[str, Any], *, image_prompt_tokens: int = DEFAULT_IMAGE_PROMPT_TOKENS
) -> int:
    """The tokens that a request's prompt is charged as; `image_prompt_tokens` stands in `/info`."""
    images = sum(1 for part in _parts(request) if _is_image(part))
    # The picture that is to be edited; in other bodies `image` is a field that nobody knows.
    images += int(request.get("kind") == "image_edit" and bool(request.get("image")))
    return _ceil_div(counted_bytes(request), BYTES_PER_TOKEN) + images * image_prompt_tokens


def counted_bytes(request: Mapping[str, Any]) -> int:
    """UTF-8 bytes of the text that a model reads; a given token id counts four.

    Counted: string content and text parts of `messages`, `prompt`, `suffix`, each `input`, and the
    compact JSON of `tools`, `functions`, `tool_calls`, the schema of `response_format`, `grammar`.
    """
    total = sum(_text_bytes(text) for text in _texts(request))
    total += sum(_given_bytes(request.get(field)) for field in ("prompt", "suffix", "input"))
    return total + sum(_text_bytes(_compact(value)) for value in _structures(request))


def base_fee_msat(rates: Rates, *, prompt_tokens: int, max_tokens: int, images: int = 0) -> int:
    """What one job costs at a multiplier of 1.000, in msat. `images` are those made, not shown."""
    per_mtok = rates.input_msat_per_mtok * prompt_tokens + rates.output_msat_per_mtok * max_tokens
    return rates.prompt_fee_msat + rates.image_fee_msat * images + _ceil_div(per_mtok, MTOK)


def offer_msat(base_fee_msat: int, *, multiplier_milli: int) -> int:
    """The least offer that has this multiplier, in msat."""
    return _ceil_div(base_fee_msat * multiplier_milli, ONE_MILLI)


def multiplier_milli(offer_msat: int, *, base_fee_msat: int) -> int:
    """Offer over base fee in thousandths, rounded down. A free job counts as one of 1 msat."""
    if base_fee_msat == 0:
        return max(ONE_MILLI, offer_msat * ONE_MILLI)
    return offer_msat * ONE_MILLI // base_fee_msat


def invoice_amount_msat(offer_msat: int) -> int:
    """What is asked over Lightning: whole satoshis, rounded up. The surplus stays the payer's."""
    return _ceil_div(offer_msat, MSAT_PER_SAT) * MSAT_PER_SAT


def output_tokens(*, max_tokens: int, worker_tokens: int | None, utf8_bytes: int) -> int:
    """Output tokens that are charged for `utf8_bytes` of delivered text.

    `worker_tokens` is the worker's own count, None when it gave none.
    """
    if worker_tokens is None:
        return min(max_tokens, _ceil_div(utf8_bytes, BYTES_PER_TOKEN))
    return min(max_tokens, worker_tokens, _ceil_div(utf8_bytes, 2))


def charge_msat(
    rates: Rates,
    *,
    prompt_tokens: int,
    output_tokens: int,
    multiplier_milli: int,
    escrow_msat: int,
    with_prompt_fee: bool = True,
    images: int = 0,
) -> int:
    """What a job that ran is charged: its use, times the multiplier, at most what was held for it.

    `with_prompt_fee` is False for a job whose worker was lost after some output had been shown.
    `images` are those delivered.
    """
    fixed = rates.prompt_fee_msat * MTOK if with_prompt_fee else 0
    use = fixed + rates.input_msat_per_mtok * prompt_tokens
    use += rates.output_msat_per_mtok * output_tokens + rates.image_fee_msat * images * MTOK
    return min(escrow_msat, _ceil_div(use * multiplier_milli, MTOK * ONE_MILLI))


def parse_multiplier_milli(value: str | int | float | Decimal) -> int:
    """`"1.25"` is 1250. Finer steps than a thousandth are rounded up, so as not to fall behind.

    Raises ValueError for what is no number, below 1 or above 1000.
    """
    try:
        decimal = Decimal(repr(value) if isinstance(value, float) else value)
    except InvalidOperation as error:
        raise ValueError(f"a multiplier is a decimal number such as 1.25, not {value!r}") from error
    if not decimal.is_finite() or not 1 <= decimal <= MAX_MULTIPLIER_MILLI // ONE_MILLI:
        raise ValueError(f"a multiplier lies between 1 and 1000, not {value!r}")
    return int((decimal * ONE_MILLI).to_integral_value(rounding=ROUND_CEILING))


def format_multiplier(milli: int) -> str:
    """1250 is `"1.250"`."""
    return f"{milli // ONE_MILLI}.{milli % ONE_MILLI:03d}"


def _messages(request: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for message in request.get("messages") or ():
        if isinstance(message, Mapping):
            yield message


def _parts(request: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for message in _messages(request):
        content = message.get("content")
        if isinstance(content, list):
            for part in content:
                if isinstance(part, str):
                    yield {"type": "text", "text": part}
                elif isinstance(part, Mapping):
                    yield part


def _is_image(part: Mapping[str, Any]) -> bool:
    if isinstance(part.get("text"), str):
        return False
    return "image_url" in part or part.get("type") in ("image", "input_image")


def _texts(request: Mapping[str, Any]) -> Iterator[str]:
    for message in _messages(request):
        if isinstance(message.get("content"), str):
            yield message["content"]
    for part in _parts(request):
        if isinstance(part.get("text"), str):
            yield part["text"]


def _structures(request: Mapping[str, Any]) -> Iterator[Any]:
    response_format = request.get("response_format")
    values: list[Any] = [request.get(field) for field in ("tools", "functions", "grammar")]
    values.extend(message.get("tool_calls") for message in _messages(request))
    if isinstance(response_format, Mapping):
        # OpenAI wraps the schema in `json_schema`; llama.cpp takes it one level up.
        wrapped = response_format.get("json_schema")
        values.append((wrapped if isinstance(wrapped, Mapping) else response_format).get("schema"))
    return (value for value in values if value)


def _given_bytes(value: Any) -> int:
    """Bytes of a `prompt`, `suffix` or `input`: text, token ids, or a list of either."""
    if isinstance(value, str):
        return _text_bytes(value)
    if isinstance(value, int):
        return BYTES_PER_TOKEN
    return sum(_given_bytes(item) for item in _items(value))


def _items(value: Any) -> Iterable[Any]:
    return value if isinstance(value, list | tuple) else ()


def _text_bytes(text: str) -> int:
    # Half a surrogate pair has no UTF-8; counted as three bytes, which is also what the replacement
    # character that other languages send in its place takes.
    return len(text.encode("utf-8", errors="surrogatepass"))


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)
