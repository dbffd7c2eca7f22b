"""What every request passes: CORS, the limit of bodies, the limits for one client."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from starlette.requests import HTTPConnection

from router.rate_limits import client_address, parse_networks
from tests.door_tools import CHAT, JOB, code
from tests.router_rig import ADMIN_TOKEN, Rig, running_rig

ORIGIN = {"Origin": "https://page.example"}
LIMIT = 20_000


# --- CORS -----------------------------------------------------------------------------------------


async def test_a_page_of_any_origin_may_ask_and_read_what_it_needs(router: Rig):
    """QB-R1, KC-11, KL-9."""
    for path in ("/info", "/v1/models", "/health/live", "/nowhere"):
        reply = await router.http.get(path, headers=ORIGIN)
        assert reply.headers["access-control-allow-origin"] == ORIGIN["Origin"]
        assert reply.headers["access-control-allow-credentials"] == "true"
        assert "origin" in reply.headers["vary"].lower()
    async with router.worker():
        due = await router.http.post("/v1/chat/completions", json=CHAT, headers=ORIGIN)
        exposed = due.headers["access-control-expose-headers"].lower()
        assert due.status_code == 402
        for name in ("www-authenticate", "x-satherd-job", "x-satherd-fee-msat", "retry-after"):
            assert name in exposed
    # Without an origin nobody is told about origins.
    plain = await router.http.get("/info")
    assert "access-control-allow-origin" not in plain.headers


async def test_a_preflight_is_answered_for_every_header_that_clients_send(router: Rig):
    asked = "authorization,content-type,x-fee-multiplier,x-anything"
    reply = await router.http.options(
        "/v1/chat/completions",
        headers=ORIGIN
        | {
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": asked,
        },
    )
    assert reply.status_code == 204 and reply.content == b""
    assert reply.headers["access-control-allow-headers"] == asked
    assert "POST" in reply.headers["access-control-allow-methods"]
    assert int(reply.headers["access-control-max-age"]) > 0
    bare = await router.http.options(
        "/jobs/x", headers=ORIGIN | {"Access-Control-Request-Method": "DELETE"}
    )
    allowed = bare.headers["access-control-allow-headers"].lower()
    for name in ("authorization", "idempotency-key", "last-event-id", "x-claim-token"):
        assert name in allowed


async def test_no_page_may_use_the_admins_api(router: Rig):
    admin = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
    for path in ("/admin/fees", "/admin/nowhere", "/admin"):
        reply = await router.http.get(path, headers=ORIGIN | admin)
        preflight = await router.http.options(
            path, headers=ORIGIN | {"Access-Control-Request-Method": "PUT"}
        )
        for answered in (reply, preflight):
            assert not [name for name in answered.headers if name.startswith("access-control")]
        assert preflight.status_code >= 400
    assert (await router.http.get("/admin/fees", headers=admin)).status_code == 200


# --- bodies ---------------------------------------------------------------------------------------


@pytest.fixture
async def small(tmp_path: Path, database_url: str) -> AsyncIterator[Rig]:
    async with running_rig(tmp_path, database_url, max_body_bytes=LIMIT) as rig:
        yield rig


async def test_a_body_over_the_limit_is_refused_whether_it_says_its_length_or_not(small: Rig):
    async def in_pieces() -> AsyncIterator[bytes]:
        for _ in range(10):
            yield b"x" * (LIMIT // 5)

    paths = ("/quotes", "/jobs", "/v1/chat/completions", "/balance/topups", "/nowhere")
    for path in paths:
        said = await small.http.post(path, content=b"x" * (LIMIT + 1), headers=ORIGIN)
        silent = await small.http.post(path, content=in_pieces(), headers=ORIGIN)
        for reply in (said, silent):
            if path == "/nowhere" and reply is silent:
                continue  # Nobody reads it, so nobody counts it.
            assert code(reply) == (413, "body_too_large"), path
            assert reply.json()["error"]["max_bytes"] == LIMIT
            assert reply.headers["access-control-allow-origin"] == ORIGIN["Origin"]
    # The router goes on, also on a connection of before.
    assert (await small.http.get("/info")).status_code == 200


async def test_a_body_just_within_the_limit_is_read(small: Rig):
    async with small.worker():
        body = json.dumps(JOB | {"user": ""})
        full = json.dumps(JOB | {"user": "x" * (LIMIT - len(body))})
        assert len(full) == LIMIT
        reply = await small.http.post("/quotes", content=full)
        assert reply.status_code == 201, reply.text


async def test_a_client_that_goes_in_the_middle_of_its_body_is_no_fault_of_the_router(
    small: Rig, caplog: pytest.LogCaptureFixture
):
    host = small.url.removeprefix("http://")
    reader, writer = await asyncio.open_connection(*host.split(":"))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: 5000\r\n\r\n"
    writer.write(head.encode() + b'{"model": ')
    await writer.drain()
    await asyncio.sleep(0.1)
    writer.close()
    await writer.wait_closed()
    assert (await small.http.get("/info")).status_code == 200
    del reader
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def test_a_head_that_does_not_end_is_refused_and_a_long_body_in_small_pieces_is_not(
    router: Rig,
):
    """One unfinished header of many megabytes kept everybody else waiting for seconds."""
    host = router.url.removeprefix("http://").split(":")
    starts = (b"GET /info HTTP/1.1\r\nHost: a\r\nX-Long: ", b"GET /")
    trailer = b"POST /quotes HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX-Long: "
    for start in (*starts, trailer):
        reader, writer = await asyncio.open_connection(*host)
        writer.write(start)
        with contextlib.suppress(ConnectionError):
            for _ in range(40):
                writer.write(b"a" * 50_000)
                await writer.drain()
        with contextlib.suppress(ConnectionError):
            said = await asyncio.wait_for(reader.read(), 20)
            assert said.startswith(b"HTTP/1.1 400 "), said[:100]
        writer.close()

    async def pieces():
        for _ in range(2000):
            yield b" " * 100
        yield b'{"model": "nobody", "prompt": "x"}'

    long = {"Authorization": "Bearer " + "x" * 20_000}
    reply = await router.http.post("/quotes", content=pieces(), headers=long)
    assert code(reply) == (404, "unknown_model")


# --- limits ---------------------------------------------------------------------------------------


async def test_too_many_invoices_or_jobs_are_a_429_that_says_when_to_come_back(
    tmp_path: Path, database_url: str
):
    """E5-59: an invoice for every anonymous 402 must not wear down the node."""
    settings = {"rate_limits": "on", "invoices_per_minute": 4, "jobs_per_minute": 6}
    async with running_rig(tmp_path, database_url, **settings) as rig, rig.worker():
        path = "/v1/chat/completions"
        replies = [await rig.http.post(path, json=CHAT) for _ in range(5)]
        assert [reply.status_code for reply in replies] == [402] * 4 + [429]
        assert code(replies[4]) == (429, "too_many_requests")
        assert replies[4].json()["error"]["type"] == "rate_limit_error"
        assert 1 <= int(replies[4].headers["retry-after"]) <= 121
        topup = await rig.http.post("/balance/topups", json={"amount_msat": 5000})
        assert code(topup) == (429, "too_many_requests")
        assert (await rig.http.post("/quotes", json=JOB)).status_code == 201
        quote = await rig.http.post("/quotes", json=JOB)
        assert code(quote) == (429, "too_many_requests") and quote.headers["retry-after"]
        # What costs nothing is not counted.
        assert (await rig.http.get("/info")).status_code == 200
        # A stranger cannot give himself another address.
        forged = {"X-Forwarded-For": "203.0.113.9"}
        assert (await rig.http.post("/quotes", json=JOB, headers=forged)).status_code == 429


async def test_clients_behind_a_trusted_proxy_are_told_apart(tmp_path: Path, database_url: str):
    settings = {
        "rate_limits": "on",
        "jobs_per_minute": 1,
        "trusted_proxies": "127.0.0.0/8, 10.0.0.0/8",
    }
    async with running_rig(tmp_path, database_url, **settings) as rig, rig.worker():

        async def ask(forwarded: str) -> int:
            headers = {"X-Forwarded-For": forwarded}
            return (await rig.http.post("/quotes", json=JOB, headers=headers)).status_code

        assert await ask("203.0.113.1") == 201
        assert await ask("203.0.113.1") == 429
        assert await ask("203.0.113.2") == 201
        # What the client itself wrote stands left of what the proxies added.
        assert await ask("203.0.113.77, 203.0.113.2") == 429
        assert await ask("203.0.113.77, 203.0.113.3, 10.1.2.3") == 201
        assert await ask("203.0.113.3") == 429
        assert await ask("2001:db8::1") == 201
        assert await ask("2001:db8::2") == 429  # the same customer's network
        assert await ask("2001:db8:1::1") == 201


def test_an_address_is_read_only_as_far_as_proxies_are_trusted():
    def address(peer: str, forwarded: str, trusted: str) -> str:
        lines = forwarded.split("\n") if forwarded else []
        headers = [(b"x-forwarded-for", line.encode()) for line in lines]
        scope = {"type": "http", "client": (peer, 1), "headers": headers}
        return client_address(HTTPConnection(scope), parse_networks(trusted))

    assert address("198.51.100.7", "203.0.113.1", "") == "198.51.100.7"
    assert address("198.51.100.7", "203.0.113.1", "10.0.0.0/8") == "198.51.100.7"
    assert address("10.0.0.1", "203.0.113.1", "10.0.0.0/8") == "203.0.113.1"
    assert address("10.0.0.1", "1.1.1.1, 203.0.113.1, 10.0.0.2", "10.0.0.0/8") == "203.0.113.1"
    # A proxy may add a line of its own: the first is what the client wrote.
    assert address("10.0.0.1", "1.1.1.1\n203.0.113.1", "10.0.0.0/8") == "203.0.113.1"
    assert address("10.0.0.1", "", "10.0.0.0/8") == "10.0.0.1"
    assert address("10.0.0.1", "nonsense", "10.0.0.0/8") == "nonsense"
    assert len(address("10.0.0.1", "x" * 500, "10.0.0.0/8")) <= 64
    with pytest.raises(ValueError):
        parse_networks("not a network")


async def test_unknown_paths_and_wrong_methods_are_errors(router: Rig):
    replies: list[tuple[httpx.Response, tuple[int, str]]] = [
        (await router.http.get("/nowhere"), (404, "not_found")),
        (await router.http.get("/v1/nowhere"), (404, "not_found")),
        (await router.http.put("/info"), (405, "method_not_allowed")),
        (await router.http.get("/quotes"), (405, "method_not_allowed")),
    ]
    for reply, expected in replies:
        assert code(reply) == expected and reply.json()["error"]["message"]


async def test_unknown_paths_and_wrong_methods_are_errors_in_the_dialect_of_the_door(router: Rig):
    async def fields(method: str, path: str) -> tuple[int, object]:
        reply = await router.http.request(method, path)
        body = reply.json()
        return reply.status_code, sorted(body) if isinstance(body, dict) else body

    openai = await router.http.get("/v1/chat/completions")
    assert openai.headers["allow"] == "POST"
    assert openai.json()["error"]["type"] == "invalid_request_error"
    assert await fields("GET", "/api/v0/nowhere") == (404, ["code", "message"])
    assert await fields("GET", "/api/v0/chat/completion") == (405, ["code", "message"])
    assert await fields("GET", "/api/v2/nowhere") == (404, ["message", "rc"])
    assert await fields("PUT", "/api/v2/generate/text/async") == (405, ["message", "rc"])
    assert await fields("GET", "/generate/nowhere/else") == (404, "Not Found")
    assert await fields("PUT", "/generate/prompt") == (405, ["code", "message"])
    assert await fields("PUT", "/servers") == (405, ["code", "message"])
    assert await fields("GET", "/remotejobs/v2/jobs") == (405, ["code", "error", "success"])
    assert await fields("GET", "/herder") == (405, ["Action", "X-Reason", "error"])
    assert await fields("GET", "/serverspotting") == (404, ["error"])
