"""A wallet of an LNbits server (1.6 or later) as a Lightning back end.

    create   POST /api/v1/payments {out: false}    whole satoshis: it cuts fractions off
    watch    WebSocket /api/v1/ws/{invoice key}    repeats nothing, so the last hour is listed first
    pay      POST /api/v1/payments {out: true}     201 says nothing, its `status` does
    look up  GET  /api/v1/payments/{hash}

We are a tenant: the server's node is not ours to ask. The network is read from an invoice of the
wallet, and the wallet has a name in place of a node's key. An answer holds the preimage of an
unpaid invoice, so none is kept or shown. Only LNbits' own words for "too little in the wallet" are
a refusal; after everything else the look-up decides, and its `failed` is not final.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from datetime import datetime
from hashlib import sha256

from billing import bolt11_codec
from billing.bolt11_codec import DecodedInvoice
from billing.errors import BadInvoice
from billing.lightning import (
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
from billing.lightning.careful_wallet import MSAT_PER_SAT, CarefulWallet
from billing.lightning.lnbits_feed import (
    NAME,
    PAYMENTS,
    LnbitsFeed,
    is_no_wallet,
    made_at,
    ok,
    settled_at,
    wrong_key,
)
from billing.lightning.node_http import Fields, NodeHttp, checked_url
from billing.lightning.node_rules import Clock

_WALLET = "/api/v1/wallet"
# Beyond the time that a caller waits for a payment, so that its clock rings first.
_SPARE_S = 10.0
_INVOICE_STATES = {
    "pending": InvoiceState.OPEN,
    "success": InvoiceState.SETTLED,
    # LNbits says so of every invoice past its expiry, without asking its node.
    "failed": InvoiceState.EXPIRED,
}
_PAYMENT_STATES = {
    "pending": PaymentState.IN_FLIGHT,
    "success": PaymentState.SUCCEEDED,
    "failed": PaymentState.FAILED,
}
# What LNbits says before it has sent anything.
_TOO_LITTLE = ("Insufficient balance", "You must reserve at least")


class LnbitsBackend(CarefulWallet):
    """`receive` has the invoice key, `pay` the admin key, or is None: then nothing can be paid."""

    name = NAME
    capabilities = Capabilities(
        granularity_msat=MSAT_PER_SAT,
        description_max_bytes=639,
        description_hash=False,
        fee_limit=False,
        cancel_invoice=False,
        push="live",
        refuses_duplicate_hash=True,
        checks_expiry=False,
        failed_is_definitive=False,
    )

    def __init__(
        self,
        receive: NodeHttp,
        pay: NodeHttp | None,
        *,
        feed: LnbitsFeed,
        wallet_name: str,
        clock: Clock = time.time,
    ) -> None:
        super().__init__(clock)
        self._receive = receive
        self._pay = pay
        self._feed = feed
        self._wallet_name = wallet_name
        self._network: str | None = None

    async def _ask_node_info(self) -> NodeInfo:
        wallet = ok(await (self._pay or self._receive).request("node_info", "GET", _WALLET))
        server = await self._receive.request("node_info", "GET", "/openapi.json")
        version = server.fields().object("info").get("version") if server.status == 200 else None
        wallet_id = wallet.get("id") or self._wallet_name
        if self._network is None:
            self._network = await self._ask_network()
        return NodeInfo(
            # Not a key, and no invoice carries it: it tells this wallet from any other.
            pubkey="02" + sha256(f"lnbits wallet {wallet_id}".encode()).hexdigest(),
            alias=str(wallet.get("name") or "LNbits wallet"),
            version=f"LNbits {version or 'of unknown version'}",
            network=self._network,
            synced=True,
        )

    async def _ask_network(self) -> str:
        """From the wallet's newest payment, or from an invoice made for this alone."""
        for payment in await self._feed.listed("node_info", {}, limit=1):
            try:
                return bolt11_codec.decode(payment.text("bolt11")).network
            except BadInvoice:
                continue
        probe = await self.create_invoice(
            amount_msat=MSAT_PER_SAT,
            description="which network is this? (do not pay)",
            expiry_s=60,
            idempotency_key="",
        )
        return bolt11_codec.decode(probe.bolt11).network

    async def balance(self) -> NodeBalance:
        """LNbits takes what is on its way off the balance at once."""
        wallet = ok(await self._receive.request("balance", "GET", _WALLET))
        pending = await self._feed.listed("balance", {"status": "pending", "amount[lt]": "0"})
        pending_msat = sum(
            abs(payment.number("amount")) + abs(payment.number_or("fee", 0)) for payment in pending
        )
        return NodeBalance(max(0, wallet.number("balance")), None, pending_msat)

    async def create_invoice(
        self, *, amount_msat: int, description: str, expiry_s: int, idempotency_key: str
    ) -> Invoice:
        """Not idempotent: LNbits makes a new invoice each time."""
        self._check_terms(amount_msat, description, expiry_s)
        body = {
            "out": False,
            "unit": "sat",
            "amount": amount_msat // MSAT_PER_SAT,
            "memo": description,
            "expiry": expiry_s,
        }
        reply = await self._receive.request("create_invoice", "POST", PAYMENTS, body=body)
        return self._made(ok(reply, 201).get("bolt11"), amount_msat)

    async def lookup_invoice(self, payment_hash: str) -> InvoiceStatus:
        found = await self._look_up("lookup_invoice", payment_hash)
        if found is None or found.number("amount") <= 0:
            return InvoiceStatus(payment_hash, InvoiceState.NOT_FOUND)
        state = _INVOICE_STATES.get(found.text("status"), InvoiceState.UNKNOWN)
        if state is not InvoiceState.SETTLED:
            return InvoiceStatus(payment_hash, state)
        return InvoiceStatus(
            payment_hash,
            state,
            amount_received_msat=found.number("amount"),
            settled_at=settled_at(found),
        )

    def settlements(self, cursor: str | None) -> AsyncIterator[Settlement]:
        """First what was settled within the last hour, then what is. There is no cursor, and a new
        connection repeats itself."""
        return self._feed.settlements(self._clock())

    async def worst_case_fee_msat(self, amount_msat: int) -> int | None:
        """What LNbits reserves unless its operator has changed that: 2 sat, or 1 % if it is more.
        Before each payment the server is asked for its own sum."""
        return max(2_000, -(-amount_msat // 100))

    async def lookup_payment(self, payment_hash: str) -> PaymentStatus:
        found = await self._look_up("lookup_payment", payment_hash)
        if found is None or found.number("amount") > 0:
            return PaymentStatus(payment_hash, PaymentState.NOT_FOUND)
        return self._status(payment_hash, found)

    def received_since(self, since: datetime) -> AsyncIterator[Settlement]:
        return self._feed.received_since(since)

    async def sent_since(self, since: datetime) -> AsyncIterator[SentPayment]:
        for payment in await self._feed.listed_since("sent_since", since, {"amount[lt]": "0"}):
            state = _PAYMENT_STATES.get(payment.text("status"))
            if state is PaymentState.SUCCEEDED or state is PaymentState.IN_FLIGHT:
                yield SentPayment(
                    payment_hash=payment.text("payment_hash"),
                    state=state,
                    amount_msat=abs(payment.number("amount")),
                    fee_msat=abs(payment.number_or("fee", 0)),
                    sent_at=made_at(payment),
                )

    async def aclose(self) -> None:
        await self._receive.aclose()
        if self._pay is not None:
            await self._pay.aclose()

    async def pay_invoice(
        self, bolt11: str, *, max_fee_msat: int, timeout_s: float, max_cltv_blocks: int | None
    ) -> PaymentStatus:
        if self._pay is None:
            words = "nothing can be paid without LNbits' admin key, SATHERD_LNBITS_PAY_KEY"
            raise self._rejected("pay_invoice", "unsupported", words)
        return await super().pay_invoice(
            bolt11,
            max_fee_msat=max_fee_msat,
            timeout_s=timeout_s,
            max_cltv_blocks=max_cltv_blocks,
        )

    async def _why_not_now(self, invoice: DecodedInvoice, max_fee_msat: int) -> str | None:
        found = await self._look_up("pay_invoice", invoice.payment_hash)
        if found is not None and found.number("amount") > 0:
            words = "the invoice is this wallet's own"
            raise self._rejected("pay_invoice", "self_payment", words)
        return await super()._why_not_now(invoice, max_fee_msat)

    async def _send(
        self,
        bolt11: str,
        invoice: DecodedInvoice,
        *,
        max_fee_msat: int,
        timeout_s: float,
        max_cltv_blocks: int | None,
    ) -> PaymentStatus:
        assert self._pay is not None
        await self._check_reserve(bolt11, max_fee_msat)
        reply = await self._pay.request(
            "pay_invoice",
            "POST",
            PAYMENTS,
            body={"out": True, "bolt11": bolt11},
            read_timeout_s=timeout_s + _SPARE_S,
        )
        if reply.status == 201:
            status = self._status(invoice.payment_hash, reply.fields())
            if status.state is PaymentState.FAILED:
                return PaymentStatus(
                    invoice.payment_hash, PaymentState.UNKNOWN, failure_code="failed"
                )
            return status
        if is_no_wallet(reply):
            raise wrong_key("pay_invoice")
        said = reply.value.get("detail") if isinstance(reply.value, dict) else None
        if reply.status != 520 or not isinstance(said, str):
            raise reply.unexpected()
        if said.startswith(_TOO_LITTLE):
            words = "the wallet holds less than amount and reserve"
            raise self._rejected("pay_invoice", "insufficient_funds", words)
        return await self._look_after_sending(invoice.payment_hash, "failed")

    async def _check_reserve(self, bolt11: str, max_fee_msat: int) -> None:
        """Ask what this server lets routing cost; its operator may have raised that."""
        try:
            reply = await self._receive.request(
                "pay_invoice", "GET", f"{PAYMENTS}/fee-reserve", query={"invoice": bolt11}
            )
            reserve_msat = ok(reply).number("fee_reserve")
        except OutcomeUnknown as error:
            # It is the question that got no answer; the payment has not been asked for.
            raise self._not_sent(error.safe_message) from None
        if reserve_msat > max_fee_msat:
            words = "this server may take more for routing than is allowed"
            raise self._rejected("pay_invoice", "fee_limit", words)

    async def _look_up(self, operation: str, payment_hash: str) -> Fields | None:
        """The wallet's record of a payment in either direction; None when it has none."""
        reply = await self._receive.request(operation, "GET", f"{PAYMENTS}/{payment_hash}")
        if reply.status == 404 and reply.value == {"detail": "Payment does not exist."}:
            return None
        answer = ok(reply)
        if answer.get("details") is None:
            # LNbits answers strangers too, who see less.
            raise wrong_key(operation)
        return answer.object("details")

    def _status(self, payment_hash: str, found: Fields) -> PaymentStatus:
        state = _PAYMENT_STATES.get(found.text("status"), PaymentState.UNKNOWN)
        if state is PaymentState.SUCCEEDED:
            return self._proven(
                payment_hash,
                preimage=found.get("preimage"),
                amount_msat=abs(found.number("amount")),
                fee_msat=abs(found.number_or("fee", 0)),
            )
        failure_code = "failed" if state is PaymentState.FAILED else None
        return PaymentStatus(payment_hash, state, failure_code=failure_code)


def from_settings(
    *, url: str | None = None, key: str | None = None, pay_key: str | None = None
) -> LnbitsBackend:
    """`key` is the wallet's invoice key, `pay_key` its admin key. Raises ValueError."""
    address = checked_url("LNBITS", url, example="https://lnbits.example.com")
    if not key:
        raise ValueError("set SATHERD_LNBITS_KEY: the wallet's invoice key, which cannot pay")
    receive = NodeHttp(NAME, address, headers={"X-Api-Key": key})
    return LnbitsBackend(
        receive,
        NodeHttp(NAME, address, headers={"X-Api-Key": pay_key}) if pay_key else None,
        feed=LnbitsFeed(receive, f"ws{address.removeprefix('http')}/api/v1/ws/{key}"),
        wallet_name=sha256(key.encode()).hexdigest(),
    )
