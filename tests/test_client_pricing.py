"""The client's price rules against the published vectors; its fee policy (LH-10, E23)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from client import pricing
from client.answers import Model
from client.fee_policy import automatic_multiplier_milli
from client.pricing import Rates, format_multiplier, offer_msat, parse_multiplier_milli

VECTORS = json.loads((Path(__file__).parent / "vectors" / "pricing.json").read_text())


def vectors(name: str) -> Any:
    return pytest.mark.parametrize("vector", VECTORS[name], ids=lambda vector: vector["name"])


@vectors("prompt_tokens")
def test_prompt_tokens_follow_the_published_rule(vector):
    got = pricing.prompt_tokens(
        vector["request"], image_prompt_tokens=VECTORS["image_prompt_tokens"]
    )
    assert pricing.counted_bytes(vector["request"]) == vector["utf8_bytes"]
    assert got == vector["prompt_tokens"]


@vectors("base_fees")
def test_base_fees_are_rounded_up_once(vector):
    got = pricing.base_fee_msat(
        Rates.from_json(vector["rates"]),
        prompt_tokens=vector["prompt_tokens"],
        max_tokens=vector["max_tokens"],
        images=vector["images"],
    )
    assert got == vector["base_fee_msat"]


@vectors("offers")
def test_offers_are_rounded_up(vector):
    milli = vector["multiplier_milli"]
    got = pricing.offer_msat(vector["base_fee_msat"], multiplier_milli=milli)
    assert got == vector["offer_msat"]


@vectors("multipliers")
def test_multipliers_are_rounded_down(vector):
    got = pricing.multiplier_milli(vector["offer_msat"], base_fee_msat=vector["base_fee_msat"])
    assert got == vector["multiplier_milli"]


@vectors("invoice_amounts")
def test_invoices_are_whole_satoshis(vector):
    assert pricing.invoice_amount_msat(vector["offer_msat"]) == vector["amount_msat"]


@vectors("output_tokens")
def test_output_is_never_charged_beyond_what_was_delivered(vector):
    got = pricing.output_tokens(
        max_tokens=vector["max_tokens"],
        worker_tokens=vector["worker_tokens"],
        utf8_bytes=vector["utf8_bytes"],
    )
    assert got == vector["output_tokens"]


@vectors("charges")
def test_charges_are_rounded_once_and_stay_within_the_escrow(vector):
    got = pricing.charge_msat(
        Rates.from_json(vector["rates"]),
        prompt_tokens=vector["prompt_tokens"],
        output_tokens=vector["output_tokens"],
        multiplier_milli=vector["multiplier_milli"],
        escrow_msat=vector["escrow_msat"],
        with_prompt_fee=vector["with_prompt_fee"],
        images=vector.get("images", 0),
    )
    assert got == vector["charge_msat"]


def test_half_a_surrogate_pair_counts_as_the_replacement_character():
    assert pricing.counted_bytes({"prompt": "\ud800"}) == 3


@pytest.mark.parametrize(
    ("given", "milli"),
    [("1", 1000), ("1.25", 1250), (1.1, 1100), (2, 2000), ("1.0001", 1001), ("1000", 1_000_000)],
)
def test_multipliers_are_read_exactly_and_finer_steps_rounded_up(given, milli):
    assert parse_multiplier_milli(given) == milli
    assert parse_multiplier_milli(format_multiplier(milli)) == milli


@pytest.mark.parametrize(
    "given", ["0.999", "-1", "nan", "inf", "fast", "", "1000.001", float("nan")]
)
def test_what_is_no_multiplier_is_refused(given):
    with pytest.raises(ValueError, match="multiplier"):
        parse_multiplier_milli(given)


def model(*, last: str, to_be_next: str, queue_length: int) -> Model:
    return Model.from_json(
        {
            "id": "m",
            "last_multiplier": last,
            "multiplier_to_be_next": to_be_next,
            "queue_length": queue_length,
        }
    )


def test_nothing_is_added_while_nothing_waits():
    """Also when the router still remembers a dear job: there is no ratchet (E23)."""
    assert automatic_multiplier_milli(model(last="7.5", to_be_next="1", queue_length=0)) == 1000


def test_half_a_percent_is_added_when_jobs_wait():
    busy = model(last="1.500", to_be_next="2.001", queue_length=4)
    assert automatic_multiplier_milli(busy) == 1508


def test_never_more_is_offered_than_makes_the_job_the_next_one():
    busy = model(last="3.000", to_be_next="1.201", queue_length=1)
    assert automatic_multiplier_milli(busy) == 1201


def test_clients_that_follow_the_policy_do_not_drive_the_price_up():
    """Each pays what it is told, alone in the queue: the price stays where it began."""
    last = 1000
    for _ in range(500):
        idle = model(last=format_multiplier(last), to_be_next="1", queue_length=0)
        last = automatic_multiplier_milli(idle)
    assert last == 1000


def test_half_a_percent_is_never_rounded_away():
    """E2-24: a small fee gets its bump too."""
    busy = model(last="1.000", to_be_next="2", queue_length=1)
    assert automatic_multiplier_milli(busy) == 1005
    assert offer_msat(1081, multiplier_milli=1005) == 1087  # 1086.405


def test_a_multiplier_multiplies_what_is_automatic():
    """LH-10: its `Multiplier`, rounded up and within what a router takes."""
    busy = model(last="1.000", to_be_next="2", queue_length=1)
    assert automatic_multiplier_milli(busy, times_milli=1100) == 1106  # 1105.5
    idle = model(last="3", to_be_next="1", queue_length=0)
    assert automatic_multiplier_milli(idle, times_milli=1100) == 1100
    assert automatic_multiplier_milli(busy, times_milli=1_000_000) == 1_000_000
