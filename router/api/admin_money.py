"""`/admin`: node and books. What a change does is in `router.solvency`."""

from __future__ import annotations

import re

from fastapi import Request, Response

from billing.operator_books import Booking
from router import admin_views, solvency
from router.api.admin_access import REASON_MAX, admin_router
from router.api.answers import answer, core_of, read_object
from router.api.own_door import only, short_text, whole_number
from router.errors import BadRequest

# All the bitcoin there is.
_MOST_MSAT = 2_100_000_000_000_000_000
_REFERENCE_MAX = 100
_HASH = re.compile("[0-9a-f]{64}")

router = admin_router()


@router.get("/ledger")
async def show_books(request: Request) -> Response:
    """The trial balance, which must be zero, beside what the node says it holds."""
    return answer(await admin_views.books(core_of(request)))


@router.post("/ledger/reconcile")
async def reconcile(request: Request) -> Response:
    """Compare the node's own history with the books now, as is done at each start and daily."""
    core = core_of(request)
    only(await read_object(request))
    found = await solvency.reconcile(core)
    return answer({**found, "simulated": core.node.simulated})


@router.post("/ledger/book")
async def book(request: Request) -> Response:
    """Book what only the operator can know of the node's money.

    `kind`: `deposit` (the operator's money came in), `withdrawal` (it left), `node_fee` (channels,
    on chain), `unassigned` (a receipt without an invoice, to `account` or else the operator). The
    same `reference` again changes nothing.
    """
    core = core_of(request)
    body = await read_object(request)
    only(body, "kind", "amount_msat", "account", "reference", "reason")
    if body.get("kind") not in set(Booking):
        raise BadRequest(f"kind must be one of {', '.join(Booking)}", param="kind")
    booking = Booking(body["kind"])
    amount_msat = whole_number(body, "amount_msat", low=1, high=_MOST_MSAT)
    account_id = short_text(body, "account", most=_REFERENCE_MAX)
    if account_id is not None and booking is not Booking.UNASSIGNED:
        raise BadRequest("account is for unassigned receipts only", param="account")
    assert amount_msat is not None
    booked = await solvency.book(
        core,
        booking,
        amount_msat,
        account_id=account_id,
        reference=short_text(body, "reference", most=_REFERENCE_MAX),
        why=short_text(body, "reason", most=REASON_MAX),
    )
    return answer({**booked, "simulated": core.node.simulated})


@router.get("/payouts/unknown")
async def list_unknown_payments(request: Request) -> Response:
    """Payments of the node that these books did not ask for; while one waits for a word, nothing is
    paid out."""
    core = core_of(request)
    payments = await solvency.unknown_payments(core)
    return answer({"payments": payments, "simulated": core.node.simulated})


@router.post("/payouts/unknown/{payment_hash}/confirm")
async def confirm_payment(request: Request, payment_hash: str) -> Response:
    """Say whose an unknown payment was: `worker` or `account` that is owed that much less, else the
    operator's own. It is booked as soon as it has succeeded."""
    core = core_of(request)
    body = await read_object(request)
    only(body, "worker", "account")
    worker_id = short_text(body, "worker", most=_REFERENCE_MAX)
    account_id = short_text(body, "account", most=_REFERENCE_MAX)
    if worker_id is not None and account_id is not None:
        raise BadRequest("it was one or the other: worker or account", param="worker")
    if not _HASH.fullmatch(payment_hash):
        raise BadRequest("a payment hash is 64 hex characters", param="payment_hash")
    payment = await solvency.confirm(core, payment_hash, worker_id=worker_id, account_id=account_id)
    return answer({**payment, "simulated": core.node.simulated})
