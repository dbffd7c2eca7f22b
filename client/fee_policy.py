"""How much to offer: the policy of Llama-Herder's client (peers.md LH-10), without its ratchet.

    fee_multiplier="auto"   the last multiplier, and half a percent more when jobs are waiting
    times_auto="1.1"        that, times this (its `Multiplier`)
    offer_msat=5000         this offer and no other (its `Fee`)

Two differences, both on purpose. Multipliers and amounts are rounded up, so that an offer is never a
msat short (E2-24). And the automatic multiplier never climbs on its own: it is 1.000 while nothing
waits, and never above what it takes to be next. There, every client that paid half a percent more
raised the price for the next one, with nobody in the queue (E2-23).
"""

from __future__ import annotations

from client.answers import Info, Model
from client.pricing import MAX_MULTIPLIER_MILLI, ONE_MILLI

BUMP_MILLI = 1005


def automatic_multiplier_milli(source: Model, *, times_milli: int = ONE_MILLI) -> int:
    """The multiplier to offer for this model now, in thousandths; `times_milli` multiplies it."""
    milli = ONE_MILLI
    if source.queue_length > 0:
        bumped = -(-source.last_multiplier_milli * BUMP_MILLI // ONE_MILLI)
        milli = max(ONE_MILLI, min(bumped, max(source.multiplier_to_be_next_milli, ONE_MILLI)))
    return min(MAX_MULTIPLIER_MILLI, -(-milli * times_milli // ONE_MILLI))


def automatic_multiplier_for(info: Info, model_id: str, *, times_milli: int = ONE_MILLI) -> int:
    """The same for a model by its id; one that `/info` does not list counts as one that is idle."""
    model = info.model(model_id)
    if model is None:
        return min(MAX_MULTIPLIER_MILLI, times_milli)
    return automatic_multiplier_milli(model, times_milli=times_milli)
