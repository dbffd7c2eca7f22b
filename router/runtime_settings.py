"""Settings that an admin may change while the router runs; they outrank the environment.

Kept in the table `settings`, one row each, so that all routers share them. A change made here counts
at once, one made at another router within REFRESH_S.
"""

from __future__ import annotations

import json
import time
from typing import Any

from router.errors import BadRequest
from router.settings import Settings

REFRESH_S = 2.0

# name -> (lowest, highest); all are whole numbers.
BOUNDS: dict[str, tuple[int, int]] = {
    "commission_ppm": (0, 1_000_000),
    "payout_threshold_msat": (1000, 10**15),
    "payout_interval_s": (1, 365 * 86_400),
    "check_every_s": (0, 30 * 86_400),
    "check_budget_msat": (0, 10**15),
    "failed_checks_hold_s": (0, 365 * 86_400),
    "default_max_tokens": (1, 10_000_000),
    "default_max_wait_s": (1, 30 * 86_400),
    "quote_ttl_s": (10, 86_400),
    "wipe_after_s": (1, 30 * 86_400),
    "invoices_per_minute": (1, 1_000_000),
    "jobs_per_minute": (1, 1_000_000),
}
_PAUSED = "paused"


class RuntimeSettings:
    """Writes changed values into the settings that the whole process reads.

    `paused` is the operator's message while no new quotes are made.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._changed: dict[str, Any] = {}
        self._read_at = 0.0

    @property
    def paused(self) -> str | None:
        return self._changed.get(_PAUSED)

    def as_json(self) -> dict[str, int]:
        return {name: getattr(self._settings, name) for name in BOUNDS}

    async def load(self, connection: Any) -> None:
        """Read what admins have changed."""
        rows = await connection.fetch("select key, value from settings")
        self._changed = {row["key"]: json.loads(row["value"]) for row in rows}
        self._apply()
        self._read_at = time.monotonic()

    @property
    def is_old(self) -> bool:
        return time.monotonic() - self._read_at > REFRESH_S

    async def change(self, connection: Any, changes: dict[str, Any]) -> None:
        """Store changed values. Raises BadRequest, naming the one at fault, with nothing changed."""
        for name, value in changes.items():
            if name not in BOUNDS:
                raise BadRequest(
                    f"there is no setting {name!r}; there are: {', '.join(sorted(BOUNDS))}",
                    param=name,
                )
            low, high = BOUNDS[name]
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise BadRequest(f"{name} must be a whole number from {low} to {high}", param=name)
        for name, value in changes.items():
            await self._store(connection, name, value)
        await self.load(connection)

    async def pause(self, connection: Any, message: str | None) -> None:
        """Stop making quotes, with a message for clients; None goes on."""
        if message is None:
            await connection.execute("delete from settings where key = $1", _PAUSED)
        else:
            await self._store(connection, _PAUSED, message)
        await self.load(connection)

    async def _store(self, connection: Any, name: str, value: Any) -> None:
        await connection.execute(
            "insert into settings (key, value) values ($1, $2)"
            " on conflict (key) do update set value = excluded.value",
            name,
            json.dumps(value),
        )

    def _apply(self) -> None:
        """Let the settings object of this process follow, for all who hold it."""
        for name in BOUNDS:
            if name in self._changed:
                setattr(self._settings, name, self._changed[name])
