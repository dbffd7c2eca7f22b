"""LND by its REST interface (0.18 and later; the routes of `routerrpc` pay).

    create   POST /v1/invoices with a preimage of ours, so that the same key makes the same invoice
    watch    GET  /v1/invoices/subscribe?settle_index=N   lines; N = 0 replays nothing
    list     GET  /v1/invoices, /v1/payments              (billing.lightning.lnd_lists)
    pay      POST /v2/router/send                         lines until the payment ends
    look up  GET  /v2/router/track/{hash}                 its first line is the present state

64-bit integers are strings; bytes are base64, and URL-safe base64 within a path. An error is
`{code, message}`, or that in `{"error": …}` on the streaming routes. LND calls a payment FAILED only
when none of its HTLCs is pending, and refuses another of a hash that is under way or paid with code
6. Whatever else a pay call says is not read: the look-up decides.
"""

from __future__ import annotations

import base64
import hmac
import time
from collections.abc import AsyncIterator
from datetime import datetime
from hashlib import sha256
from math import ceil
from pathlib import Path
from typing import Any

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
    lnd_lists,
)
from billing.lightning.lnd_answers import code_words, error, hex_of, ok, reserve_msat, streamed
from billing.lightning.node_http import Fields, NodeHttp, StreamQuiet, checked_url
from billing.lightning.node_rules import Clock, RealNode, time_of

# The plain stream has no heartbeat: after this long without a line, it is asked for again.
QUIET_STREAM_S = 300.0
# Beyond the time-out that LND is given, which only stops new attempts.
_SPARE_S = 30.0
_NOT_FOUND, _ALREADY_EXISTS = 5, 6
_NETWORKS = {"testnet4": "testnet"}
_INVOICE_STATES = {
    "OPEN": InvoiceState.OPEN,
    "ACCEPTED": InvoiceState.OPEN,
    "SETTLED": InvoiceState.SETTLED,
    "CANCELED": InvoiceState.CANCELED,
}
_FAILURES = {
    "FAILURE_REASON_TIMEOUT": "timeout",
    "FAILURE_REASON_NO_ROUTE": "no_route",
    "FAILURE_REASON_ERROR": "error",
    "FAILURE_REASON_INCORRECT_PAYMENT_DETAILS": "incorrect_payment_details",
    "FAILURE_REASON_INSUFFICIENT_BALANCE": "insufficient_balance",
    "FAILURE_REASON_CANCELED": "canceled",
}


