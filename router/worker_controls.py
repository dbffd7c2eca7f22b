"""What an operator or a worker's owner tells a worker to do: take no jobs, come back, go away.

The database has the last word, so that a worker that reconnects is what it was. A worker that
drains is sent no frame: it is simply given nothing, and can be taken back at any moment.
"""

from __future__ import annotations

from typing import Any

from router.core import Core
from router.workers import Worker


async def set_draining(connection: Any, worker_id: str, draining: bool) -> bool | None:
    """Write down whether a worker takes jobs; what it was before, None for an unknown worker."""
    before = await connection.fetchval(
        "select draining from workers where id = $1 for update", worker_id
    )
    if before is not None and before != draining:
        await connection.execute(
            "update workers set draining = $2 where id = $1", worker_id, draining
        )
    return before


def apply_draining(core: Core, worker_id: str, draining: bool) -> None:
    """Let the connected worker follow, after the commit; one that is elsewhere does so there."""
    worker = core.fleet.get(worker_id)
    if worker is None:
        core.relay.tell_changed()
    elif not core.draining:
        worker.told_to_drain = worker.draining = draining
        core.gate.on_idle()


async def follow(core: Core) -> None:
    """Bring the workers connected here in line with what was ordered at another router."""
    async with core.database.connection() as connection:
        rows = await connection.fetch(
            "select w.id, w.draining, w.quality, w.banned_at is not null as banned,"
            " case when p.next_ln_url_at <= $2 then p.next_ln_url else p.ln_url end as ln_url"
            " from workers w left join payees p on p.id = w.id where w.id = any($1::text[])",
            [worker.id for worker in core.fleet.all()],
            core.clock(),
        )
    for row in rows:
        worker = core.fleet.get(row["id"])
        if worker is not None:
            worker.standing.quality = row["quality"]
            paid_at(worker, row["ln_url"])
        if row["banned"]:
            cut_off(core, row["id"], "banned")
        elif worker is not None and worker.told_to_drain != row["draining"]:
            # A worker may also drain of its own accord: that is not for us to undo.
            apply_draining(core, row["id"], row["draining"])


def paid_at(worker: Worker, ln_url: str | None) -> None:
    """Whether a worker is paid for its jobs from now on; for one that polls it is always kept."""
    worker.ln_url, worker.payable = ln_url, ln_url is not None or worker.pulls


def cut_off(core: Core, worker_id: str, reason: str) -> bool:
    """End the connection of a worker; what it held is given back. False when it is not here."""
    session = core.gate.sessions.get(worker_id)
    if session is None:
        return False
    # It stays in the fleet until its socket has closed, and must not be given a job meanwhile.
    session.worker.draining = True
    session.cut(reason)
    return True
