"""Jobs that hang on another router: to be cancelled at its wish, or because it has died.

A cancel that came to the wrong router is written into the job (`jobs.cancel_reason`) and sent by the
bus. The router that runs the job finds it here too, when the bus has lost it; and when that router
has died, whoever takes the job back does (`router.maintenance`).

A client that takes its jobs along when it goes (§3.5) was connected to one router (`attached_to`).
When that router is lost so is the client, and any router cancels what it left behind.
"""

from __future__ import annotations

from typing import Any

from router.attempts import Attempts
from router.database import Database
from router.job_records import Ending
from router.job_states import Event, State
from router.presence import Presence

_BATCH = 200

_ASKED = """
select id, state, attempt, router_id, cancel_reason as reason from jobs
where cancel_reason is not null and (state = 'running' and router_id = $1 or state = 'queued')
limit $2"""

_ATTACHED_TO = """
select distinct attached_to from jobs
where state in ('queued', 'running') and attached_to is not null and attached_to <> $1"""

_LEFT_BEHIND = """
select id, state, attempt, router_id, 'client_gone' as reason from jobs
where (state = 'queued' or state = 'running' and router_id = $1)
    and attached_to = any($2::text[]) limit $3"""


class Orphans:
    """Steps of `router.maintenance`; several routers may do them at once."""

    def __init__(
        self, database: Database, attempts: Attempts, presence: Presence, *, router_id: str
    ) -> None:
        self._database = database
        self._attempts = attempts
        self._presence = presence
        self._router_id = router_id

    async def cancel_asked(self) -> None:
        """Cancel what another router was asked to cancel and runs here, or waits again."""
        async with self._database.connection() as connection:
            rows = await connection.fetch(_ASKED, self._router_id, _BATCH)
        await self._cancel(rows)

    async def cancel_left_behind(self) -> None:
        """Cancel what waits, or runs here, for clients that were connected to a lost router."""
        async with self._database.connection() as connection:
            at = await connection.fetch(_ATTACHED_TO, self._router_id)
            lost = [row["attached_to"] for row in at if self._presence.is_lost(row["attached_to"])]
            if not lost:
                return
            rows = await connection.fetch(_LEFT_BEHIND, self._router_id, lost, _BATCH)
        await self._cancel(rows)

    async def _cancel(self, rows: list[Any]) -> None:
        for row in rows:
            if row["state"] == State.RUNNING:
                self._attempts.cancel_later(row["id"], row["reason"])
            else:
                await self._attempts.end(
                    Ending(row["id"], Event.CANCEL, row["reason"], attempt=row["attempt"])
                )
