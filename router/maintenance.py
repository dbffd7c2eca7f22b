"""What has to be done from time to time, whoever is there to wait for it.

    often    renew the leases of what runs here; keep what running jobs have said
    seconds  cancel what another router was asked to; take back jobs whose lease has run out; expire
             unpaid quotes and waits that are over; write the workers' records; move waiting jobs to
             finer lanes
    minutes  wipe texts; forget old idempotency keys, and changes of the queue
    hours    forget what was noted of workers long ago

Every step may run on several routers at once: guards in the statements make a second time harmless.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from typing import Any

from router import (
    charging,
    demands,
    door_ids,
    growing_tables,
    job_endings,
    job_queue,
    kept_chunks,
    workers,
)
from router.answer_hash import answer_hash
from router.attempts import Attempts
from router.charging import NOTHING, Delivered
from router.database import TRANSIENT, Database, DatabaseUnavailable
from router.job_records import Claimed, Ending
from router.job_states import Event, State
from router.job_stream import StreamHub
from router.lanes import Edges, model_of
from router.models import Models
from router.orphans import Orphans
from router.presence import Presence
from router.results import result
from router.settings import Settings
from router.workers import Fleet, News, Worker
from worker.protocol import Kind

log = logging.getLogger(__name__)

KEEP_S = 0.5
IDEMPOTENCY_KEPT = timedelta(hours=24)
# A quote expires a little later here than for its payer, so that a payment in the last second wins.
EXPIRY_GRACE = timedelta(seconds=30)
# How long after its start a job of ours must be known here, if it was really sent to a worker.
UNSENT_S = 10
_BATCH = 200
# Jobs are locked by their ids, in the order in which they come, as where they end.
_RENEW = """
with given as materialized (
    select t.id from unnest($1::text[]) t(id)
    cross join lateral (select from jobs where jobs.id = t.id for update) j)
