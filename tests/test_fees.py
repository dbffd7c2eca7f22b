"""The price arithmetic, against the published vectors (tests/vectors/pricing.json)."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billing import fees
from billing.fees import Rates
from billing.msat import ceil_to_sat, parse_decimal
from billing.settlement import divide

VECTORS = json.loads((Path(__file__).parent / "vectors" / "pricing.json").read_text())
rate = st.integers(0, 10**9)
tokens = st.integers(0, 10**7)


def rates_of(vector: dict) -> Rates:
    given_rates = vector.get("rates", vector)
    names = ("prompt_fee_msat", "input_msat_per_mtok", "output_msat_per_mtok", "image_fee_msat")
    return Rates(**{name: given_rates[name] for name in names})


@pytest.mark.parametrize("vector", VECTORS["base_fees"], ids=lambda v: v.get("name", ""))
def test_base_fees_are_rounded_up_once(vector: dict):
    got = fees.base_fee_msat(
        rates_of(vector),
        prompt_tokens=vector["prompt_tokens"],
        max_tokens=vector["max_tokens"],
        images=vector["images"],
    )
    assert got == vector["base_fee_msat"]


@pytest.mark.parametrize("vector", VECTORS["offers"])
def test_offers_are_rounded_up_to_the_msat(vector: dict):
    multiplier = Decimal(vector["multiplier_milli"]) / 1000
    assert (
        fees.offer_for_multiplier_msat(vector["base_fee_msat"], multiplier) == vector["offer_msat"]
    )


@pytest.mark.parametrize("vector", VECTORS["multipliers"])
def test_multipliers_are_rounded_down_to_the_thousandth(vector: dict):
    got = fees.multiplier_milli(vector["offer_msat"], vector["base_fee_msat"])
    assert got == vector["multiplier_milli"]


@pytest.mark.parametrize("vector", VECTORS["invoice_amounts"])
def test_invoices_are_for_whole_satoshis(vector: dict):
    assert ceil_to_sat(vector["offer_msat"]) == vector["amount_msat"]


@pytest.mark.parametrize("vector", VECTORS["output_tokens"])
def test_output_is_never_charged_beyond_what_was_delivered(vector: dict):
    got = fees.charged_output_tokens(
        max_tokens=vector["max_tokens"],
        worker_tokens=vector["worker_tokens"],
        utf8_bytes=vector["utf8_bytes"],
    )
    assert got == vector["output_tokens"]


@pytest.mark.parametrize("vector", VECTORS["charges"], ids=lambda v: v.get("name", ""))
def test_charges_never_exceed_the_escrow(vector: dict):
    got = fees.charge_msat(
        rates_of(vector),
        prompt_tokens=vector["prompt_tokens"],
        output_tokens=vector["output_tokens"],
        multiplier_milli=vector["multiplier_milli"],
        held_msat=vector["escrow_msat"],
        with_prompt_fee=vector.get("with_prompt_fee", True),
        images=vector.get("images", 0),
    )
    assert got == vector["charge_msat"]


@given(rate, rate, rate, tokens, tokens, st.integers(1000, 1_000_000))
def test_an_offer_for_a_multiplier_has_at_least_that_multiplier(p, i, o, n, m, milli):
    base = fees.base_fee_msat(Rates(p, i, o), prompt_tokens=n, max_tokens=m)
    offer = fees.offer_for_multiplier_msat(base, Decimal(milli) / 1000)
    if base:
        assert fees.multiplier_milli(offer, base) >= milli


@given(rate, rate, rate, tokens, st.integers(0, 10**12))
def test_affordable_tokens_are_the_most_that_fit_the_budget(p, i, o, n, budget):
    rates = Rates(p, i, o)
    most = fees.affordable_max_tokens(rates, prompt_tokens=n, budget_msat=budget)
    if most >= 0:
        assert fees.base_fee_msat(rates, prompt_tokens=n, max_tokens=most) <= budget
    if o and most >= -1:
        assert fees.base_fee_msat(rates, prompt_tokens=n, max_tokens=most + 1) > budget


@given(st.integers(0, 10**15), st.data(), st.integers(0, 1_000_000), st.booleans())
def test_an_escrow_divides_without_remainder(escrow, data, ppm, payable):
    charge = data.draw(st.integers(0, escrow))
    parts = divide(escrow_msat=escrow, charge_msat=charge, commission_ppm=ppm, payable=payable)
    assert parts.worker_msat + parts.router_msat + parts.refund_msat == escrow
    assert min(parts.worker_msat, parts.router_msat, parts.refund_msat) >= 0
    assert parts.refund_msat == escrow - charge
    if not payable:
        assert parts.worker_msat == 0


@pytest.mark.parametrize(
    ("value", "expected"), [("1.25", "1.25"), (1.1, "1.1"), (2, "2"), ("007", "7")]
)
def test_decimals_are_read_exactly(value, expected):
    assert parse_decimal(value) == Decimal(expected)


@pytest.mark.parametrize(
    "value", ["NaN", "inf", "-1", "1e3", float("nan"), float("inf"), True, None, "", "1.", "+1"]
)
def test_what_is_no_plain_decimal_is_refused(value):
    with pytest.raises(ValueError):
        parse_decimal(value)
