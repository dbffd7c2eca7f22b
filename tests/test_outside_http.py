"""Asking strangers' servers: real loopback ones, and a pretended Internet for the strict rules."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from billing.outside_http import OutsideHttp, OutsideHttpError, OutsideLimits
from billing.outside_url import OutsideRules, OutsideUrl, parse_outside_url
from tests.loopback_http import Loopback, Request, http

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
        await asyncio.wait_for(http_client.fetch(url, **options), 5)
    return caught.value


# What an ordinary request looks like


@pytest.mark.parametrize("status", [200, 302, 404, 500])
async def test_an_answer_is_given_back_whatever_its_status(status):
    async with Loopback(lambda request: http(status, b"body")) as server:
        answer = await development().fetch(local(server, "/path?x=1"))
    assert (answer.status, answer.body) == (status, b"body")
    assert answer.url == local(server, "/path?x=1")
    assert server.requests[0].target == "/path?x=1"


async def test_a_request_carries_its_name_and_nothing_that_tells_on_us(monkeypatch):
    async with Loopback(lambda request: http(200, b"", Set_Cookie="a=b")) as server:
        for variable in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(variable, "http://127.0.0.1:9")  # would fail, were it used
        names = Names(pay_example=[["127.0.0.1"]])
        client = development(resolve=names)
        for _ in range(2):
            await client.fetch(local(server, host="pay.example"))
    for request in server.requests:
        assert request.headers["host"] == f"pay.example:{server.port}"
        assert request.headers["accept-encoding"] == "identity"
        assert not request.headers.keys() & {"cookie", "authorization", "referer"}
        assert "python" not in request.headers["user-agent"].lower()


async def test_a_body_can_be_posted_with_headers():
    async with Loopback(lambda request: http(204)) as server:
        answer = await development().fetch(
            local(server), method="POST", body=b'{"a":1}', headers={"X-Signature": "abc"}
        )
    assert answer.status == 204
    [request] = server.requests
    assert (request.method, request.body) == ("POST", b'{"a":1}')
    assert request.headers["x-signature"] == "abc"


async def test_every_request_has_a_connection_of_its_own():
    async with Loopback(lambda request: http(200)) as server:
        client = development()
        for _ in range(3):
            await client.fetch(local(server))
    assert server.connections == 3


# The filter


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.0.0.1",
        "169.254.169.254",
        "::1",
        "::ffff:10.0.0.1",
        "64:ff9b::a9fe:a9fe",
        "2002:7f00:1::",
        "2001:0:4136:e378:8000:63bf:3fff:fdd2",
        "fd00::1",
        "224.0.0.1",
        "nonsense",
    ],
)
async def test_a_name_that_leads_inside_is_never_connected_to(monkeypatch, address):
    internet = pretend(monkeypatch, pay_example=reply())
    client = OutsideHttp(STRICT, resolve=Names(pay_example=[[address]]))
    error = await failure(client, url_of("https://pay.example/"))
    assert error.code == "unreachable"
    assert internet.sent == []


async def test_one_bad_address_among_good_ones_refuses_the_name(monkeypatch):
    internet = pretend(monkeypatch, pay_example=reply())
    for mixed in ([PUBLIC, "10.0.0.1"], ["::1", PUBLIC], [PUBLIC] * 5 + ["127.0.0.1"]):
        client = OutsideHttp(STRICT, resolve=Names(pay_example=[mixed]))
        assert (await failure(client, url_of("https://pay.example/"))).code == "unreachable"
    assert internet.sent == []


async def test_a_public_name_is_asked_at_the_address_that_was_checked(monkeypatch):
    internet = pretend(monkeypatch, pay_example=reply(body=b"ok"))
    client = OutsideHttp(STRICT, resolve=Names(pay_example=[[PUBLIC]]))
    answer = await client.fetch(url_of("https://pay.example/x"))
    assert answer.body == b"ok"
    assert internet.sent == [(PUBLIC, "None", "pay.example", "pay.example")]


async def test_a_name_server_that_changes_its_answer_gains_nothing(monkeypatch):
    """One look-up per request, and the connection goes where that look-up said."""
    internet = pretend(monkeypatch, pay_example=reply())
    names = Names(pay_example=[[PUBLIC], ["127.0.0.1"], [PUBLIC]])
    client = OutsideHttp(STRICT, resolve=names)
    url = url_of("https://pay.example/")
    await client.fetch(url)
    assert (await failure(client, url)).code == "unreachable"
    await client.fetch(url)
    assert names.asked == ["pay.example"] * 3
    assert [sent[0] for sent in internet.sent] == [PUBLIC, PUBLIC]


async def test_the_address_is_pinned_on_real_connections_too():
    async with Loopback(lambda request: http(200, b"first")) as first:
        second = Loopback(lambda request: http(200, b"second"), "127.0.0.2", port=first.port)
        async with second:
            names = Names(pay_example=[["127.0.0.1"], ["127.0.0.2"]])
            client = development(resolve=names)
            bodies = [(await client.fetch(local(first, host="pay.example"))).body for _ in range(2)]
    assert bodies == [b"first", b"second"]
    assert len(names.asked) == 2


async def test_the_systems_own_resolver_is_filtered_like_any_other():
    async with Loopback(lambda request: http(200, b"inside")) as server:
        url = local(server, host="localhost")
        assert (await development().fetch(url)).body == b"inside"
        strict = OutsideHttp(STRICT)
        assert (await failure(strict, url)).code == "unreachable"
        for literal in ("127.0.0.1", "127.1", "0x7f000001"):  # as a parser with a hole would pass
            error = await failure(strict, local(server, host=literal))
            assert error.code == "unreachable"
        denied = OutsideRules(allow_private=True, deny=(ipaddress.ip_network("127.0.0.0/8"),))
        assert (await failure(OutsideHttp(denied), local(server))).code == "unreachable"
    assert len(server.requests) == 1


async def test_a_stranger_learns_nothing_of_why_a_server_is_unreachable(monkeypatch):
    """No name, a forbidden address, a refused connection, silence: the same words."""
    pretend(monkeypatch, pay_example=reply())
    errors = [
        await failure(OutsideHttp(STRICT, resolve=Names()), url_of("https://pay.example/")),
        await failure(
            OutsideHttp(STRICT, resolve=Names(pay_example=[["10.0.0.1"]])),
            url_of("https://pay.example/"),
        ),
    ]
    monkeypatch.undo()
    async with Loopback(lambda request: silence(request)) as server:
        errors.append(await failure(development(limits=QUICK), local(server)))
    errors.append(await failure(development(limits=QUICK), local(server)))  # nobody listens now
    assert {(error.code, str(error)) for error in errors} == {
        ("unreachable", "the server cannot be reached")
    }


async def test_the_log_names_the_host_and_not_the_path(caplog):
    caplog.set_level(logging.DEBUG, logger="billing")
    client = OutsideHttp(STRICT, resolve=Names(pay_example=[["10.0.0.1"]]))
    await failure(client, url_of("https://pay.example/secret-wallet-id?token=hunter2"))
    assert "pay.example" in caplog.text
    assert not any(word in caplog.text for word in ("secret-wallet-id", "hunter2", "10.0.0.1"))


# Names that do not resolve


async def test_a_slow_name_server_is_given_up_soon():
    async def slow(host: str, port: int) -> list[str]:
        await asyncio.Event().wait()
        return []

    error = await failure(development(resolve=slow, limits=QUICK), url_of("https://pay.example/"))
    assert error.code == "unreachable"


@pytest.mark.parametrize("problem", [OSError(), UnicodeError("label too long"), None])
async def test_a_name_without_an_address_is_unreachable(problem):
    async def broken(host: str, port: int) -> list[str]:
        if problem is not None:
            raise problem
        return []

    error = await failure(development(resolve=broken), url_of("https://pay.example/"))
    assert error.code == "unreachable"


# Connections


async def test_the_next_address_is_tried_when_one_does_not_connect():
    async with Loopback(lambda request: http(200, b"ok")) as server:
        names = Names(pay_example=[["127.0.0.3", "127.0.0.1"]])
        answer = await development(resolve=names).fetch(local(server, host="pay.example"))
    assert answer.body == b"ok"


async def test_nothing_is_asked_again_once_a_connection_was_made():
    async with Loopback(lambda request: b"") as server:
        names = Names(pay_example=[["127.0.0.1", "127.0.0.1"]])
        error = await failure(development(resolve=names), local(server, host="pay.example"))
    assert error.code == "unreachable"
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "garbage",
    [
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"\x00" * 100,
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nContent-Length: ten\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * 200_000,
    ],
)
async def test_a_server_that_speaks_no_http_is_unreachable(garbage):
    async with Loopback(lambda request: garbage) as server:
        assert (await failure(development(), local(server))).code == "unreachable"


async def silence(request: Request) -> AsyncIterator[bytes]:
    await asyncio.Event().wait()
    yield b""


async def drip(request: Request) -> AsyncIterator[bytes]:
    """Never idle long enough for a read time-out, and never done."""
    yield b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"
    while True:
        yield b"x"
        await asyncio.sleep(0.01)


async def drip_headers(request: Request) -> AsyncIterator[bytes]:
    yield b"HTTP/1.1 200 OK\r\n"
    while True:
        yield b"X-More: 1\r\n"
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("slow", [silence, drip, drip_headers])
async def test_a_slow_answer_is_given_up_when_the_time_is_over(slow):
    async with Loopback(slow) as server:
        started = asyncio.get_running_loop().time()
        assert (await failure(development(limits=QUICK), local(server))).code == "unreachable"
        assert asyncio.get_running_loop().time() - started < 2


async def endless(request: Request) -> AsyncIterator[bytes]:
    yield b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    while True:
        yield b"4000\r\n" + b"x" * 0x4000 + b"\r\n"


async def test_a_body_is_read_up_to_the_limit_and_not_beyond():
    most = OutsideLimits().body_bytes
    assert most == 262_144
    for answer in (http(200, b"x" * (most + 1)), endless):
        async with Loopback(answer if callable(answer) else lambda _, a=answer: a) as server:
            assert (await failure(development(), local(server))).code == "bad_answer"
    async with Loopback(lambda request: http(200, b"x" * most)) as server:
        assert len((await development().fetch(local(server))).body) == most


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "br", "deflate, gzip"])
async def test_a_compressed_body_is_refused_since_its_size_is_unknown(encoding):
    async with Loopback(
        lambda request: http(200, b"\x1f\x8b", Content_Encoding=encoding)
    ) as server:
        assert (await failure(development(), local(server))).code == "bad_answer"


# Redirects


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirects_are_followed_by_hand_through_the_same_gate(monkeypatch, status):
    internet = pretend(
        monkeypatch,
        pay_example=reply(status, location="https://www.pay.example/x?y=1"),
        www_pay_example=reply(body=b"there"),
    )
    names = Names(pay_example=[[PUBLIC]], www_pay_example=[["1.1.1.1"]])
    answer = await OutsideHttp(STRICT, resolve=names).fetch(
        url_of("https://pay.example/"), redirects=2
    )
    assert (answer.body, str(answer.url)) == (b"there", "https://www.pay.example/x?y=1")
    assert [sent[0] for sent in internet.sent] == [PUBLIC, "1.1.1.1"]
    assert names.asked == ["pay.example", "www.pay.example"]


async def test_two_redirects_are_followed_and_a_third_is_not():
    def hop(request: Request) -> bytes:
        left = int(request.path[1:])
        return http(302, b"", Location=f"/{left - 1}") if left else http(200, b"arrived")

    async with Loopback(hop) as server:
        client = development()
        assert (await client.fetch(local(server, "/2"), redirects=2)).body == b"arrived"
        error = await failure(client, local(server, "/3"), redirects=2)
        assert error.code == "bad_answer"
        assert [request.path for request in server.requests] == ["/2", "/1", "/0", "/3", "/2", "/1"]
        assert (await client.fetch(local(server, "/1"))).status == 302  # none unless asked for


@pytest.mark.parametrize(
    "location, code",
    [
        ("http://pay.example/", "bad_url"),
        ("https://169.254.169.254/latest/meta-data/", "bad_url"),
        ("https://[::1]/", "bad_url"),
        ("https://pay.example:22/", "bad_url"),
        ("https://pay.example:8443/", "bad_url"),
        ("//user:password@pay.example/", "bad_url"),
        ("file:///etc/passwd", "bad_url"),
        ("https://localhost/", "bad_url"),
        ("https://inside.example/", "unreachable"),
        ("https://metadata.example/", "unreachable"),
        ("https://unknown.example/", "unreachable"),
    ],
)
async def test_a_redirect_leads_nowhere_that_a_url_may_not(monkeypatch, location, code):
    internet = pretend(
        monkeypatch, pay_example=reply(302, location=location), inside_example=reply()
    )
    names = Names(
        pay_example=[[PUBLIC]],
        inside_example=[["192.168.0.1"]],
        metadata_example=[["169.254.169.254"]],
    )
    client = OutsideHttp(STRICT, resolve=names)
    assert (await failure(client, url_of("https://pay.example/"), redirects=2)).code == code
    assert len(internet.sent) == 1


async def test_a_redirect_to_the_same_name_is_resolved_and_checked_anew(monkeypatch):
    internet = pretend(monkeypatch, pay_example=reply(302, location="/again"))
    names = Names(pay_example=[[PUBLIC], ["127.0.0.1"]])
    client = OutsideHttp(STRICT, resolve=names)
    error = await failure(client, url_of("https://pay.example/"), redirects=2)
    assert error.code == "unreachable"
    assert len(internet.sent) == 1


async def test_the_time_limit_covers_all_hops_together():
    async def slow_hop(request: Request) -> AsyncIterator[bytes]:
        await asyncio.sleep(0.3)
        yield http(302, b"", Location="/next")

    async with Loopback(slow_hop) as server:
        error = await failure(development(limits=QUICK), local(server), redirects=2)
    assert error.code == "unreachable"
    assert len(server.requests) == 2


# How many at once


async def test_four_requests_to_a_host_run_at_once_and_others_wait_their_turn():
    gate = asyncio.Event()
    running: list[int] = [0]
    most: list[int] = [0]
    four = asyncio.Event()

    async def slow(request: Request) -> AsyncIterator[bytes]:
        running[0] += 1
        most[0] = max(most[0], running[0])
        if running[0] == 4:
            four.set()
        await gate.wait()
        running[0] -= 1
        yield http(200)

    async with Loopback(slow) as server, Loopback(lambda request: http(200)) as other:
        client = development(resolve=Names(a_example=[["127.0.0.1"]], b_example=[["127.0.0.1"]]))
        fetches = [
            asyncio.create_task(client.fetch(local(server, host="a.example"))) for _ in range(7)
        ]
        await asyncio.wait_for(four.wait(), 5)
        assert (await client.fetch(local(other, host="b.example"))).status == 200
        gate.set()
        answers = await asyncio.wait_for(asyncio.gather(*fetches), 5)
    assert [answer.status for answer in answers] == [200] * 7
    assert most[0] == 4


async def test_who_waits_too_long_for_a_turn_is_told_busy_and_may_come_back():
    gate = asyncio.Event()

    async def slow(request: Request) -> AsyncIterator[bytes]:
        await gate.wait()
        yield http(200)

    limits = OutsideLimits(turn_s=0.1, per_host=2)
    async with Loopback(slow) as server:
        client = development(limits=limits)
        fetches = [asyncio.create_task(client.fetch(local(server))) for _ in range(2)]
        await until(lambda: len(server.requests) == 2)
        assert (await failure(client, local(server))).code == "busy"
        gate.set()
        await asyncio.wait_for(asyncio.gather(*fetches), 5)
        assert (await client.fetch(local(server))).status == 200


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


async def test_a_cancelled_request_gives_its_turn_back():
    async with Loopback(silence) as server:
        client = development(limits=OutsideLimits(per_host=1))
        waiting = asyncio.create_task(client.fetch(local(server)))
        await until(lambda: len(server.requests) == 1)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        server.answer = lambda request: http(200)
        assert (await asyncio.wait_for(client.fetch(local(server)), 5)).status == 200


# TLS


@dataclass(frozen=True)
class Authority:
    """A certificate authority made for one test run."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    def server_context(self, directory, *names: str) -> ssl.SSLContext:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = signed(self.key, self.certificate.subject, key, names)
        chain, private = directory / f"{names[0]}.pem", directory / f"{names[0]}.key"
        chain.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        private.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(chain, private)
        return context

    def client_context(self) -> ssl.SSLContext:
        pem = self.certificate.public_bytes(serialization.Encoding.PEM).decode()
        return ssl.create_default_context(cadata=pem)


