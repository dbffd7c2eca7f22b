"""What is paid when, and at what cost: settings of payouts and the arithmetic on them. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from billing.lightning import NodeBalance
from billing.msat import ceil_div

FEE_FLOOR_MSAT = 5_000
FEE_PER_MILLE = 5
# Of a node that sets routing fees itself, and may take more than that: a batch has to be so large
# that they are at most 2 % of it.
WORST_FEE_PART = 50
IN_FLIGHT_PART = 4

_BACK_OFF = (
    timedelta(minutes=1),
    timedelta(minutes=5),
    timedelta(minutes=30),
    timedelta(hours=2),
    timedelta(hours=12),
    timedelta(days=1),
)


@dataclass(frozen=True, slots=True)
class PayoutSettings:
    """A worker is paid from `threshold_msat` on, or from `minimum_msat` on when that has been owed
    for `interval_s`. `at_once`: payouts under way at the same time in the one process that pays.
    """

    threshold_msat: int = 1_000_000
    interval_s: float = 86_400
    minimum_msat: int = 100_000
    withdrawal_minimum_msat: int = 10_000
    pay_timeout_s: float = 60
    max_cltv_blocks: int = 1008
    at_once: int = 16
    idle_s: float = 5
    lease_s: float = 20

    @property
    def smallest_batch_msat(self) -> int:
        return min(self.minimum_msat, self.threshold_msat)


def fee_cap_msat(amount_msat: int) -> int:
    """The most that routing may cost: 5 sat or 0.5 %, whichever is more, rounded up."""
    return max(FEE_FLOOR_MSAT, ceil_div(amount_msat * FEE_PER_MILLE, 1000))


def batch_fee_cap_msat(amount_msat: int, worst_case_msat: int | None) -> int | None:
    """The fee cap of a worker's batch; None when the batch is too small for what routing may cost.

    `worst_case_msat` is of a node that takes no limit from us; None: it does.
    """
    if worst_case_msat is None:
        return fee_cap_msat(amount_msat)
    return worst_case_msat if worst_case_msat * WORST_FEE_PART <= amount_msat else None


def room_msat(balance: NodeBalance, under_way_msat: int) -> int:
    """What may be sent besides the `under_way_msat` that is on its way: a quarter of it all.

    A payee can hold what is sent to it for days, and so lock our liquidity, but no more than that.
    The whole is what one answer of the node says, so that an older answer does not make it more.
    """
    quarter = (balance.spendable_msat + balance.pending_msat) // IN_FLIGHT_PART
    return max(0, min(quarter - under_way_msat, balance.spendable_msat))


def amount_with_cap_msat(total_msat: int) -> int:
    """The largest amount that, with its fee cap, is at most `total_msat`; 0 when there is none."""
    if total_msat <= FEE_FLOOR_MSAT:
        return 0
    amount_msat = min(total_msat - FEE_FLOOR_MSAT, total_msat * 1000 // (1000 + FEE_PER_MILLE))
    while amount_msat > 0 and amount_msat + fee_cap_msat(amount_msat) > total_msat:
        amount_msat -= 1
    return amount_msat


def back_off(failures: int, jitter: float) -> timedelta:
    """How long to leave an address alone after its `failures`th failure in a row.

    `jitter` is a random number in [0, 1): the wait is the table's, less or more up to a fifth.
    """
    return _BACK_OFF[min(failures, len(_BACK_OFF)) - 1] * (0.8 + 0.4 * jitter)