update jobs j set lease_ends_at = $2 from given t
where j.id = t.id and j.state = 'running' and j.router_id = $3"""
FEW_WORKERS = 200
SLICES = 12


class Maintenance:
    """The loops of one router."""

    def __init__(
        self,
        database: Database,
        settings: Settings,
        fleet: Fleet,
        models: Models,
        hub: StreamHub,
        attempts: Attempts,
        presence: Presence,
        *,
        router_id: str,
        clock: Callable[[], datetime],
    ) -> None:
        self._database = database
        self._settings = settings
        self._fleet = fleet
        self._models = models
        self._hub = hub
        self._attempts = attempts
        self._presence = presence
        self._orphans = Orphans(database, attempts, presence, router_id=router_id)
        self._router_id = router_id
        self._clock = clock
        self._tasks: list[asyncio.Task] = []
        self._slice = 0
        # The edges that the whole queue is known to be sorted by.
        self._laned_for: Edges | None = None

    def start(self) -> None:
        loops: list[tuple[float, Sequence[Callable[[], Awaitable[object]]]]] = [
            (KEEP_S, [self.keep_chunks]),
            (self._settings.lease_s / 4, [self.renew_leases]),
            (1.0, [self.stop_overdue, self.look_at_growth]),
            (
                2.0,
                [
                    self._orphans.cancel_asked,
                    self.take_back_lost,
                    self.expire_waits,
                    self.expire_quotes,
                ],
            ),
            (5.0, [self._orphans.cancel_left_behind, self.keep_records, self.finer_lanes]),
            (10.0, [self.wipe, self.forget_queue_changes]),
            (3600.0, [self.prune]),
        ]
        self._tasks = [
            asyncio.create_task(self._every(period_s, steps), name=f"maintenance-{period_s}")
            for period_s, steps in loops
        ]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _every(
        self, period_s: float, steps: Sequence[Callable[[], Awaitable[object]]]
    ) -> None:
        while True:
            for step in steps:
                try:
                    await step()
                except DatabaseUnavailable:
                    log.warning("maintenance waits for the database")
                except TRANSIENT as error:
                    # Of two transactions that want the same rows one is ended; the next turn does it.
                    log.info(
                        "maintenance gave way to another transaction: %s", type(error).__name__
                    )
                except Exception:
                    log.exception("maintenance step failed, going on")
            await asyncio.sleep(period_s)

    async def keep_chunks(self) -> None:
        """Store what running jobs have said since the last time, for readers that come later."""
        await kept_chunks.keep(self._database, list(self._attempts.running.values()))

    async def look_at_growth(self) -> None:
        """Have PostgreSQL plan anew for tables that have grown."""
        async with self._database.connection() as connection:
            await growing_tables.analyze(connection)

    async def renew_leases(self) -> None:
        """Say that what runs here is still alive."""
        running = sorted(self._attempts.running)
        if running:
            async with self._database.connection() as connection:
                await connection.execute(
                    _RENEW,
                    running,
                    self._clock() + timedelta(seconds=self._settings.lease_s),
                    self._router_id,
                )

    async def take_back_own(self) -> int:
        """At the start: whatever this router had running before it died is lost."""
        total = 0
        while lost := await self._take_back("router_id = $1", self._router_id):
            total += lost
        return total

    async def cancel_abandoned(self) -> int:
        """At the start: waiting jobs whose clients hung on a connection to this router before."""
        async with self._database.connection() as connection:
            rows = await connection.fetch(
                "select id from jobs where state = $1 and attached_to = $2",
                State.QUEUED.value,
                self._router_id,
            )
        for row in rows:
            await self._attempts.end(Ending(row["id"], Event.CANCEL, "client_gone"))
        return len(rows)

    async def stop_overdue(self) -> None:
        """Stop jobs that run here for longer than their client allowed; settled as they stand."""
        now = time.monotonic()
        for running in list(self._attempts.running.values()):
            limit_s = running.claimed.run_limit_s
            if limit_s is not None and now - running.began_at > limit_s:
                self._attempts.cancel_later(running.claimed.job_id, "run_limit")

    async def take_back_lost(self) -> int:
        """Jobs of any router whose lease has run out or that is lost, and jobs of ours that nobody
        runs.

        A claim whose commit we did not hear of, because the database went away in that moment, was
        never sent to its worker. A router that is there renews its leases when it can and takes back
        what is its own: those of all run out while the database is away, or by a clock that is wrong.
        """
        unsent = await self._take_back(
            f"started_at < now() - interval '{UNSENT_S} seconds' and router_id = $1",
            self._router_id,
        )
        lost = self._presence.lost()
        dead = await self._take_back("router_id = any($1::text[])", lost) if lost else 0
        expired = await self._take_back(
            "lease_ends_at < $1 and router_id <> all($3::text[])",
            self._clock(),
            self._presence.alive(),
        )
        return unsent + dead + expired

    async def _take_back(self, condition: str, *values: Any) -> int:
        value, *more = values
        async with self._database.connection() as connection:
            rows = await connection.fetch(
                f"select * from jobs where state = 'running' and {condition}"
                f" and id <> all($2::text[]) limit {_BATCH}",
                value,
                list(self._attempts.running),
                *more,
            )
        # What has begun while we looked is not lost.
        lost = [row for row in rows if row["id"] not in self._attempts.running]
        ends = await asyncio.gather(*(self._lost(row) for row in lost), return_exceptions=True)
        for row, error in zip(lost, ends, strict=True):
            if isinstance(error, DatabaseUnavailable):
                raise error
            if error is not None:
                # One job that cannot be taken back must not keep the others, or a start, waiting.
                log.error("job not taken back job=%s", row["id"], exc_info=error)
        return ends.count(None)

    async def _lost(self, row: Any) -> None:
        """The router or worker of a running job is gone, and with it the stream in memory."""
        claimed = Claimed(**{name: row[name] for name in _CLAIMED}, job_id=row["id"])
        log.warning("job lost job=%s attempt=%d", claimed.job_id, claimed.attempt)
        async with self._database.connection() as connection:
            said = await connection.fetch(
                "select start, text, tokens from job_chunks"
                " where job_id = $1 and n = $2 order by start",
                claimed.job_id,
                claimed.attempt,
            )
            payable = await connection.fetchval(
                "select ln_url is not null from payees where id = $1", claimed.worker_id
            )
        if claimed.job_id in self._attempts.running:
            # Its worker has just brought it here, and goes on with it.
            return
        if not (row["shown"] and said):
            if row["cancel_reason"]:
                await self._attempts.end(
                    Ending(
                        claimed.job_id,
                        Event.CANCEL,
                        row["cancel_reason"],
                        attempt=claimed.attempt,
                        outcome="lost",
                        blame="router",
                        router_id=row["router_id"],
                    )
                )
                return
            if claimed.attempt < self._settings.max_attempts:
                await self._attempts.give_back(
                    claimed, "lost", "router", "lease ended", at=row["router_id"]
                )
                return
            await self._attempts.end(_failed(claimed, "attempts_exhausted", row["router_id"]))
            return
        text = kept_chunks.joined(said)
        delivered = Delivered(len(text.encode()), said[-1]["tokens"] or None)
        charged = charging.charge(claimed, delivered, with_prompt_fee=False)
        usage = charging.usage(claimed, delivered, charged)
        answer = result(
            Kind(claimed.kind),
            job_id=claimed.job_id,
            model=claimed.model,
            created_s=int(claimed.started_at.timestamp()),
            text=text,
            deltas=(),
            data=None,
            finish_reason=None,
            usage=usage,
        )
        await self._attempts.end(
            Ending(
                claimed.job_id,
                Event.FAIL,
                "worker_lost",
                attempt=claimed.attempt,
                charge_msat=charged.charge_msat,
                payee=claimed.worker_id if payable else None,
                result=json.dumps(answer, ensure_ascii=False),
                usage=json.dumps(usage),
                answer_hash=answer_hash(answer),
                outcome="lost",
                blame="router",
                had_chunks=True,
                router_id=row["router_id"],
            )
        )

    async def expire_waits(self) -> None:
        """Refund jobs that have waited as long as their client was ready to.

        All of them, many in one commit: in an overload as many run out of time as are too many.
        """
        rows = [None] * _BATCH
        while len(rows) == _BATCH:
            # By the clock that has set them, and not by one of ours that may be wrong.
            async with self._database.connection() as connection:
                rows = await connection.fetch(
                    "select id from jobs where state = $1 and wait_ends_at < now() limit $2",
                    State.QUEUED.value,
                    _BATCH,
                )
            await asyncio.gather(
                *(self._attempts.end(Ending(r["id"], Event.EXPIRE, "max_wait")) for r in rows)
            )

    async def expire_quotes(self) -> None:
        """Close quotes that were not paid in time, and delete what they asked."""
        async with self._database.transaction() as connection:
            # The outer guard counts: one that is paid while we wait for its row is not expired.
            quotes = await connection.fetch(
                "update quotes set state = 'expired', request = null where state = 'open' and id in"
                " (select id from quotes where state = 'open' and expires_at < $1 limit $2)"
                " returning id",
                self._clock() - EXPIRY_GRACE,
                _BATCH,
            )
            jobs = await job_endings.expire_unpaid(
                connection,
                [quote["id"] for quote in quotes],
                wipe_after_s=self._settings.wipe_after_s,
            )
        for job_id in jobs:
            self._attempts.tell_unpaid(job_id)

    async def keep_records(self) -> None:
        """Write what was observed of the workers connected here."""
        here, left = self._due_records(), self._fleet.take_left()
        forgiven = self._attempts.reputation.take_forgiven()
        counts = [(w, w.done, w.failed, w.tokens) for w in [*left, *here]]
        try:
            async with self._database.connection() as connection:
                await workers.keep_records(connection, self._news(counts, forgiven))
        except BaseException:
            for worker in left:
                self._fleet.left(worker)
            raise
        for worker, done, failed, tokens in counts:
            worker.done -= done
            worker.failed -= failed
            worker.tokens -= tokens
        await self._attempts.reputation.keep()

    def _due_records(self) -> list[Worker]:
        """Workers of which there is something to write. Of thousands that did nothing, only that they
        are still there: a slice of them each time, all within a minute."""
        here = self._fleet.all()
        if len(here) <= FEW_WORKERS:
            return here
        self._slice = (self._slice + 1) % SLICES
        return [
            worker
            for number, worker in enumerate(here)
            if worker.done or worker.failed or worker.tokens or number % SLICES == self._slice
        ]

    def _news(
        self, counts: Sequence[tuple[Worker, int, int, int]], forgiven: dict[str, int]
    ) -> list[News]:
        """One for each worker: who has come back was here twice."""
        news: dict[str, News] = {}
        for worker, done, failed, tokens in counts:
            before = news.get(worker.id)
            news[worker.id] = News(
                worker.id,
                done + (before.done if before else 0),
                failed + (before.failed if before else 0),
                tokens + (before.tokens if before else 0),
                worker.standing.reliability,
                {**(before.speeds if before else {}), **worker.speeds},
            )
        for worker_id, faults in forgiven.items():
            standing = self._attempts.reputation.standing(worker_id)
            empty = News(worker_id, 0, 0, 0, standing.reliability, {})
            known = news.get(worker_id, empty)
            news[worker_id] = replace(known, failed=known.failed - faults)
        return list(news.values())

    async def finer_lanes(self) -> None:
        """Bring in edges that other routers have added; after new ones move waiting jobs.

        A pass over the whole queue, but only when there are new edges: each router makes one after
        it has learned of them, so that jobs it queued before that are moved too.
        """
        async with self._database.connection() as connection:
            edges = await workers.load_edges(connection)
        if edges != self._fleet.edges:
            self._fleet.set_edges(edges)
        if edges == self._laned_for:
            return
        moved, last = 0, ("", "")
        while rows := await self._waiting_after(*last):
            moved += await self._to_own_lanes(rows)
            last = (rows[-1]["job_id"], rows[-1]["lane"])
        self._laned_for = edges
        if moved:
            log.info("moved %d waiting jobs to finer lanes", moved)
            self._attempts.on_work()

    async def _waiting_after(self, job_id: str, lane: str) -> Sequence[Any]:
        async with self._database.connection() as connection:
            return await connection.fetch(
                "select q.job_id, q.lane, j.kind, j.prompt_tokens, j.max_tokens"
                " from queue q join jobs j on j.id = q.job_id"
                " where (q.job_id, q.lane) > ($1, $2) order by q.job_id, q.lane limit $3",
                job_id,
                lane,
                _BATCH * 5,
            )

    async def _to_own_lanes(self, rows: Sequence[Any]) -> int:
        moves = []
        for row in rows:
            # A job may wait in lanes of several models: each row stays with its own.
            lane = self._models.lane(
                Kind(row["kind"]),
                model_of(row["lane"]),
                prompt_tokens=row["prompt_tokens"],
                max_tokens=row["max_tokens"],
                demand=demands.of_lane(row["lane"]),
            )
            if lane != row["lane"]:
                moves.append((row["job_id"], row["lane"], lane))
        if moves:
            await self._database.run(partial(job_queue.move_waiting, moves=moves))
        return len(moves)

    async def forget_queue_changes(self) -> None:
        """Delete what every router has seen of who came to the queue and left it."""
        async with self._database.connection() as connection:
            await job_queue.forget_changes(connection)

    async def prune(self) -> None:
        """Delete what was noted of workers long ago."""
        await self._attempts.reputation.prune(self._clock())

    async def wipe(self) -> None:
        """Delete prompts and answers whose time is over; the money records stay."""
        async with self._database.transaction() as connection:
            rows = await connection.fetch(
                "update jobs set spec = null, result = null, webhook = null, prefix = null,"
                " wiped = true, wipe_at = null"
                " where wipe_at < $1 and id in"
                " (select id from jobs where wipe_at < $1 limit $2) returning id",
                self._clock(),
                _BATCH * 5,
            )
            if rows:
                await connection.execute(
                    "delete from job_chunks where job_id = any($1::text[])",
                    [row["id"] for row in rows],
                )
            await connection.execute(
                "delete from idempotency where created_at < $1 and scope not like 'l402:%'",
                self._clock() - IDEMPOTENCY_KEPT,
            )
            await door_ids.forget_old(connection, now=self._clock())


_CLAIMED = tuple(name for name in Claimed.__dataclass_fields__ if name != "job_id")


def _failed(claimed: Claimed, reason: str, router_id: str) -> Ending:
    return Ending(
        claimed.job_id,
        Event.FAIL,
        reason,
        attempt=claimed.attempt,
        charge_msat=NOTHING.charge_msat,
        outcome="lost",
        blame="router",
        router_id=router_id,
    )
