"""What a node's history says of our own payouts that our records have wrong.

invoiced here, sent there   the records are old: it was submitted after the backup was made. It
                            becomes what it is, submitted, and is looked up as always
failed here, paid there     the node took a failure back: the books are put right by other
                            transfers, and payouts pause (billing.payout_second_look)
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from billing import payout_control, payout_moves, payout_rows
from billing.lightning import LightningBackend, PaymentState, SentPayment
from billing.payout_states import AttemptState, proves

log = logging.getLogger(__name__)

# Nobody's: whoever looks it up takes it for a request that may still be on its way.
_NO_LEASE = 0


async def adopt(
    connection: Any,
    sent: Sequence[SentPayment],
    *,
    backend: str,
    node_pubkey: str,
    now: datetime,
) -> int:
    """Make of invoices that we have not sent, as far as we know, what the node says they are; how
    many that were."""
    rows = await connection.fetch(
        "select payout_id from payout_attempts where payment_hash = any($1::text[])"
        " and state = 'invoiced'",
        [payment.payment_hash for payment in sent],
    )
    for row in rows:
        payout, attempt = await payout_rows.load(connection, row["payout_id"])
        if attempt is None or attempt.state is not AttemptState.INVOICED:
            continue
        log.error("payout was sent and is not known as sent, looking it up payout=%s", payout.id)
        await payout_moves.submit(
            connection,
            payout,
            attempt.id,
            backend=backend,
            node_pubkey=node_pubkey,
            lease_token=_NO_LEASE,
            now=now,
        )
        await payout_moves.postpone(connection, payout.id, now)
    return len(rows)


async def failed_here(connection: Any, sent: Sequence[SentPayment]) -> list[Any]:
    """The failed attempts whose payment the node calls paid, as rows."""
    hashes = [p.payment_hash for p in sent if p.state is PaymentState.SUCCEEDED]
    return await connection.fetch(
        "select id, payout_id, payment_hash from payout_attempts"
        " where payment_hash = any($1::text[]) and state = 'failed'",
        hashes,
    )


async def put_right(
    transaction: Any, backend: LightningBackend, row: Any, *, now: datetime
) -> bool:
    """A payout that was counted as failed has been paid, if the node proves it."""
    paid = await backend.lookup_payment(row["payment_hash"])
    if paid.state is not PaymentState.SUCCEEDED or not proves(paid.preimage, row["payment_hash"]):
        return False
    assert paid.preimage is not None
    log.error("payout counted as failed is paid payout=%s: pausing", row["payout_id"])
    try:
        async with transaction() as connection:
            payout, _ = await payout_rows.load(connection, row["payout_id"])
            await payout_moves.correct(
                connection, payout, row["id"], preimage=paid.preimage, fee_msat=paid.fee_msat or 0
            )
            why = f"the node contradicts itself about payout {row['payout_id']}"
            await payout_control.pause(connection, why, now=now)
    except payout_moves.Moved:
        return False  # put right by somebody else
    return True
