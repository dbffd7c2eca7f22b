"""Streaming answers of the OpenAI door: one or several jobs as chunks of one response."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from router import following, requests
from router.api import openai_shapes as shapes
from router.api import sse
from router.api.errors import Problem, problem_of
from router.api.purchase import Purchase
from router.api.short_ways import ClientLine
from router.api.waiting import abandon
from router.core import Core
from router.database import DatabaseUnavailable
from router.errors import AnswerLost, RouterError
from router.following import Event
from router.job_states import State
from router.job_stream import JobStream, Piece
from router.job_views import Outcome, answer_calls, answer_text
from router.results import answer_id

# How long a stream waits for its first output before the headers go out: what fails at once is then
# still an HTTP error, and what waits longer keeps its line open with comments.
FIRST_OUTPUT_S = 1.0
DONE = b"data: [DONE]\n\n"

Told = tuple[int, Sequence[Event | None]]


class AnswerStream:
    """The jobs of a purchase as one stream of chunks."""

    def __init__(
        self,
        core: Core,
        wanted: requests.Request,
        bought: Purchase,
        direct: ClientLine | None = None,
    ) -> None:
        self._core = core
        self._wanted = wanted
        self._bought = bought
        self._direct = direct
        self._kept: list[JobStream] = []

    async def first_output(self) -> Problem | None:
        """Wait a moment for output; the error of a job that ends without any is returned.

        Several jobs are not waited for: what happens to one of them is not the answer's error.
        Raises NoSuchJob, JobWiped, AnswerDelayed.
        """
        jobs, job_ids = self._core.jobs, self._bought.job_ids
        for job_id in job_ids:
            found = await following.find(jobs, job_id)
            if isinstance(found, JobStream):
                self._kept.append(following.keep(found))
            elif len(job_ids) == 1:
                return self._failed(found)
        if len(job_ids) > 1:
            return None
        stream = self._kept[0]
        await following.until_output(jobs, stream, within_s=FIRST_OUTPUT_S)
        if stream.pieces or stream.outcome is None:
            return None
        return self._failed(stream.outcome)

    def _failed(self, outcome: Outcome) -> Problem | None:
        said = answer_text(outcome) or answer_calls(outcome)
        if outcome.state is State.SUCCEEDED or said:
            return None
        return shapes.job_problem(outcome, self._bought.job_ids[0])

    async def close(self) -> None:
        """Let go of the jobs. Twice is harmless."""
        kept, self._kept = self._kept, []
        for stream in kept:
            following.leave(self._core.jobs, stream)

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The body of the answer; what is said at one moment goes out together."""
        try:
            writer = _Writer(self._wanted, self._bought)
            async with aclosing(self._told(writer)) as all_of_them:
                async for index, events in all_of_them:
                    if said := writer.write(index, events):
                        yield said
        except AnswerLost as error:
            yield sse.data(shapes.error_body(problem_of(error)))
            # Whoever cannot come back for the new answer does not pay for it.
            abandon(self._core, self._bought)
        except (RouterError, DatabaseUnavailable) as error:
            # The headers have gone out: it can only be said in the stream, which has no `[DONE]`.
            yield sse.data(shapes.error_body(problem_of(error)))
        finally:
            await self.close()

    def _told(self, writer: _Writer) -> AsyncGenerator[Told, None]:
        core, job_ids = self._core, self._bought.job_ids
        if len(job_ids) != 1:
            return _several(core, job_ids)
        return _one(core, job_ids[0], _Wire(self._direct, writer) if self._direct else None)


class _Wire:
    """A reader's way straight to the client's connection, for an answer of one job."""

    def __init__(self, direct: ClientLine, writer: _Writer) -> None:
        self._direct = direct
        self._writer = writer
        self.ready = direct.ready

    def write(self, pieces: Sequence[Piece]) -> None:
        self._direct.write(self._writer.output(0, pieces))


