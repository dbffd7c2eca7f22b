"""Lets in workers that poll, and gives them jobs: what the Kobold and Horde doors have in common.

A worker is a name, kept by whoever shows the secret that its first pop brought
(`router.pull_records`). There is no connection: a session begins with a pop and ends when nothing was
heard for five minutes. What it earns is kept for it until it says where to pay it, in `ln_url` or with
an address as (part of) its name, which a worker that nobody has changed can have.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from billing.errors import BadLightningAddress
from billing.lightning_address import LightningAddresses
from router import kobold_params, pull_records, workers
from router.attempts import Attempts
from router.database import Database
from router.dispatcher import Dispatcher
from router.door_ids import Door
from router.market import Market
from router.named_locks import NamedLocks
from router.pull_records import Passwords
from router.pull_sessions import HandedOut, Held, PullSession, rendered
from router.sessions import Applicant, RefusedWorker
from router.worker_gate import WorkerGate
from router.workers import Fleet, Worker
from worker.protocol import JOB_SPEC, ServedModel

# How often a sign of life is written (AH-34).
CHECK_IN_S = 30.0
# How long a first pop waits for the lanes that its limits make; later ones find them anyway.
LANES_S = 2.0
# Refusals that have nothing to do with where a worker is to be paid.
NO_ADDRESS_MATTER = frozenset({"draining", "banned", "bad_registration"})


class NotTheOwner(Exception):
    """Somebody else's name: the secret is another one."""


@dataclass(frozen=True, slots=True)
class Offer:
    """What a pop says of its worker. Lengths are in tokens."""

    door: Door
    name: str
    owner_hash: bytes
    models: tuple[str, ...]
    max_length: int
    context_length: int
    threads: int = 1
    shown_as: str | None = None
    agent: str | None = None
    ln_url: str | None = None


@dataclass(frozen=True, slots=True)
class Given:
    """A job for a worker: the id to submit by, KoboldAI's params with the prompt, and the model."""

    id: str
    payload: dict[str, Any]
    model: str


@dataclass(frozen=True, slots=True)
class Popped:
    """What a pop brings: jobs, or why there are none, by our codes (`worker_views.skips`)."""

    given: list[Given]
    skipped: dict[str, int] = field(default_factory=dict)
    resting: bool = False


