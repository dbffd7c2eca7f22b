"""Waiting for jobs on behalf of an HTTP client that may go away meanwhile."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from fastapi import Request

from router import following
from router.api.leaving import ClientGone, UnlessGone
from router.api.purchase import Purchase
from router.core import Core
from router.job_views import Outcome

log = logging.getLogger(__name__)

_background: set[asyncio.Task] = set()


async def outcomes(core: Core, request: Request, purchase: Purchase) -> list[Outcome]:
    """How all jobs of a purchase ended. A client that goes takes them along, if that is the deal."""
    try:
        with UnlessGone(request.scope, request.receive):
            if len(purchase.job_ids) == 1:
                return [await following.outcome(core.jobs, purchase.job_ids[0])]
            return await asyncio.gather(
                *(following.outcome(core.jobs, job) for job in purchase.job_ids)
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
