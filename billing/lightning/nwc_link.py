"""The way to an NWC wallet (NIP-47): a connection string, and requests that may get an answer.

    we ── kind 23194, signed, encrypted ──> relay ──> wallet
       <── 23195 answers, 23197 (NIP-04: 23196) notifications ──

All three kinds are ephemeral: a relay that restarts loses them, so an answer that does not come
says nothing. A request carries an expiration, so that a wallet that was away does not act on it
long after everybody has stopped waiting.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlsplit

from coincurve import PrivateKey, PublicKeyXOnly

from billing.lightning import BackendUnavailable, OutcomeUnknown, nip44
from billing.lightning.node_rules import Clock
from billing.lightning.nostr import (
    CannotConnect,
    ConnectionLost,
    Event,
    Relay,
    pubkey_of,
    sign_event,
)

NAME = "nwc"
_INFO, _REQUEST, _RESPONSE, _NOTIFICATION_04, _NOTIFICATION = 13194, 23194, 23195, 23196, 23197
_NIP44 = "nip44_v2"
_SCHEMES = ("nostr+walletconnect", "nostrwalletconnect")
# How far back a new connection asks for events, for clocks that differ a little.
_BACK_S = 30
# How much longer than we wait a wallet may take to receive a request.
_RECEIVE_S = 30


@dataclass(frozen=True, slots=True)
class Connection:
    """What a connection string holds. The key may spend: it is in no text of this object."""

    wallet_pubkey: str
    relays: tuple[str, ...]
    key: PrivateKey = field(repr=False)


def read_connection(text: str) -> Connection:
    """Raises ValueError in words that do not repeat the text, which is a secret as a whole."""
    parts = urlsplit(text.strip())
    if parts.scheme not in _SCHEMES:
        raise ValueError("an NWC connection begins with nostr+walletconnect://")
    query = parse_qs(parts.query)
    relays = tuple(url for url in query.get("relay", []) if url.startswith(("wss://", "ws://")))
    if not relays:
        raise ValueError("the NWC connection names no relay")
    wallet_pubkey = (parts.netloc or parts.path.strip("/")).lower()
    try:
        PublicKeyXOnly(bytes.fromhex(wallet_pubkey))
        key = PrivateKey(bytes.fromhex(query["secret"][0]))
    except (KeyError, ValueError):
        raise ValueError(
            "the NWC connection's wallet or secret is no key of 64 hex digits"
        ) from None
    return Connection(wallet_pubkey, relays, key)


@dataclass(frozen=True, slots=True)
class WalletInfo:
    """What the wallet has announced: method names, notification types, and the better cipher."""

    methods: frozenset[str]
    notifications: frozenset[str]
    nip44: bool


class WalletError(Exception):
    """The wallet's own refusal. `code` is one of NIP-47's words, `message` whatever it wrote."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code)
        self.code = code
        self.message = message


class NoAnswer(OutcomeUnknown):
    """The request was sent, and the time to wait is over."""


