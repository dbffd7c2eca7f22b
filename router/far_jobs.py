"""What the database says of jobs that are read here and run elsewhere.

The bus is quicker, but promises nothing. Here is what makes it right in the end, whatever was lost,
and all there is while the bus is away: now and then, and whenever `router.relay` has reason to, the
jobs whose streams are open here are looked up. How a job ended is always read here, after its commit.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

from router.database import TRANSIENT, Database, DatabaseUnavailable
from router.job_states import FINAL, State
from router.job_stream import JobStream, Piece, StreamHub, pieces_after
from router.job_views import Outcome, answer_calls, answer_text, outcome_of
from router.relay import Relay

log = logging.getLogger(__name__)

TURN_S = 0.5
# How often all are looked up: while the bus tells us of them, and while it is all we have.
LOOK_S, LOOK_ALONE_S = 5.0, 1.0
_BATCH = 1000

_SAID = """
select c.job_id, c.start, c.text from job_chunks c
join unnest($1::text[], $2::int[], $3::bigint[]) t(id, attempt, have)
    on c.job_id = t.id and c.n = t.attempt and c.start + length(c.text) > t.have
order by c.job_id, c.start"""

# Jobs are locked in the order in which they come, by their ids, as where they end.
_SHOWN = """
with given as materialized (
    select t.* from unnest($1::text[], $2::int[]) t(id, attempt)
    cross join lateral (select from jobs where jobs.id = t.id for update) j)
