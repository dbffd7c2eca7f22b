"""What LNbits tells of payments: its list, its stream, and the two ways it says "wrong key"."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from websockets.asyncio.client import connect
from websockets.exceptions import InvalidHandshake, WebSocketException

from billing.lightning import BackendAuthError, BackendUnavailable, OutcomeUnknown, Settlement
from billing.lightning.node_http import Fields, NodeHttp, Reply, read_objects

NAME = "lnbits"
PAYMENTS = "/api/v1/payments"
_PAGE = 100
_MAX_PAGES = 20
_ALL_PAGES = 1000
_INVOICES_BEFORE = timedelta(days=1)
# A (re)connected stream tells again what was settled in this time; polling finds the rest.
_LOOK_BACK = timedelta(hours=1)
# LNbits wants the invoice key in the stream's address, which the library would write at DEBUG.
_quiet_log = logging.getLogger("billing.lightning.lnbits_feed.stream")
_quiet_log.setLevel(logging.WARNING)


class LnbitsFeed:
    """`stream_url` has the invoice key in it, and is therefore in no error and no log."""

    def __init__(self, http: NodeHttp, stream_url: str) -> None:
        self._http = http
        self._stream_url = stream_url

    async def settlements(self, now_s: float) -> AsyncIterator[Settlement]:
        """What was settled in the hour before `now_s`, then what is, until the connection breaks:
        BackendUnavailable or OutcomeUnknown."""
        try:
            async with connect(self._stream_url, proxy=None, logger=_quiet_log) as websocket:
                listed: set[str] = set()
                for payment in await self._settled_lately(now_s):
                    listed.add(payment.text("payment_hash"))
                    yield _settlement(payment)
                async for text in websocket:
                    payment = _told(text)
                    if payment is not None and payment.text("payment_hash") not in listed:
                        yield _settlement(payment)
        except (OSError, TimeoutError, InvalidHandshake) as error:
            raise BackendUnavailable(
                NAME, "settlements", "LNbits cannot be reached", type(error).__name__
            ) from None
        except WebSocketException as error:
            raise OutcomeUnknown(
                NAME, "settlements", "the stream broke", type(error).__name__
            ) from None
        raise OutcomeUnknown(NAME, "settlements", "the stream ended")

    async def listed(
        self,
        operation: str,
        where: Mapping[str, str],
        *,
        limit: int | None = None,
        pages: int = _MAX_PAGES,
    ) -> list[Fields]:
        """Payments by these filters, newest first."""
        found: list[Fields] = []
        for number in range(pages):
            query = {
                "limit": str(limit or _PAGE),
                "offset": str(number * _PAGE),
                "sortby": "time",
                "direction": "desc",
                **where,
            }
            reply = await self._http.request(operation, "GET", PAYMENTS, query=query)
            if reply.status != 200:
                ok(reply)
            page = read_objects(NAME, operation, reply.value, "payments")
            found += page
            if limit is not None or len(page) < _PAGE:
                break
        return found

    async def listed_since(
        self, operation: str, since: datetime, where: Mapping[str, str]
    ) -> list[Fields]:
        """All payments by these filters whose record was made since then."""
        moment = since.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S")
        return await self.listed(operation, {"time[ge]": moment, **where}, pages=_ALL_PAGES)

    async def received_since(self, since: datetime) -> AsyncIterator[Settlement]:
        # The record is of the invoice's time; it may have been paid long after that.
        where = {"status": "success", "amount[gt]": "0"}
        for payment in await self.listed_since("received_since", since - _INVOICES_BEFORE, where):
            if settled_at(payment) >= since:
                yield _settlement(payment)

    async def _settled_lately(self, now_s: float) -> list[Fields]:
        since = datetime.fromtimestamp(now_s, UTC) - _LOOK_BACK
        where = {
            "status": "success",
            "amount[gt]": "0",
            "time[ge]": since.strftime("%Y-%m-%dT%H:%M:%S"),
        }
        return sorted(await self.listed("settlements", where), key=settled_at)


def ok(reply: Reply, status: int = 200) -> Fields:
    """The answer, if it has that status. Raises BackendAuthError or OutcomeUnknown."""
    if is_no_wallet(reply):
        raise wrong_key(reply.operation)
    if reply.status != status:
        raise reply.unexpected()
    return reply.fields()


def is_no_wallet(reply: Reply) -> bool:
    return reply.status == 404 and reply.value == {"detail": "Wallet not found."}


def wrong_key(operation: str) -> BackendAuthError:
    return BackendAuthError(NAME, operation, "LNbits knows no wallet of this key")


def settled_at(payment: Fields) -> datetime:
    """When LNbits last touched the record of a receipt."""
    return _moment(payment.get("updated_at") or payment.text("time"))


def made_at(payment: Fields) -> datetime:
    """When LNbits made the record."""
    return _moment(payment.text("time"))


def _moment(value: Any) -> datetime:
    try:
        moment = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        raise OutcomeUnknown(NAME, "lookup_invoice", "the answer has no time") from None
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


def _told(text: str | bytes) -> Fields | None:
    """The receipt in a message of the stream; None for payments that go out, and for nonsense."""
    try:
        message = json.loads(text)
    except ValueError:
        return None
    payment: Any = message.get("payment") if isinstance(message, dict) else None
    if not isinstance(payment, dict) or payment.get("status") != "success":
        return None
    fields = Fields(NAME, "settlements", payment)
    return fields if fields.number("amount") > 0 else None


def _settlement(payment: Fields) -> Settlement:
    return Settlement(
        payment.text("payment_hash"), payment.number("amount"), settled_at(payment), cursor=None
    )
