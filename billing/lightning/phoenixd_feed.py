"""phoenixd's WebSocket of payments received: live only, and it begins anew with each connection."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator

import websockets
from websockets.asyncio.client import ClientConnection, connect

from billing.lightning import BackendAuthError, BackendUnavailable, OutcomeUnknown
from billing.lightning.node_http import CONNECT_TIMEOUT_S, Fields

# The library writes the headers of a connection at DEBUG, and the password is in one.
_quiet_log = logging.getLogger("billing.lightning.phoenixd_feed.stream")
_quiet_log.setLevel(logging.WARNING)


class _Opened:
    """`async with` of a connection, its failures in our words."""

    def __init__(self, url: str, authorization: str) -> None:
        self._connecting = connect(
            url,
            additional_headers={"Authorization": authorization},
            open_timeout=CONNECT_TIMEOUT_S,
            close_timeout=1.0,
            ping_interval=20.0,
            proxy=None,
            logger=_quiet_log,
        )

    async def __aenter__(self) -> ClientConnection:
        try:
            return await self._connecting.__aenter__()
        except websockets.InvalidStatus as error:
            status = error.response.status_code
            words = f"HTTP {status}"
            if status in (401, 403):
                raise BackendAuthError(
                    "phoenixd", "settlements", "the node refuses our password", words
                ) from None
            raise BackendUnavailable(
                "phoenixd", "settlements", "no stream of settlements", words
            ) from None
        except (OSError, websockets.WebSocketException) as error:
            detail = type(error).__name__
            raise BackendUnavailable(
                "phoenixd", "settlements", "the Lightning node cannot be reached", detail
            ) from None

    async def __aexit__(self, *_: object) -> None:
        await asyncio.shield(self._connecting.__aexit__(None, None, None))


class Feed:
    """The WebSocket of payments received, which begins anew with each connection."""

    def __init__(self, url: str, authorization: str) -> None:
        self._url = url
        self._authorization = authorization

    def opened(self) -> _Opened:
        return _Opened(self._url, self._authorization)

    async def hashes(self, connection: ClientConnection) -> AsyncIterator[str]:
        """Payment hashes of receipts as they come. Raises OutcomeUnknown when that ends."""
        try:
            while True:
                message = json.loads(await connection.recv())
                if isinstance(message, dict) and message.get("type") == "payment_received":
                    yield Fields("phoenixd", "settlements", message).text("paymentHash")
        except websockets.ConnectionClosed as error:
            detail = type(error).__name__
            raise OutcomeUnknown("phoenixd", "settlements", "the stream ended", detail) from None
        except ValueError:
            raise OutcomeUnknown("phoenixd", "settlements", "the stream cannot be read") from None
