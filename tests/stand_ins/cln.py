"""A stand-in for Core Lightning's clnrest: methods by POST, 201 for success, 500 for errors."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from billing import bolt11_codec
from billing.errors import BadInvoice
from billing.lightning.simulated.invoices import InvoiceRecord
from billing.lightning.simulated.wallets import Refused
from tests.stand_ins.core import NodeCore, index_of

RUNE = "the-rune-for-all"
RECEIVE_RUNE = "the-rune-for-invoices"
RESERVE_MSAT = 10_000_000
_PAYING = frozenset({"xpay", "listpays", "listsendpays"})
_STATUSES = {"open": "unpaid", "held": "unpaid", "settled": "paid", "expired": "expired"}
_PAY_CODES = {
    "no_route": 205,
    "fee_limit": 206,
    "insufficient_funds": 205,
    "expired": 207,
    "incorrect_payment_details": 203,
}


def routes(core: NodeCore) -> list[BaseRoute]:
    cln = _Cln(core)

    async def answer(request: Request) -> Response:
        method = request.path_params["method"]
        body = await request.json()
        core.requests.append(("POST", method, body))
        rune = request.headers.get("rune")
        if rune is None:
            return _error(1501, "Not authorized: Missing rune", status=403)
        if rune not in (RUNE, RECEIVE_RUNE) or (rune == RECEIVE_RUNE and method in _PAYING):
            return _error(1502, "Not authorized: Not derived from master", status=401)
        handler = getattr(cln, method, None)
        if handler is None:
            return _error(-32601, f"Unknown command '{method}'", status=404)
        try:
            return JSONResponse(await handler(body), status_code=201)
        except RpcError as error:
            return _error(error.code, str(error))

    return [Route("/v1/{method}", answer, methods=["POST"])]


class RpcError(Exception):
    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class _Cln:
    """A method for each of the node's."""

    def __init__(self, core: NodeCore) -> None:
        self._core = core
        self._deleted: set[str] = set()

    async def getinfo(self, body: Any) -> Any:
        node = await self._core.node("node_info")
        return {
            "id": node.pubkey,
            "alias": node.name,
            "version": "stand-in for v26.06",
            "network": "regtest",
            "blockheight": 800_000,
        }

    async def listpeerchannels(self, body: Any) -> Any:
        node = await self._core.node("balance")
        htlcs = (
            [{"direction": "out", "id": 1, "amount_msat": node.pending_msat, "state": "RCVD_ADD"}]
            if node.pending_msat
            else []
        )
        channel = {
            "state": "CHANNELD_NORMAL",
            "peer_connected": True,
            "to_us_msat": node.balance_msat + node.pending_msat + RESERVE_MSAT,
            "spendable_msat": node.balance_msat,
            "receivable_msat": 5_000_000,
            "htlcs": htlcs,
        }
        away = {
            **channel,
            "peer_connected": False,
            "spendable_msat": 7_000_000,
            "to_us_msat": 8_000_000,
            "htlcs": [],
        }
        return {"channels": [channel, away]}

    async def invoice(self, body: Any) -> Any:
        if await self._core.by_key(body["label"]) is not None:
            raise RpcError(900, "Duplicate label '" + body["label"] + "'")
        try:
            record = await self._core.network.create_invoice(
                self._core.wallet,
                amount_msat=body["amount_msat"],
                description=body["description"],
                expiry_s=body.get("expiry", 604_800),
                idempotency_key=body["label"],
            )
        except Refused as error:
            raise RpcError(-32602, str(error)) from None
        return {
            "payment_hash": record.payment_hash,
            "expires_at": record.expires_at_s,
            "bolt11": record.bolt11,
            "payment_secret": "00" * 32,
            "created_index": 1,
            "warning_capacity": "Insufficient incoming channel capacity to pay invoice",
        }

    async def listinvoices(self, body: Any) -> Any:
        if body.get("index") == "created":
            received = await self._core.network.received(self._core.wallet)
            page = received[body["start"] - 1 :][: body["limit"]]
            return {
                "invoices": [
                    await self._invoice(one) | {"created_index": body["start"] + n}
                    for n, one in enumerate(page)
                ]
            }
        payment_hash = body.get("payment_hash") or await self._core.by_key(body["label"])
        if payment_hash is None or payment_hash in self._deleted:
            return {"invoices": []}
        record = await self._core.network.lookup_invoice(self._core.wallet, payment_hash)
        return {"invoices": [] if record is None else [await self._invoice(record)]}

    async def delinvoice(self, body: Any) -> Any:
        payment_hash = await self._core.by_key(body["label"])
        if payment_hash is None:
            raise RpcError(905, "Unknown invoice")
        record = await self._core.network.lookup_invoice(self._core.wallet, payment_hash)
        if record is None or _STATUSES[record.state] != body["status"]:
            raise RpcError(906, "Invoice status is not " + body["status"])
        if not await self._core.network.cancel_invoice(self._core.wallet, payment_hash):
            raise RpcError(906, "Invoice status is paid not " + body["status"])
        self._deleted.add(payment_hash)
        return {"label": body["label"], "status": body["status"]}

    async def waitanyinvoice(self, body: Any) -> Any:
        records = self._core.settled(body.get("lastpay_index", 0))
        try:
            async with asyncio.timeout(body.get("timeout", 3600)):
                _, record = await anext(records)
        except TimeoutError:
            raise RpcError(904, "Timed out") from None
        finally:
            await records.aclose()  # type: ignore[attr-defined]
        return await self._invoice(record)

    async def xpay(self, body: Any) -> Any:
        try:
            payment_hash = bolt11_codec.decode(body["invstring"]).payment_hash
        except BadInvoice as error:
            raise RpcError(-32602, f"Invalid bolt11: {error}") from None
        self._core.disk.asked_to_pay[payment_hash] = body["invstring"]
        known = await self._core.network.lookup_payment(self._core.wallet, payment_hash)
        if known is not None and known.state == "succeeded":
            raise RpcError(219, "Already paid")
        if known is not None and known.state == "in_flight":
            raise RpcError(200, "Payment is pending")
        try:
            record = await self._core.pay(
                body["invstring"],
                max_fee_msat=body.get("maxfee", 5_000),
                max_cltv=body.get("maxdelay"),
            )
        except Refused as error:
            raise RpcError(_PAY_CODES.get(error.reason, 209), str(error)) from None
        if record.state == "failed":
            code = _PAY_CODES.get(record.failure_code or "", 209)
            raise RpcError(code, f"Failed: {record.failure_code}")
        return {
            "payment_preimage": record.preimage,
            "failed_parts": 0,
            "successful_parts": 1,
            "amount_msat": record.amount_msat,
            "amount_sent_msat": record.amount_msat + record.fee_msat,
        }

    async def listpays(self, body: Any) -> Any:
        if body.get("index") == "created":
            hashes = list(dict.fromkeys(p.payment_hash for p in await self._core.remembered()))
            page = hashes[body["start"] - 1 :][: body["limit"]]
            pays = [
                (await self.listpays({"payment_hash": one}))["pays"][0]
                | {"created_index": body["start"] + n}
                for n, one in enumerate(page)
            ]
            return {"pays": pays}
        attempts = await self._core.attempts(body["payment_hash"])
        if not attempts:
            return {"pays": []}
        states = {one.state for one in attempts}
        best = next((s for s in ("succeeded", "in_flight") if s in states), "failed")
        record = next(one for one in attempts if one.state == best)
        pay: dict[str, Any] = {
            "payment_hash": record.payment_hash,
            "bolt11": self._core.disk.asked_to_pay[record.payment_hash],
            "status": {"succeeded": "complete", "in_flight": "pending"}.get(best, "failed"),
            "created_at": int(record.sent_at_s),
            # As older versions wrote it.
            "amount_sent_msat": f"{record.amount_msat + record.fee_msat}msat",
        }
        if best == "succeeded":
            pay |= {"preimage": record.preimage, "amount_msat": record.amount_msat}
        return {"pays": [pay]}

    async def listsendpays(self, body: Any) -> Any:
        attempts = await self._core.attempts(body["payment_hash"])
        payments = [
            {
                "id": one.payment_id,
                "groupid": one.payment_id,
                "payment_hash": one.payment_hash,
                "status": {"succeeded": "complete", "in_flight": "pending"}.get(
                    one.state, "failed"
                ),
                "created_at": int(one.sent_at_s),
                "amount_msat": one.amount_msat,
                "amount_sent_msat": one.amount_msat + one.fee_msat,
            }
            for one in attempts
        ]
        return {"payments": payments}

    async def _invoice(self, record: InvoiceRecord) -> dict[str, Any]:
        invoice: dict[str, Any] = {
            "label": await self._core.key_of(record.payment_hash),
            "bolt11": record.bolt11,
            "payment_hash": record.payment_hash,
            "amount_msat": record.amount_msat,
            "status": _STATUSES[record.state],
            "description": record.description,
            "expires_at": record.expires_at_s,
        }
        if record.state == "settled":
            invoice |= {
                "pay_index": index_of(record),
                "amount_received_msat": record.amount_received_msat,
                "paid_at": int(record.settled_at_s or 0),
                "payment_preimage": await self._core.preimage(record.payment_hash),
            }
        return invoice


def _error(code: int, message: str, *, status: int = 500) -> Response:
    return JSONResponse({"code": code, "message": message, "data": None}, status_code=status)
