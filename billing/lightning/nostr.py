"""Nostr as far as a wallet connection needs it: signed events (NIP-01), and one relay.

An event is JSON with an id, the SHA-256 of its fields, and a BIP-340 signature over the id. A relay
is whatever stands between us and the wallet: nothing it sends is believed unless the signature is
right and the author is the one that we asked for.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

from coincurve import PrivateKey, PublicKeyXOnly
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidHandshake, InvalidURI, WebSocketException

_CONNECT_TIMEOUT_S = 10.0
_MAX_MESSAGE_BYTES = 1 << 20
# A relay that says nothing at the end of what it has stored still delivers what comes.
_STORED_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Event:
    """`pubkey` is x-only hex, `created_at` seconds since 1970, each tag a list of strings."""

    id: str
    pubkey: str
    created_at: int
    kind: int
    tags: list[list[str]]
    content: str
    sig: str

    def tag(self, name: str) -> str | None:
        """The first value of the first tag of that name."""
        for tag in self.tags:
            if len(tag) >= 2 and tag[0] == name:
                return tag[1]
        return None


class CannotConnect(Exception):
    """No connection was made: nothing has been sent."""


class ConnectionLost(Exception):
    """The connection broke; what was sent may or may not have arrived."""


def pubkey_of(key: PrivateKey) -> str:
    """The x-only public key, in hex."""
    return PublicKeyXOnly.from_secret(key.secret).format().hex()


def sign_event(
    key: PrivateKey, *, kind: int, tags: list[list[str]], content: str, created_at: int
) -> Event:
    pubkey = pubkey_of(key)
    event_id = _event_id(pubkey, created_at, kind, tags, content)
    signature = key.sign_schnorr(event_id)
    return Event(event_id.hex(), pubkey, created_at, kind, tags, content, signature.hex())


def read_event(value: Any) -> Event | None:
    """The event in a relay's JSON; None unless it is whole and its author has signed it."""
    if not isinstance(value, dict):
        return None
    try:
        event = Event(**{name: value[name] for name in Event.__slots__})
        event_id = _event_id(event.pubkey, event.created_at, event.kind, event.tags, event.content)
        genuine = (
            _is_well_formed(event)
            and event_id.hex() == event.id
            and PublicKeyXOnly(bytes.fromhex(event.pubkey)).verify(
                bytes.fromhex(event.sig), event_id
            )
        )
    except (KeyError, TypeError, ValueError):
        return None
    return event if genuine else None


def _is_well_formed(event: Event) -> bool:
    return (
        isinstance(event.created_at, int)
        and isinstance(event.kind, int)
        and isinstance(event.content, str)
        and all(isinstance(tag, list) for tag in event.tags)
        and all(isinstance(part, str) for tag in event.tags for part in tag)
    )


def _event_id(
    pubkey: str, created_at: int, kind: int, tags: list[list[str]], content: str
) -> bytes:
    fields = [0, pubkey, created_at, kind, tags, content]
    return sha256(json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()).digest()


class Relay:
    """One connection to one relay. `on_event(subscription, event)` gets genuine events only,
    `on_end(reason)` is called once, when the connection is lost or closed."""

    def __init__(
        self,
        websocket: ClientConnection,
        on_event: Callable[[str, Event], None],
        on_end: Callable[[str], None],
    ) -> None:
        self._websocket = websocket
        self._on_event = on_event
        self._on_end = on_end
        self._stored: dict[str, asyncio.Future[None]] = {}
        self._taken: dict[str, asyncio.Future[str | None]] = {}
        self._lasting: set[str] = set()
        self._reader: asyncio.Task[None]
        self.lost = False

    @classmethod
    async def open(
        cls, url: str, on_event: Callable[[str, Event], None], on_end: Callable[[str], None]
    ) -> Relay:
        """Raises CannotConnect."""
        try:
            websocket = await connect(
                url,
                open_timeout=_CONNECT_TIMEOUT_S,
                max_size=_MAX_MESSAGE_BYTES,
                proxy=None,
            )
        except (OSError, TimeoutError, InvalidHandshake, InvalidURI) as error:
            raise CannotConnect(type(error).__name__) from None
        relay = cls(websocket, on_event, on_end)
        relay._reader = asyncio.create_task(relay._read(), name="nostr-relay")
        return relay

    async def subscribe(self, name: str, filters: dict[str, Any], *, lasting: bool) -> None:
        """Ask for events, and wait until the relay has sent those that it has stored.

        Raises ConnectionLost, also when the relay refuses the subscription. One that is `lasting`
        is what the connection is for: without it the connection is closed.
        """
        if lasting:
            self._lasting.add(name)
        stored = self._stored[name] = asyncio.get_running_loop().create_future()
        await self._send(["REQ", name, filters])
        try:
            async with asyncio.timeout(_STORED_TIMEOUT_S):
                await stored
        except TimeoutError:
            return
        finally:
            self._stored.pop(name, None)

    async def publish(self, event: Event) -> asyncio.Future[str | None]:
        """Send an event. The future gives None when the relay has taken it, or why it has not;
        a relay may also never say. Raises ConnectionLost."""
        taken = self._taken[event.id] = asyncio.get_running_loop().create_future()
        await self._send(["EVENT", asdict(event)])
        return taken

    def forget(self, event_id: str) -> None:
        """Nobody waits any more for the relay's word on that event."""
        self._taken.pop(event_id, None)

    async def aclose(self) -> None:
        await self._websocket.close()
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)

    async def _send(self, message: list[Any]) -> None:
        try:
            await self._websocket.send(json.dumps(message, separators=(",", ":")))
        except WebSocketException as error:
            raise ConnectionLost(type(error).__name__) from None

    async def _read(self) -> None:
        reason = "closed"
        try:
            async for text in self._websocket:
                self._take(text)
        except WebSocketException as error:
            reason = type(error).__name__
        except ConnectionLost as error:
            reason = str(error)
            await self._websocket.close()
        finally:
            self.lost = True
            for waiting in (*self._stored.values(), *self._taken.values()):
                if not waiting.done():
                    waiting.set_exception(ConnectionLost(reason))
                    # Not everybody who published waits for the relay's word.
                    waiting.exception()
            self._on_end(reason)

    def _take(self, text: str | bytes) -> None:
        try:
            message = json.loads(text)
        except ValueError:
            return
        match message:
            case ["EVENT", str(name), value]:
                event = read_event(value)
                if event is not None:
                    self._on_event(name, event)
            case ["EOSE", str(name)]:
                stored = self._stored.get(name)
                if stored is not None and not stored.done():
                    stored.set_result(None)
            case ["CLOSED", str(name), *_]:
                stored = self._stored.get(name)
                if stored is None and name in self._lasting:
                    # Nothing more would come, and nobody would know why.
                    raise ConnectionLost("the relay ended a subscription")
                if stored is not None and not stored.done():
                    stored.set_exception(ConnectionLost("the relay refused a subscription"))
            case ["OK", str(event_id), bool(accepted), *reason]:
                taken = self._taken.pop(event_id, None)
                if taken is not None and not taken.done():
                    taken.set_result(None if accepted else str(reason[0] if reason else "refused"))
