"""A stand-in for phoenixd: forms, Basic auth, 200 for both outcomes, texts for errors."""

from __future__ import annotations

import asyncio
import base64
from typing import Any
from urllib.parse import parse_qs

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from billing import bolt11_codec
from billing.errors import BadInvoice
from billing.lightning.simulated.invoices import InvoiceRecord
from billing.lightning.simulated.network import ConnectionDropped
from billing.lightning.simulated.payments import PaymentRecord
from billing.lightning.simulated.wallets import Refused
from tests.stand_ins.core import NodeCore

PASSWORD = "the-password-for-all"
LIMITED_PASSWORD = "the-limited-password"
FEE_CREDIT_SAT = 333
_REASONS = {
    "no_route": "no route to the recipient could be found",
    "insufficient_funds": "not enough funds in wallet to afford payment",
    "incorrect_payment_details": "the recipient rejected the payment",
}


def routes(core: NodeCore) -> list[BaseRoute]:
    phoenixd = _Phoenixd(core)
    table = {
        "GET /getinfo": phoenixd.getinfo,
        "GET /getbalance": phoenixd.getbalance,
        "POST /createinvoice": phoenixd.createinvoice,
        "GET /payments/incoming": phoenixd.list_incoming,
        "GET /payments/incoming/{payment_hash}": phoenixd.incoming,
        "GET /payments/outgoing": phoenixd.list_outgoing,
        "GET /payments/outgoingbyhash/{payment_hash}": phoenixd.outgoing,
        "POST /payinvoice": phoenixd.payinvoice,
    }
    found: list[BaseRoute] = []
    for named, handler in table.items():
        method, _, path = named.partition(" ")
        found.append(Route(path, _guarded(core, path, handler), methods=[method]))
    found.append(WebSocketRoute("/websocket", phoenixd.websocket))
    return found


def _allowed(authorization: str | None) -> set[str]:
    for password, rights in ((PASSWORD, {"read", "pay"}), (LIMITED_PASSWORD, {"read"})):
        if authorization == "Basic " + base64.b64encode(f":{password}".encode()).decode():
            return rights
    return set()


def _guarded(core: NodeCore, path: str, handler: Any) -> Any:
    async def answer(request: Request) -> Response:
        if request.method == "POST":
            assert request.headers["content-type"] == "application/x-www-form-urlencoded"
            pairs = parse_qs((await request.body()).decode(), keep_blank_values=True)
        else:
            pairs = parse_qs(request.url.query, keep_blank_values=True)
        body = {name: values[-1] for name, values in pairs.items()}
        core.requests.append((request.method, path, body))
        needed = "pay" if path == "/payinvoice" else "read"
        if needed not in _allowed(request.headers.get("authorization")):
            return PlainTextResponse("Invalid authentication", status_code=401)
        return await handler(request, body)

    return answer


