"""What an operator says about the node's money, each change with its row in the audit."""

from __future__ import annotations

from typing import Any

from billing import foreign_payments, ledger, operator_books
from billing.accounts import new_id
from billing.errors import InsufficientFunds
from billing.foreign_payments import ForeignPayment, NoSuchForeignPayment
from billing.operator_books import Booking
from router.administration import changing, note
from router.core import Core
from router.errors import Conflict, NoSuchThing
from router.job_views import time_text


async def book(
    core: Core,
    booking: Booking,
    amount_msat: int,
    *,
    account_id: str | None,
    reference: str | None,
    why: str | None,
) -> dict[str, Any]:
    """Book money of the operator's, or a cost of the node's. The same reference again changes
    nothing. Raises NoSuchThing, and Conflict when it was used for something else, or when there is
    not so much unassigned."""
    transfer = operator_books.transfer(booking, amount_msat, reference or new_id(), account_id)
    async with changing(core) as connection:
        if account_id is not None and not await _exists(connection, "accounts", account_id):
            raise NoSuchThing("there is no such account", account=account_id)
        try:
            posted = await ledger.post(connection, [transfer])
        except InsufficientFunds as error:
            words = f"only {error.balance_msat} msat are unassigned"
            raise Conflict(words, unassigned_msat=error.balance_msat) from None
        if not posted:
            known = await connection.fetchval(
                "select 1 from ledger_transfers"
                " where id = $1 and debit = $2 and credit = $3 and amount_msat = $4",
                transfer.id,
                transfer.debit,
                transfer.credit,
                amount_msat,
            )
            if known is None:
                words = "this reference was used for something else"
                raise Conflict(words, reference=transfer.reference)
        view = {
            "kind": booking.value,
            "amount_msat": amount_msat,
            "debit": transfer.debit,
            "credit": transfer.credit,
            "reference": transfer.reference,
        }
        if posted:
            after = {**view, "reason": why}
            await note(connection, "ledger.book", transfer.reference, None, after)
    return {**view, "booked": bool(posted)}


async def unknown_payments(core: Core) -> list[dict[str, Any]]:
    """The node's payments that these books did not ask for; those that wait come first."""
    async with core.database.connection() as connection:
        return [_view(payment) for payment in await foreign_payments.listed(connection)]


async def confirm(
    core: Core, payment_hash: str, *, worker_id: str | None, account_id: str | None
) -> dict[str, Any]:
    """Say whose an unknown payment was; neither: the operator's own. Raises NoSuchThing."""
    async with changing(core) as connection:
        account = ledger.OPERATOR
        if worker_id is not None:
            if not await _exists(connection, "workers", worker_id):
                raise NoSuchThing("there is no such worker", worker=worker_id)
            account = ledger.worker(worker_id)
        elif account_id is not None:
            if not await _exists(connection, "accounts", account_id):
                raise NoSuchThing("there is no such account", account=account_id)
            account = ledger.client(account_id)
        try:
            payment = await foreign_payments.confirm(
                connection, payment_hash, account, now=core.clock()
            )
        except NoSuchForeignPayment as error:
            raise NoSuchThing(str(error), payment_hash=payment_hash) from None
        after = {"account": account, "amount_msat": payment.amount_msat, "booked": payment.booked}
        await note(connection, "payment.confirm", payment_hash, None, after)
    core.payouts.wake()
    return _view(payment)


async def reconcile(core: Core) -> dict[str, Any]:
    """Compare node and books now. Raises BackendError."""
    found = await core.reconciler.run_once()
    return {
        "since": time_text(found.since),
        "receipts": found.receipts,
        "unknown_payments": found.foreign,
        "held_msat": found.held_msat,
        "booked_msat": found.booked_msat,
        "difference_msat": found.difference_msat,
    }


async def _exists(connection: Any, table: str, row_id: str) -> bool:
    assert table in ("accounts", "workers")
    found = await connection.fetchval(f"select 1 from {table} where id = $1", row_id)
    return found is not None


def _view(payment: ForeignPayment) -> dict[str, Any]:
    return {
        "payment_hash": payment.payment_hash,
        "state": payment.state.value,
        "amount_msat": payment.amount_msat,
        "fee_msat": payment.fee_msat,
        "sent_at": time_text(payment.sent_at),
        "seen_at": time_text(payment.seen_at),
        "confirmed_at": time_text(payment.confirmed_at),
        "account": payment.account,
        "booked": payment.booked,
    }
