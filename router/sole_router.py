"""One process at a time is the router of an id: two would take each other's jobs back, mid-stream.

The id lies in the data folder, and folders are copied: a machine is cloned, a volume restored. Where
the id's router was at work a moment ago in another place, this waits until its row in `routers` moves,
and then it lives and we are the copy, or has not moved for STALE_S, and then it is gone.
"""

from __future__ import annotations

import asyncio
import logging

from router.database import Database
from router.presence import STALE_S

log = logging.getLogger(__name__)

LOOK_S = 0.5

_ROW = """
select place, seen_at, extract(epoch from clock_timestamp() - seen_at)::float8 as age_s
from routers where id = $1"""


class IdTaken(Exception):
    """Another process, in another data folder, is the router of this id."""


async def wait_until_alone(database: Database, router_id: str, place: str) -> None:
    """Returns once no other process is this router. Raises IdTaken, and DatabaseUnavailable."""
    seen_at = None
    while True:
        async with database.connection() as connection:
            row = await connection.fetchrow(_ROW, router_id)
        if row is None or row["place"] in (None, place) or row["age_s"] >= STALE_S:
            return
        if seen_at is None:
            seen_at = row["seen_at"]
            log.info(
                "this router's id was in use elsewhere a moment ago: waiting for a sign of life"
            )
        if row["seen_at"] != seen_at:
            raise IdTaken
        await asyncio.sleep(LOOK_S)
