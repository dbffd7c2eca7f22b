"""How a finished job's escrow divides: worker, router, refund. Pure, exact to the msat."""

from __future__ import annotations

from dataclasses import dataclass

PPM = 1_000_000


@dataclass(frozen=True, slots=True)
class Division:
    """The three parts of an escrow, in msat; they sum to it."""

    worker_msat: int
    router_msat: int
    refund_msat: int


def divide(*, escrow_msat: int, charge_msat: int, commission_ppm: int, payable: bool) -> Division:
    """Divide an escrow of which `charge_msat` is charged.

    The commission is rounded down, in the worker's favour. A worker that asked not to be paid
    (`payable` False) leaves its part to the router.
    """
    assert 0 <= charge_msat <= escrow_msat, (charge_msat, escrow_msat)
    assert 0 <= commission_ppm <= PPM, commission_ppm
    commission_msat = charge_msat * commission_ppm // PPM if payable else charge_msat
    return Division(
        worker_msat=charge_msat - commission_msat,
        router_msat=commission_msat,
        refund_msat=escrow_msat - charge_msat,
    )
