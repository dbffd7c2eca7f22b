"""A circuit breaker per domain: one broken server must not be asked for each of its payees.

closed ── 5 temporary failures in a row ──▶ open ── its time is over ──▶ one may try
   ▲                                         ▲ └──────── it failed: twice as long ─┘
   └────────────── it answered ──────────────┴──────────────────────────┘
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

OPENS_AFTER = 5
SHORTEST = timedelta(minutes=5)
LONGEST = timedelta(hours=1)

# Failures of the server, not of one of its payees.
TEMPORARY = frozenset({"unreachable", "busy", "bad_answer"})


@dataclass(slots=True)
class _Domain:
    failures: int = 0
    open_for: timedelta = SHORTEST
    open_until: datetime | None = None


class DomainBreaker:
    """What this process has seen of the domains it asks. A restart forgets it, and asks again."""

    def __init__(self) -> None:
        self._domains: dict[str, _Domain] = {}

    def closed_at(self, host: str, now: datetime) -> datetime | None:
        """When `host` may be asked again; None: now.

        Whoever is told "now" after an outage is the one that tries, and must report how it went.
        """
        domain = self._domains.get(host)
        if domain is None or domain.open_until is None:
            return None
        # Further away than the longest outage: the clock has been set back.
        if now < domain.open_until <= now + LONGEST:
            return domain.open_until
        domain.open_until = now + SHORTEST
        return None

    def note(self, host: str, failure_code: str | None, now: datetime) -> None:
        """How a request to `host` went. A payee's own mistake is an answer of its server."""
        if failure_code not in TEMPORARY:
            self._domains.pop(host, None)
            return
        domain = self._domains.setdefault(host, _Domain())
        domain.failures += 1
        if domain.failures < OPENS_AFTER:
            return
        if domain.failures > OPENS_AFTER:
            domain.open_for = min(domain.open_for * 2, LONGEST)
        domain.open_until = now + domain.open_for
