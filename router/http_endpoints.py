"""Servers that somebody has registered as workers: which URLs are taken, and how they are called.

Mostly the model is on the router's own machine (DG-8), and nothing but loopback is called. An operator
may let servers elsewhere register: then their URLs go through the rules for strangers' URLs, and the
address that was checked is the one connected to. Ports of our own, the database's and the Lightning
node's are never called: whoever could have us post to them would speak with our voice.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from pydantic_core import to_json
from yarl import URL

from billing.outside_http import SystemResolver
from billing.outside_url import (
    BadOutsideUrl,
    OutsideRules,
    OutsideUrl,
    address_allowed,
    parse_outside_url,
)
from billing.public_tls import public_tls
from router.sessions import RefusedWorker
from router.settings import Settings

CONNECT_S = 5.0
# Shorter than what servers keep a connection for, 5 s mostly.
KEEP_ALIVE_S = 4.0
RESOLVE_S = 3.0
_HEADERS = {
    "Accept-Encoding": "identity",  # a compressed body is not limited by its length
    "Content-Type": "application/json",
    "User-Agent": "satherd",
}
# What the known services listen on where their URL does not say.
_DEFAULT_PORTS = {"postgres": 5432, "postgresql": 5432, "https": 443, "http": 80, "nats": 4222}


class Unreachable(Exception):
    """No connection to a registered server."""


class Endpoints:
    """The rules for URLs of registered servers."""

    def __init__(self, settings: Settings) -> None:
        self._outside = settings.http_workers == "outside"
        self._off = settings.http_workers == "off"
        self._rules = OutsideRules(
            allow_private=not self._outside or settings.lnurl_allow_private,
            allow_high_ports=True,
        )
        self._own_ports = _own_ports(settings)
        self._resolve = SystemResolver()
        self._near: aiohttp.ClientSession | None = None
        self._far: aiohttp.ClientSession | None = None

    def read(self, api: str, *, own_ports: frozenset[int] = frozenset()) -> OutsideUrl:
        """The base of a registered URL, up to `/v1`: of `http://host:port`, `…/v1` and
        `…/v1/chat/completions` it is the same. `own_ports`: on which the caller is listened to.

        Raises RefusedWorker.
        """
        if self._off:
            raise RefusedWorker("http_workers_off", "this router calls no servers of others")
        try:
            url = parse_outside_url(api, self._rules)
        except BadOutsideUrl as error:
            raise RefusedWorker("bad_url", f"api: {error}") from None
        path = url.target.rstrip("/")
        if "?" in path or ".." in path or not (path in ("", "/v1") or path.startswith("/v1/")):
            raise RefusedWorker("bad_url", "api: only paths that begin with /v1 are called")
        local = is_loopback(url.host)
        if not local and not self._outside:
            raise RefusedWorker("not_loopback", "api: the server must be on the router's machine")
        # Somebody may reach our ports by a name of ours as well, so they are refused everywhere.
        if url.port in self._own_ports | own_ports:
            raise RefusedWorker("own_port", "api: this port is not for models")
        return OutsideUrl(url.scheme, url.host, url.port, "/v1")

    async def _address(self, url: OutsideUrl) -> str:
        if is_loopback(url.host):
            return "127.0.0.1" if url.host == "localhost" else url.host
        try:
            async with asyncio.timeout(RESOLVE_S):
                addresses = await self._resolve(url.host, url.port)
        except (OSError, UnicodeError):
            raise Unreachable("the host was not found") from None
        if not addresses or not all(address_allowed(a, self._rules) for a in addresses):
            raise Unreachable("the host was not found")
        return addresses[0]

    @asynccontextmanager
    async def call(
        self, url: OutsideUrl, method: str, path: str, body: dict[str, Any] | None = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """One request, its answer unread; `path` follows the base. Raises Unreachable and
        aiohttp.ClientError. How long the answer may take is the caller's business."""
        address = await self._address(url)
        # What is said to be encoded is taken as it is.
        host = f"[{address}]" if ":" in address else address
        at = URL.build(
            scheme=url.scheme, host=host, port=url.port, path=url.target + path, encoded=True
        )
        secure = url.scheme == "https"
        asking = self._session(url).request(
            method,
            at,
            data=None if body is None else to_json(body),
            headers={"Host": url.host_header},
            allow_redirects=False,
            ssl=public_tls() if secure else True,
            server_hostname=url.host if secure else None,
        )
        try:
            answer = await asking
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise Unreachable(f"no connection: {type(error).__name__}") from None
        async with answer:
            yield answer

    def _session(self, url: OutsideUrl) -> aiohttp.ClientSession:
        """Connections to this machine are kept. Those to elsewhere are not: a kept one would serve a
        second name at the same address without a look at its certificate."""
        if is_loopback(url.host):
            self._near = self._near or _session(
                aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)
            )
            return self._near
        self._far = self._far or _session(aiohttp.TCPConnector(limit=0, force_close=True))
        return self._far

    async def aclose(self) -> None:
        """Close what is kept."""
        for session in (self._near, self._far):
            if session is not None:
                await session.close()


def _session(connector: aiohttp.TCPConnector) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=connector,
        headers=_HEADERS,
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        timeout=aiohttp.ClientTimeout(sock_connect=CONNECT_S),
    )


def is_loopback(host: str) -> bool:
    """Whether a host of a URL is this machine by its own words."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _own_ports(settings: Settings) -> frozenset[int]:
    """The ports of everything that this router is connected to."""
    ports = {settings.port}
    for name in type(settings).model_fields:
        if not name.endswith("_url"):
            continue
        value = getattr(settings, name)
        text = value.get_secret_value() if hasattr(value, "get_secret_value") else value
        try:
            parts = urlsplit(text or "")
            port = parts.port or _DEFAULT_PORTS.get(parts.scheme.partition("+")[0])
        except ValueError:
            continue
        # The public URL is a proxy's in front of us; its port is that of half the Internet.
        if port is not None and (name != "public_url" or is_loopback(parts.hostname or "")):
            ports.add(port)
    return frozenset(ports)
