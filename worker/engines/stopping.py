"""Waiting for something that a cancelled job must not wait for any longer."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from worker.engines import Sink

T = TypeVar("T")


async def unless_cancelled(sink: Sink, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`; None when the job was cancelled first, and `work` has been stopped.

    What `work` raises is raised here. `work` is a task of its own, so that stopping it closes its
    connection by its own `finally` and `async with`, and this coroutine goes on.
    """
    task = asyncio.ensure_future(work)
    sink.on_cancel(task.cancel)
    try:
        return await task
    except asyncio.CancelledError:
        # Two things look alike: the job was cancelled (go on), or this coroutine was (pass it on).
        if sink.cancelled and task.cancelled() and not _being_cancelled():
            return None
        raise
    finally:
        if not task.done():
            task.cancel()


def _being_cancelled() -> bool:
    current = asyncio.current_task()
    return current is not None and current.cancelling() > 0