class PullGate:
    """The sessions of workers that poll this router."""

    def __init__(
        self,
        database: Database,
        fleet: Fleet,
        gate: WorkerGate,
        dispatcher: Dispatcher,
        attempts: Attempts,
        market: Market,
        addresses: LightningAddresses,
        *,
        skips: Callable[[Worker], dict[str, int]],
        finer_lanes: Callable[[], Awaitable[None]],
        ttl_s: float,
        router_id: str,
        clock: Callable[[], datetime],
    ) -> None:
        self._database = database
        self._fleet = fleet
        self._gate = gate
        self._dispatcher = dispatcher
        self._attempts = attempts
        self._market = market
        self._addresses = addresses
        self._skips = skips
        self._finer_lanes = finer_lanes
        self._clock = clock
        self._sessions: dict[str, PullSession] = {}
        # Two first pops at once would make two sessions, of which one cuts off the other.
        self._locks = NamedLocks()
        self.ttl_s = ttl_s
        self.handed_out = HandedOut(router_id)
        self.on_asked_here: Callable[[str], None] = lambda worker_id: None
        self.passwords = Passwords()

    async def pop(
        self, offer: Offer, *, amount: int = 1, on_new: Callable[[], None] = lambda: None
    ) -> Popped:
        """Jobs for a worker, at most `amount`. `on_new` may raise when the name is nobody's yet.

        Raises NotTheOwner, RefusedWorker.
        """
        async with self._locks.of(offer.name):
            session = await self._session(offer, on_new)
        if session.worker.asks_elsewhere or session.is_new:
            session.worker.asks_elsewhere = session.is_new = False
            self.on_asked_here(session.worker.id)
        await self._check_in(session)
        session.asked_too_much = 0
        session.make_room()
        given: list[Given] = []
        while len(given) < amount:
            claimed = await self._dispatcher.claim_for(session.worker, suits=session.suits)
            held = session.take(claimed) if claimed is not None else None
            if held is None:
                break
            given.append(_given(held, session.context_length()))
        if given:
            return Popped(given)
        await self._market.refresh()
        skipped = self._skips(session.worker)
        if session.asked_too_much:
            code = "context_too_short"
            skipped[code] = skipped.get(code, 0) + session.asked_too_much
        return Popped([], skipped, session.worker.draining)

    async def _session(self, offer: Offer, on_new: Callable[[], None]) -> PullSession:
        session = self._sessions.get(offer.name)
        if session is not None and session.owner_hash != offer.owner_hash:
            raise NotTheOwner(offer.name)
        if session is not None and session.offered == offer:
            return session
        known = await pull_records.find(self._database, name=offer.name)
        if known is None:
            on_new()
        elif known.owner_hash != offer.owner_hash:
            raise NotTheOwner(offer.name)
        applicant, edges = self._applicant(offer), self._fleet.edges
        if session is None:
            session = await self._admit(offer, applicant)
        else:
            await self._gate.change(session.worker, applicant)
            session.offered = offer
        if self._fleet.edges != edges:
            # What waits was put in lanes before its limits were known.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._finer_lanes(), LANES_S)
        async with self._database.transaction() as connection:
            kept = await pull_records.keep_name(
                connection,
                name=offer.name,
                door=offer.door,
                worker_id=session.worker.id,
                owner_hash=offer.owner_hash,
                shown_as=offer.shown_as,
                agent=offer.agent,
            )
        if not kept:
            session.cut("its name is somebody else's", blame="nobody")
            raise NotTheOwner(offer.name)
        return session

    def _applicant(self, offer: Offer) -> Applicant:
        longest = min(offer.max_length, offer.context_length)
        return Applicant(
            identity=workers.hash_identity("pull", offer.name, offer.owner_hash.hex()),
            models=[
                ServedModel(id=model, context_length=offer.context_length, max_tokens=longest)
                for model in offer.models
            ],
            slots=offer.threads,
            name=offer.name,
            ln_url=offer.ln_url or self._address_in(offer.name) or self._address_in(offer.shown_as),
            pulls=True,
        )

    def _address_in(self, name: str | None) -> str | None:
        """A Lightning address among the words of a name."""
        for word in (name or "").split():
            if "@" in word:
                try:
                    self._addresses.parse(word)
                except BadLightningAddress:
                    continue
                return word
        return None

    async def _admit(self, offer: Offer, applicant: Applicant) -> PullSession:
        def make(worker: Worker) -> PullSession:
            return PullSession(
                worker,
                self._attempts,
                self.handed_out,
                owner_hash=offer.owner_hash,
                ttl_s=self.ttl_s,
                on_idle=self._dispatcher.wake,
                on_gone=self._gone,
            )

        try:
            session = await self._gate.admit(applicant, make)
        except RefusedWorker as refused:
            if offer.ln_url or not applicant.ln_url or refused.answer.code in NO_ADDRESS_MATTER:
                raise
            # What looked like an address in its name cannot be paid: then it is just a name.
            session = await self._gate.admit(replace(applicant, ln_url=None), make)
        session.offered = offer
        self._sessions[offer.name] = session
        return session

    def _gone(self, session: PullSession) -> None:
        self._gate.leave(session)
        name = session.offered.name if session.offered is not None else ""
        if self._sessions.get(name) is session:
            del self._sessions[name]

    async def _check_in(self, session: PullSession) -> None:
        session.seen()
        now = time.monotonic()
        if now - session.kept_at < CHECK_IN_S:
            return
        session.kept_at = now
        async with self._database.connection() as connection:
            await connection.execute(
                "update workers set last_seen_at = $2 where id = $1",
                session.worker.id,
                self._clock(),
            )

    def session_of(self, worker_id: str) -> PullSession | None:
        """The session of a worker that polls here."""
        session = self._gate.sessions.get(worker_id)
        return session if isinstance(session, PullSession) else None


def _given(held: Held, context: int) -> Given:
    job = rendered(JOB_SPEC.validate_json(held.running.claimed.spec))
    assert job is not None  # else it had not been taken
    told = kobold_params.payload(job.spec, prompt=job.prompt, stops=job.stops, context=context)
    return Given(held.id, told, held.running.claimed.model)
