"""A payer's money out: to an invoice, or to a Lightning address. Payouts themselves: `billing`."""

from __future__ import annotations

import hashlib
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response

from billing.payout_records import PayoutRecord
from billing.payout_states import PayoutState
from router.api.answers import answer, core_of, read_object
from router.api.own_door import OwnDoorRoute, only, owner, short_text, whole_number
from router.api.payment import Payer
from router.api.purchase import idempotency_key
from router.core import Core
from router.errors import BadRequest, Forbidden, IdempotencyConflict, NoSuchThing
from router.job_views import time_text

router = APIRouter(tags=["balance"], route_class=OwnDoorRoute)
INVOICE_MAX, ADDRESS_MAX = 10_000, 2_000


@router.post("/balance/withdrawals")
async def order(request: Request) -> Response:
    """Take money out: `invoice`, or `address` with `amount_msat` (missing: all that is possible).

    The amount and the most that routing may cost are held at once; the true cost is charged and the
    rest returned. The same invoice, or the same Idempotency-Key, again is the same withdrawal.
    """
    core = core_of(request)
    payer = await _withdrawer(core, request)
    body = await read_object(request)
    only(body, "invoice", "address", "amount_msat")
    invoice = short_text(body, "invoice", most=INVOICE_MAX)
    address = short_text(body, "address", most=ADDRESS_MAX)
    if (invoice is None) == (address is None):
        raise BadRequest("give either an invoice or an address")
    amount_msat = whole_number(
        body, "amount_msat", low=1, high=core.settings.max_amount_msat, needed=False
    )
    if invoice is not None and amount_msat is not None:
        raise BadRequest("an invoice names its own amount", param="amount_msat")
    named = await _reserve_once(core, request, payer, body)
    if invoice is not None:
        record = await core.withdrawals.by_invoice(payer.account_id, invoice)
    else:
        assert address is not None
        record = await core.withdrawals.by_address(
            payer.account_id, address, amount_msat, idempotency_key=named
        )
    return answer(_withdrawal_json(core, record), status=202)


@router.get("/balance/withdrawals/{withdrawal_id}")
async def show(request: Request, withdrawal_id: str) -> Response:
    """How a withdrawal stands; once it is paid, its preimage."""
    core = core_of(request)
    payer = await _withdrawer(core, request)
    record = await core.withdrawals.get(payer.account_id, withdrawal_id)
    if record is None:
        raise NoSuchThing("this account has no such withdrawal")
    return answer(_withdrawal_json(core, record))


async def _withdrawer(core: Core, request: Request) -> Payer:
    payer = await owner(core, request, "withdraw")
    if not payer.may_withdraw:
        raise Forbidden(
            "this key cannot withdraw: use the credential of the top-up, or a key that was made"
            ' with "withdraw": true'
        )
    return payer


async def _reserve_once(
    core: Core, request: Request, payer: Payer, body: dict[str, Any]
) -> str | None:
    """The Idempotency-Key of an order. Raises IdempotencyConflict: it was used for another."""
    named = idempotency_key(request)
    if named is None:
        return None
    digest = hashlib.sha256(orjson.dumps(body, option=orjson.OPT_SORT_KEYS)).digest()
    async with core.database.transaction() as connection:
        await connection.execute(
            "insert into idempotency (scope, key, request_hash, quote_id)"
            " values ($1, $2, $3, '') on conflict do nothing",
            f"withdrawal:{payer.account_id}",
            named,
            digest,
        )
        known = await connection.fetchval(
            "select request_hash from idempotency where scope = $1 and key = $2",
            f"withdrawal:{payer.account_id}",
            named,
        )
    if known != digest:
        raise IdempotencyConflict("this Idempotency-Key was used for another withdrawal")
    return named


def _withdrawal_json(core: Core, record: PayoutRecord) -> dict[str, Any]:
    body: dict[str, Any] = {
        "id": record.id,
        "state": record.state.value,
        "target": record.target,
        "amount_msat": record.amount_msat,
        "fee_cap_msat": record.fee_cap_msat,
        "fee_msat": record.fee_msat,
        "payment_hash": record.payment_hash,
        "created_at": time_text(record.created_at),
        "ended_at": time_text(record.ended_at),
        "network": core.node.network,
        "simulated": core.node.simulated,
    }
    if record.state is PayoutState.PAID:
        body["preimage"] = record.preimage
    if record.state is PayoutState.FAILED:
        body["error"] = record.error_code
    return body
