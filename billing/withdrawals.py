"""A client's money out: to a BOLT11 invoice of its own, or to a Lightning address.

Held at once: the amount and the most that routing may cost. Once it is paid the true cost is
charged and the rest returned; when it definitely failed all of it is. It is sent by the payout
runner, with the same states. An address is tried once: a client that wants more asks again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from datetime import datetime
from typing import Any

from billing import bolt11_codec, ledger, payout_moves
from billing.accounts import new_id
from billing.bolt11_codec import DecodedInvoice
from billing.errors import BadAmount, BadInvoice, BadLightningAddress
from billing.lightning import LightningBackend, NodeInfo
from billing.lightning_address import LightningAddresses, payable_msat
from billing.msat import MSAT_PER_SAT
from billing.payout_context import Clock, Transaction
from billing.payout_records import PayoutRecord, find_payout
from billing.payout_rows import Payout
from billing.payout_settings import PayoutSettings, amount_with_cap_msat, fee_cap_msat
from billing.payout_states import SUBMIT_NEEDS, PayoutKind, PayoutState


class Withdrawals:
    """Takes clients' orders. `on_planned` is called after the commit: it wakes the runner."""

    def __init__(
        self,
        transaction: Transaction,
        backend: LightningBackend,
        addresses: LightningAddresses,
        *,
        settings: PayoutSettings,
        clock: Clock,
        on_planned: Callable[[], None] = lambda: None,
    ) -> None:
        self._transaction = transaction
        self._backend = backend
        self._addresses = addresses
        self._settings = settings
        self._clock = clock
        self._on_planned = on_planned

    async def by_invoice(self, account_id: str, bolt11: str) -> PayoutRecord:
        """Order the payment of an invoice. The same invoice again: the same withdrawal.

        Raises BadInvoice, BadAmount, InsufficientFunds, and BackendError when the node cannot say
        which network it is on.
        """
        bolt11 = bolt11.strip().lower().removeprefix("lightning:")
        invoice = bolt11_codec.decode(bolt11)
        async with self._transaction() as connection:
            known = await self._known(connection, account_id, invoice.payment_hash)
        if known is not None:
            return known
        node = await self._backend.node_info()
        now = self._clock()
        amount_msat = _check(invoice, node, now, self._settings)
        if amount_msat % self._backend.capabilities.granularity_msat:
            raise BadInvoice("the amount must be whole satoshis")
        self._check_minimum(amount_msat)
        payout = await self._payout(account_id, bolt11, amount_msat)
        async with self._transaction() as connection:
            # One order at a time per payment hash, whichever process it came in by.
            await connection.execute(
                "select pg_advisory_xact_lock(hashtextextended($1, 0))", invoice.payment_hash
            )
            known = await self._known(connection, account_id, invoice.payment_hash)
            if known is not None:
                return known
            await payout_moves.plan(connection, payout, now=now)
            attempt_id = await payout_moves.begin_attempt(connection, payout, now=now, address=None)
            await payout_moves.got_invoice(
                connection,
                attempt_id,
                bolt11=payout.target,
                payment_hash=invoice.payment_hash,
                expires_at=invoice.expires_at,
            )
            record = await find_payout(connection, payout.id)
        return self._planned(record)

    async def by_address(
        self,
        account_id: str,
        address: str,
        amount_msat: int | None = None,
        *,
        idempotency_key: str | None = None,
    ) -> PayoutRecord:
        """Order a payment to a Lightning address or LNURL, in whole satoshis.

        `amount_msat` None: all that the balance allows. With an `idempotency_key` the same order
        again is the same withdrawal. Raises BadLightningAddress, BadAmount, InsufficientFunds.
        """
        payout_id = _id_of(account_id, idempotency_key)
        async with self._transaction() as connection:
            # In this order: what the same order has taken meanwhile is not missed in the balance.
            balance_msat = await ledger.balance_msat(connection, ledger.client(account_id))
            known = await find_payout(connection, payout_id)
        if known is not None:
            return known
        payee = self._addresses.parse(address)
        if payee is None:
            raise BadLightningAddress("not_understood", "an address to pay to is needed")
        terms = await self._addresses.resolve(payee, on_behalf_of=account_id)
        if amount_msat is None:
            amount_msat = payable_msat(terms, await self._most_msat(balance_msat))
        self._check_minimum(amount_msat)
        if amount_msat % MSAT_PER_SAT or payable_msat(terms, amount_msat) != amount_msat:
            raise BadAmount(
                f"the payee takes whole satoshis from {terms.min_sendable_msat} to"
                f" {terms.max_sendable_msat} msat"
            )
        payout = await self._payout(account_id, payee.text, amount_msat, payout_id)
        async with self._transaction() as connection:
            await connection.execute(
                "select pg_advisory_xact_lock(hashtextextended($1, 0))", payout_id
            )
            record = await find_payout(connection, payout_id)
            if record is not None:
                return record
            await payout_moves.plan(connection, payout, now=self._clock())
            record = await find_payout(connection, payout_id)
        return self._planned(record)

    async def get(self, account_id: str, withdrawal_id: str) -> PayoutRecord | None:
        """None when this account has no such withdrawal."""
        async with self._transaction() as connection:
            record = await find_payout(connection, withdrawal_id)
        return record if record is not None and _is_of(record, account_id) else None

    async def _known(
        self, connection: Any, account_id: str, payment_hash: str
    ) -> PayoutRecord | None:
        """The withdrawal of this account to this invoice. Raises BadInvoice if it was another's."""
        payout_id = await connection.fetchval(
            "select payout_id from payout_attempts where payment_hash = $1", payment_hash
        )
        if payout_id is None:
            return None
        record = await find_payout(connection, payout_id)
        if record is None or not _is_of(record, account_id):
            raise BadInvoice("this invoice has been used before")
        return record

    async def _payout(
        self, account_id: str, target: str, amount_msat: int, payout_id: str | None = None
    ) -> Payout:
        """The cap is the client's cost, so a node that sets fees itself is held to its worst."""
        worst_msat = await self._backend.worst_case_fee_msat(amount_msat)
        return Payout(
            id=payout_id or new_id(),
            kind=PayoutKind.WITHDRAWAL,
            account=ledger.client(account_id),
            target=target,
            amount_msat=amount_msat,
            fee_cap_msat=fee_cap_msat(amount_msat) if worst_msat is None else worst_msat,
            state=PayoutState.PLANNED,
        )

    async def _most_msat(self, balance_msat: int) -> int:
        """What of a balance can be withdrawn, so that the fee cap is left of it."""
        worst_msat = await self._backend.worst_case_fee_msat(balance_msat) if balance_msat else 0
        if worst_msat is None:
            return amount_with_cap_msat(balance_msat)
        return max(0, balance_msat - worst_msat)

    def _check_minimum(self, amount_msat: int) -> None:
        least_msat = self._settings.withdrawal_minimum_msat
        if amount_msat < least_msat:
            raise BadAmount(f"a withdrawal is at least {least_msat} msat")

    def _planned(self, record: PayoutRecord | None) -> PayoutRecord:
        assert record is not None
        self._on_planned()
        return record


def _check(invoice: DecodedInvoice, node: NodeInfo, now: datetime, settings: PayoutSettings) -> int:
    """The amount of an invoice that we are ready to pay, in msat. Raises BadInvoice."""
    if invoice.network != node.network:
        raise BadInvoice(f"the invoice is for {invoice.network}, and we are on {node.network}")
    if invoice.amount_msat is None:
        raise BadInvoice("the invoice must name an amount")
    if invoice.expires_at - now < SUBMIT_NEEDS:
        raise BadInvoice("the invoice has expired, or nearly")
    if invoice.payee_pubkey == node.pubkey:
        raise BadInvoice("the invoice is one of our own node")
    if not invoice.has_payment_secret or invoice.min_final_cltv > settings.max_cltv_blocks:
        raise BadInvoice("the invoice cannot be paid safely")
    return invoice.amount_msat


def _is_of(record: PayoutRecord, account_id: str) -> bool:
    return record.kind is PayoutKind.WITHDRAWAL and record.owner_id == account_id


def _id_of(account_id: str, idempotency_key: str | None) -> str:
    if idempotency_key is None:
        return new_id()
    return hashlib.sha256(f"withdrawal\0{account_id}\0{idempotency_key}".encode()).hexdigest()[:32]
