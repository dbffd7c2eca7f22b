"""What waits to be sent to the router, in as few frames as order allows.

Engines write many small pieces in one turn of the event loop. They pile up here, and leave together
as one `chunks` frame when the loop comes round, or when the socket has taken the frame before. So a
batched engine costs one frame per step, and a slow line gets fewer and larger frames.
"""

from __future__ import annotations

import asyncio
from typing import Any

from pydantic import BaseModel
from pydantic_core import to_json

from worker.protocol import Ready

Item = list[Any]
"""`[job_id, attempt, seq, text, tokens]`, as `protocol.Chunks` has it."""


class Outbox:
    """Frames in the order in which they were put in, per attempt."""

    def __init__(self) -> None:
        self._closed_frames: list[bytes] = []
        self._open: dict[tuple[str, int], Item] = {}
        self._ready: Ready | None = None
        self._filled = asyncio.Event()
        self._sent = asyncio.Event()
        self._sent.set()

    def add_text(self, job_id: str, attempt: int, seq: int, text: str, tokens: int | None) -> bool:
        """Queue text. False: it was joined to an earlier piece still here, and `seq` is unused."""
        item = self._open.get((job_id, attempt))
        if item is not None:
            item[3] += text
            item[4] = None if item[4] is None or tokens is None else item[4] + tokens
            return False
        self._open[job_id, attempt] = [job_id, attempt, seq, text, tokens]
        self._wake()
        return True

    def add_frame(self, frame: BaseModel) -> None:
        """Queue a whole frame, behind all that is here."""
        self._close_open()
        self._closed_frames.append(to_json(frame, exclude_none=True))
        self._wake()

    def set_ready(self, slots_free: int) -> None:
        """Queue a `ready` behind everything else; of several that wait only the last is sent."""
        self._ready = Ready(slots_free=slots_free)
        self._wake()

    async def take(self) -> list[bytes]:
        """All that waits, encoded; waits until there is something."""
        if not self._filled.is_set():
            self._sent.set()
        await self._filled.wait()
        self._close_open()
        frames, self._closed_frames = self._closed_frames, []
        if self._ready is not None:
            frames.append(to_json(self._ready))
            self._ready = None
        self._filled.clear()
        return frames

    async def all_sent(self) -> None:
        """Returns when everything has been taken, and its taker has come back for more."""
        await self._sent.wait()

    def _wake(self) -> None:
        self._filled.set()
        self._sent.clear()

    def _close_open(self) -> None:
        if self._open:
            # Plain lists and not models: this runs for every token of every job.
            items = list(self._open.values())
            self._closed_frames.append(to_json({"type": "chunks", "items": items}))
            self._open.clear()
