"""What only the operator can know of the node's money, as transfers. Pure.

deposit      money of the operator's came into the node    assets:lightning / equity:operator
withdrawal   money of the operator's left it               equity:operator / assets:lightning
node_fee     a channel was opened or closed, on chain      expenses:node_fees / assets:lightning
unassigned   a receipt without an invoice, and whose it is liabilities:unassigned / its owner
"""

from __future__ import annotations

from enum import StrEnum

from billing import ledger
from billing.ledger import Transfer


class Booking(StrEnum):
    DEPOSIT = "deposit"
    WITHDRAWAL = "withdrawal"
    NODE_FEE = "node_fee"
    UNASSIGNED = "unassigned"


def transfer(
    booking: Booking, amount_msat: int, reference: str, account_id: str | None = None
) -> Transfer:
    """`account_id` is the client whose an unassigned receipt was; None: the operator's own. The same
    reference books the same thing once."""
    owner = ledger.OPERATOR if account_id is None else ledger.client(account_id)
    debit, credit = {
        Booking.DEPOSIT: (ledger.LIGHTNING, ledger.OPERATOR),
        Booking.WITHDRAWAL: (ledger.OPERATOR, ledger.LIGHTNING),
        Booking.NODE_FEE: (ledger.NODE_FEES, ledger.LIGHTNING),
        Booking.UNASSIGNED: (ledger.UNASSIGNED, owner),
    }[booking]
    return Transfer(debit, credit, amount_msat, f"operator_{booking.value}", reference)