class _Phoenixd:
    def __init__(self, core: NodeCore) -> None:
        self._core = core

    async def getinfo(self, request: Request, body: Any) -> Response:
        node = await self._core.node("node_info")
        channel = {
            "state": "Normal",
            "channelId": "00" * 32,
            "balanceSat": node.balance_msat // 1000,
            "inboundLiquiditySat": 5_000,
            "capacitySat": 10_000_000,
        }
        return JSONResponse(
            {
                "nodeId": node.pubkey,
                "channels": [channel],
                "chain": "regtest",
                "blockHeight": 800_000,
                "version": "stand-in for 0.7.0",
            }
        )

    async def getbalance(self, request: Request, body: Any) -> Response:
        node = await self._core.node("balance")
        return JSONResponse(
            {"balanceSat": node.balance_msat // 1000, "feeCreditSat": FEE_CREDIT_SAT}
        )

    async def createinvoice(self, request: Request, body: Any) -> Response:
        if len(body["description"]) > 128:
            return PlainTextResponse("Request parameter description is too long", status_code=400)
        record = await self._core.network.create_invoice(
            self._core.wallet,
            amount_msat=int(body["amountSat"]) * 1000,
            description=body["description"],
            expiry_s=int(body["expirySeconds"]),
            idempotency_key=body.get("externalId"),
        )
        return JSONResponse(
            {
                "amountSat": record.amount_msat // 1000,
                "paymentHash": record.payment_hash,
                "serialized": record.bolt11,
            }
        )

    async def incoming(self, request: Request, body: Any) -> Response:
        payment_hash = request.path_params["payment_hash"]
        record = await self._core.network.lookup_invoice(self._core.wallet, payment_hash)
        if record is None:
            return Response(status_code=204)
        return JSONResponse(await self._incoming(record))

    async def list_incoming(self, request: Request, body: Any) -> Response:
        if "externalId" in body:
            payment_hash = await self._core.by_key(body["externalId"])
            found = (
                await self._core.network.lookup_invoice(self._core.wallet, payment_hash)
                if payment_hash is not None
                else None
            )
            return JSONResponse([] if found is None else [await self._incoming(found)])
        # By the time of receipt, newest first.
        received = [
            record
            for record in await self._core.network.received(self._core.wallet)
            if (record.settled_at_s or 0) * 1000 >= int(body.get("from", "0"))
        ]
        offset = int(body.get("offset", "0"))
        page = list(reversed(received))[offset : offset + int(body.get("limit", "20"))]
        return JSONResponse([await self._incoming(record) for record in page])

    async def payinvoice(self, request: Request, body: Any) -> Response:
        try:
            payment_hash = bolt11_codec.decode(body["invoice"]).payment_hash
        except BadInvoice:
            return PlainTextResponse("Invalid parameter invoice", status_code=400)
        self._core.disk.asked_to_pay[payment_hash] = body["invoice"]
        known = await self._core.network.lookup_payment(self._core.wallet, payment_hash)
        if known is not None and known.state == "succeeded":
            return _failed(payment_hash, "this invoice has already been paid")
        if known is not None and known.state == "in_flight":
            return _failed(payment_hash, "another payment is in progress for that invoice")
        try:
            record = await self._core.pay(body["invoice"], max_fee_msat=10**12, max_cltv=None)
        except Refused as error:
            return _failed(payment_hash, _REASONS.get(error.reason, str(error)))
        if record.state == "failed":
            reason = _REASONS.get(record.failure_code or "", str(record.failure_code))
            return _failed(payment_hash, reason)
        return JSONResponse(
            {
                "recipientAmountSat": record.amount_msat // 1000,
                "routingFeeSat": record.fee_msat // 1000,
                "paymentId": str(record.payment_id),
                "paymentHash": record.payment_hash,
                "paymentPreimage": record.preimage,
            }
        )

    async def outgoing(self, request: Request, body: Any) -> Response:
        attempts = await self._core.attempts(request.path_params["payment_hash"])
        for state in ("succeeded", "in_flight", "failed"):
            for record in attempts:
                if record.state == state:
                    return JSONResponse(self._outgoing(record))
        return Response(status_code=204)

    async def list_outgoing(self, request: Request, body: Any) -> Response:
        wanted = (
            {"succeeded"} if body.get("all") != "true" else {"succeeded", "in_flight", "failed"}
        )
        found = [
            one
            for one in reversed(await self._core.remembered())
            if one.state in wanted and one.sent_at_s * 1000 >= int(body.get("from", "0"))
        ]
        offset = int(body.get("offset", "0"))
        page = found[offset : offset + int(body.get("limit", "20"))]
        return JSONResponse([self._outgoing(one) for one in page])

    async def websocket(self, websocket: WebSocket) -> None:
        if not _allowed(websocket.headers.get("authorization")):
            await websocket.send_denial_response(PlainTextResponse("no", status_code=401))
            return
        after = await self._core.last_index()
        await websocket.accept()
        gone = asyncio.ensure_future(websocket.receive())
        try:
            async for _, record in self._core.settled(after):
                await websocket.send_json(
                    {
                        "type": "payment_received",
                        "amountSat": record.amount_received_msat // 1000,
                        "paymentHash": record.payment_hash,
                        "timestamp": int((record.settled_at_s or 0) * 1000),
                    }
                )
        except (ConnectionDropped, WebSocketDisconnect):
            await websocket.close(1011)
        finally:
            gone.cancel()
            await asyncio.gather(gone, return_exceptions=True)

    async def _incoming(self, record: InvoiceRecord) -> dict[str, Any]:
        paid = record.state == "settled"
        incoming: dict[str, Any] = {
            "type": "incoming_payment",
            "subType": "lightning",
            "paymentHash": record.payment_hash,
            # As in phoenixd: of unpaid invoices too.
            "preimage": await self._core.preimage(record.payment_hash),
            "externalId": await self._core.key_of(record.payment_hash),
            "description": record.description,
            "invoice": record.bolt11,
            "isPaid": paid,
            "isExpired": record.state == "expired",
            "requestedSat": record.amount_msat // 1000,
            "receivedSat": record.amount_received_msat // 1000,
            "fees": 0,
            "expiresAt": record.expires_at_s * 1000,
            "createdAt": record.created_at_s * 1000,
        }
        if paid:
            incoming["completedAt"] = int((record.settled_at_s or 0) * 1000)
        return incoming

    def _outgoing(self, record: PaymentRecord) -> dict[str, Any]:
        """Nulls are left out."""
        paid = record.state == "succeeded"
        payment: dict[str, Any] = {
            "type": "outgoing_payment",
            "subType": "lightning",
            "paymentId": str(record.payment_id),
            "paymentHash": record.payment_hash,
            "isPaid": paid,
            "invoice": self._core.disk.asked_to_pay[record.payment_hash],
            "sent": (record.amount_msat + (record.fee_msat if paid else 0)) // 1000,
            "fees": record.fee_msat if paid else 0,
            "createdAt": int(record.sent_at_s * 1000),
        }
        if paid:
            payment["preimage"] = record.preimage
        if record.ended_at_s is not None:
            payment["completedAt"] = int(record.ended_at_s * 1000)
        return payment


def _failed(payment_hash: str, reason: str) -> Response:
    return JSONResponse({"type": "payment_failed", "paymentHash": payment_hash, "reason": reason})
