"""One event stream for a quote: its payment, then all its jobs.

The SSE id is the reader's place in each job, joined by `-` in the order of the request, so that
`Last-Event-ID` resumes over the whole stream.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

from router import following
from router.api import sse
from router.api.errors import problem_of
from router.core import Core
from router.database import DatabaseUnavailable
from router.errors import RouterError
from router.quotes import StoredQuote

POLL_S = 1.0
COMMENT_EVERY = 10


async def quote_events(
    core: Core,
    stored: StoredQuote,
    *,
    is_mine: Callable[[StoredQuote], Awaitable[bool]],
    last_event_id: str | None,
) -> AsyncGenerator[bytes, None]:
    """`paid`, `late` or `expired` of the quote; then, to its payer, the events of its jobs; `error`
    when it cannot go on, and the reader may resume.

    Before the payment nobody is the payer yet: whoever knows the quote's id follows its payment.
    Once it is there, `is_mine` says whether this reader came with the credential or the claim token
    that it has made good; other readers are told no more.
    """
    try:
        async for chunk in _events(core, stored, is_mine, last_event_id):
            yield chunk
    except (RouterError, DatabaseUnavailable) as error:
        yield sse.event("error", {"quote_id": stored.id, **problem_of(error).as_json()})


async def _events(
    core: Core,
    stored: StoredQuote,
    is_mine: Callable[[StoredQuote], Awaitable[bool]],
    last_event_id: str | None,
) -> AsyncIterator[bytes]:
    turn = 0
    while stored.state == "open":
        if stored.expires_at <= core.clock():
            break
        if turn % COMMENT_EVERY == 0:
            yield sse.comment("waiting for the payment")
        turn += 1
        await asyncio.sleep(POLL_S)
        stored = await core.quotes.get(stored.id)
    state = "expired" if stored.state == "open" else stored.state
    yield sse.event(state, {"quote_id": stored.id})
    if state != "paid" or not await is_mine(stored):
        return
    async for chunk in _jobs(core, stored.id, last_event_id):
        yield chunk


async def _jobs(core: Core, quote_id: str, last_event_id: str | None) -> AsyncIterator[bytes]:
    ids = [row["id"] for row in await core.jobs.of_quote(quote_id)]
    places = _places(last_event_id, len(ids))
    queue: asyncio.Queue[tuple[int, following.Event | None] | Exception | None] = asyncio.Queue()

    async def read(index: int) -> None:
        try:
            async for event in following.follow(
                core.jobs, ids[index], after_seq=places[index], place_at_once=True
            ):
                queue.put_nowait((index, event))
        except (RouterError, DatabaseUnavailable) as error:
            queue.put_nowait(error)
        finally:
            queue.put_nowait(None)

    tasks = [asyncio.create_task(read(index)) for index in range(len(ids))]
    left = len(tasks)
    try:
        while left:
            told = await queue.get()
            if told is None:
                left -= 1
                continue
            if isinstance(told, Exception):
                raise told
            index, event = told
            if event is None:
                yield sse.comment("waiting")
                continue
            places[index] = event.seq
            data: dict[str, Any] = {"job": ids[index], "seq": event.seq, **event.data}
            if event.outcome is not None:
                data["job"] = await core.jobs.view(await core.jobs.row(ids[index]))
            yield sse.event(event.kind, data, "-".join(map(str, places)))
    finally:
        for task in tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)


def _places(last_event_id: str | None, jobs: int) -> list[int]:
    parts = (last_event_id or "").split("-")
    if len(parts) != jobs or not all(part.isdigit() and len(part) < 19 for part in parts):
        return [0] * jobs
    return [int(part) for part in parts]
