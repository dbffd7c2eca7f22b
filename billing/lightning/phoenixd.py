"""phoenixd: form bodies, Basic auth with an empty user name, whole satoshis.

    create   POST /createinvoice                after a look whether the key has made one before
    watch    WebSocket /websocket               live only; after each connect the history is paged
    pay      POST /payinvoice                   HTTP 200 for both outcomes
    look up  GET /payments/outgoingbyhash/{hash}

phoenixd takes neither a fee limit nor a time-out and does not check an outgoing invoice's expiry, so
both are checked here. It keeps the preimage of an *unpaid* invoice in ordinary answers: nothing of an
answer leaves this module but the fields named here. Fee credit, which the first small receipts become
before there is a channel, cannot be spent and counts as nothing.
"""

from __future__ import annotations

import base64
import time
from collections.abc import AsyncIterator
from datetime import datetime

from billing.bolt11_codec import DecodedInvoice
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
from billing.lightning.node_http import (
    Fields,
    NodeHttp,
    checked_url,
)
from billing.lightning.node_rules import Clock, RealNode, asked_msat, is_preimage, time_of
from billing.lightning.phoenixd_answers import failure_code, listed, ok, settlement_of, state_of
from billing.lightning.phoenixd_feed import Feed

# What is paged again after a reconnect; a settlement that comes twice is recorded once.
OVERLAP_MS = 60_000
# Held HTLCs end within two weeks, so older payments are not pending.
_PENDING_SINCE_MS = 14 * 86_400_000
_PAGE = 100
_SPARE_S = 30.0
_BASE_FEE_MSAT, _FEE_PPM = 4_000, 4_000
_LISTED_STATES = {"succeeded": PaymentState.SUCCEEDED, "pending": PaymentState.IN_FLIGHT}
_NETWORKS = {"testnet3": "testnet", "testnet4": "testnet"}


