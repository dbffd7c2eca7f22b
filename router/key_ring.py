"""Prepaid keys as requests bring them: looked up once for all who bring one, remembered for a moment.

A key that is revoked here stops at once; one revoked at another router within FRESH_S.
"""

from __future__ import annotations

import asyncio
import time

from billing import accounts
from billing.accounts import Key
from billing.errors import BadCredential
from router.database import Database

FRESH_S = 1.0
_MOST = 10_000


class KeyRing:
    """The keys that were presented lately."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._seen: dict[bytes, tuple[float, Key]] = {}
        self._looking: dict[bytes, asyncio.Task[Key | None]] = {}

    async def find(self, presented: str) -> Key:
        """The live key that was presented. Raises BadCredential: malformed or unknown."""
        key = accounts.normal_key(presented)
        if key is None:
            raise BadCredential("malformed")
        hashed = accounts.hash_secret(key)
        known = self._seen.get(hashed)
        if known is not None and time.monotonic() - known[0] < FRESH_S:
            return known[1]
        looking = self._looking.get(hashed)
        if looking is None:
            looking = self._looking[hashed] = asyncio.create_task(self._look(hashed))
            looking.add_done_callback(lambda done: self._looked(hashed, done))
        # Whoever goes away meanwhile leaves it to the others.
        found = await asyncio.shield(looking)
        if found is None:
            raise BadCredential("unknown")
        return found

    async def _look(self, hashed: bytes) -> Key | None:
        asked_at = time.monotonic()
        async with self._database.connection() as connection:
            found = (await accounts.find_keys(connection, [hashed])).get(hashed)
        if self._looking.get(hashed) is asyncio.current_task():
            if found is None:
                self._seen.pop(hashed, None)
            else:
                if len(self._seen) >= _MOST:
                    self._seen.clear()
                self._seen[hashed] = (asked_at, found)
        return found

    def _looked(self, hashed: bytes, looking: asyncio.Task[Key | None]) -> None:
        if self._looking.get(hashed) is looking:
            del self._looking[hashed]
        if not looking.cancelled():
            # It is marked as seen: all who asked may have gone.
            looking.exception()

    def forget(self) -> None:
        """Some key has changed: look again."""
        self._seen.clear()
        self._looking.clear()
