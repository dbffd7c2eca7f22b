"""What became of a payout that a node was asked to pay: ask the node, conclude, write it down.

`next_step` of billing.payout_states decides; here is the asking before it and the writing after it.
"""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import Any

from billing import payees, payout_moves, payout_rows
from billing.lightning import (
    BackendAuthError,
    BackendError,
    BackendRejected,
    BackendUnavailable,
    NodeInfo,
    PaymentState,
    PaymentStatus,
)
from billing.payout_context import NOT_THE_PAYEES_FAULT, SOON, PayoutContext, monotonic_s
from billing.payout_control import is_paused
from billing.payout_moves import Moved
from billing.payout_rows import Attempt, Payout
from billing.payout_states import (
    EXPIRY_MARGIN,
    AskedNode,
    AttemptState,
    Failed,
    Resubmit,
    Submitted,
    Succeeded,
    Wait,
    look_again_after,
    next_step,
)

log = logging.getLogger(__name__)

# A request that is older than this when it is about to leave belongs to a process that was stopped
# in between: the world has moved on, and whoever looks next decides.
STALE_S = 10.0
# What a request of another process may need, beyond its time-out, to reach the node.
STRAGGLER = timedelta(seconds=60)

_TRY_LATER = frozenset({"insufficient_funds", "quota"})
_OUR_FAILURES = frozenset({"insufficient_funds", "insufficient_balance", "not_sent", "operator"})


