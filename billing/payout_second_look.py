"""Before a payee is sent anything more: is what was counted as failed still as dead as it was?

The rules of billing.payout_states rest on what a node says. If one takes a "failed" back (a part
that was still on its way, a record that came back with a backup), this notices it at the last moment
at which it matters: nothing more is sent to that payee, the books are put right, payouts pause.
"""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import Any

from billing import payout_control, payout_moves, payout_rows
from billing.lightning import PaymentState, PaymentStatus
from billing.payout_context import PayoutContext
from billing.payout_rows import Attempt, Payout
from billing.payout_states import proves

log = logging.getLogger(__name__)

_LOOK_BACK = timedelta(days=2)
_AT_MOST = 8

_FAILED = """
select a.id as attempt_id, a.payment_hash, o.id as payout_id
from payout_attempts a join payouts o on o.id = a.payout_id
where o.account = $1 and o.created_at > $2 and o.state = 'failed'
  and a.state = 'failed' and a.submitted_at is not null
order by o.created_at desc limit $3"""


async def failures_stand(context: PayoutContext, payout: Payout, attempt: Attempt) -> bool:
    """Whether this payout may be sent, as far as the earlier ones of its account are concerned.

    If not, it has been ended or put off. Raises BackendError when the node cannot say.
    """
    async with context.transaction() as connection:
        earlier = await connection.fetch(
            _FAILED, payout.account, context.clock() - _LOOK_BACK, _AT_MOST
        )
    for row in earlier:
        status = await context.backend.lookup_payment(row["payment_hash"])
        paid = status.state is PaymentState.SUCCEEDED and proves(
            status.preimage, row["payment_hash"]
        )
        if paid or status.state is PaymentState.IN_FLIGHT:
            async with context.move() as connection:
                await _stop(connection, context, payout, attempt, row, status if paid else None)
            return False
    return True


async def _stop(
    connection: Any,
    context: PayoutContext,
    payout: Payout,
    attempt: Attempt,
    row: Any,
    paid: PaymentStatus | None,
) -> None:
    """Send nothing, give this payout's money back, then take what the earlier one has paid."""
    now = context.clock()
    log.error(
        "payout counted as failed is %s payout=%s: pausing",
        "paid" if paid else "in flight again",
        row["payout_id"],
    )
    await payout_moves.abandon(connection, attempt.id, "paid_before", now=now)
    await payout_moves.fail(connection, payout, None, "paid_before", now=now)
    if paid is not None:
        assert paid.preimage is not None
        earlier, _ = await payout_rows.load(connection, row["payout_id"])
        await payout_moves.correct(
            connection,
            earlier,
            row["attempt_id"],
            preimage=paid.preimage,
            fee_msat=paid.fee_msat or 0,
        )
    why = f"the node contradicts itself about payout {row['payout_id']}"
    await payout_control.pause(connection, why, now=now)
