"""The core that every door calls: submit, look up, cancel, bump.

What happens to a job while a worker has it, and how it ends, is in `router.attempts`.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import time
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from decimal import Decimal
from typing import Any

from billing import accounts, fees, ledger
from billing.errors import InsufficientFunds
from billing.ledger import Transfer
from router import job_queue, job_submits, webhook_store
from router.attempts import Attempts
from router.database import BatchingWriter, ConnectionBroke, Database, DatabaseUnavailable
from router.errors import BadRequest, JobNotWaiting, NoSuchJob, NotEnoughBalance
from router.job_records import Ending, NewQuote, Submission, Submitted
from router.job_states import Event, State
from router.job_stream import JobStream, StreamHub
from router.job_views import Outcome, job_view, outcome_of
from router.market import Market, Place
from router.models import Models
from router.relay import Relay

log = logging.getLogger(__name__)

# How long a client waits to hear what became of a submission that the database did not answer.
UNSURE_S = 15.0
AGAIN_S = 0.2
# How long a statement whose line was lost may wait for locks: those who hold any are ended before that
# (`router.database`).
LATE_S = 60.0
LATE_EVERY_S = 5.0
# How long a cancel waits for the router that runs the job.
CANCEL_S = 5.0
CANCEL_LOOK_S = 0.05


class Jobs:
    """All jobs of this market, as clients see them."""

    def __init__(
        self,
        database: Database,
        writer: BatchingWriter,
        models: Models,
        market: Market,
        hub: StreamHub,
        attempts: Attempts,
        relay: Relay,
        *,
        router_id: str,
        token_secret: bytes,
        max_multiplier: int,
    ) -> None:
        self._database = database
        self._writer = writer
        self._models = models
        self._market = market
        self._attempts = attempts
        self._relay = relay
        self._router_id = router_id
        self._token_secret = token_secret
        self._max_multiplier = max_multiplier
        self._tasks: set[asyncio.Task[None]] = set()
        self.hub = hub

    async def submit(
        self,
        quote: NewQuote,
        *,
        account_id: str,
        key_id: str | None = None,
        once: tuple[str, str] | None = None,
        attached_to: str | None = None,
    ) -> Submitted:
        """Pay a quote's jobs from a balance and queue them.

        Raises NotEnoughBalance, IdempotencyConflict. Twice with the same `once`: done once.
        """
        for job in quote.jobs:
            self.hub.open(job.id, State.QUEUED)
        submitted: Submitted | None = None
        try:
            submitted = await self._submit(Submission(quote, account_id, key_id, once, attached_to))
        finally:
            if submitted is None or submitted.repeated:
                for job in quote.jobs:
                    self.forget_stream(job.id)
        assert submitted is not None
        if not submitted.repeated:
            log.debug("jobs queued quote=%s jobs=%d", quote.id, len(quote.jobs))
            self._market.touch()
            # Others were claimed before the turn of their buyer came.
            waiting = [job for job in quote.jobs if self._waits(job.id)]
            if waiting:
                self._attempts.on_queued(waiting)
        return submitted

    def _waits(self, job_id: str) -> bool:
        stream = self.hub.get(job_id)
        return stream is not None and stream.state is State.QUEUED

    async def submitted(self, once: tuple[str, str], request_hash: bytes) -> str | None:
        """The quote that was submitted before as `once`. Raises IdempotencyConflict."""
        async with self._database.connection() as connection:
            return await job_submits.find_submitted(connection, once, request_hash)

    async def _submit(self, submission: Submission) -> Submitted:
        """Write a submission, and where the database went away in the middle, find out.

        Raises DatabaseUnavailable: nothing was charged. Only a database that stays away leaves it
        open; then a client that can come back finds its jobs by its key or credential, and for any
        other they are cancelled as soon as they can be.
        """
        quote_id = submission.quote.id
        kind = "submit" if job_submits.is_plain(submission) else "submit_bound"
        until = time.monotonic() + UNSURE_S
        unsure = refused = False
        while True:
            try:
                if unsure and await self.of_quote(quote_id):
                    return Submitted(quote_id, repeated=False)
                done: Submitted = await self._writer.write(kind, submission)
                # Found as repeated, it may have been by ourselves a moment ago.
                return replace(done, repeated=done.quote_id != quote_id) if unsure else done
            except DatabaseUnavailable as error:
                unsure = unsure or isinstance(error, ConnectionBroke)
                if not unsure:
                    raise
                if time.monotonic() > until:
                    if submission.once is None:
                        self._later(self._take_back(submission.quote.id))
                    raise
            except Exception:
                # A statement whose line was lost while it waited may have been done after we looked:
                # then its rows, or the money that it has taken, are what is in the way.
                if refused or not unsure:
                    raise
                refused = True
            await asyncio.sleep(AGAIN_S)

    async def _take_back(self, quote_id: str) -> None:
        """Cancel jobs that may have been queued for somebody who was told that they were not, or will
        be in a moment: the server may not know yet that nobody hears of it any more."""
        rows: list[Any] = []
        pause_s, until = AGAIN_S, time.monotonic() + LATE_S
        while not rows and time.monotonic() < until:
            await asyncio.sleep(pause_s)
            # What has started without its worker's knowledge is taken back later than this.
            pause_s = min(2 * pause_s, LATE_EVERY_S)
            try:
                rows = await self.of_quote(quote_id)
            except DatabaseUnavailable:
                until = time.monotonic() + LATE_S
        for row in rows:
            await self.cancel_surely(row["id"], reason="database_unavailable")

    async def cancel_surely(self, job_id: str, *, reason: str) -> None:
        """Cancel a job, however long it takes until the database can be told."""
        while True:
            try:
                await self.cancel(job_id, reason=reason)
                return
            except DatabaseUnavailable:
                await asyncio.sleep(AGAIN_S)

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def paid(self, job_ids: Sequence[str], *, any_waits: bool = True) -> None:
        """An invoice was paid, its jobs wait or have started: tell their readers and the dispatcher."""
        for job_id in job_ids:
            stream = self.hub.get(job_id)
            if stream is not None and stream.state is State.AWAITING_PAYMENT:
                stream.restart(State.QUEUED, 0)
        self._market.touch()
        if any_waits:
            # Of those that have started, the others are told as of any other job.
            self._relay.tell_paid(job_ids)
            self._attempts.on_work()

    def found(self, row: Any) -> None:
        """A job was found alive and will be read here: of one that runs elsewhere we ask there."""
        if row["state"] == State.RUNNING and row["router_id"] != self._router_id:
            self._relay.follow(row["id"], row["router_id"], row["attempt"])

    def forget_stream(self, job_id: str) -> None:
        """Whoever opened a job's stream has gone, and nobody reads it: nothing is kept of it, unless a
        worker here has the job already."""
        if job_id not in self._attempts.running:
            self.hub.drop(job_id)

    def left(self, stream: JobStream) -> None:
        """The last reader of a job that is alive has gone."""
        self._relay.left(stream)

    def token(self, job_id: str) -> str:
        """The secret that opens a job, beside its payer's credential."""
        digest = hmac.new(self._token_secret, job_id.encode(), hashlib.sha256).hexdigest()
        return f"jt-{digest[:40]}"

    def is_token(self, job_id: str, presented: str) -> bool:
        return hmac.compare_digest(self.token(job_id).encode(), presented.encode())

    async def row(self, job_id: str) -> Any:
        """A job's row. Raises NoSuchJob."""
        async with self._database.connection() as connection:
            row = await connection.fetchrow("select * from jobs where id = $1", job_id)
        if row is None:
            raise NoSuchJob("there is no such job", job=job_id)
        return row

    async def of_quote(self, quote_id: str) -> list[Any]:
        """The rows of a quote's jobs, in the order of the request."""
        async with self._database.connection() as connection:
            return await connection.fetch(
                "select * from jobs where quote_id = $1 order by index", quote_id
            )

    async def view(self, row: Any) -> dict[str, Any]:
        """A job as clients see it, with its place while it waits."""
        view = job_view(row)
        if row["state"] == State.QUEUED:
            place = await self.place(row)
            view["position"] = place.position
            view["wait_s"] = place.wait.as_json()
        if row["webhook"] and row["ended_at"]:
            async with self._database.connection() as connection:
                view["webhook"] = await webhook_store.state_of(connection, row["id"])
        return view

    async def place(self, row: Any) -> Place:
        """Where a waiting job stands."""
        return await self._market.place_of(
            self._models.lanes_of(row), row["multiplier_milli"], row["seq"], row["model"]
        )

    async def touch(self, *job_ids: str, wipe_after_s: int) -> None:
        """Answers were asked for: their wiping is put off."""
        async with self._database.connection() as connection:
            await connection.execute(
                "update jobs set wipe_at = now() + make_interval(secs => $2)"
                " where id = any($1::text[]) and wipe_at is not null",
                job_ids,
                float(wipe_after_s),
            )

    async def cancel(self, job_id: str, *, reason: str = "cancelled") -> Outcome | None:
        """End a job at its payer's wish: free while it waits, settled as it stands while it runs.

        A job that has ended stays as it ended. None: it runs at another router, which has not
        answered; that router cancels it as soon as it is told, or whoever takes it back from there.
        Raises NoSuchJob.
        """
        while True:
            if not await self._attempts.cancel(job_id, reason):
                await self._attempts.end(
                    Ending(job_id, Event.CANCEL, reason, router_id=self._router_id)
                )
            row = await self.row(job_id)
            outcome = outcome_of(row)
            if outcome is not None:
                return outcome
            if row["state"] == State.RUNNING and row["router_id"] != self._router_id:
                return await self._cancel_elsewhere(job_id, reason)
            # It was claimed or given back while we looked: now it is where the next try finds it.

    async def _cancel_elsewhere(self, job_id: str, reason: str) -> Outcome | None:
        """Write down that a job is to be cancelled, tell its router, and wait for its answer."""
        async with self._database.connection() as connection:
            at = await connection.fetchval(
                "update jobs set cancel_reason = $2 where id = $1 and state = 'running'"
                " returning router_id",
                job_id,
                reason,
            )
        if at is not None:
            self._relay.ask_cancel(job_id, at, reason)
        until = time.monotonic() + CANCEL_S
        while True:
            outcome = outcome_of(await self.row(job_id))
            if outcome is not None or time.monotonic() > until:
                return outcome
            await asyncio.sleep(CANCEL_LOOK_S)

    async def bump(
        self,
        job_id: str,
        *,
        offer_msat: int | None,
        multiplier: Decimal | None,
    ) -> dict[str, Any]:
        """Raise the offer of a waiting job to a new total; it keeps its time.

        Raises JobNotWaiting, BadRequest (lower than before, or over the limit), NotEnoughBalance
        with `missing_msat` and `offer_msat` in its facts.
        """
        row = await self._database.run(
            lambda connection: self._bump_in(connection, job_id, offer_msat, multiplier)
        )
        self._market.touch()
        self._attempts.on_work()
        stream = self.hub.get(job_id)
        if stream is not None:
            stream.reprices += 1
        return await self.view(row)

    async def bump_in(self, connection: Any, job_id: str, offer_msat: int) -> bool:
        """Bump within the transaction that credited the money for it; False if it is too late."""
        try:
            async with connection.transaction():
                await self._bump_in(connection, job_id, offer_msat, None, paid=True)
        except (JobNotWaiting, NoSuchJob, BadRequest, NotEnoughBalance) as error:
            log.info("paid bump not applied job=%s: %s", job_id, error.code)
            return False
        return True

    async def _bump_in(
        self,
        connection: Any,
        job_id: str,
        offer_msat: int | None,
        multiplier: Decimal | None,
        *,
        paid: bool = False,
    ) -> Any:
        row = await connection.fetchrow("select * from jobs where id = $1 for update", job_id)
        if row is None:
            raise NoSuchJob("there is no such job", job=job_id)
        if row["state"] != State.QUEUED:
            raise JobNotWaiting("only a waiting job can be bumped", state=row["state"])
        base, held = row["base_fee_msat"], row["held_msat"]
        if multiplier is not None:
            offer_msat = fees.offer_for_multiplier_msat(base, multiplier)
        if offer_msat is None or offer_msat < held:
            raise BadRequest(f"the new total may not be lower than {held} msat", held_msat=held)
        if offer_msat > max(base, 1) * self._max_multiplier:
            raise BadRequest(f"the multiplier may be at most {self._max_multiplier}")
        milli = fees.multiplier_milli(offer_msat, base)
        more_msat = offer_msat - held
        # The account before its key, as submissions and endings do.
        await ledger.lock_balances(connection, [ledger.client(row["account_id"])])
        # What its end gives back to the key's limit is all that was held, so all of it is counted.
        if row["key_id"] and not await accounts.spend(
            connection, row["key_id"], more_msat, over_limit=paid
        ):
            raise NotEnoughBalance(
                "the spending limit of this key does not cover this bump",
                missing_msat=more_msat,
                offer_msat=offer_msat,
            )
        hold = Transfer(
            ledger.client(row["account_id"]),
            ledger.escrow(job_id),
            more_msat,
            f"bump-{offer_msat}",
            job_id,
        )
        try:
            await ledger.post(connection, [hold])
        except InsufficientFunds as error:
            raise NotEnoughBalance(
                "the balance does not cover this bump",
                balance_msat=error.balance_msat,
                missing_msat=error.needed_msat - error.balance_msat,
                offer_msat=offer_msat,
            ) from None
        await job_queue.reprice(connection, job_id, milli)
        return await connection.fetchrow(
            "update jobs set held_msat = $2, multiplier_milli = $3 where id = $1 returning *",
            job_id,
            offer_msat,
            milli,
        )
