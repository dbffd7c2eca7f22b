"""Which routers there are, and what their workers can take, summed up.

Every router says so twice: in its row of `routers`, every few seconds, and on the bus, as soon as
something has changed. Its workers are told of as sums by what they serve, so that what is said and
kept does not grow with their number. A router that neither has moved its row nor said anything for
STALE_S counts as gone, and so do its workers, until it does; after LOST_S what hung on it is lost: its
jobs are taken back, and the clients that were connected to it have gone (`router.maintenance`).

Time is measured by this router's own clock from one sign of life to the next, so that clocks need
not agree; while the database is away, or we have not looked for other reasons, nobody is thought to be
silent: a router that has only clients, and no workers, is not lost for that either.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from router.database import TRANSIENT, Database, DatabaseUnavailable
from router.market import Market
from router.models import Models
from router.queenbee_models import Offers
from router.relay import Relay
from router.workers import FarWorkers, Worker
from worker.protocol import ServedModel

log = logging.getLogger(__name__)

WRITE_S = 2.0
SAY_S = 1.0
# Changes within this time are said together.
GATHER_S = 0.02
# Summing up thousands of workers takes a while: so many times as long nothing is said, however often
# they come and go.
REST = 10
STALE_S = 8.0
LOST_S = 20.0
# Who has not looked for so long himself cannot say that others are silent.
BLIND_S = 3 * WRITE_S
# So many workers are named: whether a job has been tried by all of them matters only for a few.
MOST_NAMED = 8

_WRITE = """
with before as (select place from routers where id = $1)
insert into routers (id, started_at, seen_at, workers, minute_tokens, place)
values ($1, now(), clock_timestamp(), $2, $3, $4)
on conflict (id) do update set seen_at = clock_timestamp(), workers = excluded.workers,
    minute_tokens = excluded.minute_tokens, place = excluded.place
