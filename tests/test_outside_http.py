"""Asking strangers' servers: real loopback ones, and a pretended Internet for the strict rules."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from collections.abc import AsyncIterator

import pytest

from billing.outside_http import OutsideHttp, OutsideLimits
from billing.outside_url import OutsideRules
from tests.loopback_http import Loopback, Request, http, silence
from tests.outside_tools import (
    PUBLIC,
    QUICK,
    STRICT,
    Names,
    development,
    failure,
    local,
    pretend,
    reply,
    url_of,
)

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

    started = asyncio.get_running_loop().time()
    client = development(resolve=slow, limits=OutsideLimits(resolve_s=0.1))
    assert (await failure(client, url_of("https://pay.example/"))).code == "unreachable"
    assert asyncio.get_running_loop().time() - started < 8


@pytest.mark.parametrize("problem", [OSError(), UnicodeError("label too long"), None])
async def test_a_name_without_an_address_is_unreachable(problem):
    async def broken(host: str, port: int) -> list[str]:
        if problem is not None:
            raise problem
        return []

    error = await failure(development(resolve=broken), url_of("https://pay.example/"))
    assert error.code == "unreachable"


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
        await asyncio.sleep(2.0)
        yield http(302, b"", Location="/next")

    async with Loopback(slow_hop) as server:
        client = development(limits=OutsideLimits(total_s=3.5))
        error = await failure(client, local(server), redirects=2)
    assert error.code == "unreachable"
    assert len(server.requests) == 2
