"""Price arithmetic: rates, base fee, multiplier, charge. Pure; amounts in msat, one rounding each.

    base fee    = prompt_fee + input x prompt_tokens + output x max_tokens        rounded up
    multiplier  = offer / base fee, in thousandths                                rounded down
    charge      = (prompt_fee + input x prompt + output x produced) x multiplier  rounded up, <= held

and image_fee for each image asked for in the base fee, for each one delivered in the charge.

Test vectors for every implementation of these rules: tests/vectors/pricing.json.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from decimal import ROUND_CEILING, Decimal

from billing.msat import ceil_div

MTOK = 1_000_000
ONE_MILLI = 1000


@dataclass(frozen=True, slots=True)
class Rates:
    """What a model costs. `_per_mtok` rates are for a million tokens."""

    prompt_fee_msat: int
    input_msat_per_mtok: int
    output_msat_per_mtok: int
    image_fee_msat: int = 0
    training_msat_per_mtok: int = 0

    def as_json(self) -> dict[str, int]:
        return asdict(self)


def base_fee_msat(rates: Rates, *, prompt_tokens: int, max_tokens: int, images: int = 0) -> int:
    """What one job is asked, in msat, rounded up once. `images` are those to be made."""
    use = _micro_msat(rates, prompt_tokens, max_tokens, with_prompt_fee=True)
    return ceil_div(use, MTOK) + rates.image_fee_msat * images


def offer_for_multiplier_msat(base_msat: int, multiplier: Decimal) -> int:
    """The least offer whose multiplier is at least `multiplier` (to the thousandth), in msat."""
    return int((base_msat * multiplier).to_integral_value(rounding=ROUND_CEILING))


def multiplier_milli(offer_msat: int, base_msat: int) -> int:
    """Offer over base fee in thousandths, rounded down, at least 1000. Base 0 counts as 1 msat."""
    return max(ONE_MILLI, offer_msat * ONE_MILLI // max(base_msat, 1))


def format_multiplier(milli: int) -> str:
    """Thousandths as the decimal string of the contract: 1250 is `"1.250"`."""
    return f"{milli // ONE_MILLI}.{milli % ONE_MILLI:03d}"


def charge_msat(
    rates: Rates,
    *,
    prompt_tokens: int,
    output_tokens: int,
    multiplier_milli: int,
    held_msat: int,
    with_prompt_fee: bool = True,
    images: int = 0,
) -> int:
    """What a job that ran is charged: its use at the rates, times the multiplier, rounded up once.

    Never more than `held_msat`, its escrow. `with_prompt_fee` False is for a job whose worker was
    lost after some output had been shown. `images` are those delivered.
    """
    use = _micro_msat(rates, prompt_tokens, output_tokens, with_prompt_fee=with_prompt_fee)
    use += rates.image_fee_msat * images * MTOK
    return min(held_msat, ceil_div(use * multiplier_milli, MTOK * ONE_MILLI))


def charged_output_tokens(*, max_tokens: int, worker_tokens: int | None, utf8_bytes: int) -> int:
    """Output tokens that are charged: min(max_tokens, the worker's count, ceil(bytes / 2)).

    Without a count by the worker: min(max_tokens, ceil(bytes / 4)).
    """
    if worker_tokens is None:
        return min(max_tokens, ceil_div(utf8_bytes, 4))
    return min(max_tokens, worker_tokens, ceil_div(utf8_bytes, 2))


def affordable_max_tokens(rates: Rates, *, prompt_tokens: int, budget_msat: int) -> int:
    """The largest max_tokens whose base fee is within `budget_msat`; may be negative or huge."""
    fixed = _micro_msat(rates, prompt_tokens, 0, with_prompt_fee=True)
    if rates.output_msat_per_mtok == 0:
        return 1 << 40 if fixed <= budget_msat * MTOK else -1
    return (budget_msat * MTOK - fixed) // rates.output_msat_per_mtok


def _micro_msat(rates: Rates, prompt_tokens: int, output: int, *, with_prompt_fee: bool) -> int:
    fixed = rates.prompt_fee_msat * MTOK if with_prompt_fee else 0
    return fixed + rates.input_msat_per_mtok * prompt_tokens + rates.output_msat_per_mtok * output