class PayoutResolver:
    def __init__(self, context: PayoutContext) -> None:
        self._context = context

    async def pay(self, payout: Payout, attempt: Attempt, node: NodeInfo, started_s: float) -> bool:
        """Ask the node, which is written down and committed. `attempt` is as it was before that."""
        context = self._context
        if monotonic_s() - started_s > STALE_S:
            log.warning("payout not sent, this process was stopped for long payout=%s", payout.id)
            return False
        first = attempt.submissions == 0
        try:
            status = await context.backend.pay_invoice(
                attempt.bolt11,
                max_fee_msat=payout.fee_cap_msat,
                timeout_s=context.settings.pay_timeout_s,
                max_cltv_blocks=context.settings.max_cltv_blocks,
            )
        except BackendError as error:
            log.warning("payout not clearly paid payout=%s: %s", payout.id, error)
            async with context.move() as connection:
                if first:
                    await self._after_refusal(connection, payout, attempt.id, error)
                else:
                    # It may have been sent by an earlier submission: the look-up decides.
                    await self._postpone_look_up(connection, payout, attempt)
            return False
        async with context.move() as connection:
            payout, submitted = await payout_rows.load(connection, payout.id)
        if submitted is None or submitted.state is not AttemptState.SUBMITTED:
            return False
        if status.state is PaymentState.NOT_FOUND:
            status = PaymentStatus(submitted.payment_hash, PaymentState.UNKNOWN)
        await self._conclude(payout, submitted, status, node, calling=False, resubmit=False)
        return False

    async def _after_refusal(
        self, connection: Any, payout: Payout, attempt_id: str, error: BackendError
    ) -> None:
        """The only submission there was has ended in an error. What certainly did not happen is
        taken back; what is not certain stays submitted."""
        match error:
            case BackendUnavailable() | BackendAuthError():
                await payout_moves.unsubmit(connection, payout, attempt_id)
                await self._postpone(connection, payout, self._context.settings.idle_s)
            case BackendRejected() if error.reason in _TRY_LATER:
                self._context.short_of_balance |= error.reason == "insufficient_funds"
                await payout_moves.unsubmit(connection, payout, attempt_id)
                await self._postpone(connection, payout, self._context.settings.idle_s)
            case BackendRejected():
                await self.fail(connection, payout, attempt_id, error.reason)
            case _:
                await self._postpone(connection, payout, self._context.settings.idle_s)

    async def look_up(
        self, payout: Payout, attempt: Attempt, node: NodeInfo, *, paused: bool
    ) -> bool:
        """Whether to go on at once. It is due again later if the node does not say."""
        context = self._context
        assert attempt.submitted_at is not None
        call_ends_at = (
            attempt.submitted_at + timedelta(seconds=context.settings.pay_timeout_s) + STRAGGLER
        )
        # Our own request has ended, or we would not be here; another process's may not have.
        calling = attempt.lease_token != context.lease.token and context.clock() < call_ends_at
        try:
            status = await context.backend.lookup_payment(attempt.payment_hash)
            return await self._conclude(
                payout, attempt, status, node, calling=calling, resubmit=not paused
            )
        except BackendError as error:
            log.warning("payout not looked up payout=%s: %s", payout.id, error)
            async with context.move() as connection:
                await self._postpone_look_up(connection, payout, attempt)
            return False

    async def _conclude(
        self,
        payout: Payout,
        attempt: Attempt,
        status: PaymentStatus,
        node: NodeInfo,
        *,
        calling: bool,
        resubmit: bool,
    ) -> bool:
        """Do what follows from the node's word; always False, since the next word takes time."""
        context = self._context
        assert attempt.submitted_at is not None and attempt.expires_at is not None
        missing = status.state is PaymentState.NOT_FOUND
        weak = missing or attempt.was_missing
        asked = AskedNode(
            capabilities=context.backend.capabilities,
            same=node.pubkey == attempt.node_pubkey,
            synced=node.synced,
            remembers=not weak or await self._remembers(attempt),
            idle=(await context.backend.balance()).pending_msat == 0
            if status.state is PaymentState.FAILED
            else False,
        )
        facts = Submitted(
            payment_hash=attempt.payment_hash,
            submitted_at=attempt.submitted_at,
            expires_at=attempt.expires_at,
            calling=calling,
            was_known=attempt.was_known,
            was_missing=attempt.was_missing,
            agreed_state=PaymentState(attempt.agreed_state) if attempt.agreed_state else None,
            agreed_since=attempt.agreed_since,
            alert=attempt.alert,
        )
        margin = EXPIRY_MARGIN + timedelta(seconds=context.settings.pay_timeout_s)
        decision = next_step(facts, status, asked, context.clock(), margin=margin)
        if isinstance(decision, Resubmit) and not resubmit:
            decision = Wait()
        match decision:
            case Resubmit():
                return await self._submit_again(payout, attempt, node, missing=missing)
            case Succeeded():
                async with context.move() as connection:
                    await _unchanged(connection, payout, attempt)
                    await self._succeed(connection, payout, attempt.id, decision)
            case Failed():
                async with context.move() as connection:
                    await _unchanged(connection, payout, attempt)
                    await self.fail(connection, payout, attempt.id, decision.code)
            case Wait():
                known = status.state in (PaymentState.IN_FLIGHT, PaymentState.FAILED)
                async with context.move() as connection:
                    await _unchanged(connection, payout, attempt)
                    await self._wait(
                        connection,
                        payout,
                        attempt,
                        decision,
                        known=known,
                        missing=missing and not calling,
                    )
        return False

    async def _submit_again(
        self, payout: Payout, attempt: Attempt, node: NodeInfo, *, missing: bool
    ) -> bool:
        context = self._context
        assert context.lease.token is not None
        started_s = monotonic_s()
        async with context.move() as connection:
            await _unchanged(connection, payout, attempt)
            if await is_paused(connection):
                return False
            if missing:
                await payout_moves.note_missing(connection, attempt.id)
            await payout_moves.submit_again(
                connection, attempt.id, lease_token=context.lease.token, now=context.clock()
            )
        log.info("payout submitted again payout=%s times=%d", payout.id, attempt.submissions + 1)
        return await self.pay(payout, attempt, node, started_s)

    async def _remembers(self, attempt: Attempt) -> bool:
        """Whether the node still knows the payments submitted just before and just after this one.

        Both sides: a history deleted by age takes the older one, a node restored from a backup has
        lost the younger one.
        """
        context = self._context
        async with context.transaction() as connection:
            hashes = [
                await connection.fetchval(
                    f"select payment_hash from payout_attempts where state = 'succeeded'"
                    f" and node_pubkey = $1 and submitted_at {side} $2 and id <> $3"
                    f" order by submitted_at {order} limit 1",
                    attempt.node_pubkey,
                    attempt.submitted_at,
                    attempt.id,
                )
                for side, order in (("<=", "desc"), (">=", "asc"))
            ]
        for payment_hash in hashes:
            if payment_hash is not None:
                witness = await context.backend.lookup_payment(payment_hash)
                if witness.state is not PaymentState.SUCCEEDED:
                    return False
        return True

    # What is written, in the caller's transaction.

    async def _succeed(
        self, connection: Any, payout: Payout, attempt_id: str, proof: Succeeded
    ) -> None:
        if proof.fee_msat > payout.fee_cap_msat:
            log.error(
                "payout cost more than its cap payout=%s fee_msat=%d fee_cap_msat=%d",
                payout.id,
                proof.fee_msat,
                payout.fee_cap_msat,
            )
        await payout_moves.pay(
            connection,
            payout,
            attempt_id,
            preimage=proof.preimage,
            fee_msat=proof.fee_msat,
            now=self._context.clock(),
        )
        if payout.payee_id is not None:
            await payees.note_paid(connection, payout.payee_id)
        log.info("payout paid payout=%s amount_msat=%d", payout.id, payout.amount_msat)

    async def fail(self, connection: Any, payout: Payout, attempt_id: str, code: str) -> None:
        context, now = self._context, self._context.clock()
        await payout_moves.fail(connection, payout, attempt_id, code, now=now)
        log.warning("payout failed payout=%s code=%s", payout.id, code)
        if payout.payee_id is None:
            return
        if code in _OUR_FAILURES or code in NOT_THE_PAYEES_FAULT:
            await payees.postpone(connection, payout.payee_id, code, now + SOON)
            return
        await payees.note_failure(
            connection, payout.payee_id, code, now=now, jitter=context.jitter()
        )

    async def _wait(
        self,
        connection: Any,
        payout: Payout,
        attempt: Attempt,
        decision: Wait,
        *,
        known: bool,
        missing: bool,
    ) -> None:
        assert attempt.submitted_at is not None
        if decision.alert is not None and decision.alert is not attempt.alert:
            log.error("payout needs attention payout=%s alert=%s", payout.id, decision.alert.value)
        now = self._context.clock()
        await payout_moves.wait(
            connection,
            payout,
            attempt.id,
            decision,
            known=known,
            missing=missing,
            now=now,
            next_try_at=now + look_again_after(now - attempt.submitted_at, attempt.submissions),
        )

    async def _postpone_look_up(self, connection: Any, payout: Payout, attempt: Attempt) -> None:
        now = self._context.clock()
        waited = now - (attempt.submitted_at or now)
        await payout_moves.postpone(
            connection, payout.id, now + look_again_after(waited, attempt.submissions)
        )

    async def _postpone(self, connection: Any, payout: Payout, seconds: float) -> None:
        await payout_moves.postpone(
            connection, payout.id, self._context.clock() + timedelta(seconds=seconds)
        )


async def _unchanged(connection: Any, payout: Payout, attempt: Attempt) -> None:
    """Make sure that what was concluded from still stands: an operator may have decided meanwhile.

    Locks the payout, as the operator's decision does. Raises Moved.
    """
    if await payout_rows.load(connection, payout.id) != (payout, attempt):
        raise Moved
