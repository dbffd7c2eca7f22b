"""What the llama.cpp engine's thread does all day: take jobs in, step, deliver."""

from __future__ import annotations

import asyncio
import math
import queue
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from worker.engines import Done, Sink
from worker.engines.llama_decoder import Answer, DecodeError, Decoder
from worker.engines.llama_embedder import Embedder
from worker.engines.llama_prompt import Prompt
from worker.errors import JobError
from worker.protocol import FailureCode, FinishReason, Usage

ALL = sys.maxsize
# No reader sees the difference, and a fast model makes ten tokens in it.
TELL_EVERY_S = 0.004


@dataclass(slots=True, eq=False)
class Work:
    """A job on its way: a prompt to answer, or texts to embed. `ended` is the event loop's."""

    sink: Sink
    ended: asyncio.Future[Done]
    prompt_tokens: int
    prompt: Prompt | None = None
    texts: list[list[int]] = field(default_factory=list)
    vectors: list[list[float]] = field(default_factory=list)
    begun: bool = False

    def usage(self, made: int = 0) -> Usage:
        return Usage(prompt_tokens=self.prompt_tokens, completion_tokens=made)


@dataclass(frozen=True, slots=True)
class Delivery:
    """What one step brings to one job: text, and perhaps its end."""

    work: Work
    text: str = ""
    tokens: int = 0
    end: Done | JobError | None = None
    first: bool = False

    @property
    def urgent(self) -> bool:
        return self.first or self.end is not None


class Computer:
    """Belongs to one thread, apart from `put` and `stop`, which any may call."""

    def __init__(
        self,
        decoder: Decoder | None,
        make_embedder: Callable[[], Embedder],
        deliver: Callable[[list[Delivery]], None],
    ) -> None:
        """`deliver` is called in this thread, when there is something new to tell.

        `decoder` None: embeddings only.
        """
        self._decoder = decoder
        self._make_embedder = make_embedder
        self._deliver = deliver
        self._inbox: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._waiting: deque[Work] = deque()
        self._embedding: deque[Work] = deque()
        self._writing: dict[Answer, Work] = {}
        self._embedder: Embedder | None = None

    def put(self, work: Work) -> None:
        self._inbox.put(work)

    def stop(self) -> None:
        """`run` returns after the step that it is in."""
        self._inbox.put(None)

    def run(self) -> None:
        """Work until stopped. What is unfinished then is not told."""
        kept: list[Delivery] = []
        told_at = -math.inf
        while self._take_in():
            kept += self._start_waiting() + self._step() + self._embed()
            # Waking the event loop costs as much as a fifth of a small model's step. Beginnings and
            # endings do not wait.
            now = time.monotonic()
            if kept and (now - told_at >= TELL_EVERY_S or any(d.urgent for d in kept)):
                self._deliver(kept)
                kept, told_at = [], now

    def close(self) -> None:
        """Free the contexts."""
        if self._decoder is not None:
            self._decoder.close()
        if self._embedder is not None:
            self._embedder.close()

    def _take_in(self) -> bool:
        """Empty the inbox; wait at it when there is nothing else to do. False: stop."""
        idle = not (self._writing or self._waiting or self._embedding)
        while idle or not self._inbox.empty():
            work = self._inbox.get()
            if work is None:
                return False
            (self._waiting if work.prompt else self._embedding).append(work)
            idle = False
        return True

    def _start_waiting(self) -> list[Delivery]:
        deliveries: list[Delivery] = []
        while self._waiting and (self._decoder is None or self._decoder.has_room):
            work = self._waiting.popleft()
            prompt = work.prompt
            if self._decoder is None or prompt is None:
                error = JobError(FailureCode.MODEL_NOT_SERVED, "this model only embeds")
                deliveries.append(Delivery(work, end=error))
                continue
            if work.sink.cancelled:
                deliveries.append(Delivery(work, end=Done(FinishReason.CANCELLED, work.usage())))
                continue
            try:
                answer = self._decoder.add(
                    prompt.tokens,
                    prompt.plan,
                    max_tokens=prompt.max_tokens,
                    stops=prompt.stops,
                    sink=work.sink,
                )
            except JobError as error:
                deliveries.append(Delivery(work, end=error))
                continue
            self._writing[answer] = work
        return deliveries

    def _step(self) -> list[Delivery]:
        if self._decoder is None or not self._writing:
            return []
        try:
            outputs = self._decoder.step()
        except DecodeError as error:
            lost = list(self._writing.values())
            self._writing.clear()
            failure = JobError(FailureCode.ENGINE_ERROR, str(error))
            return [Delivery(work, end=failure) for work in lost]
        deliveries: list[Delivery] = []
        for output in outputs:
            if output.ending is None:
                work = self._writing[output.answer]
                first = not work.begun
                work.begun = True
                deliveries.append(Delivery(work, output.text, output.tokens, first=first))
            else:
                work = self._writing.pop(output.answer)
                done = Done(output.ending, work.usage(output.answer.made))
                deliveries.append(Delivery(work, output.text, output.tokens, done))
        return deliveries

    def _embed(self) -> list[Delivery]:
        """One batch of one job's texts, so that answers wait for one batch at most."""
        if not self._embedding:
            return []
        work = self._embedding[0]
        try:
            if work.sink.cancelled:
                end: Done | JobError = Done(FinishReason.CANCELLED, work.usage())
            else:
                if self._embedder is None:
                    self._embedder = self._make_embedder()
                rest = work.texts[len(work.vectors) :]
                room = self._decoder.side_room if self._decoder else ALL
                work.vectors += self._embedder.embed(rest[: self._embedder.take(rest, room=room)])
                if len(work.vectors) < len(work.texts):
                    return []
                end = Done(FinishReason.STOP, work.usage(), work.vectors)
        except JobError as error:
            end = error
        self._embedding.popleft()
        return [Delivery(work, end=end)]
