"""A wallet reached by Nostr Wallet Connect (NIP-47) as a Lightning back end.

What such a wallet says is mapped with care, since it may be any wallet:

    RATE_LIMITED NOT_IMPLEMENTED INSUFFICIENT_BALANCE QUOTA_EXCEEDED RESTRICTED UNAUTHORIZED
    UNSUPPORTED_ENCRYPTION BAD_REQUEST EXPIRED     the wallet did nothing: rejected
    PAYMENT_FAILED                                 UNKNOWN: the NIP counts time-outs among them
    INTERNAL OTHER, anything else, no answer       OutcomeUnknown: "already paid" may be behind it

No wallet is paid from unless it can also say what became of a payment (lookup_invoice) and what is
still on its way (list_transactions).
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import datetime
from typing import Any

from billing.bolt11_codec import DecodedInvoice
from billing.lightning import (
    BackendRejected,
    Capabilities,
    Invoice,
    InvoiceState,
    InvoiceStatus,
    NodeBalance,
    NodeInfo,
    OutcomeUnknown,
    PaymentState,
    PaymentStatus,
    SentPayment,
    Settlement,
)
from billing.lightning.careful_wallet import CarefulWallet
from billing.lightning.node_rules import Clock
from billing.lightning.nwc_answers import (
    NETWORKS,
    PAYMENT_STATES,
    fees,
    read_pubkey,
    read_sent,
    read_settlement,
    settled_at,
    wallet_failure,
    whole,
)
from billing.lightning.nwc_link import NAME, NoAnswer, NwcLink, WalletError, read_connection

_ANSWER_TIMEOUT_S = 20.0
_PAGE = 20
# A (re)connected stream tells again what was settled in this time; polling finds the rest.
_LOOK_BACK_S = 3600
_MAX_PENDING_PAGES = 10

_INVOICE_STATES = {
    "pending": InvoiceState.OPEN,
    "accepted": InvoiceState.OPEN,
    "settled": InvoiceState.SETTLED,
    "expired": InvoiceState.EXPIRED,
}


class NwcBackend(CarefulWallet):
    """`capabilities.push` is "live" until the wallet turns out to send no notifications."""

    name = NAME

    def __init__(self, link: NwcLink, *, clock: Clock = time.time) -> None:
        super().__init__(clock)
        self.capabilities = Capabilities(
            granularity_msat=1000,
            description_max_bytes=639,
            description_hash=False,
            fee_limit=False,
            cancel_invoice=False,
            push="live",
            refuses_duplicate_hash=False,
            checks_expiry=False,
            failed_is_definitive=False,
        )
        self._link = link

    async def _ask_node_info(self) -> NodeInfo:
        announced = await self._link.info("node_info")
        if "payment_received" not in announced.notifications:
            self.capabilities = replace(self.capabilities, push="none")
        answer = await self._call("node_info", "get_info", {})
        network = NETWORKS.get(str(answer.get("network")))
        if network is None:
            raise BackendRejected(
                NAME, "node_info", "the wallet does not say its network", reason="unsupported"
            )
        return NodeInfo(
            # Of a wallet that keeps its node to itself, the key that answers for it.
            pubkey=read_pubkey(answer.get("pubkey")) or f"02{self._link.wallet_pubkey}",
            alias=str(answer.get("alias") or "NWC wallet"),
            version="NIP-47",
            network=network,
            synced=True,
        )

    async def balance(self) -> NodeBalance:
        answer = await self._call("balance", "get_balance", {})
        pending_msat = 0
        if "list_transactions" in (await self._link.info("balance")).methods:
            pending_msat = await self._pending_msat()
        return NodeBalance(whole(answer, "balance", "balance"), None, pending_msat)

    async def create_invoice(
        self, *, amount_msat: int, description: str, expiry_s: int, idempotency_key: str
    ) -> Invoice:
        """Not idempotent: a wallet makes a new invoice each time."""
        self._check_terms(amount_msat, description, expiry_s)
        answer = await self._call(
            "create_invoice",
            "make_invoice",
            {"amount": amount_msat, "description": description, "expiry": expiry_s},
        )
        return self._made(answer.get("invoice"), amount_msat)

    async def lookup_invoice(self, payment_hash: str) -> InvoiceStatus:
        found = await self._look_up("lookup_invoice", payment_hash, "incoming")
        if found is None:
            return InvoiceStatus(payment_hash, InvoiceState.NOT_FOUND)
        if found.get("state") is None:
            expires_at = found.get("expires_at")
            lapsed = isinstance(expires_at, int) and expires_at < self._clock()
            state = InvoiceState.EXPIRED if lapsed else InvoiceState.OPEN
            if settled_at(found) is not None:
                state = InvoiceState.SETTLED
        else:
            state = _INVOICE_STATES.get(str(found["state"]), InvoiceState.UNKNOWN)
        if state is not InvoiceState.SETTLED:
            return InvoiceStatus(payment_hash, state)
        return InvoiceStatus(
            payment_hash,
            state,
            amount_received_msat=whole(found, "amount", "lookup_invoice"),
            settled_at=settled_at(found),
        )

    async def settlements(self, cursor: str | None) -> AsyncIterator[Settlement]:
        """First what was settled within the last hour, then what is. There is no cursor, and a new
        connection repeats itself."""
        listed: set[str] = set()
        async with self._link.notifications() as told:
            for found in await self._settled_lately():
                settlement = read_settlement(found)
                if settlement is not None:
                    listed.add(settlement.payment_hash)
                    yield settlement
            while (content := await told.get()) is not None:
                if content.get("notification_type") != "payment_received":
                    continue
                settlement = read_settlement(content.get("notification"))
                if settlement is not None and settlement.payment_hash not in listed:
                    yield settlement
        raise OutcomeUnknown(NAME, "settlements", "the connection to the relay was lost")

    async def worst_case_fee_msat(self, amount_msat: int) -> int | None:
        """What Alby Hub keeps in reserve: 10 sat, or 1 % if that is more."""
        return max(10_000, -(-amount_msat // 100))

    async def pay_invoice(
        self, bolt11: str, *, max_fee_msat: int, timeout_s: float, max_cltv_blocks: int | None
    ) -> PaymentStatus:
        announced = await self._link.info("pay_invoice")
        for method in ("pay_invoice", "lookup_invoice", "list_transactions"):
            if method not in announced.methods:
                words = f"the wallet does not offer {method}"
                raise self._rejected("pay_invoice", "unsupported", words)
        return await super().pay_invoice(
            bolt11,
            max_fee_msat=max_fee_msat,
            timeout_s=timeout_s,
            max_cltv_blocks=max_cltv_blocks,
        )

    async def lookup_payment(self, payment_hash: str) -> PaymentStatus:
        found = await self._look_up("lookup_payment", payment_hash, "outgoing")
        if found is None:
            return PaymentStatus(payment_hash, PaymentState.NOT_FOUND)
        if found.get("state") is None:
            settled = settled_at(found) is not None
            state = PaymentState.SUCCEEDED if settled else PaymentState.IN_FLIGHT
        else:
            state = PAYMENT_STATES.get(str(found["state"]), PaymentState.UNKNOWN)
        if state is PaymentState.SUCCEEDED:
            return self._proven(
                payment_hash,
                preimage=found.get("preimage"),
                amount_msat=whole(found, "amount", "lookup_payment"),
                fee_msat=fees(found),
            )
        failure_code = "payment_failed" if state is PaymentState.FAILED else None
        return PaymentStatus(payment_hash, state, failure_code=failure_code)

    async def received_since(self, since: datetime) -> AsyncIterator[Settlement]:
        async for found in self._listed_since("received_since", "incoming", since, {}):
            settlement = read_settlement(found)
            if settlement is not None:
                yield settlement

    async def sent_since(self, since: datetime) -> AsyncIterator[SentPayment]:
        more = {"unpaid": True, "unpaid_outgoing": True}
        async for found in self._listed_since("sent_since", "outgoing", since, more):
            sent = read_sent(found)
            if sent is not None:
                yield sent

    async def aclose(self) -> None:
        await self._link.aclose()

    async def _send(
        self,
        bolt11: str,
        invoice: DecodedInvoice,
        *,
        max_fee_msat: int,
        timeout_s: float,
        max_cltv_blocks: int | None,
    ) -> PaymentStatus:
        try:
            answer = await self._link.call(
                "pay_invoice", "pay_invoice", {"invoice": bolt11}, timeout_s=timeout_s
            )
        except NoAnswer:
            raise TimeoutError from None
        except WalletError as error:
            if error.code == "PAYMENT_FAILED":
                return PaymentStatus(
                    invoice.payment_hash, PaymentState.UNKNOWN, failure_code="payment_failed"
                )
            raise wallet_failure("pay_invoice", error) from None
        assert invoice.amount_msat is not None
        return self._proven(
            invoice.payment_hash,
            preimage=answer.get("preimage"),
            amount_msat=invoice.amount_msat,
            fee_msat=fees(answer),
        )

    async def _why_not_now(self, invoice: DecodedInvoice, max_fee_msat: int) -> str | None:
        if await self._look_up("pay_invoice", invoice.payment_hash, "incoming") is not None:
            words = "the invoice is this wallet's own"
            raise self._rejected("pay_invoice", "self_payment", words)
        return await super()._why_not_now(invoice, max_fee_msat)

    async def _call(self, operation: str, method: str, params: dict[str, Any]) -> dict[str, Any]:
        try:
            return await self._link.call(operation, method, params, timeout_s=_ANSWER_TIMEOUT_S)
        except WalletError as error:
            raise wallet_failure(operation, error) from None

    async def _look_up(
        self, operation: str, payment_hash: str, direction: str
    ) -> dict[str, Any] | None:
        """The wallet's record in that direction; None when it has none."""
        try:
            found = await self._link.call(
                operation,
                "lookup_invoice",
                {"payment_hash": payment_hash},
                timeout_s=_ANSWER_TIMEOUT_S,
            )
        except WalletError as error:
            if error.code == "NOT_FOUND":
                return None
            raise wallet_failure(operation, error) from None
        if found.get("payment_hash") != payment_hash:
            raise OutcomeUnknown(NAME, operation, "the wallet answered for another payment")
        if found.get("type") not in ("incoming", "outgoing"):
            raise OutcomeUnknown(NAME, operation, "the wallet does not say who paid whom")
        return found if found["type"] == direction else None

    async def _settled_lately(self) -> list[dict[str, Any]]:
        """In the order of their settlement."""
        if "list_transactions" not in (await self._link.info("settlements")).methods:
            return []
        found: list[dict[str, Any]] = []
        since_s = int(self._clock()) - _LOOK_BACK_S
        while True:
            page = await self._page("settlements", "incoming", len(found), {"from": since_s})
            found += page
            if len(page) < _PAGE:
                # Newest first becomes oldest first, also within one second.
                return sorted(reversed(found), key=lambda one: one.get("settled_at") or 0)

    async def _listed_since(
        self, operation: str, direction: str, since: datetime, more: dict[str, Any]
    ) -> AsyncIterator[dict[str, Any]]:
        if "list_transactions" not in (await self._link.info(operation)).methods:
            words = "the wallet does not offer list_transactions"
            raise BackendRejected(NAME, operation, words, reason="unsupported")
        offset = 0
        while True:
            filters = {"from": int(since.timestamp())} | more
            page = await self._page(operation, direction, offset, filters)
            for one in page:
                yield one
            offset += len(page)
            if len(page) < _PAGE:
                return

    async def _pending_msat(self) -> int:
        """What is out in payments without an end. The second flag is Alby Hub's own."""
        pending_msat = 0
        for number in range(_MAX_PENDING_PAGES):
            page = await self._page(
                "balance",
                "outgoing",
                number * _PAGE,
                {"unpaid": True, "unpaid_outgoing": True},
            )
            pending_msat += sum(
                whole(one, "amount", "balance") + fees(one)
                for one in page
                if PAYMENT_STATES.get(str(one.get("state"))) is PaymentState.IN_FLIGHT
                or (one.get("state") is None and settled_at(one) is None)
            )
            if len(page) < _PAGE:
                break
        return pending_msat

    async def _page(
        self, operation: str, direction: str, offset: int, more: dict[str, Any]
    ) -> list[dict[str, Any]]:
        params = {"type": direction, "limit": _PAGE, "offset": offset} | more
        answer = await self._call(operation, "list_transactions", params)
        page = answer.get("transactions")
        if not isinstance(page, list) or not all(isinstance(one, dict) for one in page):
            raise OutcomeUnknown(NAME, operation, "the wallet's list cannot be read")
        return page


def from_settings(*, url: str | None = None) -> NwcBackend:
    """`url` is the connection string that the wallet shows. Raises ValueError."""
    if not url:
        raise ValueError("set SATHERD_NWC_URL: the connection that the wallet shows")
    return NwcBackend(NwcLink(read_connection(url)))
