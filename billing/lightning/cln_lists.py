"""Core Lightning's own lists: what it was paid and what it has paid, page by page.

They can be read from an index on, but not from a time on. So each pass remembers up to where
everything is older than anybody will ask for again, and the next one begins there.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import datetime, timedelta
from typing import Any

from billing.lightning import PaymentState, SentPayment, Settlement
from billing.lightning.node_http import Fields
from billing.lightning.node_rules import asked_msat, time_of

_PAGE = 500
# An invoice that is older than this is not paid any more; nor is a payment still on its way.
_OLD = timedelta(days=14)
_STATES = {"complete": PaymentState.SUCCEEDED, "pending": PaymentState.IN_FLIGHT}

Call = Callable[[str, str, dict[str, Any]], Awaitable[Fields]]


class ClnLists:
    """`receive` and `pay` call a method of the node with the one rune or the other."""

    def __init__(self, receive: Call, pay: Call) -> None:
        self._receive = receive
        self._pay = pay
        self._first = {"listinvoices": 1, "listpays": 1}

    async def received_since(self, since: datetime) -> AsyncIterator[Settlement]:
        async for invoice in self._pages(
            self._receive, "received_since", "listinvoices", "invoices", "expires_at", since
        ):
            if invoice.get("status") != "paid":
                continue
            settled_at = time_of(invoice.number("paid_at"))
            if settled_at >= since:
                yield Settlement(
                    payment_hash=invoice.text("payment_hash"),
                    amount_received_msat=invoice.number("amount_received_msat"),
                    settled_at=settled_at,
                    cursor=None,
                )

    async def sent_since(self, since: datetime) -> AsyncIterator[SentPayment]:
        async for pay in self._pages(
            self._pay, "sent_since", "listpays", "pays", "created_at", since
        ):
            state = _STATES.get(str(pay.get("status")))
            sent_at = time_of(pay.number("created_at"))
            if state is None or sent_at < since:
                continue
            sent_msat = pay.number_or("amount_sent_msat", 0)
            amount_msat = (
                pay.number("amount_msat")
                if pay.get("amount_msat") is not None
                else asked_msat(pay.get("bolt11"))
            )
            if amount_msat is None:
                amount_msat = sent_msat
            yield SentPayment(
                payment_hash=pay.text("payment_hash"),
                state=state,
                amount_msat=amount_msat,
                fee_msat=max(0, sent_msat - amount_msat),
                sent_at=sent_at,
            )

    async def _pages(
        self, call: Call, operation: str, method: str, name: str, time_field: str, since: datetime
    ) -> AsyncIterator[Fields]:
        start, all_old = self._first[method], True
        old_s = (since - _OLD).timestamp()
        while True:
            body = {"index": "created", "start": start, "limit": _PAGE}
            listed = (await call(operation, method, body)).objects(name)
            for one in listed:
                all_old = all_old and one.number_or(time_field, 0) < old_s
                start = one.number("created_index") + 1
                if all_old:
                    self._first[method] = start
                yield one
            if len(listed) < _PAGE:
                return
