"""A stand-in for an NWC wallet and its relay, over the simulated network.

Not a real wallet: the money is simulated. The relay is a real WebSocket server, and the events, the
signatures (BIP-340) and the encryption (NIP-44, or NIP-04 for the wallet that knows no better) are
real. Built from NIP-01, NIP-44 and NIP-47; errors and reserve as Alby Hub has them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import asdict, replace
from typing import Any
from urllib.parse import quote

from coincurve import PrivateKey
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from billing import bolt11_codec
from billing.errors import BadInvoice
from billing.lightning import nip44
from billing.lightning.nostr import Event, pubkey_of, read_event, sign_event
from billing.lightning.simulated.invoices import InvoiceRecord
from billing.lightning.simulated.network import ConnectionDropped, Network
from billing.lightning.simulated.payments import PaymentRecord
from billing.lightning.simulated.wallets import Refused

METHODS = (
    "pay_invoice get_balance get_info make_invoice lookup_invoice list_transactions notifications"
)
_INVOICE_STATES = {"open": "pending", "held": "accepted", "canceled": "failed"}
_PAYMENT_STATES = {"in_flight": "pending", "succeeded": "settled"}
_CODES = {"insufficient_funds": "INSUFFICIENT_BALANCE", "malformed": "BAD_REQUEST"}
# A wallet gives out the preimage of an invoice that nobody has paid; here a made-up one.
UNPAID_PREIMAGE = "5e" * 32


class NwcStandIn:
    """`encryption` None: a wallet that announces none, and so speaks NIP-04."""

    def __init__(
        self,
        network: Network,
        *,
        encryption: str | None = "nip44_v2 nip04",
        methods: str = METHODS,
        notifications: str = "payment_received payment_sent",
        says_state: bool = True,
    ) -> None:
        self._network = network
        self._encryption = encryption
        self._methods = methods
        self._notifications = notifications
        self._says_state = says_state
        self.key = PrivateKey()
        self.client_key = PrivateKey()
        self.requests: list[dict[str, Any]] = []
        self.events: list[Event] = []
        # What goes wrong: answers that get lost, refusals by code, events from somebody else.
        self.answers_to_lose: list[str] = []
        self.preimage: str | None = None
        self.errors: list[tuple[str, str]] = []
        self.forge_answers = False
        # How many more receipts are told before the connection breaks.
        self.settlements_until_drop: int | None = None
        self._subscriptions: dict[ServerConnection, dict[str, dict[str, Any]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._port = 0
        self._server: Server | None = None

    @property
    def uri(self) -> str:
        relay = quote(f"ws://127.0.0.1:{self._port}", safe="")
        secret = self.client_key.secret.hex()
        return f"nostr+walletconnect://{pubkey_of(self.key)}?relay={relay}&secret={secret}"

    def take_over(self, earlier: NwcStandIn) -> None:
        """Be that wallet after a restart."""
        self.key, self.client_key, self._port = earlier.key, earlier.client_key, earlier._port

    async def start(self) -> None:
        self._server = await serve(self._serve, "127.0.0.1", self._port)
        self._port = next(iter(self._server.sockets)).getsockname()[1]
        self._spawn(self._notify())

    async def stop(self) -> None:
        assert self._server is not None
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._server.close()
        await self._server.wait_closed()

    async def drop_connections(self) -> None:
        for connection in list(self._subscriptions):
            connection.transport.abort()
            await connection.wait_closed()

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # The relay

    async def _serve(self, connection: ServerConnection) -> None:
        self._subscriptions[connection] = {}
        try:
            async for text in connection:
                await self._hear(connection, json.loads(text))
        except ConnectionClosed:
            pass
        finally:
            del self._subscriptions[connection]

    async def _hear(self, connection: ServerConnection, message: list[Any]) -> None:
        match message:
            case ["REQ", str(name), dict(wanted)]:
                self._subscriptions[connection][name] = wanted
                info = self._info()
                if _matches(info, wanted):
                    await _say(connection, ["EVENT", name, asdict(info)])
                await _say(connection, ["EOSE", name])
            case ["EVENT", value]:
                event = read_event(value)
                if event is None:
                    await _say(connection, ["OK", value.get("id", ""), False, "invalid: signature"])
                    return
                await _say(connection, ["OK", event.id, True, ""])
                self.events.append(event)
                self._spawn(self._answer(event))

    async def _publish(self, event: Event) -> None:
        for connection, subscriptions in list(self._subscriptions.items()):
            for name, wanted in list(subscriptions.items()):
                if _matches(event, wanted):
                    with contextlib.suppress(ConnectionClosed):
                        await _say(connection, ["EVENT", name, asdict(event)])

    # The wallet

    def _info(self) -> Event:
        tags = [["notifications", self._notifications]]
        if self._encryption is not None:
            tags.append(["encryption", self._encryption])
        return self._sign(13194, tags, self._methods)

    def _sign(self, kind: int, tags: list[list[str]], content: str) -> Event:
        now_s = int(self._network._clock())
        return sign_event(self.key, kind=kind, tags=tags, content=content, created_at=now_s)

    def _conversation(self) -> bytes:
        return nip44.conversation_key(self.key.secret, pubkey_of(self.client_key))

    def _encrypt(self, content: dict[str, Any]) -> str:
        text = json.dumps(content)
        if self._encryption is None:
            return nip44.encrypt_nip04(self.key.secret, pubkey_of(self.client_key), text)
        return nip44.encrypt(self._conversation(), text)

    def _decrypt(self, event: Event) -> dict[str, Any]:
        if self._encryption is None:
            return json.loads(nip44.decrypt_nip04(self.key.secret, event.pubkey, event.content))
        assert event.tag("encryption") == "nip44_v2"
        return json.loads(nip44.decrypt(self._conversation(), event.content))

    async def _answer(self, event: Event) -> None:
        if event.kind != 23194 or event.pubkey != pubkey_of(self.client_key):
            return
        request = self._decrypt(event)
        self.requests.append(request)
        method = request["method"]
        try:
            if self.errors and self.errors[0][0] == method:
                raise _Error(self.errors.pop(0)[1])
            answer = {"result": await self._perform(method, request["params"]), "error": None}
        except _Error as error:
            answer = {"error": {"code": error.code, "message": "scripted"}, "result": None}
        except Refused as error:
            code = _CODES.get(error.reason, "INTERNAL")
            answer = {"error": {"code": code, "message": str(error)}, "result": None}
        except ConnectionDropped:
            await self.drop_connections()
            return
        tags = [["p", event.pubkey], ["e", event.id]]
        content = self._encrypt({"result_type": method, **answer})
        if self.forge_answers:
            await self._publish(_forged(self._sign(23195, tags, content)))
            await self._publish(
                sign_event(PrivateKey(), kind=23195, tags=tags, content=content, created_at=1)
            )
        if method in self.answers_to_lose:
            self.answers_to_lose.remove(method)
            return
        await self._publish(self._sign(23195, tags, content))

    async def _perform(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        network = self._network
        match method:
            case "get_info":
                node = await network.node("router")
                return {
                    "alias": node.name,
                    "pubkey": node.pubkey,
                    "network": "regtest",
                    "methods": self._methods.split(),
                }
            case "get_balance":
                node = await network.node("router", operation="balance")
                return {"balance": node.balance_msat}
            case "make_invoice":
                made = await network.create_invoice(
                    "router",
                    amount_msat=params["amount"],
                    description=params["description"],
                    expiry_s=params["expiry"],
                )
                return self._incoming(made)
            case "lookup_invoice":
                return await self._look_up(params["payment_hash"])
            case "list_transactions":
                return {"transactions": await self._list(params)}
            case "pay_invoice":
                return await self._pay(params["invoice"])
        raise _Error("NOT_IMPLEMENTED")

    async def _look_up(self, payment_hash: str) -> dict[str, Any]:
        invoice = await self._network.lookup_invoice("router", payment_hash)
        if invoice is not None:
            return self._incoming(invoice)
        payment = await self._network.lookup_payment("router", payment_hash)
        if payment is None:
            raise _Error("NOT_FOUND")
        return self._outgoing(payment)

    async def _list(self, params: dict[str, Any]) -> list[dict[str, Any]]:
        if params["type"] == "incoming":
            received = await self._network.received("router")
            found = [self._incoming(invoice) for invoice in reversed(received)]
        else:
            sent = await self._network.paid_out("router")
            found = [self._outgoing(payment) for payment in sent if not payment.forgotten]
        found = [one for one in found if one["created_at"] >= params.get("from", 0)]
        return found[params["offset"] :][: min(params["limit"], 20)]

    async def _pay(self, bolt11: str) -> dict[str, Any]:
        try:
            amount_msat = bolt11_codec.decode(bolt11).amount_msat or 0
        except BadInvoice:
            raise _Error("BAD_REQUEST") from None
        payment = await self._network.pay_invoice(
            "router", bolt11, max_fee_msat=max(10_000, amount_msat // 100), timeout_s=3600
        )
        if payment.state != "succeeded":
            raise _Error("PAYMENT_FAILED")
        return {"preimage": self.preimage or payment.preimage, "fees_paid": payment.fee_msat}

    def _incoming(self, invoice: InvoiceRecord) -> dict[str, Any]:
        settled = invoice.state == "settled"
        found = {
            "type": "incoming",
            "state": _INVOICE_STATES.get(invoice.state, invoice.state),
            "invoice": invoice.bolt11,
            "preimage": UNPAID_PREIMAGE,
            "payment_hash": invoice.payment_hash,
            "amount": invoice.amount_received_msat if settled else invoice.amount_msat,
            "fees_paid": 0,
            "created_at": int(invoice.created_at_s),
            "expires_at": int(invoice.expires_at_s),
            "settled_at": int(invoice.settled_at_s or 0) if settled else None,
        }
        return self._as_said(found)

    def _outgoing(self, payment: PaymentRecord) -> dict[str, Any]:
        succeeded = payment.state == "succeeded"
        found = {
            "type": "outgoing",
            "state": _PAYMENT_STATES.get(payment.state, payment.state),
            "payment_hash": payment.payment_hash,
            "preimage": self.preimage or payment.preimage,
            "amount": payment.amount_msat,
            "fees_paid": payment.fee_msat,
            "created_at": int(payment.sent_at_s),
            "settled_at": int(payment.ended_at_s or 0) if succeeded else None,
        }
        return self._as_said(found)

    def _as_said(self, found: dict[str, Any]) -> dict[str, Any]:
        if not self._says_state:
            del found["state"]
        return found

    async def _notify(self) -> None:
        if "payment_received" not in self._notifications:
            return
        cursor = None
        for known in await self._network.received("router"):
            cursor = known.cursor
        kind = 23196 if self._encryption is None else 23197
        async for settled in self._network.settlements("router", cursor):
            content = {
                "notification_type": "payment_received",
                "notification": self._incoming(settled),
            }
            if self.settlements_until_drop == 0:
                self.settlements_until_drop = None
                await self.drop_connections()
                continue
            if self.settlements_until_drop is not None and self._subscriptions:
                self.settlements_until_drop -= 1
            tags = [["p", pubkey_of(self.client_key)]]
            await self._publish(self._sign(kind, tags, self._encrypt(content)))


class _Error(Exception):
    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


async def _say(connection: ServerConnection, message: list[Any]) -> None:
    await connection.send(json.dumps(message))


def _forged(event: Event) -> Event:
    """The wallet's name over a signature that is somebody else's."""
    other = sign_event(
        PrivateKey(),
        kind=event.kind,
        tags=event.tags,
        content=event.content,
        created_at=event.created_at,
    )
    return replace(event, sig=other.sig)


def _matches(event: Event, wanted: dict[str, Any]) -> bool:
    return (
        event.kind in wanted.get("kinds", [event.kind])
        and event.pubkey in wanted.get("authors", [event.pubkey])
        and event.tag("p") in wanted.get("#p", [event.tag("p")])
    )
