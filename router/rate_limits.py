"""How often one client address may cause work: invoices, jobs, wrong admin tokens."""

from __future__ import annotations

import ipaddress
import math
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import lru_cache

from starlette.requests import HTTPConnection

from router.errors import TooManyRequests
from router.settings import Settings

MINUTE_S = 60
ADMIN_FAILURES_PER_MINUTE = 10
KEY_FAILURES_PER_MINUTE = 60
ADDRESS_CHECKS_PER_MINUTE = 30
# Texts of quotes that nobody has paid are kept for ten minutes: so many from one address.
UNPAID_UNIT, UNPAID_UNITS_PER_MINUTE = 256 << 10, 512

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(slots=True)
class _Window:
    """What one client did in the minute that runs, and in the one before."""

    minute: int
    count: int = 0
    before: int = 0


class Windows:
    """Counts by name over the last minute, in two numbers a name.

    The minute before is taken to have been even, so a count may be off by as much as it was not;
    a list of times would be exact, and costs most for those who ask most.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._windows: dict[Hashable, _Window] = {}
        self._swept = 0

    def __len__(self) -> int:
        """How many names are remembered."""
        return len(self._windows)

    def hit(self, name: Hashable, per_minute: int) -> float:
        """Count one. Returns 0, or in how many seconds to come back; then it is not counted."""
        minute, second = divmod(self._clock(), MINUTE_S)
        self._sweep(int(minute))
        window = self._windows.get(name)
        if window is None:
            window = self._windows[name] = _Window(int(minute))
        elif window.minute != minute:
            window.before = window.count if window.minute == minute - 1 else 0
            window.minute, window.count = int(minute), 0
        weight = 1 - second / MINUTE_S
        if window.count + window.before * weight + 1 > per_minute:
            return _comes_free_s(window, second, per_minute)
        window.count += 1
        return 0.0

    def _sweep(self, minute: int) -> None:
        """Once a minute, forget those who have been away for two."""
        if minute != self._swept:
            self._swept = minute
            gone = [name for name, w in self._windows.items() if w.minute < minute - 1]
            for name in gone:
                del self._windows[name]


def _comes_free_s(window: _Window, second: float, per_minute: int) -> float:
    """In how many seconds one more fits: the minute before fades, then this one does."""
    room = per_minute - 1 - window.count
    if room >= 0:
        return max(0.001, MINUTE_S * (1 - room / window.before) - second)
    fades_s = MINUTE_S * (1 - max(0, per_minute - 1) / window.count)
    return MINUTE_S - second + fades_s


class RateLimits:
    """Windows of a minute, in this process. Off with `SATHERD_RATE_LIMITS=off`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._windows = Windows()
        self._proxies = parse_networks(settings.trusted_proxies)

    def invoice(self, request: HTTPConnection) -> None:
        """Raises TooManyRequests: this client has had its invoices for now."""
        self._count(request, "invoice", lambda: self._settings.invoices_per_minute)

    def job(self, request: HTTPConnection) -> None:
        """Raises TooManyRequests: this client has had its jobs for now."""
        self._count(request, "job", lambda: self._settings.jobs_per_minute)

    def address_check(self, request: HTTPConnection) -> None:
        """Raises TooManyRequests: this client has had addresses looked up for now."""
        self._count(request, "check-address", lambda: ADDRESS_CHECKS_PER_MINUTE)

    def unpaid(self, request: HTTPConnection, characters: int) -> None:
        """Raises TooManyRequests: this client has had enough kept that it has not paid for."""
        for _ in range(characters // UNPAID_UNIT):
            self._count(request, "unpaid texts", lambda: UNPAID_UNITS_PER_MINUTE)

    def poll(self, request: HTTPConnection, what: str, per_minute: int) -> None:
        """Raises TooManyRequests: this client asks more often than its dialect allows (KC-11)."""
        self._count(request, what, lambda: per_minute)

    def client(self, request: HTTPConnection) -> str:
        """The client's address as it is counted: for IPv6, its network."""
        return client_address(request, self._proxies)

    def failed(self, request: HTTPConnection, what: str, per_minute: int) -> None:
        """Count a wrong secret. Raises TooManyRequests once there were too many."""
        self._count(request, what, lambda: per_minute)

    def _count(self, request: HTTPConnection, what: str, per_minute: Callable[[], int]) -> None:
        if self._settings.rate_limits == "off":
            return
        address = client_address(request, self._proxies)
        wait_s = self._windows.hit((what, address), per_minute())
        if wait_s > 0:
            raise TooManyRequests(
                f"too many requests of this kind ({what}) from your address",
                retry_after_s=math.ceil(wait_s),
            )


def parse_networks(text: str) -> list[Network]:
    """Networks of trusted proxies, comma separated. Raises ValueError for what is none."""
    return [
        ipaddress.ip_network(part.strip(), strict=False) for part in text.split(",") if part.strip()
    ]


def client_address(request: HTTPConnection, proxies: list[Network]) -> str:
    """The client's address: the last in `X-Forwarded-For` that is no proxy we trust."""
    peer = request.client.host if request.client else "unknown"
    if _trusted(peer, proxies):
        # Some proxies add a line of their own behind the client's.
        lines = request.headers.getlist("x-forwarded-for")
        hops = [hop.strip() for hop in ",".join(lines).split(",")]
        while _trusted(peer, proxies) and hops and hops[-1]:
            peer = hops.pop()
    return _group(peer)


def _trusted(address: str, proxies: list[Network]) -> bool:
    if not proxies:
        return False
    try:
        return any(ipaddress.ip_address(address) in network for network in proxies)
    except ValueError:
        return False


@lru_cache(maxsize=10_000)
def _group(address: str) -> str:
    # One customer usually has a whole IPv6 /64: counting single addresses would count nothing.
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address[:64]
    if parsed.version == 6:
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed)
