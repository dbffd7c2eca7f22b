"""LND's own lists: what it was paid and what it has paid, page by page.

Both are filtered by the time of creation. An invoice may be paid long after that, so invoices are
read from some days before; later ones still are what the stream of settlements replays.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import datetime, timedelta

from billing.lightning import PaymentState, SentPayment, Settlement
from billing.lightning.lnd_answers import hex_of, ok
from billing.lightning.node_http import Fields, NodeHttp
from billing.lightning.node_rules import time_of

_PAGE = 500
_INVOICES_BEFORE = timedelta(days=7)
_STATES = {
    "SUCCEEDED": PaymentState.SUCCEEDED,
    "IN_FLIGHT": PaymentState.IN_FLIGHT,
    "INITIATED": PaymentState.IN_FLIGHT,
}


async def received_since(http: NodeHttp, since: datetime) -> AsyncIterator[Settlement]:
    query = {"num_max_invoices": str(_PAGE)}
    async for invoice in _pages(
        http, "received_since", "/v1/invoices", "invoices", since - _INVOICES_BEFORE, query
    ):
        if invoice.get("state") != "SETTLED":
            continue
        settled_at = time_of(invoice.number("settle_date"))
        if settled_at >= since:
            yield Settlement(
                payment_hash=hex_of(invoice.text("r_hash"), "received_since"),
                amount_received_msat=invoice.number("amt_paid_msat"),
                settled_at=settled_at,
                cursor=None,
            )


async def sent_since(http: NodeHttp, since: datetime) -> AsyncIterator[SentPayment]:
    query = {"include_incomplete": "true", "max_payments": str(_PAGE)}
    async for payment in _pages(http, "sent_since", "/v1/payments", "payments", since, query):
        state = _STATES.get(str(payment.get("status")))
        if state is not None:
            yield SentPayment(
                payment_hash=payment.text("payment_hash"),
                state=state,
                amount_msat=payment.number("value_msat"),
                fee_msat=payment.number_or("fee_msat", 0),
                sent_at=time_of(payment.number("creation_time_ns") / 1_000_000_000),
            )


async def _pages(
    http: NodeHttp, operation: str, path: str, name: str, since: datetime, query: dict[str, str]
) -> AsyncIterator[Fields]:
    offset = 0
    while True:
        reply = await http.request(
            operation,
            "GET",
            path,
            query={
                "index_offset": str(offset),
                "creation_date_start": str(max(0, int(since.timestamp()))),
                **query,
            },
        )
        page = ok(reply)
        listed = page.objects(name)
        for one in listed:
            yield one
        if len(listed) < _PAGE:
            return
        offset = page.number("last_index_offset")
