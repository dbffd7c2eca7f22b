"""Workers that poll, and who owns them: a name, and the secret that its first pop brought.

At the Horde door the secret is the `apikey`, at the Kobold door the password (KC-5, AH-9). Only hashes
are stored. An apikey is long and random, so its hash needs no stretching, and finds all workers of its
owner; a password may be short, so it is stretched, with the name as its salt.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from billing.accounts import normal_key
from billing.errors import BadCredential
from router.database import Database
from router.door_ids import Door

# Shorter ones could be guessed. `0000000000`, which stands for no key, is one of them.
SHORTEST_KEY, LONGEST_KEY = 20, 200
# Between a password that is remembered and one that is looked up again lies this much work.
_SCRYPT: dict[str, int] = {"n": 2**14, "r": 8, "p": 1}
_MOST_REMEMBERED = 10_000


def owner_of_key(apikey: str) -> bytes:
    """The hash of an apikey; a prepaid key has one, however it is spelt. Raises BadCredential."""
    key = normal_key(apikey) or apikey.strip()
    if not SHORTEST_KEY <= len(key) <= LONGEST_KEY:
        raise BadCredential("malformed")
    return hashlib.sha256(b"satherd-owner\0" + key.encode()).digest()


class Passwords:
    """Stretched hashes of passwords, remembered in this process: a worker shows its own often."""

    def __init__(self) -> None:
        self._seen: dict[bytes, bytes] = {}

    async def owner(
        self, name: str, password: str, *, before_work: Callable[[], None] = lambda: None
    ) -> bytes:
        """`before_work` may raise, for whoever has shown too many that are new here."""
        salt = hashlib.sha256(b"satherd-name\0" + name.encode()).digest()
        quick = hashlib.sha256(salt + password.encode()).digest()
        stretched = self._seen.get(quick)
        if stretched is None:
            before_work()
            stretched = await asyncio.to_thread(
                hashlib.scrypt, password.encode(), salt=salt, dklen=32, **_SCRYPT
            )
            if len(self._seen) >= _MOST_REMEMBERED:
                self._seen.clear()
            self._seen[quick] = stretched
        return stretched


@dataclass(frozen=True, slots=True)
class Named:
    """A worker's name as it is kept."""

    name: str
    door: Door
    worker_id: str
    owner_hash: bytes
    info: str | None
    draining: bool


_NAMED = """
select p.*, w.draining from pull_workers p join workers w on w.id = p.worker_id where """


async def find(database: Database, *, name: str = "", worker_id: str = "") -> Named | None:
    """The worker of this name, or with this id; None when there is none."""
    async with database.connection() as connection:
        row = await connection.fetchrow(_NAMED + "p.name = $1 or p.worker_id = $2", name, worker_id)
    return _named(row) if row else None


async def owned(database: Database, owner_hash: bytes) -> list[Named]:
    """All workers of an owner, by name."""
    async with database.connection() as connection:
        rows = await connection.fetch(_NAMED + "p.owner_hash = $1 order by p.name", owner_hash)
    return [_named(row) for row in rows]


async def has_job(database: Database, worker_id: str) -> bool:
    """Whether a worker has a job now, of any router."""
    async with database.connection() as connection:
        return await connection.fetchval(
            "select exists (select 1 from jobs where state = 'running' and worker_id = $1)",
            worker_id,
        )


async def keep_name(
    connection: Any,
    *,
    name: str,
    door: Door,
    worker_id: str,
    owner_hash: bytes,
    shown_as: str | None,
    agent: str | None,
) -> bool:
    """Give a name to its owner, or note what its owner says now; False: somebody else's it is."""
    kept = await connection.fetchval(
        "insert into pull_workers (name, door, worker_id, owner_hash, shown_as, agent)"
        " values ($1, $2, $3, $4, $5, $6) on conflict (name) do update"
        " set shown_as = excluded.shown_as, agent = excluded.agent"
        " where pull_workers.owner_hash = excluded.owner_hash returning 1",
        name,
        door.value,
        worker_id,
        owner_hash,
        shown_as,
        agent,
    )
    return kept is not None


async def describe(connection: Any, worker_id: str, info: str) -> None:
    """What the owner says of a worker, for the public."""
    await connection.execute(
        "update pull_workers set info = $2 where worker_id = $1", worker_id, info
    )


async def give_up(connection: Any, worker_id: str) -> None:
    """Free a worker's name; its record and what it earned stay with its id."""
    await connection.execute("delete from pull_workers where worker_id = $1", worker_id)


def _named(row: Any) -> Named:
    return Named(
        row["name"],
        Door(row["door"]),
        row["worker_id"],
        row["owner_hash"],
        row["info"],
        row["draining"],
    )