class PhoenixdBackend(RealNode):
    """A phoenixd. `pay` holds the password that may pay; the other may be the limited one."""

    name = "phoenixd"
    capabilities = Capabilities(
        granularity_msat=1000,
        description_max_bytes=128,
        description_hash=True,
        fee_limit=False,
        cancel_invoice=False,
        push="live",
        refuses_duplicate_hash=True,
        checks_expiry=False,
        failed_is_definitive=True,
    )

    def __init__(
        self, receive: NodeHttp, pay: NodeHttp, *, feed: Feed, clock: Clock = time.time
    ) -> None:
        super().__init__(clock)
        self._receive = receive
        self._pay = pay
        self._feed = feed
        self._looks_up_by_hash = False

    async def _ask_node_info(self) -> NodeInfo:
        info = ok(await self._receive.request("node_info", "GET", "/getinfo"))
        network = info.text("chain")
        return NodeInfo(
            pubkey=info.text("nodeId"),
            alias="phoenixd",
            version=info.text("version"),
            network=_NETWORKS.get(network, network),
            # It has a block height as soon as it follows the chain.
            synced=info.get("blockHeight") is not None,
        )

    async def balance(self) -> NodeBalance:
        """Spendable is the channel's balance; fee credit is none of it."""
        held = ok(await self._receive.request("balance", "GET", "/getbalance"))
        info = ok(await self._receive.request("balance", "GET", "/getinfo"))
        since_ms = int(self._clock() * 1000) - _PENDING_SINCE_MS
        sent = listed(
            await self._pay.request(
                "balance",
                "GET",
                "/payments/outgoing",
                query={"all": "true", "from": str(since_ms), "limit": "1000"},
            )
        )
        inbound_sat = sum(
            channel.number_or("inboundLiquiditySat", 0) for channel in info.objects("channels")
        )
        pending_msat = sum(
            payment.number("sent") * 1000 for payment in sent if state_of(payment) == "pending"
        )
        return NodeBalance(held.number("balanceSat") * 1000, inbound_sat * 1000, pending_msat)

    async def fee_credit_msat(self) -> int:
        """What was received before there was a channel: neither spendable nor refundable."""
        held = ok(await self._receive.request("fee_credit", "GET", "/getbalance"))
        return held.number_or("feeCreditSat", 0) * 1000

    async def create_invoice(
        self, *, amount_msat: int, description: str, expiry_s: int, idempotency_key: str
    ) -> Invoice:
        self._check_terms(amount_msat, description, expiry_s)
        made = await self._receive.request(
            "create_invoice",
            "GET",
            "/payments/incoming",
            query={"all": "true", "externalId": idempotency_key},
        )
        found = [one for one in listed(made) if one.get("externalId") == idempotency_key]
        if found:
            bolt11 = found[0].text("invoice")
        else:
            reply = await self._receive.request(
                "create_invoice",
                "POST",
                "/createinvoice",
                form={
                    "amountSat": str(amount_msat // 1000),
                    "description": description,
                    "expirySeconds": str(expiry_s),
                    "externalId": idempotency_key,
                },
            )
            bolt11 = ok(reply).text("serialized")
        return self._invoice(
            bolt11, amount_msat=amount_msat, description=description, expiry_s=expiry_s
        )

    async def lookup_invoice(self, payment_hash: str) -> InvoiceStatus:
        found = await self._incoming("lookup_invoice", payment_hash)
        if found is None:
            return InvoiceStatus(payment_hash, InvoiceState.NOT_FOUND)
        if found.get("isPaid") is not True:
            expired = found.get("isExpired") is True
            state = InvoiceState.EXPIRED if expired else InvoiceState.OPEN
            return InvoiceStatus(payment_hash, state)
        settlement = settlement_of(found)
        return InvoiceStatus(
            payment_hash,
            InvoiceState.SETTLED,
            amount_received_msat=settlement.amount_received_msat,
            settled_at=settlement.settled_at,
            cursor=settlement.cursor,
        )

    async def cancel_invoice(self, payment_hash: str) -> bool:
        return False

    async def settlements(self, cursor: str | None) -> AsyncIterator[Settlement]:
        """Connect, then page what came since the cursor less a minute, then what comes. So some
        come twice; with None, those of the last minute only."""
        async with self._feed.opened() as connection:
            now_ms = int(self._clock() * 1000)
            since_ms = (now_ms if cursor is None else int(cursor)) - OVERLAP_MS
            async for settlement in self._received_since(max(0, since_ms)):
                yield settlement
            async for payment_hash in self._feed.hashes(connection):
                # The message is a hint: amounts and times are those of the record.
                found = await self._incoming("settlements", payment_hash)
                if found is not None and found.get("isPaid") is True:
                    yield settlement_of(found)

    async def worst_case_fee_msat(self, amount_msat: int) -> int | None:
        """The fee schedule of phoenixd's source, which has one level: 4 sat and 0.4 %."""
        return _BASE_FEE_MSAT - (-amount_msat * _FEE_PPM // 1_000_000)

    async def _send(
        self,
        bolt11: str,
        invoice: DecodedInvoice,
        *,
        max_fee_msat: int,
        timeout_s: float,
        max_cltv_blocks: int | None,
    ) -> PaymentStatus:
        reply = await self._pay.request(
            "pay_invoice",
            "POST",
            "/payinvoice",
            form={"invoice": bolt11},
            read_timeout_s=timeout_s + _SPARE_S,
        )
        if reply.status != 200:
            raise reply.unexpected()
        answer = reply.fields()
        preimage = answer.get("paymentPreimage")
        if preimage is None:
            reason = answer.get("reason")
            return await self._look_after_sending(
                invoice.payment_hash, failure_code(reason if isinstance(reason, str) else "")
            )
        status = await self._look_after_sending(invoice.payment_hash)
        if status.state is PaymentState.SUCCEEDED or not is_preimage(
            preimage, invoice.payment_hash
        ):
            return status  # which has the fee to the msat
        assert invoice.amount_msat is not None
        return self._proven(
            invoice.payment_hash,
            preimage=preimage,
            amount_msat=invoice.amount_msat,
            fee_msat=answer.number("routingFeeSat") * 1000,
        )

    async def lookup_payment(self, payment_hash: str) -> PaymentStatus:
        reply = await self._pay.request(
            "lookup_payment", "GET", f"/payments/outgoingbyhash/{payment_hash}"
        )
        if reply.status in (204, 404) and reply.value is None:
            if reply.status == 404:
                await self._prove_lookup_by_hash()
            return PaymentStatus(payment_hash, PaymentState.NOT_FOUND)
        payment = ok(reply)
        match state_of(payment):
            case "succeeded":
                fee_msat = payment.number("fees")
                amount_msat = asked_msat(payment.get("invoice"))
                if amount_msat is None:
                    # `sent` has lost its fraction of a satoshi; what we pay out has none.
                    amount_msat = -(-(payment.number("sent") * 1000 - fee_msat) // 1000) * 1000
                return self._proven(
                    payment_hash,
                    preimage=payment.get("preimage"),
                    amount_msat=amount_msat,
                    fee_msat=fee_msat,
                )
            case "pending":
                return PaymentStatus(payment_hash, PaymentState.IN_FLIGHT)
            case "failed":
                return PaymentStatus(payment_hash, PaymentState.FAILED, failure_code="failed")
            case _:
                return PaymentStatus(payment_hash, PaymentState.UNKNOWN)

    def received_since(self, since: datetime) -> AsyncIterator[Settlement]:
        return self._received_since(int(since.timestamp() * 1000))

    async def sent_since(self, since: datetime) -> AsyncIterator[SentPayment]:
        """What it spent on chain, for channels and splices, has no payment hash and is not here."""
        offset, page = 0, [None] * _PAGE
        while len(page) == _PAGE:
            query = {
                "all": "true",
                "from": str(int(since.timestamp() * 1000)),
                "limit": str(_PAGE),
                "offset": str(offset),
            }
            reply = await self._pay.request("sent_since", "GET", "/payments/outgoing", query=query)
            page = listed(reply)
            offset += _PAGE
            for payment in page:
                state = _LISTED_STATES.get(state_of(payment))
                if state is not None and payment.get("paymentHash") is not None:
                    yield _sent_payment(payment, state)

    async def aclose(self) -> None:
        await self._receive.aclose()
        await self._pay.aclose()

    async def _prove_lookup_by_hash(self) -> None:
        """Newer versions answer 204 for an unknown hash; older ones 404, with the very words they
        have for an unknown address. A version, or a proxy, without this address must not pass for
        one that knows of no payment: of a hash that is none only the right one answers 400."""
        if self._looks_up_by_hash:
            return
        path = "/payments/outgoingbyhash/not-a-hash"
        probe = await self._pay.request("lookup_payment", "GET", path)
        if probe.status != 400:
            words = "this phoenixd, or a proxy before it, has no look-up of payments by their hash"
            raise OutcomeUnknown(self.name, "lookup_payment", words, f"HTTP {probe.status}")
        self._looks_up_by_hash = True

    async def _incoming(self, operation: str, payment_hash: str) -> Fields | None:
        reply = await self._receive.request(operation, "GET", f"/payments/incoming/{payment_hash}")
        if reply.status in (204, 404) and reply.value is None:
            return None
        return ok(reply)

    async def _received_since(self, since_ms: int) -> AsyncIterator[Settlement]:
        page = [None] * _PAGE
        offset = 0
        while len(page) == _PAGE:
            query = {"from": str(since_ms), "limit": str(_PAGE), "offset": str(offset)}
            reply = await self._receive.request(
                "settlements", "GET", "/payments/incoming", query=query
            )
            page = listed(reply)
            offset += _PAGE
            received = [settlement_of(one) for one in page if one.get("isPaid") is True]
            # It lists the newest first.
            for settlement in sorted(reversed(received), key=lambda one: one.settled_at):
                yield settlement


def _sent_payment(payment: Fields, state: PaymentState) -> SentPayment:
    fee_msat = payment.number_or("fees", 0)
    amount_msat = asked_msat(payment.get("invoice"))
    if amount_msat is None:
        amount_msat = max(0, payment.number("sent") * 1000 - fee_msat)
    return SentPayment(
        payment_hash=payment.text("paymentHash"),
        state=state,
        amount_msat=amount_msat,
        fee_msat=fee_msat,
        sent_at=time_of(payment.number("createdAt") / 1000),
    )


def from_settings(
    *, url: str | None = None, password: str | None = None, pay_password: str | None = None
) -> PhoenixdBackend:
    """Raises ValueError, in words for the operator, when a setting is missing or cannot be used."""
    address = checked_url("PHOENIXD", url, example="http://127.0.0.1:9740")
    if not password:
        raise ValueError(
            "set SATHERD_PHOENIXD_PASSWORD: http-password of ~/.phoenix/phoenix.conf, or"
            " http-password-limited-access with SATHERD_PHOENIXD_PAY_PASSWORD beside it"
        )

    def client(authorization: str) -> NodeHttp:
        return NodeHttp("phoenixd", address, headers={"Authorization": authorization})

    receiving = basic(password)
    feed = Feed("ws" + address.removeprefix("http") + "/websocket", receiving)
    return PhoenixdBackend(client(receiving), client(basic(pay_password or password)), feed=feed)


def basic(password: str) -> str:
    """The header of Basic auth with the empty user name."""
    return "Basic " + base64.b64encode(f":{password}".encode()).decode()
