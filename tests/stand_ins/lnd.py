"""A stand-in for LND's REST interface: its routes, its encodings, its errors."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from billing import bolt11_codec
from billing.errors import BadInvoice
from billing.lightning.simulated.invoices import InvoiceRecord
from billing.lightning.simulated.payments import PaymentRecord
from billing.lightning.simulated.wallets import Refused
from tests.stand_ins.core import Lines, NodeCore, index_of

MACAROON = "0201036c6e64"
RECEIVE_MACAROON = "0201036c6e65"
RESERVE_SAT = 10_000
_HTTP_OF_CODE = {2: 500, 3: 400, 5: 404, 6: 409, 7: 403, 13: 500, 14: 503, 16: 401}
_INVOICE_STATES = {
    "open": "OPEN",
    "held": "ACCEPTED",
    "settled": "SETTLED",
    "canceled": "CANCELED",
    "expired": "CANCELED",
}
_FAILURE_REASONS = {
    "no_route": "FAILURE_REASON_NO_ROUTE",
    "fee_limit": "FAILURE_REASON_NO_ROUTE",
    "insufficient_funds": "FAILURE_REASON_INSUFFICIENT_BALANCE",
    "incorrect_payment_details": "FAILURE_REASON_INCORRECT_PAYMENT_DETAILS",
}


def routes(core: NodeCore) -> list[BaseRoute]:
    lnd = _Lnd(core)
    table = {
        "GET /v1/getinfo": lnd.getinfo,
        "GET /v1/balance/channels": lnd.channel_balance,
        "GET /v1/channels": lnd.channels,
        "POST /v1/invoices": lnd.add_invoice,
        "GET /v1/invoices": lnd.list_invoices,
        "GET /v1/payments": lnd.list_payments,
        "GET /v1/invoices/subscribe": lnd.subscribe,
        "GET /v1/invoice/{payment_hash}": lnd.lookup_invoice,
        "POST /v2/invoices/cancel": lnd.cancel,
        "POST /v2/router/send": lnd.send,
        "GET /v2/router/track/{payment_hash}": lnd.track,
    }
    found: list[BaseRoute] = []
    for named, handler in table.items():
        method, _, path = named.partition(" ")
        found.append(Route(path, _guarded(core, path, handler), methods=[method]))
    return found


def _guarded(core: NodeCore, path: str, handler: Any) -> Any:
    async def answer(request: Request) -> Response:
        body = await request.json() if request.method == "POST" else dict(request.query_params)
        core.requests.append((request.method, path, body))
        macaroon = request.headers.get("grpc-metadata-macaroon")
        if macaroon not in (MACAROON, RECEIVE_MACAROON):
            # Macaroon failures come as code 2, which is 500.
            return _error(2, "verification failed: signature mismatch after caveat verification")
        if macaroon == RECEIVE_MACAROON and not path.startswith(("/v1/invoice", "/v2/invoices")):
            return _error(2, "permission denied")
        return await handler(request, body)

    return answer


class _Lnd:
    def __init__(self, core: NodeCore) -> None:
        self._core = core

    async def getinfo(self, request: Request, body: Any) -> Response:
        node = await self._core.node("node_info")
        return JSONResponse(
            {
                "identity_pubkey": node.pubkey,
                "alias": node.name,
                "version": "stand-in for 0.21.0-beta",
                "synced_to_chain": True,
                "synced_to_graph": True,
                "num_active_channels": 1,
                "block_height": 800_000,
                "chains": [{"chain": "bitcoin", "network": "regtest"}],
            }
        )

    async def channel_balance(self, request: Request, body: Any) -> Response:
        node = await self._core.node("balance")
        return JSONResponse(
            {
                "local_balance": _amount(node.balance_msat + RESERVE_SAT * 1000),
                "remote_balance": _amount(RESERVE_SAT * 1000 + 5_000_000),
                "unsettled_local_balance": _amount(0),
                "unsettled_remote_balance": _amount(node.pending_msat),
            }
        )

    async def channels(self, request: Request, body: Any) -> Response:
        node = await self._core.node("none")
        constraints = {"chan_reserve_sat": str(RESERVE_SAT), "dust_limit_sat": "354"}
        channel = {
            "active": True,
            "capacity": "100000000",
            "local_balance": str(node.balance_msat // 1000 + RESERVE_SAT),
            "remote_balance": str(RESERVE_SAT + 5_000),
            "local_constraints": constraints,
            "remote_constraints": constraints,
        }
        return JSONResponse({"channels": [channel]})

    async def add_invoice(self, request: Request, body: Any) -> Response:
        preimage = body.get("r_preimage")
        try:
            record = await self._core.network.create_invoice(
                self._core.wallet,
                amount_msat=int(body["value_msat"]),
                description=body.get("memo", ""),
                expiry_s=int(body.get("expiry", 86_400)),
                preimage=None if preimage is None else base64.b64decode(preimage, validate=True),
            )
        except Refused as error:
            words = "invoice with payment hash already exists"
            return _error(2, words if error.reason == "conflict" else str(error))
        return JSONResponse(
            {
                "r_hash": _base64(record.payment_hash),
                "payment_request": record.bolt11,
                "add_index": "1",
                "payment_addr": _base64("00" * 32),
            }
        )

    async def lookup_invoice(self, request: Request, body: Any) -> Response:
        payment_hash = request.path_params["payment_hash"]
        record = await self._core.network.lookup_invoice(self._core.wallet, payment_hash)
        if record is None:
            return _error(5, "unable to locate invoice")
        return JSONResponse(await self._invoice(record))

    async def list_invoices(self, request: Request, body: Any) -> Response:
        """Of this node those that were paid: it indexes them by their settlement."""
        first, most = int(body["index_offset"]), int(body["num_max_invoices"])
        since_s = int(body["creation_date_start"])
        found = [
            record
            for record in await self._core.network.received(self._core.wallet)
            if index_of(record) > first and record.created_at_s >= since_s
        ][:most]
        last = index_of(found[-1]) if found else 0
        listed = [await self._invoice(record) for record in found]
        return JSONResponse({"invoices": listed, "last_index_offset": str(last)})

    async def list_payments(self, request: Request, body: Any) -> Response:
        assert body["include_incomplete"] == "true"
        first, most = int(body["index_offset"]), int(body["max_payments"])
        since_s = int(body["creation_date_start"])
        found = [
            one
            for one in await self._core.remembered()
            if one.payment_id > first and one.sent_at_s >= since_s
        ][:most]
        last = found[-1].payment_id if found else 0
        listed = [
            self._payment(one) | {"creation_time_ns": str(int(one.sent_at_s * 1_000_000_000))}
            for one in found
        ]
        return JSONResponse({"payments": listed, "last_index_offset": str(last)})

    async def cancel(self, request: Request, body: Any) -> Response:
        payment_hash = base64.b64decode(body["payment_hash"], validate=True).hex()
        record = await self._core.network.lookup_invoice(self._core.wallet, payment_hash)
        if record is None:
            return _error(5, "unable to locate invoice")
        if not await self._core.network.cancel_invoice(self._core.wallet, payment_hash):
            return _error(2, "invoice already settled")
        return JSONResponse({})

    async def subscribe(self, request: Request, body: Any) -> Response:
        asked = int(body.get("settle_index", "0"))

        async def lines() -> AsyncIterator[dict[str, Any]]:
            # 0 means "no backlog", not "all".
            after = asked or await self._core.last_index()
            async for _, record in self._core.settled(after):
                # Additions come on the same stream.
                yield {"result": {**await self._invoice(record), "state": "OPEN"}}
                yield {"result": await self._invoice(record)}

        return Lines(lines())

    async def send(self, request: Request, body: Any) -> Response:
        bolt11 = body["payment_request"]
        try:
            payment_hash = bolt11_codec.decode(bolt11).payment_hash
        except BadInvoice as error:
            return _streamed_error(2, str(error))
        known = await self._core.network.lookup_payment(self._core.wallet, payment_hash)
        if known is not None and known.state == "succeeded":
            return _streamed_error(6, "invoice is already paid")
        if known is not None and known.state == "in_flight":
            return _streamed_error(6, "payment is in transition")
        try:
            record = await self._core.pay(
                bolt11,
                # As in LND: what is not said is 0, and 0 allows only what is free.
                max_fee_msat=int(body.get("fee_limit_msat", "0")),
                max_cltv=body.get("cltv_limit"),
            )
        except Refused as error:
            if error.reason in ("expired", "self_payment", "wrong_network"):
                return _streamed_error(2, "invoice expired. Valid until 2026-01-01 00:00:00")
            self._core.disk.given_up[payment_hash] = error.reason
            return Lines(_once({"result": self._given_up(payment_hash)}))
        return Lines(_once({"result": self._payment(record)}))

    async def track(self, request: Request, body: Any) -> Response:
        in_base64 = request.path_params["payment_hash"]
        payment_hash = base64.b64decode(in_base64, altchars=b"-_", validate=True).hex()
        attempts = await self._core.attempts(payment_hash)
        alive = [one for one in attempts if one.state != "failed"] or attempts
        if alive:
            return Lines(_once({"result": self._payment(alive[0])}))
        if payment_hash in self._core.disk.given_up:
            return Lines(_once({"result": self._given_up(payment_hash)}))
        return _streamed_error(5, "payment isn't initiated")

    async def _invoice(self, record: InvoiceRecord) -> dict[str, Any]:
        settled = record.state == "settled"
        return {
            "memo": record.description,
            "r_preimage": _base64(await self._core.preimage(record.payment_hash)),
            "r_hash": _base64(record.payment_hash),
            "value_msat": str(record.amount_msat),
            "settled": settled,
            "creation_date": str(record.created_at_s),
            "settle_date": str(int(record.settled_at_s or 0)),
            "payment_request": record.bolt11,
            "expiry": str(record.expires_at_s - record.created_at_s),
            "settle_index": str(index_of(record)) if settled else "0",
            "amt_paid_msat": str(record.amount_received_msat),
            "state": _INVOICE_STATES[record.state],
        }

    def _payment(self, record: PaymentRecord) -> dict[str, Any]:
        reason = _FAILURE_REASONS.get(record.failure_code or "", "FAILURE_REASON_ERROR")
        return {
            "payment_hash": record.payment_hash,
            "value_msat": str(record.amount_msat),
            "fee_msat": str(record.fee_msat),
            "payment_preimage": record.preimage or "00" * 32,
            "status": record.state.upper(),
            "failure_reason": reason if record.state == "failed" else "FAILURE_REASON_NONE",
            "htlcs": [],
        }

    def _given_up(self, payment_hash: str) -> dict[str, Any]:
        reason = self._core.disk.given_up[payment_hash]
        return {
            "payment_hash": payment_hash,
            "value_msat": "0",
            "fee_msat": "0",
            "payment_preimage": "00" * 32,
            "status": "FAILED",
            "failure_reason": _FAILURE_REASONS.get(reason, "FAILURE_REASON_ERROR"),
            "htlcs": [],
        }


async def _once(line: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    yield line


def _error(code: int, message: str) -> Response:
    body = {"code": code, "message": message, "details": []}
    return JSONResponse(body, status_code=_HTTP_OF_CODE[code])


def _streamed_error(code: int, message: str) -> Response:
    body = {"error": {"code": code, "message": message, "details": []}}
    return JSONResponse(body, status_code=_HTTP_OF_CODE[code])


def _amount(msat: int) -> dict[str, str]:
    return {"sat": str(msat // 1000), "msat": str(msat)}


def _base64(in_hex: str) -> str:
    return base64.b64encode(bytes.fromhex(in_hex)).decode()
