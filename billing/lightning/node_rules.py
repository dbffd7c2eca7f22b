"""What every back end of a real node decides in the same way, whatever its node's words.

    before anything is sent   an invoice that cannot be paid, by us, now, is BackendRejected
    afterwards                only a look-up decides, and an error of that look-up is OutcomeUnknown

A refusal that could also meet an invoice which we have sent before (it has expired meanwhile, the
money has gone) is a rejection only when the node has no record of an earlier payment.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import UTC, datetime
from hashlib import sha256

from billing import bolt11_codec
from billing.bolt11_codec import DecodedInvoice
from billing.errors import BadInvoice
from billing.lightning import (
    BackendError,
    BackendRejected,
    Capabilities,
    Invoice,
    InvoiceStatus,
    NodeBalance,
    NodeInfo,
    OutcomeUnknown,
    PaymentState,
    PaymentStatus,
    SentPayment,
    Settlement,
)

log = logging.getLogger(__name__)

Clock = Callable[[], float]
_EXPIRY_MAX_S = 365 * 86_400


def time_of(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


class RealNode(ABC):
    """A `LightningBackend` but for its node's own words. `clock` gives seconds since 1970."""

    name: str
    capabilities: Capabilities

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._known_node: NodeInfo | None = None

    @abstractmethod
    async def _ask_node_info(self) -> NodeInfo: ...

    @abstractmethod
    async def balance(self) -> NodeBalance: ...

    @abstractmethod
    async def create_invoice(
        self, *, amount_msat: int, description: str, expiry_s: int, idempotency_key: str
    ) -> Invoice: ...

    @abstractmethod
    async def lookup_invoice(self, payment_hash: str) -> InvoiceStatus: ...

    @abstractmethod
    async def cancel_invoice(self, payment_hash: str) -> bool: ...

    @abstractmethod
    def settlements(self, cursor: str | None) -> AsyncIterator[Settlement]: ...

    @abstractmethod
    async def lookup_payment(self, payment_hash: str) -> PaymentStatus: ...

    @abstractmethod
    def received_since(self, since: datetime) -> AsyncIterator[Settlement]: ...

    @abstractmethod
    def sent_since(self, since: datetime) -> AsyncIterator[SentPayment]: ...

    @abstractmethod
    async def _send(
        self,
        bolt11: str,
        invoice: DecodedInvoice,
        *,
        max_fee_msat: int,
        timeout_s: float,
        max_cltv_blocks: int | None,
    ) -> PaymentStatus:
        """Ask the node to pay, and wait. Raises BackendUnavailable, BackendAuthError (nothing was
        done) or OutcomeUnknown; never BackendRejected for what the node says of the payment."""

    @abstractmethod
    async def aclose(self) -> None: ...

    async def node_info(self) -> NodeInfo:
        self._known_node = await self._ask_node_info()
        return self._known_node

    async def worst_case_fee_msat(self, amount_msat: int) -> int | None:
        return None

    async def pay_invoice(
        self, bolt11: str, *, max_fee_msat: int, timeout_s: float, max_cltv_blocks: int | None
    ) -> PaymentStatus:
        node = self._known_node or await self.node_info()
        invoice = self._payable(bolt11, node, max_cltv_blocks)
        reason = await self._why_not_now(invoice, max_fee_msat)
        if reason is not None:
            return await self._refused(invoice.payment_hash, reason)
        try:
            async with asyncio.timeout(timeout_s):
                return await self._send(
                    bolt11,
                    invoice,
                    max_fee_msat=max_fee_msat,
                    timeout_s=timeout_s,
                    max_cltv_blocks=max_cltv_blocks,
                )
        except TimeoutError:
            return await self._look_after_sending(invoice.payment_hash)

    def _payable(self, bolt11: str, node: NodeInfo, max_cltv_blocks: int | None) -> DecodedInvoice:
        """The invoice, if a payment of it can ever have left this node."""
        try:
            invoice = bolt11_codec.decode(bolt11)
        except BadInvoice as error:
            raise self._rejected("pay_invoice", "malformed", str(error)) from None
        if invoice.network != node.network:
            words = f"the invoice is of {invoice.network}, the node of {node.network}"
            raise self._rejected("pay_invoice", "wrong_network", words)
        if invoice.amount_msat is None:
            raise self._rejected("pay_invoice", "unsupported", "the invoice names no amount")
        if invoice.payee_pubkey == node.pubkey:
            raise self._rejected("pay_invoice", "self_payment", "the invoice is the node's own")
        if max_cltv_blocks is not None and invoice.min_final_cltv > max_cltv_blocks:
            words = "the payee wants more blocks than are allowed"
            raise self._rejected("pay_invoice", "refused", words)
        return invoice

    async def _why_not_now(self, invoice: DecodedInvoice, max_fee_msat: int) -> str | None:
        """Why this node should not even be asked, as a word of BackendRejected."""
        assert invoice.amount_msat is not None
        if self._clock() >= invoice.expires_at.timestamp():
            return "expired"
        worst_msat = await self.worst_case_fee_msat(invoice.amount_msat)
        if worst_msat is not None and worst_msat > max_fee_msat:
            return "fee_limit"
        # Only what is certainly too little: a payment already under way needs no second sum.
        if (await self.balance()).spendable_msat < invoice.amount_msat:
            return "insufficient_funds"
        return None

    async def _refused(self, payment_hash: str, reason: str) -> PaymentStatus:
        """Nothing was sent now. What was sent before, if anything, is what the caller must know."""
        status = await self.lookup_payment(payment_hash)
        definitive = self.capabilities.failed_is_definitive
        match status.state:
            case PaymentState.NOT_FOUND:
                raise self._rejected("pay_invoice", reason, _WORDS[reason])
            case PaymentState.FAILED if definitive:
                raise self._rejected("pay_invoice", reason, _WORDS[reason])
            case PaymentState.FAILED:
                return PaymentStatus(payment_hash, PaymentState.UNKNOWN, failure_code=reason)
            case _:
                return status

    async def _look_after_sending(
        self, payment_hash: str, failure_code: str | None = None
    ) -> PaymentStatus:
        """What the node says after it was asked to pay. Raises OutcomeUnknown only: of a request
        that was sent, a failed look-up proves nothing.

        `failure_code` is the pay call's own word, for a FAILED that is not certain yet.
        """
        try:
            status = await self.lookup_payment(payment_hash)
        except BackendError as error:
            raise OutcomeUnknown(
                self.name, "pay_invoice", "sent, and then no look-up was possible", str(error)
            ) from None
        code = status.failure_code or failure_code
        match status.state:
            case PaymentState.FAILED if self.capabilities.failed_is_definitive:
                if failure_code in _SAYS_THERE_IS_ANOTHER:
                    return PaymentStatus(payment_hash, PaymentState.UNKNOWN, failure_code=code)
                # The call's word is of this attempt, and says more.
                return replace(status, failure_code=failure_code or code)
            case PaymentState.FAILED | PaymentState.NOT_FOUND | PaymentState.UNKNOWN:
                return PaymentStatus(payment_hash, PaymentState.UNKNOWN, failure_code=code)
            case _:
                return status

    def _proven(
        self, payment_hash: str, *, preimage: object, amount_msat: int, fee_msat: int
    ) -> PaymentStatus:
        """SUCCEEDED, if the preimage proves it, else UNKNOWN and a word to the operator."""
        if not is_preimage(preimage, payment_hash):
            log.error(
                "%s calls a payment complete without its preimage; it counts as unresolved"
                " payment_hash=%s",
                self.name,
                payment_hash,
            )
            return PaymentStatus(payment_hash, PaymentState.UNKNOWN, failure_code="wrong_preimage")
        return PaymentStatus(
            payment_hash,
            PaymentState.SUCCEEDED,
            preimage=str(preimage).lower(),
            amount_msat=amount_msat,
            fee_msat=max(0, fee_msat),
        )

    def _check_terms(self, amount_msat: int, description: str, expiry_s: int) -> None:
        """Refuse what no invoice of this node can hold. Raises BackendRejected."""
        words = None
        if not 0 < amount_msat <= bolt11_codec.MAX_AMOUNT_MSAT:
            words = "no invoice can ask for this amount"
        elif amount_msat % self.capabilities.granularity_msat:
            words = "this node makes invoices of whole satoshis only"
        elif len(description.encode()) > self.capabilities.description_max_bytes:
            words = "the description is too long for this node"
        elif not 0 < expiry_s <= _EXPIRY_MAX_S:
            words = f"an invoice lasts between 1 s and {_EXPIRY_MAX_S} s"
        if words is not None:
            raise self._rejected("create_invoice", "malformed", words)

    def _invoice(
        self, bolt11: str, *, amount_msat: int, description: str, expiry_s: int
    ) -> Invoice:
        """What the node has made, by its own text. Raises BackendRejected with `conflict` when that
        has other terms, and OutcomeUnknown when it cannot be read."""
        try:
            decoded = bolt11_codec.decode(bolt11)
        except BadInvoice as error:
            raise OutcomeUnknown(
                self.name, "create_invoice", "the node's invoice cannot be read", str(error)
            ) from None
        made = (decoded.amount_msat, decoded.description, decoded.expiry_s)
        if made != (amount_msat, description, expiry_s):
            words = "the node has made an invoice with other terms for this key"
            raise self._rejected("create_invoice", "conflict", words)
        return Invoice(
            payment_hash=decoded.payment_hash,
            bolt11=bolt11,
            amount_msat=amount_msat,
            created_at=decoded.created_at,
            expires_at=decoded.expires_at,
        )

    def _rejected(self, operation: str, reason: str, words: str) -> BackendRejected:
        return BackendRejected(self.name, operation, words, reason=reason)


# Words of a pay call that contradict a look-up's FAILED.
_SAYS_THERE_IS_ANOTHER = frozenset({"already_paid", "in_progress"})
_WORDS = {
    "expired": "the invoice has expired",
    "fee_limit": "this node may take more for routing than is allowed",
    "insufficient_funds": "the node can send less than the invoice asks for",
}


def is_preimage(preimage: object, payment_hash: str) -> bool:
    """Whether this is 64 hex characters, and their SHA-256 the hash."""
    if not isinstance(preimage, str) or len(preimage) != 64:
        return False
    try:
        return sha256(bytes.fromhex(preimage)).hexdigest() == payment_hash
    except ValueError:
        return False


def asked_msat(bolt11: object) -> int | None:
    """What an invoice that a node shows asks for; None where it shows none, or a misshapen one."""
    if not isinstance(bolt11, str):
        return None
    try:
        return bolt11_codec.decode(bolt11).amount_msat
    except BadInvoice:
        return None
