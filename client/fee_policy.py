"""How much to offer: the policy of Llama-Herder's client (peers.md LH-10), without its ratchet.

    automatic     last multiplier, and half a percent more when jobs are waiting
    fee_msat      this offer and no other (its `Fee`)
    multiplier    the automatic offer times this (its `Multiplier`)

Two differences, both on purpose. Amounts are rounded up, so that an offer is never a msat short.
And the automatic multiplier never climbs on its own: it is 1.000 while nothing waits, and never
above what it takes to be next. There, every client that paid half a percent more raised the price
for the next one, with nobody in the queue (peers.md E23).
"""

from __future__ import annotations

from decimal import Decimal

from client.answers import Info, Model
from client.pricing import ONE_MILLI, offer_msat, parse_multiplier_milli

BUMP_MILLI = 1005


def automatic_multiplier_milli(source: Model) -> int:
    """The multiplier to offer for this model now, in thousandths."""
    if source.queue_length <= 0:
        return ONE_MILLI
    bumped = -(-source.last_multiplier_milli * BUMP_MILLI // ONE_MILLI)
    return max(ONE_MILLI, min(bumped, max(source.multiplier_to_be_next_milli, ONE_MILLI)))


def choose_offer_msat(
    base_fee_msat: int,
    source: Model,
    *,
    fee_msat: int | None = None,
    multiplier: str | int | float | Decimal | None = None,
) -> int:
    """What to offer for a job of this base fee, in msat.

    Raises ValueError for both `fee_msat` and `multiplier`, and for a fee below the base fee.
    """
    if fee_msat is not None and multiplier is not None:
        raise ValueError("give a fee or a multiplier, not both")
    if fee_msat is not None:
        if fee_msat < base_fee_msat:
            raise ValueError(f"the fee is at least {base_fee_msat} msat, not {fee_msat}")
        return fee_msat
    milli = automatic_multiplier_milli(source)
    if multiplier is not None:
        # In one step: rounding twice would offer more than asked.
        milli_milli = milli * parse_multiplier_milli(multiplier)
        return -(-base_fee_msat * milli_milli // ONE_MILLI**2)
    return offer_msat(base_fee_msat, multiplier_milli=milli)


def automatic_multiplier_for(info: Info, model_id: str) -> int:
    """`automatic_multiplier_milli` of the model; 1.000 for a model that `/info` does not list."""
    model = info.model(model_id)
    return automatic_multiplier_milli(model) if model else ONE_MILLI
