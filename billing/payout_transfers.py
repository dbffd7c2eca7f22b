"""The transfers that belong to each move of a payout. Pure.

    planned   owner                  -> payouts_sending    amount, and fee cap if a client's
    paid      payouts_sending        -> assets:lightning   amount, and fee if a client's
              expenses:routing_fees  -> assets:lightning   fee, if a worker's
              payouts_sending        -> owner              what is left of the fee cap
    failed    payouts_sending        -> owner              all of it
    paid after all, of a payout that failed:
              owner                  -> assets:lightning   amount, as far as it still holds it
              expenses:goodwill      -> assets:lightning   the rest of the amount
              expenses:routing_fees  -> assets:lightning   fee

They are named by the payout, so each of them can be posted once only.
"""

from __future__ import annotations

from billing import ledger
from billing.ledger import Transfer
from billing.payout_rows import Payout
from billing.payout_states import PayoutKind


def when_planned(payout: Payout) -> list[Transfer]:
    return [Transfer(payout.account, ledger.SENDING, payout.held_msat, "payout", payout.id)]


def when_failed(payout: Payout) -> list[Transfer]:
    return [Transfer(ledger.SENDING, payout.account, payout.held_msat, "payout_failed", payout.id)]


def when_paid(payout: Payout, fee_msat: int) -> list[Transfer]:
    def transfer(debit: str, credit: str, amount_msat: int, code: str) -> Transfer:
        return Transfer(debit, credit, amount_msat, code, payout.id)

    if payout.kind is PayoutKind.WORKER:
        return [
            transfer(ledger.SENDING, ledger.LIGHTNING, payout.amount_msat, "paid"),
            transfer(ledger.ROUTING_FEES, ledger.LIGHTNING, fee_msat, "routing_fee"),
        ]
    # A node that exceeds its cap costs the router, not the client, who has agreed to the cap.
    charged_msat = min(fee_msat, payout.fee_cap_msat)
    return [
        transfer(ledger.SENDING, ledger.LIGHTNING, payout.amount_msat + charged_msat, "paid"),
        transfer(ledger.SENDING, payout.account, payout.fee_cap_msat - charged_msat, "fee_rest"),
        transfer(ledger.ROUTING_FEES, ledger.LIGHTNING, fee_msat - charged_msat, "routing_fee"),
    ]


def when_paid_after_all(payout: Payout, fee_msat: int, *, owner_holds_msat: int) -> list[Transfer]:
    """What it gave back to its owner is taken again; what the owner has spent since is our loss."""
    taken_msat = min(payout.amount_msat, owner_holds_msat)
    lost_msat = payout.amount_msat - taken_msat
    code = "paid_after_all"
    return [
        Transfer(payout.account, ledger.LIGHTNING, taken_msat, code, payout.id),
        Transfer(ledger.GOODWILL, ledger.LIGHTNING, lost_msat, f"{code}_lost", payout.id),
        Transfer(ledger.ROUTING_FEES, ledger.LIGHTNING, fee_msat, f"{code}_fee", payout.id),
    ]