returning (select place from before)"""

# Its age by the database's own clock, which wrote it.
_OTHERS = """
select id, seen_at, workers, extract(epoch from clock_timestamp() - seen_at)::float8 as age_s
from routers where id <> $1"""

# Of one that has died, what it wrote counts until the minute is over.
_MINUTE_TOKENS = """
select coalesce(sum(minute_tokens), 0)::bigint from routers
where seen_at > clock_timestamp() - interval '60 s'"""

_FORGET = "delete from routers where seen_at < now() - interval '1 day'"


@dataclass(slots=True)
class Peer:
    """Another router. `seen_at` as it stood in its row; the last sign of life and the last word on the
    bus by our own clock."""

    alive_at: float
    heard_at: float = float("-inf")
    seen_at: Any = None
    workers: list[Any] = field(default_factory=list)
    lasts: dict[str, int] = field(default_factory=dict)


class Presence:
    """What this router knows of the others, and tells them of itself."""

    def __init__(
        self,
        database: Database,
        models: Models,
        market: Market,
        relay: Relay,
        *,
        router_id: str,
        place: str,
    ) -> None:
        self._database = database
        self._models = models
        self._fleet = models.fleet
        self._market = market
        self._relay = relay
        self._router_id = router_id
        self.place = place
        self._has_place = False
        self._peers: dict[str, Peer] = {}
        self._looked_at = float("-inf")
        self._changed = asyncio.Event()
        self._noted: set[str] | None = None
        # What is said of our workers while this router stops.
        self._last_words: list[dict[str, Any]] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self.on_change: Callable[[], None] = lambda: None
        self.minute_tokens_here: Callable[[], int] = lambda: 0
        self._fleet.on_change = self._changed.set
        relay.on_hello = self._on_hello
        relay.listen("who", lambda sender: relay.bus.send(sender, self._hello()))

    @property
    def others(self) -> int:
        """How many other routers there are now."""
        return sum(1 for peer in self._peers.values() if _silent_s(peer) < STALE_S)

    def is_connected(self, worker: Any) -> bool:
        """Whether the worker with this row is connected to some router of this market."""
        router_id = worker["router_id"]
        if router_id is None or router_id == self._router_id:
            return self._fleet.get(worker["id"]) is not None
        peer = self._peers.get(router_id)
        return peer is not None and _silent_s(peer) < STALE_S

    def is_lost(self, router_id: str) -> bool:
        """Whether a router has been silent for so long that what hangs on it is lost.

        Of one that was never heard of, the time counts from this question on.
        """
        if router_id == self._router_id:
            return False
        self._peers.setdefault(router_id, Peer(time.monotonic()))
        return router_id in self.lost()

    def lost(self) -> list[str]:
        """The routers that were there and are lost."""
        if time.monotonic() - self._looked_at > BLIND_S:
            return []
        return [name for name, peer in self._peers.items() if _silent_s(peer) > LOST_S]

    def alive(self) -> list[str]:
        """The other routers that are there, as far as we know, and look after their own jobs."""
        lost = set(self.lost())
        return [name for name in self._peers if name not in lost]

    def others_known(self) -> list[str]:
        """All other routers that were heard of, the lost ones too."""
        return list(self._peers)

    async def minute_tokens(self) -> int:
        """The tokens of the last minute at all routers, as each has told: the same at any."""
        async with self._database.connection() as connection:
            return await connection.fetchval(_MINUTE_TOKENS)

    def start(self) -> None:
        self._tasks = [
            asyncio.create_task(self._write_for_ever(), name="presence-write"),
            asyncio.create_task(self._say_for_ever(), name="presence-say"),
        ]

    def leave(self) -> None:
        """This router is about to stop, and its workers to come to the others: they count on them
        until the end, as busy. To be called while they still take jobs."""
        self._last_words = [group | {"idle": 0, "free": 0} for group in self._summary()]
        self.say()

    async def stop(self) -> None:
        """Say goodbye, so that nobody counts on the workers of a router that is shut down."""
        self._relay.bus.tell_all(["hello", [], {}])
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        async with self._database.connection() as connection:
            await connection.execute("delete from routers where id = $1", self._router_id)
            await connection.execute(
                "update workers set router_id = null where router_id = $1", self._router_id
            )

    def say(self) -> None:
        """Tell the others of our workers now: one has just joined, or the bus is back."""
        if not self._relay.bus.alone:
            self._relay.bus.tell_all(self._hello())

    def ask(self) -> None:
        """Have the others say now what they have: we may be new here, or were away from the bus."""
        if not self._relay.bus.alone:
            self._relay.bus.tell_all(["who"])

    def _hello(self) -> list[Any]:
        return ["hello", self._summary(), self._market.last_multiplier_milli]

    async def _say_for_ever(self) -> None:
        while True:
            self._changed.clear()
            began = time.monotonic()
            try:
                self.say()
            except Exception:
                log.exception("other routers were not told of our workers, going on")
            took_s = time.monotonic() - began
            try:
                async with asyncio.timeout(SAY_S):
                    await self._changed.wait()
                await asyncio.sleep(max(GATHER_S, REST * took_s))
            except TimeoutError:
                continue

    async def _write_for_ever(self) -> None:
        while True:
            try:
                await self.turn()
            except DatabaseUnavailable:
                log.warning("other routers are not looked at while the database is away")
                self._think_all_alive()
            except TRANSIENT:
                continue
            except Exception:
                log.exception("other routers were not looked at, going on")
            await asyncio.sleep(WRITE_S)

    async def turn(self) -> None:
        """Move our row, read the others', and note which workers are connected here."""
        began = time.monotonic()
        async with self._database.connection() as connection:
            place = await connection.fetchval(
                _WRITE,
                self._router_id,
                json.dumps(self._summary()),
                self.minute_tokens_here(),
                self.place,
            )
            self._see_copies(place)
            await connection.execute(_FORGET)
            rows = await connection.fetch(_OTHERS, self._router_id)
            await self._note_workers(connection)
        if time.monotonic() - began > WRITE_S:
            # The database was slow for us, and so for them.
            self._think_all_alive()
        # Before what could fail, which is to understand what another version says of its workers.
        self._looked_at = time.monotonic()
        news: list[tuple[str, Peer, str]] = []
        for row in rows:
            peer = self._peers.get(row["id"])
            if peer is None:
                # It may have died long ago: then its row has to move before it counts as alive.
                silent_s = min(max(row["age_s"], 0.0), STALE_S)
                peer = self._peers[row["id"]] = Peer(time.monotonic() - silent_s)
                peer.seen_at = row["seen_at"]
                if silent_s < STALE_S:
                    news.append((row["id"], peer, row["workers"]))
            elif peer.seen_at != row["seen_at"]:
                peer.seen_at, peer.alive_at = row["seen_at"], time.monotonic()
                # What it says on the bus is newer than what it has written.
                if peer.alive_at - peer.heard_at > 3 * SAY_S:
                    news.append((row["id"], peer, row["workers"]))
        for router_id, peer, said in news:
            self._learn(router_id, peer, json.loads(said))
        gone = self._peers.keys() - {row["id"] for row in rows}
        for router_id, peer in list(self._peers.items()):
            if _silent_s(peer) >= STALE_S and peer.workers:
                log.warning("router silent router=%s", router_id)
                self._learn(router_id, peer, [])
            if router_id in gone and _silent_s(peer) > 10 * LOST_S:
                del self._peers[router_id]

    def _see_copies(self, place: str | None) -> None:
        """`place`: what our row said before. We were thought dead, and somebody took our id over."""
        if self._has_place and place not in (None, self.place):
            log.error(
                "another process uses this router's id: stop one of them, and remove router_id from its"
                " data folder router=%s",
                self._router_id,
            )
        self._has_place = True

    def _think_all_alive(self) -> None:
        """All that were alive when we looked last."""
        for peer in self._peers.values():
            if peer.workers or peer.alive_at > self._looked_at - STALE_S:
                peer.alive_at = time.monotonic()

    async def _note_workers(self, connection: Any) -> None:
        """Keep `workers.router_id`, by which other routers know who is connected to some router."""
        if self._noted is None:
            # Whoever was connected before this router died is not now.
            await connection.execute(
                "update workers set router_id = null where router_id = $1", self._router_id
            )
            self._noted = set()
        now = {worker.id for worker in self._fleet.all()}
        come, left = now - self._noted, self._noted - now
        if come:
            await connection.execute(
                "update workers set router_id = $1 where id = any($2::text[])",
                self._router_id,
                list(come),
            )
        if left:
            await connection.execute(
                "update workers set router_id = null where id = any($2::text[]) and router_id = $1",
                self._router_id,
                list(left),
            )
        self._noted = now

    def _on_hello(self, sender: str, said: list[Any]) -> None:
        workers, lasts = said
        is_new = sender not in self._peers or _silent_s(self._peers[sender]) >= STALE_S
        peer = self._peers.setdefault(sender, Peer(0.0))
        peer.alive_at = peer.heard_at = time.monotonic()
        for model, milli in lasts.items():
            if peer.lasts.get(model) != milli:
                self._market.last_multiplier_milli[model] = milli
        peer.lasts = lasts
        self._learn(sender, peer, workers)
        if is_new:
            # It does not know us either.
            self.say()

    def _learn(self, router_id: str, peer: Peer, workers: list[Any]) -> None:
        if workers == peer.workers:
            return
        peer.workers = workers
        found = [_far_workers(router_id, index, group) for index, group in enumerate(workers)]
        served = [model for worker in found for model in worker.models]
        self._models.learn(served)
        edges = self._fleet.edges.with_limits(served)
        if edges != self._fleet.edges:
            self._fleet.set_edges(edges)
        self._fleet.set_elsewhere(router_id, found)
        self._market.touch()
        self.on_change()

    def _summary(self) -> list[dict[str, Any]]:
        if self._last_words is not None:
            return self._last_words
        groups: dict[tuple[Any, ...], list[Worker]] = {}
        for worker in self._fleet.all():
            if not worker.draining and not worker.asks_elsewhere:
                # Workers whose models have the same limits share the set of their lanes.
                floors = tuple(sorted(worker.floors.items()))
                offers = repr(worker.offers.as_json()) if worker.offers is not None else None
                alike = id(worker.lanes), floors, offers, worker.pulls
                groups.setdefault(alike, []).append(worker)
        return [_group(workers) for workers in groups.values()]