class LndBackend(RealNode):
    """An LND. `pay` holds the credential for everything but invoices; it may be the same one."""

    name = "lnd"
    capabilities = Capabilities(
        granularity_msat=1,
        description_max_bytes=639,
        description_hash=True,
        fee_limit=True,
        cancel_invoice=True,
        push="cursor",
        refuses_duplicate_hash=True,
        checks_expiry=True,
        failed_is_definitive=True,
    )

    def __init__(
        self, receive: NodeHttp, pay: NodeHttp, *, preimage_key: bytes, clock: Clock = time.time
    ) -> None:
        super().__init__(clock)
        self._receive = receive
        self._pay = pay
        self._preimage_key = preimage_key

    async def _ask_node_info(self) -> NodeInfo:
        reply = await self._pay.request("node_info", "GET", "/v1/getinfo")
        info = ok(reply)
        network = info.objects("chains")[0].text("network") if info.objects("chains") else ""
        return NodeInfo(
            pubkey=info.text("identity_pubkey"),
            alias=info.text("alias"),
            version=info.text("version"),
            network=_NETWORKS.get(network, network),
            synced=info.get("synced_to_chain") is True,
        )

    async def balance(self) -> NodeBalance:
        """Spendable is what active channels hold of ours beyond their reserves; routing takes its
        part of that."""
        total = ok(await self._pay.request("balance", "GET", "/v1/balance/channels"))
        listed = ok(await self._pay.request("balance", "GET", "/v1/channels"))
        spendable_msat = ours_msat = total.object("local_balance").number_or("msat", 0)
        receivable_msat = total.object("remote_balance").number_or("msat", 0)
        for channel in listed.objects("channels"):
            if channel.get("active") is True:
                spendable_msat -= reserve_msat(channel, "local_constraints")
                receivable_msat -= reserve_msat(channel, "remote_constraints")
            else:
                spendable_msat -= channel.number_or("local_balance", 0) * 1000
                receivable_msat -= channel.number_or("remote_balance", 0) * 1000
        # Outgoing HTLCs count on the remote side, where they are going.
        pending = total.get("unsettled_remote_balance")
        pending_msat = (
            total.object("unsettled_remote_balance").number_or("msat", 0) if pending else 0
        )
        spendable_msat = max(0, spendable_msat)
        return NodeBalance(
            spendable_msat, max(0, receivable_msat), pending_msat, ours_msat - spendable_msat
        )

    async def create_invoice(
        self, *, amount_msat: int, description: str, expiry_s: int, idempotency_key: str
    ) -> Invoice:
        self._check_terms(amount_msat, description, expiry_s)
        preimage = hmac.digest(self._preimage_key, idempotency_key.encode(), "sha256")
        reply = await self._receive.request(
            "create_invoice",
            "POST",
            "/v1/invoices",
            body={
                "value_msat": str(amount_msat),
                "memo": description,
                "expiry": str(expiry_s),
                "private": True,
                "r_preimage": base64.b64encode(preimage).decode(),
            },
        )
        if reply.status == 200:
            bolt11 = reply.fields().text("payment_request")
        else:
            # Most likely the hash exists, because this is the second call with this key.
            found = await self._find_invoice("create_invoice", sha256(preimage).hexdigest())
            if found is None:
                raise reply.unexpected(code_words(reply))
            bolt11 = found.text("payment_request")
        return self._invoice(
            bolt11, amount_msat=amount_msat, description=description, expiry_s=expiry_s
        )

    async def lookup_invoice(self, payment_hash: str) -> InvoiceStatus:
        found = await self._find_invoice("lookup_invoice", payment_hash)
        if found is None:
            return InvoiceStatus(payment_hash, InvoiceState.NOT_FOUND)
        state = _INVOICE_STATES.get(found.text("state"), InvoiceState.UNKNOWN)
        if state is not InvoiceState.SETTLED:
            return InvoiceStatus(payment_hash, state)
        return InvoiceStatus(
            payment_hash,
            state,
            amount_received_msat=found.number("amt_paid_msat"),
            settled_at=time_of(found.number("settle_date")),
            cursor=str(found.number("settle_index")),
        )

    async def cancel_invoice(self, payment_hash: str) -> bool:
        in_base64 = base64.b64encode(bytes.fromhex(payment_hash)).decode()
        reply = await self._receive.request(
            "cancel_invoice", "POST", "/v2/invoices/cancel", body={"payment_hash": in_base64}
        )
        if reply.status == 200:
            return True
        return (await self.lookup_invoice(payment_hash)).state is InvoiceState.CANCELED

    async def settlements(self, cursor: str | None) -> AsyncIterator[Settlement]:
        """With None nothing is replayed: LND takes settle index 0 for "from now on"."""
        while True:
            lines = self._receive.lines(
                "settlements",
                "GET",
                "/v1/invoices/subscribe",
                query={"settle_index": cursor or "0"},
                read_timeout_s=QUIET_STREAM_S,
            )
            try:
                async for line in lines:
                    invoice = streamed(line)
                    if invoice.get("state") != "SETTLED":
                        continue
                    cursor = str(invoice.number("settle_index"))
                    yield Settlement(
                        payment_hash=hex_of(invoice.text("r_hash"), "settlements"),
                        amount_received_msat=invoice.number("amt_paid_msat"),
                        settled_at=time_of(invoice.number("settle_date")),
                        cursor=cursor,
                    )
            except StreamQuiet:
                continue
            raise OutcomeUnknown(self.name, "settlements", "the stream ended")

    async def _send(
        self,
        bolt11: str,
        invoice: DecodedInvoice,
        *,
        max_fee_msat: int,
        timeout_s: float,
        max_cltv_blocks: int | None,
    ) -> PaymentStatus:
        body: dict[str, Any] = {
            "payment_request": bolt11,
            # Without it LND takes only routes that cost nothing.
            "fee_limit_msat": str(max_fee_msat),
            "timeout_seconds": max(1, ceil(timeout_s)),
            "no_inflight_updates": True,
        }
        if max_cltv_blocks is not None:
            body["cltv_limit"] = max_cltv_blocks
        lines = self._pay.lines(
            "pay_invoice",
            "POST",
            "/v2/router/send",
            body=body,
            read_timeout_s=timeout_s + _SPARE_S,
        )
        try:
            async for line in lines:
                failure = error(line)
                if failure is not None and failure.get("code") == _ALREADY_EXISTS:
                    break
                payment = streamed(line)
                if payment.get("status") in ("SUCCEEDED", "FAILED"):
                    return self._payment_status(invoice.payment_hash, payment)
        except StreamQuiet:
            raise OutcomeUnknown(self.name, "pay_invoice", "no answer came") from None
        return await self._look_after_sending(invoice.payment_hash)

    async def lookup_payment(self, payment_hash: str) -> PaymentStatus:
        in_path = base64.urlsafe_b64encode(bytes.fromhex(payment_hash)).decode()
        lines = self._pay.lines(
            "lookup_payment",
            "GET",
            f"/v2/router/track/{in_path}",
            query={"no_inflight_updates": "false"},
            read_timeout_s=_SPARE_S,
        )
        try:
            async for line in lines:
                failure = error(line)
                if failure is not None and failure.get("code") == _NOT_FOUND:
                    return PaymentStatus(payment_hash, PaymentState.NOT_FOUND)
                return self._payment_status(payment_hash, streamed(line))
        except StreamQuiet:
            raise OutcomeUnknown(self.name, "lookup_payment", "no answer came") from None
        finally:
            await lines.aclose()  # type: ignore[attr-defined]
        raise OutcomeUnknown(self.name, "lookup_payment", "the answer is empty")

    def received_since(self, since: datetime) -> AsyncIterator[Settlement]:
        return lnd_lists.received_since(self._receive, since)

    def sent_since(self, since: datetime) -> AsyncIterator[SentPayment]:
        return lnd_lists.sent_since(self._pay, since)

    async def aclose(self) -> None:
        await self._receive.aclose()
        await self._pay.aclose()

    def _payment_status(self, payment_hash: str, payment: Fields) -> PaymentStatus:
        match payment.get("status"):
            case "SUCCEEDED":
                return self._proven(
                    payment_hash,
                    preimage=payment.get("payment_preimage"),
                    amount_msat=payment.number("value_msat"),
                    fee_msat=payment.number("fee_msat"),
                )
            case "FAILED":
                code = _FAILURES.get(str(payment.get("failure_reason")), "failed")
                return PaymentStatus(payment_hash, PaymentState.FAILED, failure_code=code)
            case "INITIATED" | "IN_FLIGHT":
                return PaymentStatus(payment_hash, PaymentState.IN_FLIGHT)
            case _:
                return PaymentStatus(payment_hash, PaymentState.UNKNOWN)

    async def _find_invoice(self, operation: str, payment_hash: str) -> Fields | None:
        reply = await self._receive.request(operation, "GET", f"/v1/invoice/{payment_hash}")
        failure = error(reply)
        if failure is not None and failure.get("code") == _NOT_FOUND:
            return None
        return ok(reply)


