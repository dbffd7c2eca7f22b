"""Prepaid keys as requests bring them: looked up many at a time, remembered for a moment.

A key that is revoked here stops at once; one revoked at another router within FRESH_S.
"""

from __future__ import annotations

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

    async def find(self, presented: str) -> Key:
        """The live key that was presented. Raises BadCredential: malformed or unknown."""
        key = accounts.normal_key(presented)
        if key is None:
            raise BadCredential("malformed")
        hashed = accounts.hash_secret(key)
        known = self._seen.get(hashed)
        if known is not None and time.monotonic() - known[0] < FRESH_S:
            return known[1]
        async with self._database.connection() as connection:
            found = await accounts.find_keys(connection, [hashed])
        if hashed not in found:
            self._seen.pop(hashed, None)
            raise BadCredential("unknown")
        if len(self._seen) >= _MOST:
            self._seen.clear()
        self._seen[hashed] = (time.monotonic(), found[hashed])
        return found[hashed]

    def forget(self) -> None:
        """Some key has changed: look again."""
        self._seen.clear()
