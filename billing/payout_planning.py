"""From "owed enough" to a planned payout: asks the payee's terms, then takes the money.

Asking comes first, so that an address that does not answer costs no row and moves no money.
"""

from __future__ import annotations

import logging
from datetime import timedelta

from billing import ledger, payees, payout_moves
from billing.accounts import new_id
from billing.errors import BadLightningAddress
from billing.lightning import NodeBalance
from billing.lightning_address import PayTerms, payable_msat
from billing.payees import DuePayee
from billing.payout_context import NOT_THE_PAYEES_FAULT, SOON, PayoutContext
from billing.payout_rows import Payout
from billing.payout_settings import amount_with_cap_msat, batch_fee_cap_msat, room_msat
from billing.payout_states import PayoutKind, PayoutState

log = logging.getLogger(__name__)

TOO_LITTLE_WAIT = timedelta(minutes=10)


class PayoutPlanner:
    def __init__(self, context: PayoutContext) -> None:
        self._context = context

    async def plan(self, due: DuePayee) -> tuple[str, PayTerms] | None:
        """Plan a batch for a payee; returns its id and the terms it was planned by.

        None: nothing was planned, and the payee is due again when its row says so.
        """
        context = self._context
        balance = await context.backend.balance()
        async with context.transaction() as connection:
            affordable_msat = amount_with_cap_msat(await context.room_msat(connection, balance))
        if affordable_msat < context.settings.smallest_batch_msat:
            # Either others are on their way, or the node could not even send this one alone.
            alone_msat = amount_with_cap_msat(room_msat(balance, 0))
            context.short_of_balance |= alone_msat < context.settings.smallest_batch_msat
            return None
        try:
            terms = await self._ask_terms(due)
        except BadLightningAddress as error:
            await self._note_refusal(due, error.code)
            return None
        if terms is None:
            return None
        amount_msat = payable_msat(terms, min(due.owed_msat, affordable_msat))
        worst_msat = await context.backend.worst_case_fee_msat(amount_msat) if amount_msat else None
        fee_cap_msat = batch_fee_cap_msat(amount_msat, worst_msat)
        if amount_msat == 0 or fee_cap_msat is None:
            await self._postpone(due, "below_minimum", TOO_LITTLE_WAIT)
            return None
        payout = Payout(
            id=new_id(),
            kind=PayoutKind.WORKER,
            account=ledger.worker(due.id),
            target=due.ln_url,
            amount_msat=amount_msat,
            fee_cap_msat=fee_cap_msat,
            state=PayoutState.PLANNED,
        )
        return (payout.id, terms) if await self._take_money(due, payout, balance) else None

    async def _ask_terms(self, due: DuePayee) -> PayTerms | None:
        """None when its domain is left alone for now. Raises BadLightningAddress."""
        context, now = self._context, self._context.clock()
        payee = context.addresses.parse(due.ln_url)
        if payee is None:
            raise BadLightningAddress("not_understood", "no address")
        closed_until = context.breaker.closed_at(payee.url.host, now)
        if closed_until is not None:
            await self._postpone(due, "unreachable", closed_until - now)
            return None
        try:
            terms = await context.addresses.resolve(payee)
        except BadLightningAddress as error:
            context.breaker.note(payee.url.host, error.code, now)
            raise
        context.breaker.note(payee.url.host, None, now)
        return terms

    async def _take_money(self, due: DuePayee, payout: Payout, balance: NodeBalance) -> bool:
        """Whether it could be taken: much may have changed while the payee was asked."""
        context, now = self._context, self._context.clock()
        async with context.move() as connection:
            row = await connection.fetchrow(
                "select ln_url from payees where id = $1 for update", due.id
            )
            busy = await connection.fetchval(
                "select 1 from payouts where account = $1 and state in ('planned', 'sending')",
                payout.account,
            )
            held = await ledger.lock_balances(connection, [payout.account])
            if (
                row["ln_url"] != payout.target
                or busy is not None
                or held.get(payout.account, 0) < payout.amount_msat
                or await context.room_msat(connection, balance)
                < payout.amount_msat + payout.fee_cap_msat
            ):
                return False
            await payout_moves.plan(connection, payout, now=now)
            await payout_moves.begin_attempt(connection, payout, now=now, address=payout.target)
        log.info("payout planned payout=%s amount_msat=%d", payout.id, payout.amount_msat)
        return True

    async def _note_refusal(self, due: DuePayee, code: str) -> None:
        log.info("payee not resolved payee=%s code=%s", due.id, code)
        if code in NOT_THE_PAYEES_FAULT:
            await self._postpone(due, code, SOON)
            return
        async with self._context.move() as connection:
            await payees.note_failure(
                connection,
                due.id,
                code,
                now=self._context.clock(),
                jitter=self._context.jitter(),
            )

    async def _postpone(self, due: DuePayee, code: str, wait: timedelta) -> None:
        async with self._context.move() as connection:
            await payees.postpone(connection, due.id, code, self._context.clock() + wait)
