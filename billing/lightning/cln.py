"""Core Lightning by clnrest (25.02 and later): every method is `POST /v1/{method}`.

    create   invoice {label}            the label is the key, so twice makes one invoice
    watch    waitanyinvoice             a long poll: the next paid invoice after an index
    pay      xpay                       with a fee limit; its errors prove nothing
    look up  listpays and listsendpays  complete wins, else pending, else failed
    list     listinvoices and listpays  (billing.lightning.cln_lists)

Success is HTTP 201, an error is 500 with `{code, message}`. `xpay` may report an error while parts
of the payment are still out, and between two of its attempts all parts may be marked failed. So
FAILED is said only when neither list has anything pending and the pay call must have ended, and even
then it is not called definitive.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator
from datetime import datetime
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

from billing.bolt11_codec import DecodedInvoice
from billing.lightning import (
    BackendAuthError,
    Capabilities,
    Invoice,
    InvoiceState,
    InvoiceStatus,
    NodeBalance,
    NodeInfo,
    PaymentState,
    PaymentStatus,
    SentPayment,
    Settlement,
)
from billing.lightning.cln_lists import ClnLists
from billing.lightning.node_http import Fields, NodeHttp, Reply, checked_url
from billing.lightning.node_rules import Clock, RealNode, asked_msat, time_of

LONG_POLL_S = 60
# For how long xpay may begin new attempts, and how long after that one may still be on its way out.
RETRY_FOR_MAX_S = 60
ENDED_AFTER_S = RETRY_FOR_MAX_S + 60
_SPARE_S = 30.0
_CALL_TIMED_OUT = 904
_RUNE_REFUSED = (1501, 1502)
_NETWORKS = {"bitcoin": "mainnet", "testnet4": "testnet"}
_INVOICE_STATES = {
    "unpaid": InvoiceState.OPEN,
    "paid": InvoiceState.SETTLED,
    "expired": InvoiceState.EXPIRED,
}
# Words for what xpay answers. None of them proves that nothing is in flight.
_PAY_ERRORS = {
    203: "incorrect_payment_details",  # the destination refused for good
    205: "no_route",
    206: "no_route",  # every route costs more than is allowed
    207: "expired",
    209: "error",
    210: "timeout",
    219: "already_paid",
}


class ClnBackend(RealNode):
    """A CLN. `pay` holds the rune for xpay, listpays and listsendpays; it may be the same one."""

    name = "cln"
    capabilities = Capabilities(
        granularity_msat=1,
        description_max_bytes=639,
        description_hash=True,
        fee_limit=True,
        cancel_invoice=True,
        push="cursor",
        refuses_duplicate_hash=True,
        checks_expiry=True,
        failed_is_definitive=False,
    )

    def __init__(self, receive: NodeHttp, pay: NodeHttp, *, clock: Clock = time.time) -> None:
        super().__init__(clock)
        self._receive = receive
        self._pay = pay
        self._lists = ClnLists(partial(self._call, receive), partial(self._call, pay))
        # Hashes that a call of this process is paying right now.
        self._paying: Counter[str] = Counter()

    async def _ask_node_info(self) -> NodeInfo:
        info = await self._call(self._receive, "node_info", "getinfo")
        network = info.text("network")
        warnings = (info.get("warning_bitcoind_sync"), info.get("warning_lightningd_sync"))
        alias = info.get("alias")
        return NodeInfo(
            pubkey=info.text("id"),
            alias=alias if isinstance(alias, str) else "",
            version=info.text("version"),
            network=_NETWORKS.get(network, network),
            synced=not any(warnings),
        )

    async def balance(self) -> NodeBalance:
        listed = await self._call(self._receive, "balance", "listpeerchannels")
        spendable_msat = receivable_msat = pending_msat = ours_msat = 0
        for channel in listed.objects("channels"):
            # An outgoing HTLC is ours until it is settled, and so in this.
            ours_msat += channel.number_or("to_us_msat", 0)
            for htlc in channel.objects("htlcs"):
                if htlc.get("direction") == "out":
                    pending_msat += htlc.number("amount_msat")
            if channel.get("state") == "CHANNELD_NORMAL" and channel.get("peer_connected") is True:
                spendable_msat += channel.number_or("spendable_msat", 0)
                receivable_msat += channel.number_or("receivable_msat", 0)
        reserve_msat = max(0, ours_msat - spendable_msat - pending_msat)
        return NodeBalance(spendable_msat, receivable_msat, pending_msat, reserve_msat)

    async def create_invoice(
        self, *, amount_msat: int, description: str, expiry_s: int, idempotency_key: str
    ) -> Invoice:
        self._check_terms(amount_msat, description, expiry_s)
        reply = await self._receive.request(
            "create_invoice",
            "POST",
            "/v1/invoice",
            body={
                "amount_msat": amount_msat,
                "label": idempotency_key,
                "description": description,
                "expiry": expiry_s,
            },
        )
        if reply.status == 201:
            bolt11 = reply.fields().text("bolt11")
        else:
            _refuse_bad_rune(reply)
            # Most likely the label exists, because this is the second call with this key.
            listed = await self._call(
                self._receive, "create_invoice", "listinvoices", {"label": idempotency_key}
            )
            found = listed.objects("invoices")
            if not found:
                raise reply.unexpected(_code_words(reply))
            bolt11 = found[0].text("bolt11")
        return self._invoice(
            bolt11, amount_msat=amount_msat, description=description, expiry_s=expiry_s
        )

    async def lookup_invoice(self, payment_hash: str) -> InvoiceStatus:
        found = await self._find_invoice("lookup_invoice", payment_hash)
        if found is None:
            return InvoiceStatus(payment_hash, InvoiceState.NOT_FOUND)
        state = _INVOICE_STATES.get(found.text("status"), InvoiceState.UNKNOWN)
        if state is not InvoiceState.SETTLED:
            return InvoiceStatus(payment_hash, state)
        return InvoiceStatus(
            payment_hash,
            state,
            amount_received_msat=found.number("amount_received_msat"),
            settled_at=time_of(found.number("paid_at")),
            cursor=str(found.number("pay_index")),
        )

    async def cancel_invoice(self, payment_hash: str) -> bool:
        """True once: CLN deletes the invoice, and knows nothing of it afterwards."""
        found = await self._find_invoice("cancel_invoice", payment_hash)
        if found is None or found.get("status") not in ("unpaid", "expired"):
            return False
        # It names the status, so that an invoice that is paid at this moment is not deleted.
        body = {"label": found.text("label"), "status": found.text("status")}
        reply = await self._receive.request("cancel_invoice", "POST", "/v1/delinvoice", body=body)
        _refuse_bad_rune(reply)
        return reply.status == 201

    async def settlements(self, cursor: str | None) -> AsyncIterator[Settlement]:
        """With None everything is replayed that the node has ever been paid."""
        index = int(cursor) if cursor is not None else 0
        while True:
            reply = await self._receive.request(
                "settlements",
                "POST",
                "/v1/waitanyinvoice",
                body={"lastpay_index": index, "timeout": LONG_POLL_S},
                read_timeout_s=LONG_POLL_S + _SPARE_S,
            )
            if reply.status != 201 and _code(reply) == _CALL_TIMED_OUT:
                continue
            invoice = _ok(reply)
            index = invoice.number("pay_index")
            yield Settlement(
                payment_hash=invoice.text("payment_hash"),
                amount_received_msat=invoice.number("amount_received_msat"),
                settled_at=time_of(invoice.number("paid_at")),
                cursor=str(index),
            )

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
            "invstring": bolt11,
            "maxfee": max_fee_msat,
            "retry_for": min(RETRY_FOR_MAX_S, max(1, ceil(timeout_s))),
        }
        if max_cltv_blocks is not None:
            body["maxdelay"] = max_cltv_blocks
        self._paying[invoice.payment_hash] += 1
        try:
            reply = await self._pay.request(
                "pay_invoice", "POST", "/v1/xpay", body=body, read_timeout_s=timeout_s + _SPARE_S
            )
        finally:
            self._paying[invoice.payment_hash] -= 1
            self._paying += Counter()  # drops what has come to zero
        if reply.status != 201:
            code = _code(reply)
            if code is None:
                raise reply.unexpected()
            word = _PAY_ERRORS.get(code, f"error_{code}")
            return await self._look_after_sending(invoice.payment_hash, word)
        paid = reply.fields()
        amount_msat = paid.number("amount_msat")
        return self._proven(
            invoice.payment_hash,
            preimage=paid.get("payment_preimage"),
            amount_msat=amount_msat,
            fee_msat=paid.number("amount_sent_msat") - amount_msat,
        )

    async def lookup_payment(self, payment_hash: str) -> PaymentStatus:
        about = {"payment_hash": payment_hash}
        # In this order: a part that is begun between the two answers shows in the second.
        listed = await self._call(self._pay, "lookup_payment", "listpays", about)
        parts_listed = await self._call(self._pay, "lookup_payment", "listsendpays", about)
        pays, parts = listed.objects("pays"), parts_listed.objects("payments")
        for pay in pays:
            if pay.get("status") == "complete":
                return self._complete(payment_hash, pay)
        states = {record.get("status") for record in (*pays, *parts)}
        if "complete" in states or not states <= {"pending", "failed"}:
            # The two lists disagree, or a word is new: they will agree, or somebody must look.
            return PaymentStatus(payment_hash, PaymentState.UNKNOWN)
        if "pending" in states or self._paying[payment_hash]:
            return PaymentStatus(payment_hash, PaymentState.IN_FLIGHT)
        if not states:
            return PaymentStatus(payment_hash, PaymentState.NOT_FOUND)
        begun_at_s = max(record.number("created_at") for record in (*pays, *parts))
        if self._clock() < begun_at_s + ENDED_AFTER_S:
            # Between two of its attempts, perhaps: a pay call may still be under way.
            return PaymentStatus(payment_hash, PaymentState.UNKNOWN)
        return PaymentStatus(payment_hash, PaymentState.FAILED, failure_code="failed")

    def received_since(self, since: datetime) -> AsyncIterator[Settlement]:
        return self._lists.received_since(since)

    def sent_since(self, since: datetime) -> AsyncIterator[SentPayment]:
        return self._lists.sent_since(since)

    async def aclose(self) -> None:
        await self._receive.aclose()
        await self._pay.aclose()

    def _complete(self, payment_hash: str, pay: Fields) -> PaymentStatus:
        sent_msat = pay.number("amount_sent_msat")
        amount_msat = _asked_msat(pay)
        return self._proven(
            payment_hash,
            preimage=pay.get("preimage"),
            amount_msat=sent_msat if amount_msat is None else amount_msat,
            fee_msat=0 if amount_msat is None else sent_msat - amount_msat,
        )

    async def _find_invoice(self, operation: str, payment_hash: str) -> Fields | None:
        listed = await self._call(
            self._receive, operation, "listinvoices", {"payment_hash": payment_hash}
        )
        return next(iter(listed.objects("invoices")), None)

    async def _call(
        self, http: NodeHttp, operation: str, method: str, body: dict[str, Any] | None = None
    ) -> Fields:
        return _ok(await http.request(operation, "POST", f"/v1/{method}", body=body or {}))


def from_settings(
    *,
    url: str | None = None,
    rune: str | None = None,
    pay_rune: str | None = None,
    cert: str | None = None,
) -> ClnBackend:
    """Raises ValueError, in words for the operator, when a setting is missing or cannot be used."""
    address = checked_url("CLN", url, example="https://127.0.0.1:3010")
    if not rune:
        raise ValueError("set SATHERD_CLN_RUNE: make a rune with `lightning-cli createrune`")
    certificate = Path(cert).expanduser() if cert else None

    def client(one: str) -> NodeHttp:
        return NodeHttp("cln", address, headers={"Rune": one}, certificate=certificate)

    return ClnBackend(client(rune), client(pay_rune or rune))


def _asked_msat(pay: Fields) -> int | None:
    """What the payee asked for: the field where there is one, else what the invoice says."""
    if pay.get("amount_msat") is not None:
        return pay.number("amount_msat")
    return asked_msat(pay.get("bolt11"))


def _error(reply: Reply) -> dict[str, Any]:
    """The JSON-RPC error of an answer; an older plugin wrapped it in `error`."""
    if not isinstance(reply.value, dict):
        return {}
    wrapped = reply.value.get("error")
    return wrapped if isinstance(wrapped, dict) else reply.value


def _code(reply: Reply) -> int | None:
    code = _error(reply).get("code")
    return code if isinstance(code, int) and not isinstance(code, bool) else None


def _code_words(reply: Reply) -> str:
    return f"code {_code(reply)}: {_error(reply).get('message')}"


def _refuse_bad_rune(reply: Reply) -> None:
    if reply.status != 201 and _code(reply) in _RUNE_REFUSED:
        words = "the node refuses our rune"
        raise BackendAuthError("cln", reply.operation, words, _code_words(reply))


def _ok(reply: Reply) -> Fields:
    if reply.status != 201:
        _refuse_bad_rune(reply)
        raise reply.unexpected(_code_words(reply))
    return reply.fields()
