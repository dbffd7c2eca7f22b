"""How often one client address may cause work: invoices, jobs, wrong admin tokens."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from starlette.requests import HTTPConnection

from router.errors import TooManyRequests
from router.settings import Settings

ADMIN_FAILURES_PER_MINUTE = 10
KEY_FAILURES_PER_MINUTE = 60
ADDRESS_CHECKS_PER_MINUTE = 30

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class RateLimits:
    """Moving windows of a minute, in this process. Off with `SATHERD_RATE_LIMITS=off`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._windows = MovingWindowRateLimiter(MemoryStorage())
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

    def client(self, request: HTTPConnection) -> str:
        """The client's address as it is counted: for IPv6, its network."""
        return client_address(request, self._proxies)

    def failed(self, request: HTTPConnection, what: str, per_minute: int) -> None:
        """Count a wrong secret. Raises TooManyRequests once there were too many."""
        self._count(request, what, lambda: per_minute)

    def _count(self, request: HTTPConnection, what: str, per_minute: Callable[[], int]) -> None:
        if self._settings.rate_limits == "off":
            return
        item = RateLimitItemPerMinute(per_minute())
        address = client_address(request, self._proxies)
        if not self._windows.hit(item, what, address):
            resets_at = self._windows.get_window_stats(item, what, address).reset_time
            raise TooManyRequests(
                f"too many requests of this kind ({what}) from your address",
                retry_after_s=max(1, int(resets_at - time.time()) + 1),
            )


def parse_networks(text: str) -> list[Network]:
    """Networks of trusted proxies, comma separated. Raises ValueError for what is none."""
    return [
        ipaddress.ip_network(part.strip(), strict=False) for part in text.split(",") if part.strip()
    ]


def client_address(request: HTTPConnection, proxies: list[Network]) -> str:
    """The client's address: the last in `X-Forwarded-For` that is no proxy we trust."""
    peer = request.client.host if request.client else "unknown"
    hops = [hop.strip() for hop in request.headers.get("x-forwarded-for", "").split(",")]
    while _trusted(peer, proxies) and hops and hops[-1]:
        peer = hops.pop()
    return _group(peer)


def _trusted(address: str, proxies: list[Network]) -> bool:
    try:
        return any(ipaddress.ip_address(address) in network for network in proxies)
    except ValueError:
        return False


def _group(address: str) -> str:
    # One customer usually has a whole IPv6 /64: counting single addresses would count nothing.
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address[:64]
    if parsed.version == 6:
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed)