class NwcLink:
    """Connects when it is first needed, and again after a connection was lost."""

    def __init__(self, connection: Connection, *, clock: Clock = time.time) -> None:
        self._connection = connection
        self._clock = clock
        self._pubkey = pubkey_of(connection.key)
        self._conversation = nip44.conversation_key(connection.key.secret, connection.wallet_pubkey)
        self._connecting = asyncio.Lock()
        self._relay: Relay | None = None
        self._info: WalletInfo | None = None
        self._pending: dict[str, asyncio.Future[Any]] = {}
        self._listeners: set[asyncio.Queue[dict[str, Any] | None]] = set()

    @property
    def wallet_pubkey(self) -> str:
        return self._connection.wallet_pubkey

    async def info(self, operation: str) -> WalletInfo:
        """Raises BackendUnavailable."""
        await self._connected(operation)
        assert self._info is not None
        return self._info

    async def call(
        self, operation: str, method: str, params: dict[str, Any], *, timeout_s: float
    ) -> dict[str, Any]:
        """The wallet's result. Raises WalletError, BackendUnavailable while nothing has been sent,
        and OutcomeUnknown after that: NoAnswer when the time is up."""
        relay = await self._connected(operation)
        request = self._request(method, params, timeout_s)
        answer = self._pending[request.id] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(timeout_s):
                taken = await relay.publish(request)
                await asyncio.wait((taken, answer), return_when=asyncio.FIRST_COMPLETED)
                if not answer.done() and taken.result() is not None:
                    # A relay that says no may have passed it on all the same.
                    raise OutcomeUnknown(NAME, operation, "the relay did not take the request")
                content = await answer
        except TimeoutError:
            raise NoAnswer(NAME, operation, "the wallet has not answered in time") from None
        except ConnectionLost as error:
            raise OutcomeUnknown(
                NAME, operation, "the connection to the relay was lost", str(error)
            ) from None
        finally:
            self._pending.pop(request.id, None)
            relay.forget(request.id)
        return _result(content, method, operation)

    @asynccontextmanager
    async def notifications(self) -> AsyncIterator[asyncio.Queue[dict[str, Any] | None]]:
        """What the wallet tells by itself from now on; None when the connection is lost."""
        await self._connected("settlements")
        queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._listeners.add(queue)
        try:
            yield queue
        finally:
            self._listeners.discard(queue)

    async def aclose(self) -> None:
        if self._relay is not None:
            await asyncio.shield(self._relay.aclose())

    async def _connected(self, operation: str) -> Relay:
        async with self._connecting:
            if self._relay is not None and not self._relay.lost:
                return self._relay
            trouble = ""
            for url in self._connection.relays:
                try:
                    self._relay = await self._connect(url)
                    return self._relay
                except (CannotConnect, ConnectionLost) as error:
                    trouble = str(error)
            raise BackendUnavailable(
                NAME, operation, "no relay of the wallet can be reached", trouble
            )

    async def _connect(self, url: str) -> Relay:
        self._info = None
        relay = await Relay.open(url, self._on_event, self._on_end)
        wallet = self._connection.wallet_pubkey
        try:
            await relay.subscribe(
                "info", {"kinds": [_INFO], "authors": [wallet], "limit": 1}, lasting=False
            )
            if self._info is None:
                raise ConnectionLost("the relay knows nothing of the wallet")
            await relay.subscribe(
                "wallet",
                {
                    "kinds": [_RESPONSE, _NOTIFICATION if self._info.nip44 else _NOTIFICATION_04],
                    "authors": [wallet],
                    "#p": [self._pubkey],
                    "since": int(self._clock()) - _BACK_S,
                },
                lasting=True,
            )
        except ConnectionLost:
            await relay.aclose()
            raise
        return relay

    def _request(self, method: str, params: dict[str, Any], timeout_s: float) -> Event:
        now_s = int(self._clock())
        text = json.dumps({"method": method, "params": params})
        tags = [["p", self._connection.wallet_pubkey]]
        assert self._info is not None
        if self._info.nip44:
            content = nip44.encrypt(self._conversation, text)
            tags.append(["encryption", _NIP44])
        else:
            content = nip44.encrypt_nip04(
                self._connection.key.secret, self._connection.wallet_pubkey, text
            )
        tags.append(["expiration", str(now_s + int(timeout_s) + _RECEIVE_S)])
        return sign_event(
            self._connection.key, kind=_REQUEST, tags=tags, content=content, created_at=now_s
        )

    def _on_event(self, subscription: str, event: Event) -> None:
        if event.pubkey != self._connection.wallet_pubkey:
            return
        if event.kind == _INFO and subscription == "info":
            self._info = WalletInfo(
                methods=frozenset(event.content.split()),
                notifications=frozenset((event.tag("notifications") or "").split()),
                nip44=_NIP44 in (event.tag("encryption") or "").replace(",", " ").split(),
            )
        elif event.tag("p") != self._pubkey:
            return
        elif event.kind == _RESPONSE:
            waiting = self._pending.get(event.tag("e") or "")
            if waiting is not None and not waiting.done():
                waiting.set_result(self._decrypt(event))
        elif event.kind in (_NOTIFICATION, _NOTIFICATION_04):
            content = self._decrypt(event)
            if isinstance(content, dict):
                for queue in self._listeners:
                    queue.put_nowait(content)

    def _decrypt(self, event: Event) -> Any:
        """None when it cannot be read."""
        try:
            if self._info is not None and self._info.nip44:
                return json.loads(nip44.decrypt(self._conversation, event.content))
            return json.loads(
                nip44.decrypt_nip04(
                    self._connection.key.secret, self._connection.wallet_pubkey, event.content
                )
            )
        except ValueError:
            return None

    def _on_end(self, reason: str) -> None:
        for waiting in self._pending.values():
            if not waiting.done():
                waiting.set_exception(ConnectionLost(reason))
        for queue in self._listeners:
            queue.put_nowait(None)


def _result(content: Any, method: str, operation: str) -> dict[str, Any]:
    match content:
        case {"result_type": str(answered), "error": {"code": str(code), **rest}} if (
            answered == method
        ):
            raise WalletError(code, str(rest.get("message", "")))
        case {"result_type": str(answered), "result": dict(result)} if answered == method:
            return result
        case _:
            raise OutcomeUnknown(NAME, operation, "the wallet's answer cannot be read")
