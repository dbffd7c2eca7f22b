"""Who may serve: registration of workers, and the sessions of those connected to this router."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import datetime
from typing import Any

from pydantic import ValidationError

from billing import payees
from billing.errors import BadLightningAddress
from billing.lightning_address import LightningAddresses
from router import workers
from router.attempts import Attempts
from router.database import Database
from router.job_records import Claimed
from router.models import Models
from router.settings import Settings
from router.worker_sessions import Connection, WorkerSession
from router.workers import Fleet, Worker
from worker.protocol import Refused, Registered, Registration

log = logging.getLogger(__name__)

CHECK_S = 1.0
# Codes of a bad address that may be gone at the next try.
_PASSING = frozenset({"unreachable", "busy", "too_many_lookups", "bad_answer", "payee_error"})


class RefusedWorker(Exception):
    """A registration that is not accepted; `answer` is the frame to send before closing."""

    def __init__(self, code: str, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.answer = Refused(code=code, message=message, retryable=retryable)


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
        *,
        clock: Callable[[], datetime],
    ) -> None:
        self._database = database
        self._settings = settings
        self._fleet = fleet
        self._models = models
        self._attempts = attempts
        self._addresses = addresses
        self._clock = clock
        self._task: asyncio.Task | None = None
        self.sessions: dict[str, WorkerSession] = {}
        self.on_idle: Callable[[], None] = lambda: None
        self.commission_ppm: Callable[[], int] = lambda: settings.commission_ppm
        self.closing = False

    def start(self) -> None:
        self._task = asyncio.create_task(self._watch(), name="worker-watch")

    async def stop(self) -> None:
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def register(self, raw: Any, connection: Connection) -> WorkerSession:
        """Let a worker in by its first frame. Raises RefusedWorker, DatabaseUnavailable."""
        if self.closing:
            raise RefusedWorker("draining", "this router is shutting down", retryable=True)
        try:
            registration = Registration.model_validate(raw)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise RefusedWorker("bad_registration", f"{where}: {first['msg']}") from None
        if "\\u0000" in registration.model_dump_json():
            # PostgreSQL has no such character in its texts.
            raise RefusedWorker("bad_registration", "NUL is not a character of any name")
        seen = {(model.kind, model.id) for model in registration.models}
        if len(seen) != len(registration.models):
            raise RefusedWorker("bad_registration", "models: a model is listed twice")
        ln_url = await self._check_address(registration)
        worker = await self._store(registration, ln_url)
        session = WorkerSession(
            worker,
            connection,
            self._attempts,
            lease_s=self._settings.lease_s,
            on_idle=self._idle,
        )
        before = self.sessions.get(worker.id)
        if before is not None:
            before.cut("replaced by a new connection of the same worker")
        self.sessions[worker.id] = session
        self._fleet.add(worker)
        self._models.learn(worker.models)
        session.send(
            Registered(
                worker_id=worker.id,
                ln_url=worker.ln_url,
                payable=worker.payable,
                commission_ppm=self.commission_ppm(),
            ).model_dump_json()
        )
        log.info(
            "worker registered worker=%s models=%s slots=%d payable=%s",
            worker.id,
            ",".join(sorted({model.id for model in worker.models})),
            worker.slots,
            worker.payable,
        )
        self.on_idle()
        return session

    async def _check_address(self, registration: Registration) -> str | None:
        """The address in its canonical text, after its server has answered for it."""
        try:
            payee = self._addresses.parse(registration.ln_url or "")
            if payee is None:
                return None
            await self._addresses.resolve(
                payee, on_behalf_of=workers.hash_worker_key(registration.worker_key).hex()
            )
        except BadLightningAddress as error:
            raise RefusedWorker(
                error.code, f"ln_url: {error}", retryable=error.code in _PASSING
            ) from None
        return payee.text

    async def _store(self, registration: Registration, ln_url: str | None) -> Worker:
        async with self._database.transaction() as connection:
            record = await workers.register(connection, registration)
            if record.banned:
                raise RefusedWorker("banned", record.ban_reason or "this worker is banned")
            address = await payees.set_address(connection, record.id, ln_url, now=self._clock())
            edges = await workers.add_edges(connection, registration.models)
        if edges != self._fleet.edges:
            self._fleet.set_edges(edges)
        return Worker(
            id=record.id,
            name=registration.name,
            models=registration.models,
            slots=registration.slots,
            payable=address.ln_url is not None,
            ln_url=address.ln_url,
            speeds=record.speeds,
            reliability=record.reliability,
            draining=record.draining,
            told_to_drain=record.draining,
        )

    def leave(self, session: WorkerSession) -> None:
        """A connection has ended."""
        session.end()
        self._fleet.remove(session.worker)
        if self.sessions.get(session.worker.id) is session:
            del self.sessions[session.worker.id]
        log.info("worker left worker=%s", session.worker.id)

    def assign(self, claimed: Claimed, worker: Worker) -> None:
        """Hand a claimed job to its worker, or give it back if that has left meanwhile."""
        session = self.sessions.get(worker.id)
        if session is not None and session.worker is worker:
            session.assign(claimed)
            return
        running = self._attempts.begin(claimed, worker, lambda: None)
        self._attempts.fail(
            running, outcome="worker_lost", blame="nobody", error="gone before the job was sent"
        )

    def drain_all(self) -> None:
        """This router is shutting down: no new jobs for anybody."""
        self.closing = True
        for session in self.sessions.values():
            session.drain()

    async def close_all(self) -> None:
        """End all sessions; what their workers still hold is given back or settled."""
        for session in list(self.sessions.values()):
            session.cut("the router is shutting down", blame="router")
        await self._attempts.settle_all()

    def _idle(self) -> None:
        self.on_idle()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(CHECK_S)
            for session in list(self.sessions.values()):
                session.check_progress(
                    first_token_s=self._settings.first_token_timeout_s,
                    stall_s=self._settings.stall_timeout_s,
                )
