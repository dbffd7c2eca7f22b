"""One attempt at one job, as the worker holds it: where the engine writes, how it is stopped."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel

from worker.engines import Done
from worker.errors import JobError
from worker.outbox import Outbox
from worker.protocol import Assign, Chunk, Failed, FailureCode, Finished

MESSAGE_LENGTH = 2000


class Attempt:
    """A Sink that sends to the router until the attempt has ended, and nothing after."""

    def __init__(self, assign: Assign, outbox: Outbox) -> None:
        self.job_id = assign.job_id
        self.attempt = assign.attempt
        self.tokens = 0
        self.started_at = time.monotonic()
        self._outbox = outbox
        self._seq = 0
        self._said: list[tuple[str, int | None, dict[str, Any] | None]] = []
        self._last_word: BaseModel | None = None
        self._ended = False
        self._cancelled = False
        self._on_cancel: list[Callable[[], object]] = []

    @property
    def key(self) -> tuple[str, int]:
        return self.job_id, self.attempt

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    def write(
        self, text: str, *, tokens: int | None = None, delta: dict[str, Any] | None = None
    ) -> None:
        if self._ended:
            return
        self.tokens += tokens or 0
        self._said.append((text, tokens, delta))
        self._send(text, tokens, delta)

    def _send(self, text: str, tokens: int | None, delta: dict[str, Any] | None) -> None:
        if delta is None:
            self._seq += self._outbox.add_text(self.job_id, self.attempt, self._seq, text, tokens)
            return
        self._outbox.add_frame(
            Chunk(
                job_id=self.job_id,
                attempt=self.attempt,
                seq=self._seq,
                text=text,
                delta=delta,
                tokens=tokens,
            )
        )
        self._seq += 1

    def on_cancel(self, call: Callable[[], object]) -> None:
        if self._cancelled:
            call()
        else:
            self._on_cancel.append(call)

    def cancel(self) -> None:
        """Ask the engine to stop. Twice is harmless."""
        if not self._cancelled:
            self._cancelled = True
            for call in self._on_cancel:
                call()

    def finish(self, done: Done) -> None:
        """Tell the router how it ended. Nothing is said about an attempt that has ended before."""
        self._end(
            Finished(
                job_id=self.job_id,
                attempt=self.attempt,
                finish_reason=done.finish_reason,
                usage=done.usage,
                data=done.data,
                images=done.images,
            )
        )

    def fail(self, error: JobError) -> None:
        """Tell the router that it failed. Nothing is said about one that has ended before."""
        self._end(
            Failed(
                job_id=self.job_id,
                attempt=self.attempt,
                code=error.code,
                message=error.message[:MESSAGE_LENGTH],
                retryable=error.retryable,
            )
        )

    def _end(self, last_word: BaseModel) -> None:
        if not self._ended:
            self._ended = True
            self._last_word = last_word
            self._outbox.add_frame(last_word)

    @property
    def has_last_word(self) -> bool:
        """Whether it has ended in words, and was not abandoned."""
        return self._last_word is not None

    def repeat(self, outbox: Outbox) -> None:
        """Say everything again, to another router or on another line; what follows goes there too."""
        self._outbox = outbox
        self._seq = 0
        for text, tokens, delta in self._said:
            self._send(text, tokens, delta)
        if self._last_word is not None:
            outbox.add_frame(self._last_word)

    def give_back(self) -> None:
        """Return the job to the router, and stop working on it."""
        self.fail(JobError(FailureCode.RETURNED, "the worker shuts down"))
        self.cancel()

    def abandon(self) -> None:
        """Stop without a word: nobody wants it any more."""
        self._ended = True
        self._last_word = None
        self.cancel()
