"""Following jobs to their end, over one event stream that may break and is resumed.

`Tracker` makes our events of the server's, drops what was already seen, and knows when all jobs
have ended; it is pure. `follow` reconnects with `Last-Event-ID`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from client.answers import Completion, Job, Purchase
from client.errors import (
    JobNotDone,
    NotQueued,
    RouterRefused,
    SatherdError,
    UnexpectedAnswer,
    Unreachable,
)
from client.events import (
    Ended,
    Event,
    Position,
    Reconnecting,
    Restarted,
    StateChanged,
    Text,
)
from client.exchange import (
    LONGEST_RETRY_AFTER_S,
    Answer,
    Close,
    ConnectionLost,
    Credentialed,
    Emit,
    Flow,
    Open,
    Patience,
    Read,
    Request,
    Wait,
    ask,
    is_worth_repeating,
)
from client.sse import EventParser, ServerEvent

# The router sends a comment every few seconds; a line that is silent for so long is dead.
SILENCE_S = 60.0


class Tracker:
    """The state of a followed stream. `wanted` is how many jobs have to end."""

    def __init__(self, wanted: int, last_id: str = "") -> None:
        self.wanted = wanted
        self.last_id = last_id
        self.texts: dict[str, str] = {}
        self.job_ids: list[str] = []
        self.ended: dict[str, Job] = {}
        self._attempts: dict[str, int] = {}
        self._places: dict[str, int] = {}

    @property
    def finished(self) -> bool:
        return len(self.ended) >= self.wanted

    def take(self, event: ServerEvent) -> Iterator[Event]:
        """Our events for one of the server's; none for one that was seen before or is unknown.

        Raises NotQueued for `late` and `expired`, UnexpectedAnswer for data of another shape.
        """
        try:
            data = event.json()
        except ValueError as error:
            raise UnexpectedAnswer(f"an event `{event.event}` without JSON") from error
        yield from self._read(event.event, data)
        # Only now: an event that could not be read has not been seen.
        self.last_id = event.id or self.last_id

    def _read(self, name: str, data: Mapping[str, Any]) -> Iterator[Event]:
        match name:
            case "state":
                yield from self._read_state(data)
            case "position":
                yield self._read_position(data)
            case "chunk":
                yield from self._read_chunk(data)
            case "done":
                job = Job.from_json(_job_of(data))
                if job.id not in self.ended:
                    self._remember(job.id)
                    self.ended[job.id] = job
                    yield Ended(job)
            case "late" | "expired":
                raise NotQueued(
                    "the payment came too late: it is credited"
                    if name == "late"
                    else "the quote expired before it was paid",
                    code="paid_late" if name == "late" else "quote_expired",
                    facts=data,
                )
            case _:
                pass

    def _read_state(self, data: Mapping[str, Any]) -> Iterator[Event]:
        job_id, attempt = self._job_id(data), int(data.get("attempt") or 0)
        if attempt > self._attempts.get(job_id, 0):
            self._attempts[job_id] = attempt
            if self.texts.pop(job_id, ""):
                yield Restarted(job_id, attempt)
        reason = data.get("reason")
        yield StateChanged(job_id, str(data.get("state", "")), attempt, reason)

    def _read_chunk(self, data: Mapping[str, Any]) -> Iterator[Event]:
        job_id, seq = self._job_id(data), data.get("seq")
        # `seq` grows within a job and is no more than a place elsewhere: other events share it.
        if isinstance(seq, int):
            if seq <= self._places.get(job_id, -1):
                return
            self._places[job_id] = seq
        text = str(data.get("text") or "")
        self.texts[job_id] = self.texts.get(job_id, "") + text
        yield Text(job_id, text, data.get("delta"))

    def _read_position(self, data: Mapping[str, Any]) -> Position:
        wait_s = data.get("wait_s") or {}
        return Position(
            job_id=self._job_id(data),
            position=int(data.get("position") or 0),
            wait_p50_s=wait_s.get("p50"),
            wait_p90_s=wait_s.get("p90"),
            multiplier_to_be_next=data.get("multiplier_to_be_next"),
            servable=bool(data.get("servable", True)),
        )

    def _job_id(self, data: Mapping[str, Any]) -> str:
        job_id = data.get("job")
        if not isinstance(job_id, str):
            raise UnexpectedAnswer("an event that does not name its job")
        self._remember(job_id)
        return job_id

    def _remember(self, job_id: str) -> None:
        if job_id not in self.job_ids:
            self.job_ids.append(job_id)


def follow(
    path: str, credential: Credentialed, tracker: Tracker, *, patience: Patience
) -> Flow[None]:
    """Read the events at `path` until all jobs have ended, however often the line breaks.

    Raises Unreachable after `patience.attempts` failures in a row, without an event between them.
    """
    failures = 0
    while not tracker.finished:
        line = Line(path, credential, tracker)
        problem = yield from line.read()
        if tracker.finished:
            return
        failures = 1 if line.events else failures + 1
        if failures >= patience.attempts:
            raise problem
        wait_s = max(patience.delay_s(failures), line.asked_wait_s)
        yield Emit(Reconnecting(failures, wait_s))
        yield Wait(wait_s)


class Line:
    """One connection to an event stream. `events` counts what it had to say about the jobs."""

    def __init__(self, path: str, credential: Credentialed, tracker: Tracker) -> None:
        self._tracker = tracker
        headers = {"Accept": "text/event-stream", **credential.headers()}
        if tracker.last_id:
            headers["Last-Event-ID"] = tracker.last_id
        self._request = Request("GET", path, None, headers, read_timeout_s=SILENCE_S)
        self._parser = EventParser()
        self.events = 0
        self.asked_wait_s = 0.0

    def read(self) -> Flow[SatherdError]:
        """Emit what comes, until all jobs have ended or the line has; then why it has.

        Raises what trying again would not change.
        """
        try:
            answer = yield Open(self._request)
            if answer.status != 200:
                return self._refused(answer)
            while data := (yield Read()):
                yield from self._take(data)
                if self._tracker.finished:
                    break
        except ConnectionLost as error:
            return Unreachable(f"the event stream was lost: {error}")
        yield Close()
        return Unreachable("the router ended the event stream before the jobs had ended")

    def _take(self, data: bytes) -> Flow[None]:
        for server_event in self._parser.feed(data):
            for event in self._tracker.take(server_event):
                self.events += 1
                yield Emit(event)
        if self._parser.retry_ms is not None:
            self.asked_wait_s = min(self._parser.retry_ms / 1000, LONGEST_RETRY_AFTER_S)

    def _refused(self, answer: Answer) -> RouterRefused:
        refused = answer.refusal()
        # A 402 right after paying: the router has not seen the settlement yet.
        if answer.status != 402 and not is_worth_repeating(answer, repeatable=True):
            raise refused
        self.asked_wait_s = answer.retry_after_s or 0.0
        return refused


def fetch_job(job_id: str, credential: Credentialed, *, patience: Patience) -> Flow[Job]:
    request = Request("GET", f"/jobs/{job_id}", None, credential.headers())
    return Job.from_json((yield from ask(request, patience=patience)))


def collect(purchase: Purchase, tracker: Tracker, *, patience: Patience) -> Flow[Completion]:
    """The ended jobs of a purchase. Raises JobNotDone, naming the first, if none succeeded."""
    jobs: list[Job] = []
    for job in tracker.ended.values():
        if job.state == "succeeded" and job.result is None and not job.raw.get("wiped"):
            # The event said only that it ended.
            job = yield from fetch_job(job.id, purchase.credential, patience=patience)
        jobs.append(job)
    order = {job.id: place for place, job in enumerate(purchase.jobs)}
    jobs.sort(key=lambda job: order.get(job.id, len(order)))
    if not any(job.state == "succeeded" for job in jobs):
        raise _not_done(jobs[0])
    return Completion(purchase, tuple(jobs), dict(tracker.texts))


def _not_done(job: Job) -> JobNotDone:
    reason = job.raw.get("end_reason") or job.raw.get("error") or "no reason given"
    return JobNotDone(
        f"the job ended as {job.state}: {reason}",
        code=f"job_{job.state}",
        facts={"job": dict(job.raw)},
    )


def _job_of(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """The job of a `done` event, which holds it whole or names it beside its facts."""
    job = data.get("job")
    return job if isinstance(job, Mapping) else {**data, "id": job}
