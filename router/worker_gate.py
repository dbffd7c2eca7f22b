"""Who may serve: registration of workers, and the sessions of those connected to this router."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, TypeVar

from pydantic import ValidationError

from billing import payees
from billing.errors import BadLightningAddress
from billing.lightning_address import LightningAddresses
from router import job_store, queenbee, workers
from router.asks import Asks, fault_of
from router.attempts import Attempts, RunningAttempt
from router.database import Database
from router.http_endpoints import Endpoints
from router.http_sessions import HttpSession, HttpWorker
from router.job_records import Claimed, Resumed
from router.lanes import ANY_MODEL
from router.models import Models
from router.queenbee import QueenBeeRegistration
from router.queenbee_sessions import QueenBeeSession
from router.rate_limits import Windows
from router.sessions import (
    Applicant,
    RefusedWorker,
    Session,
    bad_registration,
    native_traits,
    texts_of,
)
from router.settings import Settings
from router.worker_sessions import Connection, WorkerSession
from router.workers import Fleet, Worker
from worker.protocol import Registered, Registration

log = logging.getLogger(__name__)

STORED_AT_ONCE = 3

CHECK_S = 1.0
# How long a worker that was let go may take until it is at another router.
COME_S = 3.0
HAND_OVER_EVERY_S = 0.05
REGISTRATIONS_PER_MINUTE = 30
# Codes of a bad address that may be gone at the next try.
_PASSING = frozenset({"unreachable", "busy", "too_many_lookups", "bad_answer", "payee_error"})


AnySession = TypeVar("AnySession", bound=Session)


class WorkerGate:
    """Lets workers in, watches over them, and sends them away."""

    def __init__(
        self,
        database: Database,
        settings: Settings,
        fleet: Fleet,
        models: Models,
        attempts: Attempts,
        addresses: LightningAddresses,
        asks: Asks,
        *,
        router_id: str,
        clock: Callable[[], datetime],
    ) -> None:
        self._router_id = router_id
        self._database = database
        self._settings = settings
        self._fleet = fleet
        self._models = models
        self._attempts = attempts
        self._addresses = addresses
        self._asks = asks
        self._clock = clock
        self._task: asyncio.Task | None = None
        # Of applicants without an identity: which seats at which address are taken.
        self._seats: dict[bytes, str | None] = {}
        self._registrations = Windows()
        self._endpoints = Endpoints(settings)
        self.sessions: dict[str, Session] = {}
        # Of workers that were let go: when, and what they may take along.
        self._let_go: dict[str, tuple[float, list[RunningAttempt]]] = {}
        self._come: set[str] = set()
        self._storing = asyncio.Semaphore(STORED_AT_ONCE)
        self.on_idle: Callable[[], None] = lambda: None
        self.on_admitted: Callable[[str], None] = lambda worker_id: None
        self.commission_ppm: Callable[[], int] = lambda: settings.commission_ppm
        self.closing = False

    def start(self) -> None:
        self._task = asyncio.create_task(self._watch(), name="worker-watch")

    async def stop(self) -> None:
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._endpoints.aclose()

    async def register(
        self, raw: Any, connection: Connection, *, peer: str = ""
    ) -> WorkerSession | QueenBeeSession:
        """Let a worker in by the first frame on its socket; `peer` is where it comes from.

        Raises RefusedWorker, DatabaseUnavailable.
        """
        self.check_open()
        if queenbee.is_queenbee(raw):
            return await self._register_queenbee(raw, connection, peer)
        try:
            registration = Registration.model_validate(raw)
        except ValidationError as error:
            raise bad_registration(error) from None
        fault = fault_of(registration.min_fees or {})
        if fault is not None:
            raise RefusedWorker("bad_registration", f"min_fees: {fault}")
        applicant = Applicant(
            identity=workers.hash_worker_key(registration.worker_key),
            models=registration.models,
            slots=registration.slots,
            name=registration.name,
            ln_url=registration.ln_url,
            hardware=registration.model_dump(mode="json", exclude=_NOT_HARDWARE),
            min_fees=registration.min_fees or {},
            traits=native_traits(registration),
            holding=[(held.job_id, held.attempt) for held in registration.holding],
        )
        session = await self.admit(
            applicant,
            lambda worker: WorkerSession(
                worker,
                connection,
                self._attempts,
                lease_s=self._settings.lease_s,
                image_s=self._settings.image_timeout_s,
                on_idle=self._idle,
            ),
        )
        worker = session.worker
        # Before anything else: no task has had a turn since it was let in.
        session.send(
            Registered(
                worker_id=worker.id,
                ln_url=worker.ln_url,
                payable=worker.payable,
                commission_ppm=self.commission_ppm(),
                resume=session.held(),
            ).model_dump_json()
        )
        return session

    async def _register_queenbee(
        self, raw: dict[str, Any], connection: Connection, peer: str
    ) -> QueenBeeSession:
        try:
            registration = QueenBeeRegistration.model_validate(raw)
        except ValidationError as error:
            raise bad_registration(error) from None
        applicant = queenbee.applicant(registration, queenbee.verified_key(raw))
        # It reconnects at once and for ever (QB-P19); each time is a lookup and a transaction.
        who = applicant.identity or workers.hash_identity("peer", peer, registration.pay_to or "")
        if self._registrations.hit(who, REGISTRATIONS_PER_MINUTE) > 0:
            raise RefusedWorker("too_often", "registered too often", retryable=True)
        return await self.admit(
            applicant,
            lambda worker: QueenBeeSession(
                worker,
                connection,
                self._attempts,
                registration,
                image_s=self._settings.image_timeout_s,
                on_idle=self._idle,
            ),
        )

    async def register_http(
        self, described: HttpWorker, *, own_ports: frozenset[int] = frozenset()
    ) -> HttpSession:
        """Let in servers that jobs are sent to by HTTP. `own_ports`: on which the caller is heard.

        The same identity with the same description keeps its session; with another it gets a new
        one, and what the old one was at goes back. Raises RefusedWorker, DatabaseUnavailable.
        """
        self.check_open()
        urls = {
            (model.kind, model.id): self._endpoints.read(model.api, own_ports=own_ports)
            for model in described.models
        }
        if not urls:
            raise RefusedWorker("bad_registration", "models: at least one is needed")
        for before in self.sessions.values():
            if isinstance(before, HttpSession) and before.described == described:
                return before
        applicant = Applicant(
            identity=described.identity,
            models=[model.served() for model in described.models],
            slots=described.slots,
            name=described.name,
            ln_url=described.ln_url,
        )
        return await self.admit(
            applicant,
            lambda worker: HttpSession(
                worker,
                self._attempts,
                described,
                self._endpoints,
                urls,
                image_s=self._settings.image_timeout_s,
                on_idle=self._idle,
                on_end=self.leave,
            ),
        )

    def check_open(self) -> None:
        """Raises RefusedWorker when nobody is let in any more."""
        if self.closing:
            raise RefusedWorker("draining", "this router is shutting down", retryable=True)

    async def admit(self, applicant: Applicant, make: Callable[[Worker], AnySession]) -> AnySession:
        """Let a worker of any kind in: its address is looked up, its record found or begun, and its
        session, which `make` makes, may be given work from now on. Whoever calls this calls `leave`
        when the session has ended. Raises RefusedWorker, DatabaseUnavailable.

        An identity has one session: an earlier one is cut off.
        """
        self.check_open()
        if any("\0" in text for text in texts_of(applicant)):
            # PostgreSQL has no such character in its texts.
            raise RefusedWorker("bad_registration", "NUL is not a character of any name")
        if any(model.id == ANY_MODEL for model in applicant.models):
            raise RefusedWorker("bad_registration", "models: * is not the name of a model")
        seen = {(model.kind, model.id) for model in applicant.models}
        if len(seen) != len(applicant.models):
            raise RefusedWorker("bad_registration", "models: a model is listed twice")
        ln_url = await self._check_address(applicant)
        identity = applicant.identity or self._free_seat(ln_url)
        try:
            worker, resumed = await self._store(applicant, identity, ln_url)
        except BaseException:
            self._seats.pop(identity, None)
            raise
        if identity in self._seats:
            self._seats[identity] = worker.id
        session = make(worker)
        if isinstance(session, WorkerSession):
            session.resume(resumed)
        before = self.sessions.get(worker.id)
        if before is not None:
            # A server that registers anew has done nothing wrong; a socket has been lost.
            blame = "nobody" if isinstance(before, HttpSession) else "worker"
            before.cut("replaced by a new connection of the same worker", blame=blame)
        self.sessions[worker.id] = session
        self._asks.set_floors(worker)
        self._fleet.add(worker)
        self._models.learn(worker.models)
        log.info(
            "worker registered worker=%s models=%s slots=%d payable=%s",
            worker.id,
            ",".join(sorted({model.id for model in worker.models})),
            worker.slots,
            worker.payable,
        )
        if applicant.identity is not None and isinstance(session, WorkerSession | QueenBeeSession):
            # A socket is in one place only.
            self.on_admitted(worker.id)
        self.on_idle()
        return session

    async def change(self, worker: Worker, applicant: Applicant) -> None:
        """A worker that is here offers something else from now on; what it holds it goes on with.

        Raises RefusedWorker, DatabaseUnavailable.
        """
        assert applicant.identity is not None
        ln_url = await self._check_address(applicant)
        now, _ = await self._store(applicant, applicant.identity, ln_url)
        worker.models, worker.slots, worker.ln_url = now.models, now.slots, now.ln_url
        if self.sessions.get(worker.id) is not None:
            self._fleet.add(worker)
        self._models.learn(worker.models)

    def come_elsewhere(self, worker_id: str) -> None:
        """A worker has connected to another router: its session here, if there is one, is dead; that
        of one which polls goes on, but it is counted there."""
        if worker_id in self._let_go:
            self._come.add(worker_id)
        session = self.sessions.get(worker_id)
        if session is not None and session.worker.pulls:
            session.worker.asks_elsewhere = True
        elif session is not None and not session.closed:
            session.cut("connected to another router", blame="nobody")

    def _free_seat(self, ln_url: str | None) -> bytes:
        """The first seat at an address that nobody sits on, so that whoever comes back finds its
        record. A banned one is never left empty by another: who was sent away stays away."""
        seats = (workers.hash_identity("seat", ln_url or "", str(n)) for n in itertools.count())
        seat = next(seat for seat in seats if seat not in self._seats)
        self._seats[seat] = None
        return seat

    async def _check_address(self, applicant: Applicant) -> str | None:
        """The address in its canonical text, after its server has answered for it, now or when this
        worker first named it: a provider that is away must not keep its workers out."""
        try:
            payee = self._addresses.parse(applicant.ln_url or "")
            if payee is None:
                return None
            identity = applicant.identity or workers.hash_identity("seat", payee.text, "0")
            async with self._storing, self._database.connection() as connection:
                if await workers.is_paid_at(connection, identity, payee.text):
                    return payee.text
            whom = applicant.identity or workers.hash_identity("address", payee.text)
            await self._addresses.resolve(payee, on_behalf_of=whom.hex())
        except BadLightningAddress as error:
            raise RefusedWorker(
                error.code, f"ln_url: {error}", retryable=error.code in _PASSING
            ) from None
        return payee.text

    async def _store(
        self, applicant: Applicant, identity: bytes, ln_url: str | None
    ) -> tuple[Worker, list[Resumed]]:
        # When thousands come back at once they must not hold every connection to the database: what
        # is paid for needs one, too.
        async with self._storing, self._database.transaction() as connection:
            record = await workers.register(
                connection,
                identity,
                name=applicant.name,
                models=applicant.models,
                hardware=applicant.hardware,
                slots=applicant.slots,
            )
            if record.banned:
                raise RefusedWorker("banned", record.ban_reason or "this worker is banned")
            address = None
            if applicant.pulls and ln_url is None:
                address = await payees.get_address(connection, record.id, now=self._clock())
            if address is None:
                address = await payees.set_address(connection, record.id, ln_url, now=self._clock())
            edges = await workers.add_edges(connection, applicant.models)
            resumed = await job_store.resume_many(
                connection,
                record.id,
                [held for held in applicant.holding if not self._is_ending(held[0])],
                router_id=self._router_id,
                lease_ends_at=self._clock() + timedelta(seconds=self._settings.lease_s),
            )
        if edges != self._fleet.edges:
            self._fleet.set_edges(edges)
        standing = self._attempts.reputation.standing(record.id)
        standing.resume(record.reliability, record.quality)
        worker = Worker(
            id=record.id,
            name=applicant.name,
            models=applicant.models,
            slots=applicant.slots,
            payable=address.ln_url is not None or applicant.pulls,
            ln_url=address.ln_url,
            speeds=record.speeds,
            standing=standing,
            min_fees=applicant.min_fees,
            draining=record.draining,
            told_to_drain=record.draining,
            pulls=applicant.pulls,
            offers=applicant.offers,
            # Its public id is one of its names.
            traits=replace(applicant.traits, names=applicant.traits.names | {record.id}),
        )
        return worker, resumed

    def _is_ending(self, job_id: str) -> bool:
        """Whether an attempt of this router is being given back or settled just now."""
        running = self._attempts.running.get(job_id)
        return running is not None and running.settled

    def leave(self, session: Session) -> None:
        """A connection has ended. Twice is harmless."""
        session.end()
        self._fleet.remove(session.worker)
        if self.sessions.get(session.worker.id) is session:
            del self.sessions[session.worker.id]
            for seat in [s for s, who in self._seats.items() if who == session.worker.id]:
                del self._seats[seat]
        log.info("worker left worker=%s", session.worker.id)

    def assign(self, claimed: Claimed, worker: Worker) -> None:
        """Hand a claimed job to its worker, or give it back if that has left meanwhile."""
        session = self.sessions.get(worker.id)
        if session is not None and session.worker is worker:
            try:
                session.assign(claimed)
            except Exception:
                # Others were claimed or bought in the same statement, and that is done.
                log.exception("job not sent job=%s worker=%s", claimed.job_id, worker.id)
                self._give_back_unsent(claimed, worker)
            return
        running = self._attempts.begin(claimed, worker, lambda: None)
        self._attempts.fail(
            running, outcome="worker_lost", blame="nobody", error="gone before the job was sent"
        )

    def _give_back_unsent(self, claimed: Claimed, worker: Worker) -> None:
        """If its attempt has not even begun, it is taken back as one whose claim was not heard of."""
        worker.busy.discard(claimed.job_id)
        running = self._attempts.running.get(claimed.job_id)
        if running is not None and running.claimed is claimed:
            self._attempts.fail(
                running, outcome="router_error", blame="router", error="a fault of the router"
            )

    def drain_all(self) -> None:
        """This router is shutting down: no new jobs for anybody."""
        self.closing = True
        for session in self.sessions.values():
            session.drain()

    def let_idle_go(self) -> None:
        """Let workers go to other routers that have nothing in hand here."""
        for session in list(self.sessions.values()):
            if isinstance(session, WorkerSession) and not session.worker.busy:
                self._let(session)

    async def hand_over(self) -> None:
        """Let all workers go that can take along what they hold, and wait until they are elsewhere."""
        for session in list(self.sessions.values()):
            if isinstance(session, WorkerSession):
                self._let(session)
        while self.awaits_any:
            await asyncio.sleep(HAND_OVER_EVERY_S)

    @property
    def awaits_any(self) -> bool:
        """Whether some worker that was let go may come to another router in a moment."""
        now = time.monotonic()
        return any(
            now - at < COME_S for who, (at, _) in self._let_go.items() if who not in self._come
        )

    def _let(self, session: WorkerSession) -> None:
        if not session.closed:
            self._let_go[session.worker.id] = time.monotonic(), session.let_go()

    async def close_all(self) -> None:
        """End all sessions; what their workers still hold is given back or settled."""
        for _, held in self._let_go.values():
            for running in held:
                # Of one that goes on elsewhere this says nothing any more.
                self._attempts.fail(
                    running, outcome="cut", blame="router", error="the router is shutting down"
                )
        for session in list(self.sessions.values()):
            session.cut("the router is shutting down", blame="router")
        await self._attempts.settle_all()

    def _idle(self) -> None:
        self.on_idle()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(CHECK_S)
            self._attempts.check_deadlines()
            for session in list(self.sessions.values()):
                session.check_progress(
                    first_token_s=self._settings.first_token_timeout_s,
                    stall_s=self._settings.stall_timeout_s,
                )


# Of a registration, what is not kept as a description of the machine.
_NOT_HARDWARE = {
    "worker_key",
    "models",
    "slots",
    "ln_url",
    "name",
    "protocol",
    "min_fees",
    "holding",
}