class _Writer:
    """Turns events into chunks, and remembers what the last ones must say."""

    def __init__(self, wanted: requests.Request, bought: Purchase) -> None:
        self._include_usage = wanted.include_usage
        self._echoes = [shapes.echoed(item.spec) if wanted.echo else "" for item in wanted.items]
        self._job_ids = bought.job_ids
        self._begun: set[int] = set()
        self._attempts: dict[int, int] = {}
        self._ended: dict[int, Outcome] = {}
        created_s = int(time.time())
        self._choices = [
            shapes.ChunkShape(
                wanted.kind,
                answer_id=answer_id(wanted.kind, bought.job_ids[0]),
                model=item.spec.model,
                created_s=created_s,
                index=index,
            )
            for index, item in enumerate(wanted.items)
        ]

    def write(self, index: int, events: Sequence[Event | None]) -> bytes:
        """What events of a job add to the body; with the last job's end, the closing."""
        said = []
        for event in events:
            said += self._said(index, event)
        ends = events[-1] is not None and events[-1].outcome is not None
        if ends and len(self._ended) == len(self._job_ids):
            return sse.Last(b"".join([*said, *self._closing()]))
        return b"".join(said)

    def output(self, index: int, pieces: Sequence[Piece]) -> bytes:
        """What output of a job adds to the body."""
        choice = self._choices[index]
        said = [choice.delta(p.delta) if p.delta else choice.text(p.text) for p in pieces]
        return b"".join([*self._opening(index), *said])

    def _said(self, index: int, event: Event | None) -> list[bytes]:
        if event is None:
            return [sse.comment("waiting")]
        if event.kind == "position":
            return [sse.comment(f"position {event.data['position']}")]
        if event.kind == "chunk":
            data = event.data
            piece = Piece(0, data.get("text", ""), data.get("delta"))
            return [self.output(index, (piece,))]
        if event.kind == "state":
            self._same_attempt(index, event.data["attempt"])
        if event.outcome is not None:
            self._ended[index] = event.outcome
            return self._ending(index, event.outcome)
        return []

    def _same_attempt(self, index: int, attempt: int) -> None:
        """Raises AnswerLost where more would be a mixture of two answers.

        A job that has shown output is not given to another worker, unless the router that ran it
        died before it could write down that it was shown.
        """
        if index in self._begun and attempt != self._attempts.get(index, attempt):
            raise AnswerLost(
                "the worker was lost in the middle of the answer, which is being made anew",
                job=self._job_ids[index],
            )
        self._attempts[index] = attempt

    def _opening(self, index: int) -> list[bytes]:
        if index in self._begun:
            return []
        self._begun.add(index)
        choice, echo = self._choices[index], self._echoes[index]
        return [choice.text(echo) if echo else choice.first()]

    def _ending(self, index: int, outcome: Outcome) -> list[bytes]:
        choice = self._choices[index]
        if not shapes.answered(outcome):
            if len(self._job_ids) == 1:
                problem = shapes.job_problem(outcome, self._job_ids[index])
                return [sse.data(shapes.error_body(problem))]
            usage = shapes.failed_usage(outcome, self._job_ids[index])
            return [*self._opening(index), choice.last("error", usage)]
        assert outcome.result is not None
        reason = outcome.result["choices"][0]["finish_reason"]
        return [*self._opening(index), choice.last(reason, outcome.usage)]

    def _closing(self) -> list[bytes]:
        """`[DONE]` says that every answer is whole in the database; errors end without it."""
        jobs = [(job_id, self._ended[i]) for i, job_id in enumerate(self._job_ids)]
        if not any(shapes.answered(outcome) for _, outcome in jobs):
            if len(jobs) == 1:
                return []  # It was said when it happened.
            problem = shapes.job_problem(jobs[0][1], jobs[0][0])
            return [sse.data(shapes.error_body(problem))]
        if not self._include_usage:
            return [DONE]
        only = jobs[0][1].usage if len(jobs) == 1 else None
        return [self._choices[0].usage(only or shapes.total_usage(jobs)), DONE]


async def _one(core: Core, job_id: str, wire: _Wire | None = None) -> AsyncGenerator[Told, None]:
    """The events of a job, as they come, but for output that went over the wire."""
    reader = await following.read(core.jobs, job_id, wire=wire)
    try:
        while not reader.ended:
            yield 0, await reader.next()
    finally:
        reader.close()


async def _several(core: Core, job_ids: tuple[str, ...]) -> AsyncGenerator[Told, None]:
    """The events of several jobs, as they come."""
    queue: asyncio.Queue[Told | Exception | None] = asyncio.Queue()

    async def read(index: int, job_id: str) -> None:
        try:
            async for _, events in _one(core, job_id):
                queue.put_nowait((index, events))
        except Exception as error:
            queue.put_nowait(error)
        queue.put_nowait(None)

    tasks = [asyncio.create_task(read(i, job)) for i, job in enumerate(job_ids)]
    try:
        left = len(tasks)
        while left:
            item = await queue.get()
            if item is None:
                left -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
