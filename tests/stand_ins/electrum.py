"""A stand-in for the daemon of Electrum 4.3.4, or of a later one: its JSON-RPC over HTTP.

Built from the source of Debian's 4.3.4; for later ones from their documented parameters.
"""

from __future__ import annotations

import base64
import json
from decimal import Decimal
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from billing import bolt11_codec
from billing.errors import BadInvoice
from billing.lightning.simulated.invoices import InvoiceRecord
from billing.lightning.simulated.network import ConnectionDropped
from billing.lightning.simulated.payments import PaymentRecord
from billing.lightning.simulated.wallets import Refused
from tests.stand_ins.core import NodeCore

USER, PASSWORD = "user", "rpc-password"
_RESERVE_SAT = 1_000
_REQUEST_STATUS = {"open": 0, "held": 0, "expired": 1, "settled": 3}
_PARAMETERS = {
    "getinfo": set(),
    "nodeid": set(),
    "list_channels": set(),
    "list_requests": {"pending", "expired", "paid"},
    "get_request": {"request_id"},
    "get_invoice": {"invoice_id"},
    "lightning_history": {"show_fiat"},
}


class ElectrumStandIn:
    """`stuck_sat`: what an HTLC of some given-up payment still holds in the channel."""

    def __init__(self, core: NodeCore, *, version: str = "4.3.4") -> None:
        self._core = core
        self.version = version
        self.stuck_sat = 0
        self.can_receive = True
        self.loaded = True
        self.on_chain: set[str] = set()
        self._modern = tuple(int(part) for part in version.split(".")) >= (4, 8)

    def routes(self) -> list[BaseRoute]:
        return [Route("/", self.answer, methods=["POST"])]

    async def answer(self, request: Request) -> Response:
        given = request.headers.get("authorization")
        if given is None:
            return PlainTextResponse("Unauthorized", status_code=401)
        if given != "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode():
            return PlainTextResponse("Forbidden", status_code=403)
        body = json.loads(await request.body())
        method, params = body["method"], body["params"]
        self._core.requests.append(("POST", method, params))
        allowed = _PARAMETERS | {
            "add_request": {"amount", "memo"}
            | ({"expiry", "lightning"} if self._modern else {"expiration", "force"}),
            "lnpay": {"invoice"} | ({"max_fee_msat", "max_cltv"} if self._modern else set()),
        }
        if method not in allowed:
            return PlainTextResponse("Invalid Request", status_code=500)
        try:
            if not params.keys() <= allowed[method]:
                raise _Error("got an unexpected keyword argument")
            if not self.loaded and method != "getinfo":
                raise _Error("wallet not loaded")
            result = await getattr(self, f"_{method}")(**params)
        except _Error as error:
            failure = {"code": 1, "message": str(error)}
            return JSONResponse({"id": body["id"], "jsonrpc": "2.0", "error": failure})
        return JSONResponse({"id": body["id"], "jsonrpc": "2.0", "result": result})

    async def _getinfo(self) -> Any:
        await self._core.node("node_info")
        return {
            "network": "regtest",
            "blockchain_height": 800_000,
            "server_height": 800_000,
            "connected": True,
            "version": self.version,
        }

    async def _nodeid(self) -> Any:
        return (await self._core.node("none")).pubkey + "@127.0.0.1:9735"

    async def _list_channels(self) -> Any:
        node = await self._core.node("balance")
        # Electrum takes an HTLC off the balance only when it has settled.
        return [
            {
                "type": "CHANNEL",
                "state": "OPEN",
                "peer_state": "GOOD",
                "local_balance": (node.balance_msat + node.pending_msat) // 1000,
                "remote_balance": 5_000_000,
                "local_reserve": _RESERVE_SAT,
                "remote_reserve": _RESERVE_SAT,
                "local_unsettled_sent": -(-node.pending_msat // 1000) + self.stuck_sat,
                "remote_unsettled_sent": 0,
            },
            {"type": "BACKUP", "state": "CLOSED"},
        ]

    async def _add_request(
        self, amount: str, memo: str, expiration: int = 0, expiry: int = 0, **_: Any
    ) -> Any:
        record = await self._core.network.create_invoice(
            self._core.wallet,
            amount_msat=int(100_000_000 * Decimal(amount)) * 1000,
            description=memo,
            expiry_s=expiration or expiry,
        )
        return self._request(record)

    async def _get_request(self, request_id: str) -> Any:
        record = await self._core.network.lookup_invoice(self._core.wallet, request_id)
        if record is None:
            raise _Error("Request not found")
        return self._request(record)

    async def _list_requests(self, paid: bool = False) -> Any:
        assert paid
        received = await self._core.network.received(self._core.wallet)
        if received and self._core.settlements_until_drop == 0:
            self._core.settlements_until_drop = None
            raise ConnectionDropped
        if received and self._core.settlements_until_drop:
            self._core.settlements_until_drop -= 1
        return [self._request(record) for record in received]

    async def _get_invoice(self, invoice_id: str) -> Any:
        attempts = await self._core.attempts(invoice_id)
        given_up = invoice_id in self._core.disk.given_up
        if not attempts and not given_up:
            raise _Error("Request not found")
        states = {attempt.state for attempt in attempts}
        status = 3 if "succeeded" in states else 4 if "in_flight" in states else 5
        return {"is_lightning": True, "status": status, "invoice_id": invoice_id}

    async def _lightning_history(self) -> Any:
        paid = await self._core.network.paid_out(self._core.wallet)
        received = await self._core.network.received(self._core.wallet)
        return [
            {"type": "channel_opening", "channel_id": "00", "amount_msat": 10**9},
            *(_receipt(one) for one in received),
            *(_history(one) for one in paid if one.state == "succeeded" and not one.forgotten),
        ]

    async def _lnpay(
        self, invoice: str, max_fee_msat: int | None = None, max_cltv: int | None = None
    ) -> Any:
        try:
            decoded = bolt11_codec.decode(invoice)
        except BadInvoice:
            raise _Error("invalid bech32") from None
        payment_hash = decoded.payment_hash
        for known in await self._core.attempts(payment_hash):
            match known.state:
                case "succeeded":
                    raise _Error("This invoice has been paid already")
                case "in_flight":
                    raise _Error("A payment was already initiated for this invoice")
        if max_fee_msat is None:
            max_fee_msat = max(5_000, (decoded.amount_msat or 0) // 100)
        try:
            record = await self._core.pay(invoice, max_fee_msat=max_fee_msat, max_cltv=max_cltv)
        except Refused as error:
            if error.reason == "expired":
                raise _Error("This invoice has expired") from None
            self._core.disk.given_up[payment_hash] = error.reason
            return {"payment_hash": payment_hash, "success": False, "preimage": None, "log": []}
        paid = record.state == "succeeded"
        return {
            "payment_hash": payment_hash,
            "success": paid,
            "preimage": record.preimage if paid else None,
            "log": [],
        }

    def _request(self, record: InvoiceRecord) -> dict[str, Any]:
        on_chain = record.payment_hash in self.on_chain
        request: dict[str, Any] = {
            "is_lightning": True,
            "status": 3 if on_chain else _REQUEST_STATUS.get(record.state, 2),
            "request_id": record.payment_hash,
            "rhash": record.payment_hash,
            "lightning_invoice": record.bolt11,
            "amount_msat": record.amount_received_msat or record.amount_msat,
            "tx_hashes": ["00" * 32] if on_chain else [],
        }
        if request["status"] == 0:
            request["can_receive"] = self.can_receive
        return request


class _Error(Exception):
    """What Electrum says in `error.message`."""


def _receipt(record: InvoiceRecord) -> dict[str, Any]:
    return {
        "type": "payment",
        "direction": 1,
        "timestamp": int(record.settled_at_s or 0),
        "amount_msat": record.amount_received_msat,
        "fee_msat": None,
        "payment_hash": record.payment_hash,
    }


def _history(record: PaymentRecord) -> dict[str, Any]:
    return {
        "type": "payment",
        "direction": 0,
        "timestamp": int(record.ended_at_s or 0),
        "amount_msat": -(record.amount_msat + record.fee_msat),
        "fee_msat": record.fee_msat,
        "payment_hash": record.payment_hash,
        "preimage": record.preimage,
    }
