"""Servers that are slow, endless, crowded, or speak no HTTP; and the certificates of the rest."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from billing.outside_http import OutsideLimits
from billing.outside_url import OutsideUrl
from tests.loopback_http import Loopback, Request, http, silence
from tests.outside_tools import QUICK, Names, development, failure, local

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
        assert asyncio.get_running_loop().time() - started < 20


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
        await asyncio.wait_for(four.wait(), 20)
        assert (await client.fetch(local(other, host="b.example"))).status == 200
        gate.set()
        answers = await asyncio.wait_for(asyncio.gather(*fetches), 20)
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
        await asyncio.wait_for(asyncio.gather(*fetches), 20)
        assert (await client.fetch(local(server))).status == 200


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


async def test_hosts_asked_long_ago_take_no_memory():
    names = Names(**{f"host{n}_example": [["127.0.0.1"]] for n in range(5)})
    async with Loopback(lambda request: http(200)) as server:
        client = development(resolve=names)
        for n in range(5):
            await client.fetch(local(server, host=f"host{n}.example"))
        await failure(client, local(server, host="unknown.example"))
    assert client._turns == {}


async def test_a_cancelled_request_gives_its_turn_back():
    async with Loopback(silence) as server:
        client = development(limits=OutsideLimits(per_host=1))
        waiting = asyncio.create_task(client.fetch(local(server)))
        await until(lambda: len(server.requests) == 1)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        server.answer = lambda request: http(200)
        assert (await asyncio.wait_for(client.fetch(local(server)), 20)).status == 200


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
