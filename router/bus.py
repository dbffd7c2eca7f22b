"""What routers tell each other: at most once, in order from one sender, and nothing is lost unnoticed.

A message is a list that begins with its kind (`router.relay` knows them). Messages to one router
that are sent in the same moment travel together. Every parcel has a number, one series for each
pair of sender and receiver and one for what a sender tells all: a receiver that misses one is told
by `on_gap`, and asks again or looks into the database, which alone is the truth.

One router alone needs no bus: `InProcessBus` delivers nothing to nobody, or joins routers that run
in one process. Between processes it is `router.nats_bus`.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Protocol

import orjson

log = logging.getLogger(__name__)

Message = list[Any]

# What a broker takes as one piece; NATS refuses a megabyte.
MOST_BYTES = 512_000
# More than this is not kept for a bus that does not take it away.
MOST_UNSENT = 50_000
_ALL = "*"


class Bus(Protocol):
    """A way to the other routers of this market."""

    on_message: Callable[[str, Message], None]
    on_gap: Callable[[str], None]
    on_up: Callable[[], None]
    sent: int
    received: int
    gaps: int

    @property
    def name(self) -> str:
        """What carries it, for people."""
        ...

    @property
    def up(self) -> bool:
        """Whether what is sent now can be expected to arrive."""
        ...

    @property
    def alone(self) -> bool:
        """Whether there can be nobody who hears it."""
        ...

    def send(self, to: str, message: Message) -> None:
        """Tell one router. Returns at once; nothing is raised and nothing promised."""
        ...

    def tell_all(self, message: Message) -> None:
        """Tell all other routers."""
        ...

    def start(self) -> None: ...

    async def stop(self) -> None: ...


class Parcels:
    """Packs messages for the wire and unpacks them: what every bus has in common.

    `boot` tells the parcels of a restarted router from those of its life before.
    """

    def __init__(self, router_id: str) -> None:
        self.router_id = router_id
        self.on_message: Callable[[str, Message], None] = lambda sender, message: None
        self.on_gap: Callable[[str], None] = lambda sender: None
        self.on_up: Callable[[], None] = lambda: None
        self.sent = self.received = self.gaps = 0
        self._boot = secrets.token_hex(8)
        self._numbers: dict[str, int] = defaultdict(int)
        self._heard: dict[tuple[str, bool], tuple[str, int]] = {}
        self._unsent: dict[str, list[Message]] = {}
        self._some = asyncio.Event()

    def send(self, to: str, message: Message) -> None:
        unsent = self._unsent.setdefault(to, [])
        if len(unsent) < MOST_UNSENT:
            unsent.append(message)
            self.sent += 1
            self._some.set()
        else:
            # What is dropped is missed by its number, with the next parcel.
            self._numbers[to] += 1

    def tell_all(self, message: Message) -> None:
        self.send(_ALL, message)

    async def parcels(self) -> list[tuple[str | None, bytes]]:
        """Wait for messages; what was sent meanwhile, packed: (receiver or None for all, bytes)."""
        await self._some.wait()
        self._some.clear()
        unsent, self._unsent = self._unsent, {}
        return [
            (None if to == _ALL else to, parcel)
            for to, messages in unsent.items()
            for parcel in self._packed(to, messages)
        ]

    async def flushed(self, within_s: float = 0.5) -> None:
        """Wait a moment until what was sent has been taken away."""
        until = time.monotonic() + within_s
        while self._unsent and time.monotonic() < until:
            await asyncio.sleep(0.005)

    def _packed(self, to: str, messages: list[Message]) -> list[bytes]:
        try:
            parcel = self._parcel(to, messages)
        except TypeError:
            # One that is no JSON takes none of the others with it, and is missed by its number.
            if len(messages) == 1:
                log.exception("bus: a message cannot be sent kind=%s", messages[0][0])
                return []
        else:
            if len(parcel) <= MOST_BYTES or len(messages) == 1:
                return [parcel]
        self._numbers[to] -= 1
        half = len(messages) // 2
        return self._packed(to, messages[:half]) + self._packed(to, messages[half:])

    def _parcel(self, to: str, messages: list[Message]) -> bytes:
        self._numbers[to] += 1
        return orjson.dumps([self.router_id, self._boot, to == _ALL, self._numbers[to], messages])

    def take(self, parcel: bytes) -> None:
        """Handle a parcel of another router. One that cannot be read is dropped, and logged."""
        try:
            sender, boot, to_all, number, messages = orjson.loads(parcel)
        except ValueError as error:
            log.warning("a parcel of the bus cannot be read: %s", error)
            return
        if sender == self.router_id:
            return
        series = sender, to_all
        before = self._heard.get(series)
        if before is not None and before[0] == boot and number <= before[1]:
            # A broker that hung reads what was sent to it before what has been said since over
            # another connection, or after it. Being late it counts as lost, and that was noticed.
            return
        self._heard[series] = boot, number
        # The first that we hear of a router is no gap: whatever we want of it we ask for now.
        if before is not None and before[0] == boot and number != before[1] + 1:
            self.gaps += 1
            self._handle(self.on_gap, sender)
        for message in messages:
            self.received += 1
            self._handle(self.on_message, sender, message)

    def _handle(self, what: Callable[..., None], *arguments: Any) -> None:
        try:
            what(*arguments)
        except Exception:
            log.exception("a message of another router was not handled")


class Exchange:
    """Where the routers of one process meet."""

    def __init__(self) -> None:
        self.members: dict[str, InProcessBus] = {}


class InProcessBus(Parcels):
    """The bus of a router that is alone, or of several in one process on one `exchange`."""

    name = "in-process"

    def __init__(self, router_id: str, exchange: Exchange | None = None) -> None:
        super().__init__(router_id)
        self._exchange = exchange or Exchange()
        self._task: asyncio.Task[None] | None = None

    @property
    def up(self) -> bool:
        return self._task is not None

    @property
    def alone(self) -> bool:
        return len(self._exchange.members) < 2

    def send(self, to: str, message: Message) -> None:
        # Alone there is nothing to keep for anybody.
        if not self.alone:
            super().send(to, message)

    def start(self) -> None:
        self._exchange.members[self.router_id] = self
        self._task = asyncio.create_task(self._carry(), name="bus")
        self.on_up()

    async def stop(self) -> None:
        await self.flushed()
        self._exchange.members.pop(self.router_id, None)
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def _carry(self) -> None:
        while True:
            for to, parcel in await self.parcels():
                for name, member in list(self._exchange.members.items()):
                    if name != self.router_id and to in (None, name):
                        member.take(parcel)
