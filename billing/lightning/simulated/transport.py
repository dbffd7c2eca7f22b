"""How a back end reaches the simulated network: the object itself, or HTTP. The one seam.

Both give the same plain dictionaries, and turn what goes wrong into `BackendError`s:

    connect refused, timed out, no free connection  -> BackendUnavailable
    sent, and then a time-out, a reset, nonsense    -> OutcomeUnknown
    the network says no                             -> BackendRejected
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any, Protocol

import httpx

from billing.lightning import BackendRejected, BackendUnavailable, OutcomeUnknown, bounded_answer
from billing.lightning.kept_http import KeptHttp, NoAnswer, NotSent
from billing.lightning.simulated.network import ConnectionDropped, Network
from billing.lightning.simulated.wallets import Refused
from billing.public_tls import public_tls

NAME = "simulated"
_CONNECT_TIMEOUT_S = 5.0
_READ_TIMEOUT_S = 10.0
# The server sends an empty line every 15 s on a quiet stream.
_STREAM_READ_TIMEOUT_S = 45.0
# Paying calls may each wait for an HTLC, and the others must not wait behind them.
_CONNECTIONS = 256
# For streams alone, one for each wallet that is watched.
_LIMITS = httpx.Limits(max_connections=16, max_keepalive_connections=0)


class Transport(Protocol):
    async def call(
        self, wallet: str, operation: str, arguments: dict[str, Any], *, timeout_s: float = 0.0
    ) -> dict[str, Any]:
        """The answer of the wallet's node. `timeout_s` is what the operation itself may last."""
        ...

    def settlements(self, wallet: str, cursor: str | None) -> AsyncIterator[dict[str, Any]]: ...

    async def aclose(self) -> None: ...


async def perform(
    network: Network, wallet: str, operation: str, arguments: dict[str, Any]
) -> dict[str, Any]:
    """One operation of a node as a plain dictionary; both transports end here.

    Raises Refused and ConnectionDropped as the network does; TypeError on wrong arguments.
    """
    match operation:
        case "node_info" | "balance":
            node = await network.node(wallet, operation=operation, **arguments)
            return {
                "pubkey": node.pubkey,
                "alias": node.name,
                "balance_msat": node.balance_msat,
                "pending_msat": node.pending_msat,
            }
        case "create_invoice":
            return asdict(await network.create_invoice(wallet, **arguments))
        case "lookup_invoice":
            record = await network.lookup_invoice(wallet, **arguments)
            return {"state": "not_found"} if record is None else asdict(record)
        case "cancel_invoice":
            return {"canceled": await network.cancel_invoice(wallet, **arguments)}
        case "pay_invoice":
            return asdict(await network.pay_invoice(wallet, **arguments))
        case "lookup_payment":
            payment = await network.lookup_payment(wallet, **arguments)
            return {"state": "not_found"} if payment is None else asdict(payment)
        case "list_received":
            received = await network.list_received(wallet, **arguments)
            return {"received": [asdict(record) for record in received]}
        case "list_sent":
            sent = await network.list_sent(wallet, **arguments)
            return {"sent": [asdict(payment) for payment in sent]}
        case _:
            raise Refused("unsupported", "the simulated network has no such operation")


class InProcess:
    """The network object of this very process. Closing this does not close the network."""

    def __init__(self, network: Network) -> None:
        self._network = network

    async def call(
        self, wallet: str, operation: str, arguments: dict[str, Any], *, timeout_s: float = 0.0
    ) -> dict[str, Any]:
        try:
            return await perform(self._network, wallet, operation, arguments)
        except Refused as error:
            raise _rejected(operation, str(error), error.reason) from None
        except ConnectionDropped:
            raise _unknown(operation, "the connection was dropped") from None
        except sqlite3.Error as error:
            raise _unknown(operation, "the network's database failed", str(error)) from None

    async def settlements(self, wallet: str, cursor: str | None) -> AsyncIterator[dict[str, Any]]:
        try:
            async for record in self._network.settlements(wallet, cursor):
                yield asdict(record)
        except Refused as error:
            raise _rejected("settlements", str(error), error.reason) from None
        except ConnectionDropped:
            raise _unknown("settlements", "the connection was dropped") from None
        except sqlite3.Error as error:
            raise _unknown("settlements", "the network's database failed", str(error)) from None

    async def aclose(self) -> None:
        return None


class Http:
    """A network served at `url` by another process."""

    def __init__(self, url: str) -> None:
        timeout = httpx.Timeout(_STREAM_READ_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S)
        self._client = httpx.AsyncClient(
            base_url=url,
            headers=bounded_answer.IDENTITY,
            timeout=timeout,
            limits=_LIMITS,
            trust_env=False,
            verify=public_tls(),
        )
        self._calls = KeptHttp(url, connect_timeout_s=_CONNECT_TIMEOUT_S, most=_CONNECTIONS)

    async def call(
        self, wallet: str, operation: str, arguments: dict[str, Any], *, timeout_s: float = 0.0
    ) -> dict[str, Any]:
        try:
            status, body = await self._calls.request(
                "POST",
                f"/v1/wallets/{wallet}/{operation}",
                body=json.dumps(arguments).encode(),
                read_timeout_s=_READ_TIMEOUT_S + timeout_s,
            )
            answer = json.loads(body)
            if not isinstance(answer, dict):
                raise ValueError("not an object")
        except NotSent as error:
            raise _unavailable(operation, str(error)) from None
        except NoAnswer as error:
            raise _unknown(operation, "no answer came", str(error)) from None
        except ValueError:
            raise _unknown(operation, "the answer cannot be read") from None
        _raise_for(operation, status, answer)
        return answer

    async def settlements(self, wallet: str, cursor: str | None) -> AsyncIterator[dict[str, Any]]:
        try:
            async with self._client.stream(
                "GET",
                f"/v1/wallets/{wallet}/settlements",
                params={} if cursor is None else {"after": cursor},
            ) as response:
                if response.status_code != 200:
                    answer = json.loads(await bounded_answer.whole(response))
                    _raise_for("settlements", response.status_code, answer)
                async for line in bounded_answer.lines(response):
                    yield json.loads(line)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            raise _unavailable("settlements", type(error).__name__) from None
        except httpx.RequestError as error:
            raise _unknown("settlements", "the stream broke", type(error).__name__) from None
        except bounded_answer.TooLong as error:
            raise _unknown("settlements", "the stream is too long", str(error)) from None
        except ValueError:
            raise _unknown("settlements", "the stream cannot be read") from None
        raise _unknown("settlements", "the stream ended")

    async def aclose(self) -> None:
        # Shielded, so that a cancelled shutdown does not leave sockets behind.
        await asyncio.shield(self._client.aclose())
        await self._calls.aclose()


def _raise_for(operation: str, status: int, answer: dict[str, Any]) -> None:
    if status == 200:
        return
    message, reason = answer.get("message"), answer.get("reason")
    # Only a refusal in the network's own words is certain; anything else may come from elsewhere.
    if status in (400, 409) and isinstance(message, str) and isinstance(reason, str):
        raise _rejected(operation, message, reason)
    raise _unknown(operation, "the network failed", f"HTTP {status}")


def _rejected(operation: str, message: str, reason: str) -> BackendRejected:
    return BackendRejected(NAME, operation, message, reason=reason)


def _unknown(operation: str, message: str, detail: str = "") -> OutcomeUnknown:
    return OutcomeUnknown(NAME, operation, message, detail)


def _unavailable(operation: str, detail: str) -> BackendUnavailable:
    return BackendUnavailable(NAME, operation, "the simulated network cannot be reached", detail)
