"""An Electrum daemon (4.3 to 4.8) by its JSON-RPC. Receiving first; paying is experimental.

    create   add_request      BTC as a decimal, and cut to whole satoshis
    watch    list_requests    nothing is pushed, so it is asked again and again
    pay      lnpay            its time-out does nothing; `success: false` may leave HTLCs behind
    look up  get_invoice      3 paid, 4 in flight, anything else is no proof by itself
             lightning_history    the preimage and the fee of what was paid
             list_channels        whether any HTLC of ours is out at all

Met with 4.3.4 on a real network: a payment whose failure it cannot read, since a hop has spoilt it,
stays in flight (4) until the daemon is started again. It limits the fee by its own rule only (5
sat, or 1 %), and a request of its may also be paid on chain: that is none of our business and
counts as UNKNOWN.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import datetime
from decimal import Decimal
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
from billing.lightning.careful_wallet import MSAT_PER_SAT, CarefulWallet
from billing.lightning.electrum_rpc import NAME, ElectrumRpc, Refused, unclear
from billing.lightning.node_http import Fields, checked_url, read_objects
from billing.lightning.node_rules import Clock, time_of

_SAT_PER_BTC = 100_000_000
_POLL_S = 1.0
# Beyond the time that a caller waits for a payment, so that its clock rings first.
_SPARE_S = 10.0
_UNPAID, _EXPIRED, _PAID, _IN_FLIGHT, _FAILED = 0, 1, 3, 4, 5
# `expiration` became `expiry`, and requests without an address came, and limits for a payment.
_EXPIRY_SINCE, _LIGHTNING_SINCE, _LIMITS_SINCE = (4, 5), (4, 6), (4, 8)
_NOT_FOUND = "not found"
_GONE = frozenset({"CLOSED", "REDEEMED"})


class ElectrumBackend(CarefulWallet):
    """The wallet that the daemon has loaded as its default."""

    name = NAME
    capabilities = Capabilities(
        granularity_msat=MSAT_PER_SAT,
        description_max_bytes=639,
        description_hash=False,
        fee_limit=False,
        cancel_invoice=False,
        push="none",
        refuses_duplicate_hash=True,
        checks_expiry=True,
        failed_is_definitive=False,
    )

    def __init__(self, rpc: ElectrumRpc, *, clock: Clock = time.time) -> None:
        super().__init__(clock)
        self._rpc = rpc
        self._version: tuple[int, ...] | None = None

    async def _ask_node_info(self) -> NodeInfo:
        info = await self._rpc.object("node_info", "getinfo")
        node = await self._rpc.call("node_info", "nodeid")
        if not isinstance(node, str):
            raise OutcomeUnknown(NAME, "node_info", "the wallet has no Lightning key")
        self._version = _read_version(info.text("version"))
        return NodeInfo(
            pubkey=node.partition("@")[0],
            alias="Electrum",
            version=f"Electrum {info.text('version')}",
            network=info.text("network"),
            synced=info.get("connected") is True
            and info.number("blockchain_height") >= info.number("server_height"),
        )

    async def balance(self) -> NodeBalance:
        """In whole satoshis, as Electrum tells it; reserves are not spendable."""
        spendable_sat = receivable_sat = pending_sat = ours_sat = 0
        for channel in await self._channels("balance"):
            if channel.get("state") not in _GONE:
                # It takes an outgoing HTLC off only when that has settled.
                ours_sat += channel.number_or("local_balance", 0)
            sent_sat = channel.number_or("local_unsettled_sent", 0)
            pending_sat += sent_sat
            if channel.get("state") == "OPEN" and channel.get("peer_state") == "GOOD":
                spendable_sat += max(
                    0,
                    channel.number("local_balance")
                    - channel.number_or("local_reserve", 0)
                    - sent_sat,
                )
                receivable_sat += max(
                    0, channel.number("remote_balance") - channel.number_or("remote_reserve", 0)
                )
        reserve_sat = max(0, ours_sat - spendable_sat - pending_sat)
        return NodeBalance(
            spendable_sat * MSAT_PER_SAT,
            receivable_sat * MSAT_PER_SAT,
            pending_sat * MSAT_PER_SAT,
            reserve_sat * MSAT_PER_SAT,
        )

    async def create_invoice(
        self, *, amount_msat: int, description: str, expiry_s: int, idempotency_key: str
    ) -> Invoice:
        """Not idempotent. Rejected when no channel can receive so much: Electrum would make an
        invoice that nobody can pay."""
        self._check_terms(amount_msat, description, expiry_s)
        version = await self._known_version()
        params: dict[str, Any] = {
            "amount": f"{Decimal(amount_msat // MSAT_PER_SAT) / _SAT_PER_BTC:.8f}",
            "memo": description,
            "expiry" if version >= _EXPIRY_SINCE else "expiration": expiry_s,
        }
        # Older ones attach an address to each request, and would run out of fresh ones.
        params |= {"lightning": True} if version >= _LIGHTNING_SINCE else {"force": True}
        request = await self._rpc.object("create_invoice", "add_request", params)
        if request.get("can_receive") is False:
            words = "no channel can receive this amount"
            raise BackendRejected(NAME, "create_invoice", words, reason="refused")
        return self._made(request.get("lightning_invoice"), amount_msat)

    async def lookup_invoice(self, payment_hash: str) -> InvoiceStatus:
        try:
            found = await self._rpc.object(
                "lookup_invoice", "get_request", {"request_id": payment_hash}, may_refuse=True
            )
        except Refused as error:
            if _NOT_FOUND in error.message.lower():
                return InvoiceStatus(payment_hash, InvoiceState.NOT_FOUND)
            raise unclear("lookup_invoice") from None
        status = _invoice_status(payment_hash, found)
        if status.state is not InvoiceState.SETTLED:
            return status
        times = await self._times_of_receipts("lookup_invoice")
        return replace(status, settled_at=self._time_of_receipt(times, payment_hash))

    async def settlements(self, cursor: str | None) -> AsyncIterator[Settlement]:
        """Everything that was ever received, then what is; asked for again each second."""
        told: set[str] = set()
        while True:
            listed = await self._rpc.call("settlements", "list_requests", {"paid": True})
            new = [
                status
                for request in read_objects(NAME, "settlements", listed, "requests")
                if isinstance(payment_hash := request.get("rhash"), str)
                and payment_hash not in told
                and (status := _invoice_status(payment_hash, request)).state is InvoiceState.SETTLED
            ]
            times = await self._times_of_receipts("settlements") if new else {}
            settlements = [
                Settlement(
                    status.payment_hash,
                    status.amount_received_msat,
                    self._time_of_receipt(times, status.payment_hash),
                    cursor=None,
                )
                for status in new
            ]
            for settlement in sorted(settlements, key=lambda one: one.settled_at):
                told.add(settlement.payment_hash)
                yield settlement
            await asyncio.sleep(_POLL_S)

    async def _times_of_receipts(self, operation: str) -> dict[str, int]:
        """Seconds since 1970, by payment hash. Requests themselves do not say when."""
        history = await self._rpc.call(operation, "lightning_history")
        return {
            item.text("payment_hash"): item.number("timestamp")
            for item in read_objects(NAME, operation, history, "history")
            if item.get("payment_hash") and item.get("timestamp")
        }

    def _time_of_receipt(self, times: dict[str, int], payment_hash: str) -> datetime:
        return time_of(times.get(payment_hash, self._clock()))

    async def worst_case_fee_msat(self, amount_msat: int) -> int | None:
        """Electrum's own rule: 1 %, or 5 sat in 4.3 and 10 sat since, whichever is more."""
        return max(10_000, -(-amount_msat // 100))

    async def lookup_payment(self, payment_hash: str) -> PaymentStatus:
        try:
            found = await self._rpc.object(
                "lookup_payment", "get_invoice", {"invoice_id": payment_hash}, may_refuse=True
            )
        except Refused as error:
            if _NOT_FOUND not in error.message.lower():
                raise unclear("lookup_payment") from None
            return await self._paid(payment_hash) or PaymentStatus(
                payment_hash, PaymentState.NOT_FOUND
            )
        status = found.number("status")
        if status == _IN_FLIGHT:
            return PaymentStatus(payment_hash, PaymentState.IN_FLIGHT)
        if status == _PAID:
            # Without the preimage, it may have been paid on chain.
            return await self._paid(payment_hash) or PaymentStatus(
                payment_hash, PaymentState.UNKNOWN, failure_code="no_preimage"
            )
        if status not in (_UNPAID, _EXPIRED, _FAILED) or await self._any_htlc():
            # Electrum has given up, and an HTLC is out that may be of this payment.
            return PaymentStatus(payment_hash, PaymentState.UNKNOWN, failure_code="htlcs_pending")
        # Killed between two writes of its file, it has the HTLC as settled and the invoice as
        # unpaid, and would pay again. Asked after the channels, so that it cannot settle between.
        return await self._paid(payment_hash) or PaymentStatus(
            payment_hash, PaymentState.FAILED, failure_code="failed"
        )

    async def received_since(self, since: datetime) -> AsyncIterator[Settlement]:
        for item in await self._history_since("received_since", since):
            if item.number("amount_msat") > 0:
                yield Settlement(
                    item.text("payment_hash"),
                    item.number("amount_msat"),
                    time_of(item.number("timestamp")),
                    cursor=None,
                )

    async def sent_since(self, since: datetime) -> AsyncIterator[SentPayment]:
        """What has settled: Electrum lists nothing that is still on its way."""
        for item in await self._history_since("sent_since", since):
            if item.number("amount_msat") < 0:
                fee_msat = item.number_or("fee_msat", 0)
                yield SentPayment(
                    item.text("payment_hash"),
                    PaymentState.SUCCEEDED,
                    -item.number("amount_msat") - fee_msat,
                    fee_msat,
                    time_of(item.number("timestamp")),
                )

    async def _history_since(self, operation: str, since: datetime) -> list[Fields]:
        history = await self._rpc.call(operation, "lightning_history")
        return [
            item
            for item in read_objects(NAME, operation, history, "history")
            if item.get("payment_hash")
            and item.get("timestamp")
            and time_of(item.number("timestamp")) >= since
        ]

    async def aclose(self) -> None:
        await self._rpc.aclose()

    async def _send(
        self,
        bolt11: str,
        invoice: DecodedInvoice,
        *,
        max_fee_msat: int,
        timeout_s: float,
        max_cltv_blocks: int | None,
    ) -> PaymentStatus:
        params: dict[str, Any] = {"invoice": bolt11}
        if await self._known_version() >= _LIMITS_SINCE:
            params["max_fee_msat"] = max_fee_msat
            if max_cltv_blocks is not None:
                params["max_cltv"] = max_cltv_blocks
        try:
            await self._rpc.object(
                "pay_invoice",
                "lnpay",
                params,
                may_refuse=True,
                read_timeout_s=timeout_s + _SPARE_S,
            )
        except Refused:
            # Paid already, on its way already, or none of that: the look-up knows.
            return await self._look_after_sending(invoice.payment_hash, "refused")
        # Of a success, the history knows the fee; of a failure, the channels whether it is one.
        return await self._look_after_sending(invoice.payment_hash, "failed")

    async def _paid(self, payment_hash: str) -> PaymentStatus | None:
        """What the history says of a payment that has settled; None when it says nothing."""
        history = await self._rpc.call("lookup_payment", "lightning_history")
        for item in read_objects(NAME, "lookup_payment", history, "history"):
            if item.get("payment_hash") == payment_hash and item.number("amount_msat") < 0:
                fee_msat = item.number_or("fee_msat", 0)
                return self._proven(
                    payment_hash,
                    preimage=item.get("preimage"),
                    # What left the channels, the fee included.
                    amount_msat=-item.number("amount_msat") - fee_msat,
                    fee_msat=fee_msat,
                )
        return None

    async def _any_htlc(self) -> bool:
        channels = await self._channels("lookup_payment")
        return any(channel.number_or("local_unsettled_sent", 0) > 0 for channel in channels)

    async def _channels(self, operation: str) -> list[Fields]:
        listed = await self._rpc.call(operation, "list_channels")
        channels = read_objects(NAME, operation, listed, "channels")
        return [channel for channel in channels if channel.get("type") != "BACKUP"]

    async def _known_version(self) -> tuple[int, ...]:
        if self._version is None:
            await self.node_info()
        assert self._version is not None
        return self._version


def from_settings(
    *, url: str | None = None, user: str | None = None, password: str | None = None
) -> ElectrumBackend:
    """`user` and `password` are the daemon's rpcuser and rpcpassword. Raises ValueError."""
    address = checked_url("ELECTRUM", url, example="http://127.0.0.1:7777")
    if not user or not password:
        raise ValueError(
            "set SATHERD_ELECTRUM_USER and SATHERD_ELECTRUM_PASSWORD, the daemon's rpcuser and"
            " rpcpassword (electrum getconfig rpcuser)"
        )
    return ElectrumBackend(ElectrumRpc(address, user, password))


def _invoice_status(payment_hash: str, request: Fields) -> InvoiceStatus:
    status = request.number("status")
    if status == _PAID and not request.get("tx_hashes"):
        return InvoiceStatus(
            payment_hash,
            InvoiceState.SETTLED,
            amount_received_msat=request.number("amount_msat"),
        )
    states = {_UNPAID: InvoiceState.OPEN, _EXPIRED: InvoiceState.EXPIRED}
    return InvoiceStatus(payment_hash, states.get(status, InvoiceState.UNKNOWN))


def _read_version(text: str) -> tuple[int, ...]:
    """(4, 3, 4) of "4.3.4"; letters after a number are dropped."""
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])