def _silent_s(peer: Peer) -> float:
    return time.monotonic() - peer.alive_at


def _group(workers: list[Worker]) -> dict[str, Any]:
    """Workers that can take the same jobs, as others are told of them."""
    return {
        "models": [model.model_dump(mode="json") for model in workers[0].models],
        "workers": len(workers),
        "idle": sum(1 for worker in workers if worker.free_slots > 0),
        "busy": sum(1 for worker in workers if worker.busy),
        "slots": sum(worker.slots for worker in workers),
        "free": sum(worker.free_slots for worker in workers),
        "names": [worker.id for worker in workers] if len(workers) <= MOST_NAMED else [],
        "speeds": _rounded(max, workers, "speeds"),
        "service_s": _rounded(_mean, workers, "service_s"),
        "floors": workers[0].floors,
        "offers": workers[0].offers.as_json() if workers[0].offers is not None else None,
        "pulls": workers[0].pulls,
    }


def _rounded(how: Callable[..., float], workers: list[Worker], name: str) -> dict[str, float]:
    seen: dict[str, list[float]] = {}
    for worker in workers:
        for model, value in getattr(worker, name).items():
            seen.setdefault(model, []).append(value)
    return {model: round(how(values), 2) for model, values in seen.items()}


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def _far_workers(router_id: str, index: int, group: dict[str, Any]) -> FarWorkers:
    models = [ServedModel.model_validate(model) for model in group["models"]]
    # A router of another version may say less of its workers.
    offers = group.get("offers")
    return FarWorkers(
        id=f"{router_id}/{index}",
        name=None,
        models=models,
        offers=Offers.read(offers, (model.id for model in models)) if offers else None,
        pulls=group.get("pulls", False),
        slots=group["slots"],
        payable=True,
        ln_url=None,
        speeds=group["speeds"],
        service_s=group["service_s"],
        floors=group["floors"],
        stands_for=group["workers"],
        router_id=router_id,
        free=group["free"],
        idle=group["idle"],
        busy_workers=group["busy"],
        names=frozenset(group["names"]),
    )
