"""Asking servers that strangers name, without becoming their way into our own network.

Each request, and each hop of a redirect, goes through the same gate:

    URL read strictly ─> resolve ─> every address public? ─> connect to that very address ─> answer

The address that was checked is the address connected to, so a name server that answers twice
differently gains nothing. The certificate is checked against the name (`sni_hostname`). Every
request has a client, a connection and a TLS session of its own: on a kept-alive connection httpx
would serve a second name on the same address without checking its certificate.

No proxies, cookies, credentials or compression; bodies, time and requests at once are limited.
Whatever goes wrong leaves here as one of four codes, and of these `unreachable` is one for all of:
no such name, a forbidden address, refused, timed out, wrong certificate. A stranger must not be
able to tell them apart, or he could map our network with us.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx

from billing.errors import BillingError
from billing.outside_url import BadOutsideUrl, OutsideRules, OutsideUrl, address_allowed
from billing.public_tls import public_tls

# The addresses of a host, as text. Raises OSError or UnicodeError when it has none.
Resolver = Callable[[str, int], Awaitable[Sequence[str]]]

_log = logging.getLogger(__name__)

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_ADDRESSES_TRIED = 3
_HEADERS = {
    "Accept": "application/json",
    "Accept-Encoding": "identity",  # a compressed body is not limited by its length
    "User-Agent": "satherd",
}


class OutsideHttpError(BillingError):
    """No answer that can be used. `code`: bad_url, unreachable, busy or bad_answer.

    The message is a fixed sentence, safe to show. `bad_url`: a redirect led to a URL against the
    rules. `busy`: too many requests to this host at once, ask again later.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class OutsideLimits:
    """Times in seconds; `total_s` covers resolving, waiting for a turn, and all redirects."""

    total_s: float = 10.0
    connect_s: float = 5.0
    resolve_s: float = 3.0
    turn_s: float = 5.0
    body_bytes: int = 256 * 1024  # LNURL metadata may hold an image of 136,536 characters
    per_host: int = 4


@dataclass(frozen=True, slots=True)
class OutsideAnswer:
    """`url` is where it came from, after redirects."""

    status: int
    body: bytes = field(repr=False)
    url: OutsideUrl