def from_settings(
    *,
    url: str | None = None,
    macaroon: str | None = None,
    pay_macaroon: str | None = None,
    cert: str | None = None,
) -> LndBackend:
    """Raises ValueError, in words for the operator, when a setting is missing or cannot be used."""
    address = checked_url("LND", url, example="https://127.0.0.1:8080")
    if not macaroon:
        raise ValueError("set SATHERD_LND_MACAROON: a macaroon as hex, or the path of its file")
    certificate = Path(cert).expanduser() if cert else None
    receive_hex = _macaroon_hex("SATHERD_LND_MACAROON", macaroon)
    pay_hex = (
        _macaroon_hex("SATHERD_LND_PAY_MACAROON", pay_macaroon) if pay_macaroon else receive_hex
    )

    def client(macaroon_hex: str) -> NodeHttp:
        headers = {"Grpc-Metadata-macaroon": macaroon_hex}
        return NodeHttp("lnd", address, headers=headers, certificate=certificate)

    # Whoever holds this macaroon may read the node's preimages anyhow, so the key made of it gives
    # nobody anything; a new macaroon only ends that an old key finds its old invoice.
    preimage_key = sha256(b"satherd preimages of invoices\0" + receive_hex.encode()).digest()
    return LndBackend(client(receive_hex), client(pay_hex), preimage_key=preimage_key)


def _macaroon_hex(setting: str, macaroon: str) -> str:
    try:
        return bytes.fromhex(macaroon).hex()
    except ValueError:
        pass  # Then it is a path.
    try:
        return Path(macaroon).expanduser().read_bytes().hex()
    except OSError as error:
        words = error.strerror or "it cannot be read"
        raise ValueError(f"{setting} is neither hex nor a file that can be read: {words}") from None
