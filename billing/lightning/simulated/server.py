"""The simulated network over HTTP, so that router, payer and workers share one.

    GET  /                                        what this is
    GET  /health
    GET  /v1/wallets                              names, keys and balances
    GET  /v1/wallets/{wallet}                     one, with what it received and paid
    POST /v1/wallets/{wallet}/fund                {amount_msat}
    POST /v1/wallets/{wallet}/{operation}         node_info, balance, create_invoice,
                                                  lookup_invoice, cancel_invoice, pay_invoice,
                                                  lookup_payment: a node's own interface
    GET  /v1/wallets/{wallet}/settlements?after=CURSOR
                                                  a line of JSON for each, for ever; an empty
                                                  line every 15 s
    POST /v1/pay                                  {invoice}: the payer pays, and gets the preimage
    GET, POST, DELETE /v1/faults                  the script of faults
    POST /v1/payments/{hash}/resolve              {settle: true or false}: end what hangs
    POST /v1/payments/{hash}/forget               {wallet}: delete its node's history
    GET  /v1/audit                                where all the money is
    GET  /.well-known/lnurlp/{user}               LNURL-pay; then /lnurlp/{user}/callback

Raw ASGI: this runs beside the router on a developer's machine and needs no framework. Whoever can
reach it may do all of this, so it listens on loopback unless told otherwise. Nothing here is money.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from dataclasses import asdict
from typing import Any
from urllib.parse import parse_qs

from billing.lightning.simulated import lnurl_pay
from billing.lightning.simulated.arguments import Malformed, check_arguments, fault_from
from billing.lightning.simulated.network import ConnectionDropped, Network
from billing.lightning.simulated.transport import perform
from billing.lightning.simulated.wallets import PAYER, ROUTER, Refused

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

log = logging.getLogger(__name__)

BODY_MAX_BYTES = 65_536
HEARTBEAT_S = 15.0
# The payer's own limits, generous: it is there to be spent from.
PAYER_TIMEOUT_S = 30.0
PAYER_MAX_FEE_MSAT = 10_000_000_000
_HOST = re.compile(r"[A-Za-z0-9.\-]{1,253}(:[0-9]{1,5})?|\[[0-9a-fA-F:]{2,45}\](:[0-9]{1,5})?")


class NetworkApp:
    """The ASGI application. `stop` ends its streams, so that a server can shut down."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        self._stopping.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        path: str = scope["path"]
        parts = path.strip("/").split("/")
        try:
            if (
                scope["method"] == "GET"
                and len(parts) == 4
                and parts[:2] == ["v1", "wallets"]
                and parts[3] == "settlements"
            ):
                await self._stream(parts[2], _query(scope), receive, send)
                return
            body = await _read_body(receive) if scope["method"] == "POST" else {}
            status, answer = await self._answer(scope, parts, body)
        except ConnectionDropped:
            await _drop(send)
            return
        except Malformed as error:
            status, answer = 400, _refusal("malformed", str(error))
        except Refused as error:
            status, answer = 409, _refusal(error.reason, str(error))
        except sqlite3.Error:
            log.exception("the simulated network's database failed")
            status, answer = 500, {"message": "the network's database failed"}
        await _send_json(send, status, answer)

    async def _answer(
        self, scope: Scope, parts: list[str], body: dict[str, Any]
    ) -> tuple[int, dict[str, Any]]:
        network = self._network
        match [scope["method"], *parts]:
            case ["GET", ".well-known", "lnurlp", user]:
                return 200, _foreign(lnurl_pay.pay_request(user, _host(scope)))
            case ["GET", "lnurlp", user, "callback"]:
                amount_msat = _query(scope).get("amount", "")
                answer = await lnurl_pay.invoice(network, user, _host(scope), amount_msat)
                return 200, _foreign(answer)
            case ["POST", "v1", "pay"]:
                return 200, await self._pay(body)
            case ["GET", "v1", "wallets"]:
                wallets = [_wallet(wallet) for wallet in await network.wallets()]
                return 200, {"wallets": wallets}
            case ["GET", "v1", "wallets", wallet]:
                return 200, await self._wallet_with_history(wallet)
            case ["POST", "v1", "wallets", wallet, "fund"]:
                arguments = check_arguments("fund", body)
                await network.ensure_wallet(wallet)
                await network.fund(wallet, **arguments)
                return 200, await self._wallet_with_history(wallet)
            case ["POST", "v1", "wallets", wallet, operation]:
                arguments = check_arguments(operation, body)
                return 200, await perform(network, wallet, operation, arguments)
            case ["GET", "v1", "faults"]:
                return 200, {"faults": [asdict(fault) for fault in await network.scripted()]}
            case ["POST", "v1", "faults"]:
                await network.script(fault_from(body))
                return 200, {"faults": [asdict(fault) for fault in await network.scripted()]}
            case ["DELETE", "v1", "faults"]:
                await network.clear_faults()
                return 200, {"faults": []}
            case ["POST", "v1", "payments", payment_hash, "resolve"]:
                arguments = check_arguments("resolve", body)
                return 200, {"ended": await network.resolve(payment_hash, **arguments)}
            case ["POST", "v1", "payments", payment_hash, "forget"]:
                wallet = check_arguments("forget", body).get("wallet") or ROUTER
                return 200, {"forgotten": await network.forget(wallet, payment_hash)}
            case ["GET", "v1", "audit"]:
                audit = await network.audit()
                return 200, {**asdict(audit), "balances": audit.balances}
            case ["GET", "health"]:
                return 200, {"status": "ok"}
            case ["GET", ""]:
                return 200, {"about": __doc__}
            case _:
                return 404, {"message": "not found"}

    async def _pay(self, body: dict[str, Any]) -> dict[str, Any]:
        arguments = check_arguments("pay", body)
        payment = await self._network.pay_invoice(
            PAYER,
            arguments["invoice"],
            max_fee_msat=PAYER_MAX_FEE_MSAT,
            timeout_s=PAYER_TIMEOUT_S,
        )
        return asdict(payment)

    async def _wallet_with_history(self, name: str) -> dict[str, Any]:
        network = self._network
        found = [wallet for wallet in await network.wallets() if wallet.name == name]
        if not found:
            raise Refused("refused", "no such wallet on the simulated network")
        paid = [asdict(payment) for payment in await network.paid_out(name)]
        for payment in paid:
            # Proof of payment belongs to the payer's own calls, not to a page of history.
            del payment["preimage"]
        received = [asdict(record) for record in await network.received(name)]
        return {**_wallet(found[0]), "received": received, "paid": paid}

    async def _stream(
        self, wallet: str, query: Mapping[str, str], receive: Receive, send: Send
    ) -> None:
        records = self._network.settlements(wallet, query.get("after"))
        gone = asyncio.ensure_future(_disconnected(receive))
        stopping = asyncio.ensure_future(self._stopping.wait())
        try:
            await self._send_records(records, send, {gone, stopping})
        finally:
            gone.cancel()
            stopping.cancel()
            await asyncio.gather(gone, stopping, return_exceptions=True)

    async def _send_records(
        self, records: AsyncIterator[Any], send: Send, ends: set[asyncio.Future[Any]]
    ) -> None:
        started = False
        pending: asyncio.Future[Any] | None = None
        try:
            while True:
                pending = pending or asyncio.ensure_future(anext(records))
                done, _ = await asyncio.wait(
                    {pending, *ends}, timeout=HEARTBEAT_S, return_when=asyncio.FIRST_COMPLETED
                )
                line = b"\n"
                if pending in done:
                    line = json.dumps({"simulated": True, **asdict(pending.result())}).encode()
                    line, pending = line + b"\n", None
                elif done:
                    break
                if not started:
                    started = True
                    await _send_start(send, 200, [(b"content-type", b"application/x-ndjson")])
                await send({"type": "http.response.body", "body": line, "more_body": True})
        except (ConnectionDropped, sqlite3.Error):
            # What was sent stays sent; an unfinished body makes the server cut the connection.
            if not started:
                await _drop(send)
            return
        finally:
            if pending is not None:
                pending.cancel()
                await asyncio.gather(pending, return_exceptions=True)
        if not started:
            await _send_start(send, 200, [(b"content-type", b"application/x-ndjson")])
        await send({"type": "http.response.body", "body": b""})


