"""Reading what a registered server answers, within bounds, and whether it is well."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson

from router.openai_calls import BadAnswer
from router.workers import Worker

MOST_ANSWER_BYTES = 64 << 20
MOST_LINE_BYTES = 1 << 20
FIRST_REST_S, LONGEST_REST_S = 1.0, 60.0
# How long an answer may go on after it has said that it is done.
END_S = 0.5


async def read_object(response: aiohttp.ClientResponse) -> dict[str, Any]:
    """The whole answer; of an error that is no JSON, nothing. Raises BadAnswer."""
    body = bytearray()
    async for part in response.content.iter_any():
        body += part
        if len(body) > MOST_ANSWER_BYTES:
            raise BadAnswer("an answer without an end")
    try:
        return as_object(bytes(body))
    except BadAnswer:
        if response.status >= 400:
            return {}
        raise


async def read_events(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The data of each event up to `[DONE]`. Raises BadAnswer."""
    rest = b""
    async for part in response.content.iter_any():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            data = line.strip().removeprefix(b"data:").strip()
            if not line.startswith(b"data:") or not data:
                continue
            if data == b"[DONE]":
                await _read_end(response)
                return
            yield data
        if len(rest) > MOST_LINE_BYTES:
            raise BadAnswer("an event without an end")


async def _read_end(response: aiohttp.ClientResponse) -> None:
    """What says that the answer has ended mostly comes in a packet of its own, and a connection on
    which it has not come cannot be kept."""
    with suppress(TimeoutError, aiohttp.ClientError):
        async with asyncio.timeout(END_S):
            while await response.content.readany():
                pass


def as_object(text: bytes) -> dict[str, Any]:
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        raise BadAnswer("no JSON") from None
    if not isinstance(value, dict):
        raise BadAnswer("no object")
    return value


@dataclass(slots=True)
class Health:
    """Whether a server answers. One that has come back is on trial until it has served a job."""

    failures: int = 0
    look_at: float | None = None
    task: asyncio.Task[None] | None = field(default=None, repr=False)

    def fell_ill(self, worker: Worker) -> None:
        rest_s = min(LONGEST_REST_S, FIRST_REST_S * 2 ** min(self.failures, 10))
        self.failures += 1
        self.look_at = time.monotonic() + rest_s
        worker.resting = True

    def is_due(self, now: float) -> bool:
        if self.look_at is None or now < self.look_at:
            return False
        self.look_at = None
        return True

    def may_try(self, worker: Worker) -> None:
        worker.resting = False

    def is_well(self) -> None:
        self.failures = 0
