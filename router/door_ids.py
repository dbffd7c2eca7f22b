"""The ids that polling doors hand out (Kobold, AI Horde, GridRepublic): whoever has one may open,
cancel and raise the jobs that it names.

Clients of these dialects bring nothing but the id, in the path, so the id is the secret: 122 bits or
more that nobody can compute from a job's own id. The table has its hash, with the quote whose jobs it
opens (or the one of them that it names). Logs, receipts and metrics carry the job's own id. The same
purchase has the same id at the same door however often it is asked for, so a client that repeats a
request after a lost answer finds what it bought.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from typing import Any

from billing.accounts import hash_secret
from router.database import Database

# The texts of a job are wiped long before; its money stays in the books without the id.
KEPT = timedelta(days=3)

_IDS = re.compile(r"[0-9a-fA-F]{32}\Z|[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\Z")


class Door(StrEnum):
    """Where ids are handed out."""

    KOBOLD = "kobold"
    HORDE = "horde"
    GRIDREPUBLIC = "gridrepublic"


@dataclass(frozen=True, slots=True)
class Named:
    """What an id opens: all jobs of a quote, or with `job_index` one of them."""

    door: Door
    quote_id: str
    job_index: int | None


class DoorIds:
    """Issues ids and finds what they open."""

    def __init__(self, database: Database, *, secret: bytes) -> None:
        self._database = database
        self._secret = secret

    async def issue(
        self,
        door: Door,
        quote_id: str,
        *,
        indexes: Sequence[int | None],
        shown_as: str | None = None,
    ) -> list[str]:
        """An id for each of `indexes` (None: all jobs of the quote), 32 hex digits each.

        `shown_as`: the client's public name. Twice is harmless: the ids are the same.
        """
        ids = [self._id(door, quote_id, index) for index in indexes]
        async with self._database.connection() as connection:
            await connection.execute(
                "insert into door_ids (id_hash, door, quote_id, job_index, shown_as)"
                " select h, $2, $3, i, $5 from unnest($1::bytea[], $4::int[]) t(h, i)"
                " on conflict do nothing",
                [hash_secret(door_id) for door_id in ids],
                door.value,
                quote_id,
                list(indexes),
                shown_as,
            )
        return ids

    def _id(self, door: Door, quote_id: str, index: int | None) -> str:
        text = f"{door}:{quote_id}:{'' if index is None else index}"
        digest = hmac.new(self._secret, text.encode(), hashlib.sha256).digest()
        # Spelt as a random UUID (version 4): clients of Kobold and Horde take it for one.
        return uuid.UUID(bytes=digest[:16], version=4).hex

    async def find(self, presented: str, door: Door | None = None) -> Named | None:
        """What this id opens (at one door); None for one that was never handed out, or long ago."""
        normal = normal_id(presented)
        if normal is None:
            return None
        async with self._database.connection() as connection:
            row = await connection.fetchrow(
                "select door, quote_id, job_index from door_ids where id_hash = $1",
                hash_secret(normal),
            )
        if row is None or (door is not None and row["door"] != door):
            return None
        return Named(Door(row["door"]), row["quote_id"], row["job_index"])

    async def jobs(self, presented: str, door: Door | None = None) -> list[Any]:
        """The rows of the jobs that this id opens, in the order of the request; [] for no such id."""
        named = await self.find(presented, door)
        if named is None:
            return []
        async with self._database.connection() as connection:
            return await connection.fetch(
                "select * from jobs where quote_id = $1 and ($2::int is null or index = $2)"
                " order by index",
                named.quote_id,
                named.job_index,
            )

    async def jobs_of_each(self, presented: Sequence[str], door: Door) -> dict[str, list[Any]]:
        """The same for many ids at one door, in one look; without those that open nothing."""
        hashes = {i: hash_secret(normal) for i in presented if (normal := normal_id(i)) is not None}
        if not hashes:
            return {}
        async with self._database.connection() as connection:
            rows = await connection.fetch(
                "select d.id_hash, j.* from door_ids d join jobs j on j.quote_id = d.quote_id"
                " and (d.job_index is null or j.index = d.job_index)"
                " where d.id_hash = any($1::bytea[]) and d.door = $2 order by j.index",
                list(hashes.values()),
                door.value,
            )
        found = {i: [row for row in rows if row["id_hash"] == named] for i, named in hashes.items()}
        return {i: opened for i, opened in found.items() if opened}


def normal_id(presented: str) -> str | None:
    """What may be an id, as 32 hex digits; None for what is none."""
    return presented.replace("-", "").lower() if _IDS.match(presented) else None


def as_uuid(door_id: str) -> str:
    """An id as text with dashes, which is how Kobold and Horde spell theirs."""
    return str(uuid.UUID(hex=door_id))


_USE = """
select d.shown_as, sum(j.prompt_tokens) as tokens
from door_ids d join jobs j on j.quote_id = d.quote_id and j.state = 'succeeded'
where d.shown_as is not null group by 1"""

_FORGET = """
with gone as (delete from door_ids where created_at < $1 returning quote_id, shown_as)
insert into named_use (name, tokens)
select g.shown_as, sum(j.prompt_tokens) from gone g
join jobs j on j.quote_id = g.quote_id and j.state = 'succeeded'
where g.shown_as is not null group by 1
on conflict (name) do update set tokens = named_use.tokens + excluded.tokens"""


async def use_by_name(connection: Any) -> dict[str, int]:
    """Prompt tokens of the answers that were given, by the public name of who asked (KC-10)."""
    use: dict[str, int] = {}
    for row in await connection.fetch(
        f"select name, tokens from named_use union all ({_USE}) order by 1"
    ):
        use[row["name"]] = use.get(row["name"], 0) + int(row["tokens"])
    return use


async def forget_old(connection: Any, *, now: Any) -> None:
    """Delete the ids of jobs that ended long ago; what was used by name stays counted."""
    await connection.execute(_FORGET, now - KEPT)