def _wallet(wallet: Any) -> dict[str, Any]:
    return {
        "name": wallet.name,
        "pubkey": wallet.pubkey,
        "balance_msat": wallet.balance_msat,
        "pending_msat": wallet.pending_msat,
    }


def _refusal(reason: str, message: str) -> dict[str, Any]:
    return {"reason": reason, "message": message}


class _Foreign(dict[str, Any]):
    """An answer of another specification, which gets no field of ours."""


def _foreign(answer: dict[str, Any]) -> _Foreign:
    return _Foreign(answer)


def _host(scope: Scope) -> str:
    """Where the caller believes us to be, for the callback's address."""
    for name, value in scope["headers"]:
        if name == b"host" and _HOST.fullmatch(text := value.decode("latin-1")):
            return text
    host, port = scope["server"]
    return f"{host}:{port}"


def _query(scope: Scope) -> dict[str, str]:
    text = scope["query_string"].decode("latin-1")
    return {name: values[-1] for name, values in parse_qs(text).items()}


async def _read_body(receive: Receive) -> dict[str, Any]:
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Malformed("the body was cut short")
        body += message.get("body", b"")
        if len(body) > BODY_MAX_BYTES:
            raise Malformed(f"a body has at most {BODY_MAX_BYTES} bytes")
        if not message.get("more_body", False):
            break
    try:
        parsed = json.loads(body or b"{}")
    except (ValueError, RecursionError):
        raise Malformed("the body is not JSON") from None
    if not isinstance(parsed, dict):
        raise Malformed("the body is not an object")
    return parsed


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send_json(send: Send, status: int, answer: dict[str, Any]) -> None:
    labelled = answer if isinstance(answer, _Foreign) else {"simulated": True, **answer}
    body = json.dumps(labelled).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    await _send_start(send, status, headers)
    await send({"type": "http.response.body", "body": body})


async def _send_start(send: Send, status: int, headers: list[tuple[bytes, bytes]]) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers})


async def _drop(send: Send) -> None:
    """Promise a byte and send none: the server then cuts the connection, which is what we want."""
    await _send_start(send, 200, [(b"content-length", b"1")])
