"""What each failure of a connection to a node proves (lightning.md, section 2)."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from billing.lightning import (
    BackendAuthError,
    BackendError,
    BackendUnavailable,
    OutcomeUnknown,
    bounded_answer,
    lnd,
)
from billing.lightning.node_http import Fields, NodeHttp, StreamQuiet, trusting
from tests.loopback_http import Loopback, Request, http, http_json, silence


@pytest.mark.parametrize(
    "raised, expected",
    [
        (httpx.ConnectError, BackendUnavailable),
        (httpx.ConnectTimeout, BackendUnavailable),
        (httpx.PoolTimeout, BackendUnavailable),
        (httpx.WriteError, OutcomeUnknown),
        (httpx.WriteTimeout, OutcomeUnknown),
        (httpx.ReadError, OutcomeUnknown),
        (httpx.RemoteProtocolError, OutcomeUnknown),
        (httpx.LocalProtocolError, OutcomeUnknown),
        (httpx.CloseError, OutcomeUnknown),
        (httpx.DecodingError, OutcomeUnknown),
    ],
)
async def test_what_each_failure_of_a_stream_proves(
    raised: Callable[[str], Exception], expected: type[BackendError]
) -> None:
    calls = 0

    def fail(request: httpx.Request) -> httpx.Response:
        nonlocal calls
        calls += 1
        raise raised("as told")

    node = NodeHttp("node", "http://node", headers={})
    await node._client.aclose()
    node._client = httpx.AsyncClient(
        base_url="http://node", transport=httpx.MockTransport(fail), trust_env=False
    )
    with pytest.raises(expected):
        await anext(node.lines("settlements", "GET", "/lines", read_timeout_s=1))
    assert calls == 1  # and it is not tried again
    await node.aclose()


async def test_nobody_listens() -> None:
    node = NodeHttp("node", "http://127.0.0.1:1", headers={})
    with pytest.raises(BackendUnavailable):
        await node.request("pay_invoice", "POST", "/pay")
    with pytest.raises(BackendUnavailable):
        await anext(node.lines("settlements", "GET", "/lines", read_timeout_s=1))
    await node.aclose()


async def test_a_node_that_takes_the_request_and_says_nothing() -> None:
    async with Loopback(silence) as server:
        node = NodeHttp("node", server.url("").rstrip("/"), headers={})
        with pytest.raises(OutcomeUnknown):
            await node.request("pay_invoice", "POST", "/pay", read_timeout_s=0.1)
        with pytest.raises(StreamQuiet):
            await anext(node.lines("settlements", "GET", "/lines", read_timeout_s=0.1))
        await node.aclose()
    assert len(server.requests) == 2


@pytest.mark.parametrize("status", [401, 403])
async def test_a_refused_credential_is_told_from_all_else(status: int) -> None:
    async with Loopback(lambda request: http(status, "no")) as server:
        node = NodeHttp("node", server.url("").rstrip("/"), headers={"Rune": "very secret"})
        with pytest.raises(BackendAuthError) as error:
            await node.request("node_info", "GET", "/info")
        await node.aclose()
    assert "very secret" not in str(error.value)


async def test_a_redirect_is_not_followed() -> None:
    def answer(request: Request) -> bytes:
        return http(307, "", Location=server.url("/elsewhere"))

    async with Loopback(answer) as server:
        node = NodeHttp("node", server.url("").rstrip("/"), headers={"Rune": "secret"})
        reply = await node.request("pay_invoice", "POST", "/pay")
        await node.aclose()
    assert reply.status == 307
    assert len(server.requests) == 1


async def test_the_environment_has_no_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy in it would get our credentials."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    async with Loopback(lambda request: http_json({"yes": 1})) as server:
        node = NodeHttp("node", server.url("").rstrip("/"), headers={})
        assert (await node.request("node_info", "GET", "/info")).value == {"yes": 1}
        await node.aclose()


async def test_a_stream_is_read_line_by_line_and_its_end_is_seen() -> None:
    async def answer(request: Request) -> AsyncIterator[bytes]:
        head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        yield head + b"6\r\n[1]\n[2\r\n" + b"3\r\n]\n\n\r\n" + b"0\r\n\r\n"

    async with Loopback(answer) as server:
        node = NodeHttp("node", server.url("").rstrip("/"), headers={})
        replies = [r async for r in node.lines("x", "GET", "/", read_timeout_s=2)]
        await node.aclose()
    assert [reply.value for reply in replies] == [[1], [2]]


@pytest.mark.parametrize("status", [200, 500])
async def test_a_stream_of_which_one_line_does_not_end_is_cut(
    status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounded_answer, "MOST_ANSWER_BYTES", 100_000)
    monkeypatch.setattr(bounded_answer, "MOST_LINE_BYTES", 100_000)

    async def answer(request: Request) -> AsyncIterator[bytes]:
        assert request.headers["accept-encoding"] == "identity"
        yield f"HTTP/1.1 {status} X\r\n\r\n".encode()
        if status == 200:
            yield b"".join(b"[1]\n" for _ in range(100_000))  # long, but of lines
        while True:
            yield b"x" * 1000
            await asyncio.sleep(0)

    async with Loopback(answer) as server:
        node = NodeHttp("node", server.url("").rstrip("/"), headers={})
        replies = []
        with pytest.raises(OutcomeUnknown) as raised:
            async with asyncio.timeout(20):
                async for reply in node.lines("x", "GET", "/", read_timeout_s=2):
                    replies.append(reply.value)
        assert raised.value.detail == "AnswerTooLong: over 100000 bytes"
        assert replies == ([[1]] * 100_000 if status == 200 else [])
        await node.aclose()


@pytest.mark.parametrize(
    "value, number",
    [(5, 5), ("5", 5), ("5msat", 5), ("-5", -5), ("9223372036854775807", 2**63 - 1), (0, 0)],
)
def test_numbers_of_every_spelling(value: object, number: int) -> None:
    assert Fields("node", "x", {"n": value}).number("n") == number


@pytest.mark.parametrize("value", [None, True, 1.5, "", "1.5", "-", "1 sat", [], {}, "٣"])
def test_what_is_no_number_is_not_guessed(value: object) -> None:
    with pytest.raises(OutcomeUnknown):
        Fields("node", "x", {"n": value}).number("n")


def certificate(folder: Path, name: str) -> tuple[Path, ssl.SSLContext]:
    """A self-signed certificate for localhost, as LND makes itself one; and a server's use of it."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    cert_path, key_path = folder / f"{name}.cert", folder / f"{name}.key"
    cert_path.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    key_path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(cert_path, key_path)
    return cert_path, serving


async def test_only_the_certificate_of_the_settings_is_trusted(tmp_path: Path) -> None:
    ours, serving = certificate(tmp_path, "ours")
    other, _ = certificate(tmp_path, "other")
    macaroon = "0201"
    invoice = http_json({"code": 5, "message": "unknown"}, 404)
    async with Loopback(lambda request: invoice, tls=serving) as server:
        url = f"https://localhost:{server.port}"
        for trusted, works in ((ours, True), (other, False), (None, False)):
            cert = None if trusted is None else str(trusted)
            backend = lnd.from_settings(url=url, macaroon=macaroon, cert=cert)
            if works:
                assert (await backend.lookup_invoice("00" * 32)).state == "not_found"
            else:
                with pytest.raises(BackendUnavailable):
                    await backend.lookup_invoice("00" * 32)
            await backend.aclose()
    # The macaroon went to nobody but the server that proved itself.
    assert len(server.requests) == 1


def test_a_certificate_that_is_none_is_said(tmp_path: Path) -> None:
    path = tmp_path / "tls.cert"
    for content in (None, "not a certificate"):
        if content is not None:
            path.write_text(content)
        with pytest.raises(ValueError, match="certificate"):
            trusting(path)
