"""Name servers and a pretended Internet, for the tests of requests to strangers' servers."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx
import pytest

from billing.outside_http import OutsideHttp, OutsideHttpError, OutsideLimits
from billing.outside_url import OutsideRules, OutsideUrl, parse_outside_url
from tests.loopback_http import Loopback

STRICT = OutsideRules()
DEVELOPMENT = OutsideRules(allow_private=True)
QUICK = OutsideLimits(total_s=0.5, connect_s=0.3, resolve_s=0.2, turn_s=0.2)
PUBLIC = "93.184.216.34"


class Names:
    """A name server that a test writes; several answers for a name are given one after another."""

    def __init__(self, **answers: list[list[str]]) -> None:
        self._answers = {name.replace("_", "."): given for name, given in answers.items()}
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> list[str]:
        self.asked.append(host)
        if host not in self._answers:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        given = self._answers[host]
        return given.pop(0) if len(given) > 1 else given[0]


@dataclass
class Internet:
    """Stands in for every connection: what httpx would have sent, and to which address."""

    answers: dict[str, Callable[[httpx.Request], httpx.Response]]
    sent: list[tuple[str, str, str, str]] = field(default_factory=list)

    async def __call__(self, _transport: object, request: httpx.Request) -> httpx.Response:
        name = request.headers["Host"]
        self.sent.append(
            (request.url.host, str(request.url.port), name, request.extensions["sni_hostname"])
        )
        return self.answers[name](request)


def reply(
    status: int = 200, body: bytes = b"", location: str = ""
) -> Callable[[httpx.Request], httpx.Response]:
    headers = {"Location": location} if location else {}
    return lambda _: httpx.Response(status, headers=headers, stream=httpx.ByteStream(body))


def pretend(
    monkeypatch: pytest.MonkeyPatch, **answers: Callable[[httpx.Request], httpx.Response]
) -> Internet:
    internet = Internet({name.replace("_", "."): answer for name, answer in answers.items()})
    monkeypatch.setattr(
        httpx.AsyncHTTPTransport,
        "handle_async_request",
        lambda transport, request: internet(transport, request),
    )
    return internet


def url_of(text: str, rules: OutsideRules = STRICT) -> OutsideUrl:
    return parse_outside_url(text, rules)


def local(server: Loopback, target: str = "/", host: str = "") -> OutsideUrl:
    return OutsideUrl("http", host or server.address, server.port, target)


def development(**options) -> OutsideHttp:
    return OutsideHttp(DEVELOPMENT, **options)


async def failure(http_client: OutsideHttp, url: OutsideUrl, **options) -> OutsideHttpError:
    with pytest.raises(OutsideHttpError) as caught:
        await asyncio.wait_for(http_client.fetch(url, **options), 20)
    return caught.value
