"""What NWC wallets, LNbits and Electrum have in common, beyond `node_rules`: they promise little.

None of them can be trusted with a second call for the same invoice, so before each call the hash
is looked up, and one call per hash runs at a time:

    wait for our own call with this hash   -> its outcome, or a look-up when the time is up first
    look the hash up                       -> SUCCEEDED or IN_FLIGHT: that is the answer
    node_rules                             -> refuse, or send; too late: look it up once more
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from billing import bolt11_codec
from billing.errors import BadInvoice
from billing.lightning import (
    BackendUnavailable,
    Invoice,
    OutcomeUnknown,
    PaymentState,
    PaymentStatus,
)
from billing.lightning.node_rules import Clock, RealNode

MSAT_PER_SAT = 1000


class CarefulWallet(RealNode):
    """A `RealNode` that looks before it pays."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self._locks: dict[str, _Lock] = {}

    async def pay_invoice(
        self, bolt11: str, *, max_fee_msat: int, timeout_s: float, max_cltv_blocks: int | None
    ) -> PaymentStatus:
        node = self._known_node or await self.node_info()
        payment_hash = self._payable(bolt11, node, max_cltv_blocks).payment_hash
        try:
            async with self._alone(payment_hash, timeout_s):
                known = await self._before_sending(payment_hash)
                if known is not None:
                    return known
                return await super().pay_invoice(
                    bolt11,
                    max_fee_msat=max_fee_msat,
                    timeout_s=timeout_s,
                    max_cltv_blocks=max_cltv_blocks,
                )
        except TimeoutError:
            return await self._look_after_sending(payment_hash)

    async def cancel_invoice(self, payment_hash: str) -> bool:
        return False

    async def _before_sending(self, payment_hash: str) -> PaymentStatus | None:
        """What an earlier call has come to; None when there is nothing that still counts."""
        try:
            known = await self.lookup_payment(payment_hash)
        except OutcomeUnknown as error:
            # It is the question that got no answer; the payment has not been asked for.
            raise self._not_sent(error.safe_message) from None
        match known.state:
            case PaymentState.SUCCEEDED | PaymentState.IN_FLIGHT:
                return known
            case PaymentState.UNKNOWN:
                raise self._not_sent("the wallet does not say what it knows of this payment")
            case _:
                return None

    def _not_sent(self, words: str) -> BackendUnavailable:
        return BackendUnavailable(self.name, "pay_invoice", words)

    def _made(self, bolt11: object, amount_msat: int) -> Invoice:
        """What the wallet has made, by its own text. Raises OutcomeUnknown unless it is over what
        was asked: some wallets round, and some drop the amount."""
        try:
            decoded = bolt11_codec.decode(bolt11 if isinstance(bolt11, str) else "")
        except BadInvoice as error:
            raise OutcomeUnknown(
                self.name, "create_invoice", "the wallet's invoice cannot be read", str(error)
            ) from None
        if decoded.amount_msat != amount_msat:
            raise OutcomeUnknown(
                self.name, "create_invoice", "the wallet made an invoice over another amount"
            )
        return Invoice(
            payment_hash=decoded.payment_hash,
            bolt11=str(bolt11),
            amount_msat=amount_msat,
            created_at=decoded.created_at,
            expires_at=decoded.expires_at,
        )

    @asynccontextmanager
    async def _alone(self, payment_hash: str, timeout_s: float) -> AsyncIterator[None]:
        """Raises TimeoutError while another call of ours has the hash."""
        lock = self._locks.setdefault(payment_hash, _Lock())
        lock.wanted_by += 1
        try:
            async with asyncio.timeout(timeout_s):
                await lock.acquire()
            try:
                yield
            finally:
                lock.release()
        finally:
            lock.wanted_by -= 1
            if lock.wanted_by == 0:
                self._locks.pop(payment_hash, None)


class _Lock(asyncio.Lock):
    def __init__(self) -> None:
        super().__init__()
        self.wanted_by = 0
