"""Millisatoshi arithmetic. Every amount in Satherd is an integer of msat; each rounding has a name."""

from __future__ import annotations

import re
from decimal import Decimal

MSAT_PER_SAT = 1000

_DECIMAL = re.compile(r"[0-9]{1,18}(\.[0-9]{1,18})?\Z")


def ceil_div(numerator: int, denominator: int) -> int:
    """`numerator / denominator`, rounded towards plus infinity. The denominator is positive."""
    return -(-numerator // denominator)


def ceil_to_sat(amount_msat: int) -> int:
    """The smallest whole number of satoshis that is at least `amount_msat`, in msat."""
    return ceil_div(amount_msat, MSAT_PER_SAT) * MSAT_PER_SAT


def floor_to_sat(amount_msat: int) -> int:
    """The largest whole number of satoshis that is at most `amount_msat`, in msat."""
    return amount_msat // MSAT_PER_SAT * MSAT_PER_SAT


def parse_decimal(value: object) -> Decimal:
    """A plain non-negative decimal from JSON: a number or a string such as `"1.25"`.

    Exponents, signs, NaN, infinities and booleans raise ValueError. A float stands for the shortest
    decimal that reads back as it, which is what its author typed.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("a decimal number was expected")
    text = value.strip() if isinstance(value, str) else repr(value)
    if not _DECIMAL.match(text):
        raise ValueError("a plain decimal number was expected, such as 1.25")
    return Decimal(text)