update jobs j set shown = true from given t
where j.id = t.id and j.attempt = t.attempt and j.state = 'running' and not j.shown"""


class FarJobs:
    """The loop that looks. `others` says whether there are other routers at all."""

    def __init__(
        self, database: Database, hub: StreamHub, relay: Relay, *, others: Callable[[], bool]
    ) -> None:
        self._database = database
        self._hub = hub
        self._relay = relay
        self._soon: set[str] = set()
        self._awake = asyncio.Event()
        self._looked_at = 0.0
        self._lengths: dict[str, int] = {}
        self._task: asyncio.Task[None] | None = None
        self._others = others
        relay.look_soon = self.look_soon

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="far-jobs")

    async def stop(self) -> None:
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def look_soon(self, job_ids: Iterable[str]) -> None:
        """Look these up now."""
        self._soon.update(job_ids)
        self._awake.set()

    def look_at_all(self) -> None:
        """The bus is back, or another router has gone: look everything up now."""
        self._looked_at = 0.0
        self._awake.set()

    async def _run(self) -> None:
        while True:
            try:
                async with asyncio.timeout(TURN_S):
                    await self._awake.wait()
            except TimeoutError:
                pass
            self._awake.clear()
            try:
                await self.turn()
            except DatabaseUnavailable:
                log.warning("jobs of other routers are not looked up while the database is away")
                await asyncio.sleep(TURN_S)
            except TRANSIENT:
                self._looked_at = 0.0
            except Exception:
                log.exception("jobs of other routers were not looked up, going on")
                await asyncio.sleep(TURN_S)

    async def turn(self) -> None:
        """Note what was shown, and look up what it is time for."""
        far = [stream for stream in self._hub.all() if self._relay.is_far(stream)]
        await self._keep_shown([s for s in far if s.shown and not s.shown_kept])
        every_s = LOOK_S if self._relay.bus.up else LOOK_ALONE_S
        if self._others() and time.monotonic() - self._looked_at > every_s:
            self._looked_at = time.monotonic()
            wanted = [stream.job_id for stream in far]
            # Readers may leave before the end, and the bus may lose the word of it.
            self._lengths = {
                job_id: self._lengths[job_id] for job_id in wanted if job_id in self._lengths
            }
        else:
            wanted = [job_id for job_id in self._soon if self._hub.get(job_id) is not None]
        self._soon.clear()
        for first in range(0, len(wanted), _BATCH):
            batch = wanted[first : first + _BATCH]
            try:
                await self.look(batch)
            except DatabaseUnavailable:
                self._soon.update(wanted[first:])
                raise

    async def _keep_shown(self, streams: list[JobStream]) -> None:
        """That somebody was given output of a job decides what it costs if its worker is lost."""
        if not streams:
            return
        for stream in streams:
            self._relay.tell_shown(stream)
        told = sorted(((s, s.attempt) for s in streams), key=lambda pair: pair[0].job_id)
        async with self._database.connection() as connection:
            await connection.execute(_SHOWN, [s.job_id for s, _ in told], [n for _, n in told])
        for stream, attempt in told:
            if stream.attempt == attempt:
                stream.shown_kept = True

    async def look(self, job_ids: list[str]) -> None:
        """Bring the streams of these jobs in line with their rows."""
        async with self._database.connection() as connection:
            rows = await connection.fetch(
                "select id, state, attempt, router_id from jobs where id = any($1::text[])", job_ids
            )
            ended = [row["id"] for row in rows if row["state"] in FINAL]
            whole = (
                await connection.fetch("select * from jobs where id = any($1::text[])", ended)
                if ended
                else []
            )
        for row in whole:
            self._end(row)
        silent = [stream for row in rows if (stream := self._follow(row)) is not None]
        if silent:
            await self._read_said(silent)

    def _end(self, row: Any) -> None:
        stream, outcome = self._hub.get(row["id"]), outcome_of(row)
        self._lengths.pop(row["id"], None)
        if stream is None or outcome is None or not self._relay.is_far(stream):
            return
        if row["attempt"] > stream.attempt:
            stream.restart(State.RUNNING, row["attempt"])
        if row["attempt"] == stream.attempt:
            for piece in rest_of(stream, outcome):
                stream.push(piece.text, piece.delta)
        stream.end(outcome)
        if not stream.readers:
            self._hub.drop(stream.job_id)

    def _follow(self, row: Any) -> JobStream | None:
        """Bring a stream to its job's state; the stream, if it runs elsewhere and says nothing."""
        stream, state = self._hub.get(row["id"]), State(row["state"])
        if stream is None or not self._relay.is_far(stream) or row["attempt"] < stream.attempt:
            return None
        if state is State.QUEUED and stream.state is not State.QUEUED:
            stream.restart(State.QUEUED, row["attempt"])
        if state is not State.RUNNING:
            return None
        if not stream.readers:
            self._hub.drop(stream.job_id)
            return None
        if self._relay.follows(stream.job_id) != row["router_id"]:
            self._relay.follow(stream.job_id, row["router_id"], row["attempt"])
        before = self._lengths.get(stream.job_id)
        self._lengths[stream.job_id] = stream.length
        return stream if before == stream.length or not self._relay.bus.up else None

    async def _read_said(self, streams: list[JobStream]) -> None:
        """What the routers that run these jobs have stored of them, as far as it joins on."""
        async with self._database.connection() as connection:
            rows = await connection.fetch(
                _SAID,
                [stream.job_id for stream in streams],
                [stream.attempt for stream in streams],
                [stream.length for stream in streams],
            )
        attempts = {stream.job_id: stream.attempt for stream in streams}
        for row in rows:
            stream = self._hub.get(row["job_id"])
            if stream is None or stream.attempt != attempts[row["job_id"]]:
                continue
            # A hole is where a delta stands, which is not stored: the rest comes with the end.
            if row["start"] <= stream.length and self._relay.is_far(stream):
                for piece in pieces_after([Piece(row["start"], row["text"], None)], stream.length):
                    stream.push(piece.text)


def rest_of(stream: JobStream, outcome: Outcome) -> list[Piece]:
    """What an answer has that its stream has not. Pure."""
    rest = []
    said = stream.text()
    text = answer_text(outcome)
    if len(text) > len(said):
        rest.append(Piece(stream.length, text[len(said) :], None))
    calls = _unsaid_calls(stream, answer_calls(outcome))
    if calls:
        start = rest[-1].end if rest else stream.length
        rest.append(Piece(start, "", {"tool_calls": calls}))
    return rest


def _unsaid_calls(stream: JobStream, calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    said: dict[int, str] = {}
    for delta in stream.all_deltas():
        for call in delta.get("tool_calls") or ():
            index = call.get("index", 0)
            arguments = (call.get("function") or {}).get("arguments") or ""
            said[index] = said.get(index, "") + arguments
    unsaid = []
    for call in calls:
        had = said.get(call["index"])
        if had is None:
            unsaid.append(call)
            continue
        arguments = ((call.get("function") or {}).get("arguments") or "")[len(had) :]
        if arguments:
            unsaid.append({"index": call["index"], "function": {"arguments": arguments}})
    return unsaid
