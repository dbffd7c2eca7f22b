"""A stand-in for LNbits 1.6.2: one wallet of it, with shapes and words as the real one gave them.

Built from answers of LNbits 1.6.2 with its FakeWallet, and for what that cannot do (payments to
elsewhere, pending ones) from its source.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from billing import bolt11_codec
from billing.errors import BadInvoice
from billing.lightning.simulated.invoices import InvoiceRecord
from billing.lightning.simulated.network import ConnectionDropped
from billing.lightning.simulated.payments import PaymentRecord
from billing.lightning.simulated.wallets import Refused
from tests.stand_ins.core import NodeCore

INVOICE_KEY = "5f4d5a9adbde4875a2318552f074515d"
ADMIN_KEY = "3a64e97cef604d39aea3c7e288699ce8"
WALLET_ID = "3cfe60885a7342a6b5566e0936a375c0"
_NO_RETRY = "Payment is failed node, retrying is not possible."
_STATUS = {"succeeded": "success", "in_flight": "pending", "failed": "failed"}


class LnbitsStandIn:
    """`wait_s`: how long a payment may last before LNbits answers "pending". `reserve_min_msat` is
    what its operator set."""

    def __init__(self, core: NodeCore, *, wait_s: float = 5.0) -> None:
        self._core = core
        self.wait_s = wait_s
        self.reserve_min_msat = 2_000
        # Answers of the pay call that come in place of the real one, and change nothing.
        self.pay_answers: list[Response] = []
        self._paying: set[asyncio.Task[Any]] = set()

    def routes(self) -> list[BaseRoute]:
        return [
            Route("/openapi.json", self.openapi),
            Route("/api/v1/wallet", self.wallet),
            Route("/api/v1/payments", self.payments, methods=["GET", "POST"]),
            Route("/api/v1/payments/fee-reserve", self.fee_reserve),
            Route("/api/v1/payments/{payment_hash}", self.payment),
            WebSocketRoute("/api/v1/ws/{key}", self.websocket),
        ]

    async def openapi(self, request: Request) -> Response:
        return JSONResponse({"info": {"title": "LNbits API", "version": "1.6.2"}})

    async def wallet(self, request: Request) -> Response:
        key = request.headers.get("x-api-key")
        if key not in (INVOICE_KEY, ADMIN_KEY):
            return _detail(404, "Wallet not found.")
        node = await self._core.node("balance")
        found = {"name": "a", "balance": node.balance_msat}
        return JSONResponse(found | ({"id": WALLET_ID} if key == ADMIN_KEY else {}))

    async def payments(self, request: Request) -> Response:
        key = request.headers.get("x-api-key")
        if key not in (INVOICE_KEY, ADMIN_KEY):
            return _detail(404, "Wallet not found.")
        if request.method == "GET":
            return JSONResponse(await self._list(dict(request.query_params)))
        body = await request.json()
        self._core.requests.append((request.method, request.url.path, body))
        if not body["out"]:
            return await self._create(body)
        if key != ADMIN_KEY:
            return _detail(403, "Invoice (or Admin) key required.")
        if self.pay_answers:
            return self.pay_answers.pop(0)
        return await self._pay(body["bolt11"])

    async def fee_reserve(self, request: Request) -> Response:
        amount_msat = bolt11_codec.decode(request.query_params["invoice"]).amount_msat or 0
        return JSONResponse({"fee_reserve": self._reserve_msat(amount_msat)})

    async def payment(self, request: Request) -> Response:
        payment_hash = request.path_params["payment_hash"]
        found = await self._find(payment_hash)
        if found is None:
            return _detail(404, "Payment does not exist.")
        paid = found["status"] == "success"
        answer: dict[str, Any] = {"paid": paid, "preimage": found["preimage"] if paid else None}
        if not paid:
            answer["status"] = found["status"]
        if request.headers.get("x-api-key") in (INVOICE_KEY, ADMIN_KEY):
            answer["details"] = found
        return JSONResponse(answer)

    async def websocket(self, websocket: WebSocket) -> None:
        # As in LNbits, anybody may listen to any name; of a wrong key nothing is ever said.
        after = await self._core.last_index()
        await websocket.accept()
        if websocket.path_params["key"] not in (INVOICE_KEY, ADMIN_KEY):
            await websocket.receive()
            return
        await websocket.send_json({"wallet_balance": 1, "payment": {"amount": -5, "status": "x"}})
        gone = asyncio.ensure_future(websocket.receive())
        try:
            async for _, record in self._core.settled(after):
                payment = await self._incoming(record)
                await websocket.send_json({"wallet_balance": 1, "payment": payment})
        except (ConnectionDropped, WebSocketDisconnect):
            await websocket.close(1011)
        finally:
            gone.cancel()
            await asyncio.gather(gone, return_exceptions=True)

    async def _create(self, body: dict[str, Any]) -> Response:
        amount_sat = int(body["amount"])
        record = await self._core.network.create_invoice(
            self._core.wallet,
            amount_msat=amount_sat * 1000,
            description=body["memo"],
            expiry_s=body["expiry"],
        )
        return JSONResponse(await self._incoming(record), status_code=201)

    async def _pay(self, bolt11: str) -> Response:
        try:
            invoice = bolt11_codec.decode(bolt11)
        except BadInvoice:
            return _error("Bolt11 decoding failed.", "failed")
        amount_msat = invoice.amount_msat or 0
        reserve_msat = self._reserve_msat(amount_msat)
        node = await self._core.node("balance")
        if node.balance_msat < amount_msat:
            return _error("Insufficient balance.", "failed")
        if node.balance_msat < amount_msat + reserve_msat:
            return _error("You must reserve at least (2  sat) to cover potential", "failed")
        for known in await self._core.attempts(invoice.payment_hash):
            match known.state:
                case "succeeded":
                    return _error("Payment already paid.", "success")
                case "in_flight":
                    return _error("Payment is still pending.", "pending")
                case _:
                    return _error(_NO_RETRY, "failed")
        if invoice.payment_hash in self._core.disk.given_up:
            return _error(_NO_RETRY, "failed")
        self._core.disk.asked_to_pay[invoice.payment_hash] = bolt11
        paying = asyncio.create_task(
            self._core.pay(bolt11, max_fee_msat=reserve_msat, max_cltv=None)
        )
        # It goes on after the answer, and after its caller has hung up.
        self._paying.add(paying)
        paying.add_done_callback(self._forget)
        done, _ = await asyncio.wait({paying}, timeout=self.wait_s)
        if not done:
            [known, *_] = await self._core.attempts(invoice.payment_hash)
            return JSONResponse(self._outgoing(known), status_code=201)
        try:
            record = paying.result()
        except Refused as error:
            self._core.disk.given_up[invoice.payment_hash] = error.reason
            return _error(f"Payment failed: {error}", "failed")
        if record.state == "failed":
            return _error("Payment failed: no route", "failed")
        return JSONResponse(self._outgoing(record), status_code=201)

    def _forget(self, paying: asyncio.Task[Any]) -> None:
        self._paying.discard(paying)
        if not paying.cancelled():
            paying.exception()

    async def _list(self, query: dict[str, str]) -> list[dict[str, Any]]:
        received = await self._core.network.received(self._core.wallet)
        sent = await self._core.network.paid_out(self._core.wallet)
        found = [await self._incoming(record) for record in received]
        found += [self._outgoing(record) for record in sent if not record.forgotten]
        found.sort(key=lambda one: one["time"], reverse=True)
        if "status" in query:
            found = [one for one in found if one["status"] == query["status"]]
        if "amount[lt]" in query:
            found = [one for one in found if one["amount"] < int(query["amount[lt]"])]
        if "amount[gt]" in query:
            found = [one for one in found if one["amount"] > int(query["amount[gt]"])]
        if "time[ge]" in query:
            found = [one for one in found if one["time"] >= query["time[ge]"]]
        offset = int(query["offset"])
        return found[offset : offset + int(query["limit"])]

    async def _find(self, payment_hash: str) -> dict[str, Any] | None:
        record = await self._core.network.lookup_invoice(self._core.wallet, payment_hash)
        if record is not None:
            return await self._incoming(record)
        attempts = await self._core.attempts(payment_hash)
        if attempts:
            order = ("succeeded", "in_flight", "failed")
            return self._outgoing(min(attempts, key=lambda one: order.index(one.state)))
        if payment_hash in self._core.disk.given_up:
            return {"payment_hash": payment_hash, "status": "failed", "amount": -1, "fee": 0} | {
                "preimage": None
            }
        return None

    def _reserve_msat(self, amount_msat: int) -> int:
        return max(self.reserve_min_msat, amount_msat // 100)

    async def _incoming(self, record: InvoiceRecord) -> dict[str, Any]:
        status = {"settled": "success", "expired": "failed", "canceled": "failed"}
        moment_s = record.settled_at_s or record.created_at_s
        return {
            "checking_id": record.payment_hash,
            "payment_hash": record.payment_hash,
            "wallet_id": WALLET_ID,
            "amount": record.amount_received_msat or record.amount_msat,
            "fee": 0,
            "bolt11": record.bolt11,
            "status": status.get(record.state, "pending"),
            "memo": record.description,
            # As in LNbits: of unpaid invoices too.
            "preimage": await self._core.preimage(record.payment_hash),
            "time": _iso(record.created_at_s),
            "updated_at": _iso(moment_s),
        }

    def _outgoing(self, record: PaymentRecord) -> dict[str, Any]:
        return {
            "checking_id": record.payment_hash,
            "payment_hash": record.payment_hash,
            "wallet_id": WALLET_ID,
            "amount": -record.amount_msat,
            "fee": -record.fee_msat,
            "bolt11": self._core.disk.asked_to_pay[record.payment_hash],
            "status": _STATUS[record.state],
            "preimage": record.preimage,
            "time": _iso(record.sent_at_s),
            "updated_at": _iso(record.ended_at_s or record.sent_at_s),
        }


def _detail(status: int, words: str) -> Response:
    return JSONResponse({"detail": words}, status_code=status)


def _error(words: str, status: str) -> Response:
    return JSONResponse({"detail": words, "status": status}, status_code=520)


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()