class OutsideHttp:
    """Fetches from hosts that strangers name. One object per process, since it counts requests."""

    def __init__(
        self,
        rules: OutsideRules,
        *,
        limits: OutsideLimits | None = None,
        resolve: Resolver | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self.rules = rules
        self._limits = limits or OutsideLimits()
        self._resolve = resolve or SystemResolver()
        self._ssl_context = ssl_context or public_tls()
        self._turns: dict[str, _Turns] = {}

    async def fetch(
        self,
        url: OutsideUrl,
        *,
        method: str = "GET",
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        redirects: int = 0,
    ) -> OutsideAnswer:
        """Ask once and read the whole answer, whatever its status. Raises OutsideHttpError.

        Nothing is retried after a connection was made. With `redirects` = 0 a redirect is an
        answer like any other; otherwise GET follows that many, and one more is `bad_answer`.
        """
        assert redirects == 0 or method == "GET"
        try:
            async with asyncio.timeout(self._limits.total_s):
                for hops_left in range(redirects, -1, -1):
                    answer, location = await self._ask(url, method, body, headers or {})
                    if redirects == 0 or answer.status not in _REDIRECTS or location is None:
                        return answer
                    if hops_left > 0:
                        url = url.follow(location, self.rules)
                raise OutsideHttpError("bad_answer", "the server redirects too often")
        except BadOutsideUrl as error:
            raise OutsideHttpError("bad_url", str(error)) from None
        except TimeoutError:
            raise _unreachable(url, "timed out") from None

    async def _ask(
        self, url: OutsideUrl, method: str, body: bytes | None, headers: Mapping[str, str]
    ) -> tuple[OutsideAnswer, str | None]:
        """One hop: the answer, and its Location header."""
        async with self._turn(url):
            for address in await self._addresses(url):
                try:
                    return await self._ask_address(url, address, method, body, headers)
                except (httpx.ConnectError, httpx.ConnectTimeout):
                    continue  # nothing was sent, so the next address is no second request
                except httpx.HTTPError as error:
                    raise _unreachable(url, type(error).__name__) from None
        raise _unreachable(url, "no connection")

    async def _addresses(self, url: OutsideUrl) -> Sequence[str]:
        try:
            async with asyncio.timeout(self._limits.resolve_s):
                addresses = await self._resolve(url.host, url.port)
        except (OSError, UnicodeError) as error:  # TimeoutError is an OSError
            raise _unreachable(url, f"not resolved, {type(error).__name__}") from None
        # One bad address refuses the name: who mixes them is trying something.
        if not all(address_allowed(address, self.rules) for address in addresses):
            raise _unreachable(url, "resolves to an address that is not allowed")
        return addresses[:_ADDRESSES_TRIED]

    async def _ask_address(
        self,
        url: OutsideUrl,
        address: str,
        method: str,
        body: bytes | None,
        headers: Mapping[str, str],
    ) -> tuple[OutsideAnswer, str | None]:
        limits = self._limits
        async with httpx.AsyncClient(
            verify=self._ssl_context,
            trust_env=False,
            follow_redirects=False,
            timeout=httpx.Timeout(limits.total_s, connect=limits.connect_s),
            limits=httpx.Limits(max_connections=1, max_keepalive_connections=0),
        ) as client:
            request = client.build_request(
                method,
                httpx.URL(
                    scheme=url.scheme, host=address, port=url.port, raw_path=url.target.encode()
                ),
                headers={**_HEADERS, **headers, "Host": url.host_header},
                content=body,
                extensions={"sni_hostname": url.host},
            )
            response = await client.send(request, stream=True)
            try:
                content = await self._read(response)
            finally:
                await response.aclose()
            answer = OutsideAnswer(response.status_code, content, url)
            return answer, response.headers.get("location")

    async def _read(self, response: httpx.Response) -> bytes:
        if response.headers.get("content-encoding", "identity").lower() != "identity":
            raise OutsideHttpError("bad_answer", "the server compresses its answer")
        content = bytearray()
        async for part in response.aiter_raw():
            content += part
            if len(content) > self._limits.body_bytes:
                raise OutsideHttpError("bad_answer", "the server's answer is too long")
        return bytes(content)

    @asynccontextmanager
    async def _turn(self, url: OutsideUrl) -> AsyncIterator[None]:
        """Wait for one of the few requests to this host that may run at once."""
        turns = self._turns.setdefault(url.host, _Turns(self._limits.per_host))
        turns.users += 1
        try:
            try:
                async with asyncio.timeout(self._limits.turn_s):
                    await turns.free.acquire()
            except TimeoutError:
                raise OutsideHttpError("busy", "too many requests to this host") from None
            try:
                yield
            finally:
                turns.free.release()
        finally:
            turns.users -= 1
            if turns.users == 0:
                del self._turns[url.host]


class _Turns:
    def __init__(self, at_once: int) -> None:
        self.free = asyncio.Semaphore(at_once)
        self.users = 0  # holding or waiting; at none the entry goes


class SystemResolver:
    """`getaddrinfo` in threads of its own.

    A thread lasts as long as the name server lets it, whatever our patience. Were these the event
    loop's threads, a stranger with a slow name server could hold up the whole program's look-ups.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(max_workers=8, thread_name_prefix="outside-dns")

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        found = await asyncio.get_running_loop().run_in_executor(
            self._threads, _system_addresses, host, port
        )
        return list(dict.fromkeys(found))


def _system_addresses(host: str, port: int) -> list[str]:
    return [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def _unreachable(url: OutsideUrl, why: str) -> OutsideHttpError:
    # The reason is for the operator alone; the path may be somebody's secret, the host is not.
    _log.info("outside host %s: %s", url.host, why)
    return OutsideHttpError("unreachable", "the server cannot be reached")
