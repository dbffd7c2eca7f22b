"""One payout from planned to submitted: get an invoice, then have the node pay it.

Each step is: write down what is about to be done, commit, do it, write down what came of it. So a
process that dies anywhere leaves a state from which the next one goes on (billing.payout_states).
"""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import Any

from billing import payees, payout_moves, payout_rows
from billing.errors import BadLightningAddress
from billing.lightning import NodeInfo
from billing.lightning_address import PayTerms, RequestedInvoice
from billing.payout_context import PayoutContext, monotonic_s
from billing.payout_control import is_paused
from billing.payout_resolving import PayoutResolver
from billing.payout_rows import Attempt, Payout
from billing.payout_second_look import failures_stand
from billing.payout_states import OPEN_PAYOUT, SUBMIT_NEEDS, AttemptState

log = logging.getLogger(__name__)


class PayoutSender:
    def __init__(self, context: PayoutContext) -> None:
        self._context = context
        self._resolver = PayoutResolver(context)

    async def advance(self, payout_id: str, node: NodeInfo, terms: PayTerms | None = None) -> None:
        """Do all that can be done for a payout now. Raises LeaseLost, Moved and BackendError: then
        nothing is lost, and the next turn goes on from what is written.

        `terms`: those it was planned by a moment ago.
        """
        going_on = True
        while going_on:
            async with self._context.move() as connection:
                payout, attempt = await payout_rows.load(connection, payout_id)
                paused = await is_paused(connection)
            if payout.state not in OPEN_PAYOUT:
                return
            if attempt is not None and attempt.state is AttemptState.SUBMITTED:
                going_on = await self._resolver.look_up(payout, attempt, node, paused=paused)
            elif paused:
                return
            elif attempt is not None and attempt.state is AttemptState.INVOICED:
                going_on = await self._submit(payout, attempt, node)
            else:
                going_on = await self._get_invoice(payout, attempt, terms)

    async def _get_invoice(
        self, payout: Payout, attempt: Attempt | None, terms: PayTerms | None
    ) -> bool:
        """Whether there is an invoice now."""
        context = self._context
        balance = await context.backend.balance()
        async with context.move() as connection:
            if not await self._wanted(connection, payout):
                await payout_moves.fail(
                    connection,
                    payout,
                    None if attempt is None else attempt.id,
                    "address_changed",
                    now=context.clock(),
                )
                return False
            needed_msat = payout.amount_msat + payout.fee_cap_msat
            if not await context.affords(connection, balance, needed_msat, payout.id):
                await self._postpone(connection, payout)
                return False
            attempt_id = (
                attempt.id
                if attempt is not None
                else await payout_moves.begin_attempt(
                    connection, payout, now=context.clock(), address=payout.target
                )
            )
        try:
            invoice = await self._ask_for_invoice(payout, terms)
        except BadLightningAddress as error:
            async with context.move() as connection:
                await self._resolver.fail(connection, payout, attempt_id, error.code)
            return False
        async with context.move() as connection:
            if await payout_moves.hash_used(connection, invoice.payment_hash):
                await self._resolver.fail(connection, payout, attempt_id, "payment_hash_used")
                return False
            await payout_moves.got_invoice(
                connection,
                attempt_id,
                bolt11=invoice.bolt11,
                payment_hash=invoice.payment_hash,
                expires_at=invoice.expires_at,
            )
        return True

    async def _ask_for_invoice(self, payout: Payout, terms: PayTerms | None) -> RequestedInvoice:
        context, now = self._context, self._context.clock()
        payee = context.addresses.parse(payout.target)
        if payee is None:
            raise BadLightningAddress("not_understood", "no address")
        if terms is None and context.breaker.closed_at(payee.url.host, now) is not None:
            raise BadLightningAddress("unreachable", "the server cannot be reached")
        try:
            if terms is None:
                terms = await context.addresses.resolve(payee)
            invoice = await context.addresses.request_invoice(
                terms, payout.amount_msat, comment=payout.id
            )
        except BadLightningAddress as error:
            context.breaker.note(payee.url.host, error.code, now)
            raise
        context.breaker.note(payee.url.host, None, now)
        return invoice

    async def _submit(self, payout: Payout, attempt: Attempt, node: NodeInfo) -> bool:
        """Whether to go on at once."""
        context = self._context
        assert attempt.expires_at is not None
        if not await failures_stand(context, payout, attempt):
            return False
        balance = await context.backend.balance()
        started_s = monotonic_s()
        async with context.move() as connection:
            now = context.clock()
            if attempt.expires_at - now < SUBMIT_NEEDS:
                await payout_moves.abandon(connection, attempt.id, "invoice_expired", now=now)
                if attempt.address is not None:
                    return True
                await payout_moves.fail(connection, payout, None, "invoice_expired", now=now)
                return False
            if not await self._wanted(connection, payout):
                await payout_moves.abandon(connection, attempt.id, "address_changed", now=now)
                await payout_moves.fail(connection, payout, None, "address_changed", now=now)
                return False
            if await is_paused(connection):
                return False
            needed_msat = payout.amount_msat + payout.fee_cap_msat
            if not await context.affords(connection, balance, needed_msat, payout.id):
                await self._postpone(connection, payout)
                return False
            assert context.lease.token is not None
            await payout_moves.submit(
                connection,
                payout,
                attempt.id,
                backend=context.backend.name,
                node_pubkey=node.pubkey,
                lease_token=context.lease.token,
                now=now,
            )
        return await self._resolver.pay(payout, attempt, node, started_s)

    async def _wanted(self, connection: Any, payout: Payout) -> bool:
        """Whether this is still where its payee wants to be paid."""
        if payout.payee_id is None:
            return True
        address = await payees.get_address(connection, payout.payee_id, now=self._context.clock())
        return address is not None and address.ln_url == payout.target

    async def _postpone(self, connection: Any, payout: Payout) -> None:
        until = self._context.clock() + timedelta(seconds=self._context.settings.idle_s)
        await payout_moves.postpone(connection, payout.id, until)