def signed(signer, issuer, key, names=()) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0] if names else "test")])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer or subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - timedelta(hours=1))
        .not_valid_after(datetime.now(UTC) + timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=not names, path_length=None), critical=True)
    )
    if names:
        alternatives = x509.SubjectAlternativeName([x509.DNSName(name) for name in names])
        builder = builder.add_extension(alternatives, critical=False)
    return builder.sign(signer, hashes.SHA256())


@pytest.fixture(scope="module")
def authority() -> Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    return Authority(key, signed(key, None, key))


async def test_the_certificate_is_checked_against_the_name_and_not_the_address(authority, tmp_path):
    """Also right after a good request to the same address: no TLS session is shared."""
    context = authority.server_context(tmp_path, "pay.example")
    asked_for: list[str | None] = []
    context.sni_callback = lambda _socket, name, _context: asked_for.append(name)
    names = Names(pay_example=[["127.0.0.1"]], evil_example=[["127.0.0.1"]])
    async with Loopback(lambda request: http(200, b"ok"), tls=context) as server:
        client = development(resolve=names, ssl_context=authority.client_context())
        good = OutsideUrl("https", "pay.example", server.port, "/")
        evil = OutsideUrl("https", "evil.example", server.port, "/")
        for _ in range(2):
            assert (await client.fetch(good)).body == b"ok"
            assert (await failure(client, evil)).code == "unreachable"
    assert asked_for == ["pay.example", "evil.example"] * 2
    assert [request.headers["host"].split(":")[0] for request in server.requests] == (
        ["pay.example"] * 2
    )


async def test_a_certificate_of_an_unknown_authority_is_refused(authority, tmp_path):
    context = authority.server_context(tmp_path, "pay.example")
    async with Loopback(lambda request: http(200), tls=context) as server:
        client = development(resolve=Names(pay_example=[["127.0.0.1"]]))
        url = OutsideUrl("https", "pay.example", server.port, "/")
        assert (await failure(client, url)).code == "unreachable"
    assert server.requests == []
