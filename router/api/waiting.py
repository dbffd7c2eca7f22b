"""Waiting for jobs on behalf of an HTTP client that may go away meanwhile."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Coroutine
from typing import Any, TypeVar

from fastapi import Request

from router import following
from router.api.purchase import Purchase
from router.core import Core
from router.job_views import Outcome

log = logging.getLogger(__name__)

T = TypeVar("T")
_background: set[asyncio.Task] = set()


class ClientGone(Exception):
    """The client has closed its connection; nobody reads the answer."""


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, or ClientGone as soon as the client has gone."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        task.cancel()
        gone.cancel()
        # Else a group of waits would be missed by nobody but the event loop, which complains.
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def outcomes(core: Core, request: Request, purchase: Purchase) -> list[Outcome]:
    """How all jobs of a purchase ended. A client that goes takes them along, if that is the deal."""
    try:
        return await unless_gone(
            request,
            asyncio.gather(*(following.outcome(core.jobs, job) for job in purchase.job_ids)),
        )
    except (ClientGone, asyncio.CancelledError):
        abandon(core, purchase)
        raise


def abandon(core: Core, purchase: Purchase) -> None:
    """The client has gone before the end: cancel what it alone was waiting for.

    Not when it is the router that goes: then the jobs run on, or wait for its next start.
    """
    if purchase.cancel_when_gone and not core.draining:
        for job_id in purchase.job_ids:
            in_background(core.jobs.cancel_surely(job_id, reason="client_gone"))


def in_background(work: Coroutine[Any, Any, Any]) -> None:
    """Run something that must not end with the request that started it."""
    task = asyncio.create_task(work)
    _background.add(task)
    task.add_done_callback(_done)


def _done(task: asyncio.Task) -> None:
    _background.discard(task)
    if not task.cancelled() and task.exception() is not None:
        log.error("work in the background failed", exc_info=task.exception())
