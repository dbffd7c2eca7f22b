"""A stranger names an address whose server is hostile: all he gets is one of a few fixed errors.

Nothing of what the server said comes back, neither in the answer nor in the log, and a withdrawal or a
change of address that fails so moves no money (lightning.md 4.5).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from tests.balance_tools import balance, paid
from tests.lnurl_wallet import invoice, serving
from tests.loopback_http import Request, http_json
from tests.router_rig import PATIENCE_S, Rig

CANARY = "CANARY-5521"


def raw(head: str, body: bytes = b"") -> bytes:
    return f"HTTP/1.1 {head}\r\nConnection: close\r\n\r\n".encode() + body


async def endless(_: Request) -> AsyncIterator[bytes]:
    yield b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{"
    while True:
        yield f'"{CANARY}": "'.encode() + b"x" * 65_536
        await asyncio.sleep(0)


def deep(_: Request) -> bytes:
    return raw("200 OK", b'{"a":' + b"[" * 100_000)


def saying(value: Any) -> Callable[[Request], bytes]:
    return lambda _: http_json(value)


HOSTILE: dict[str, Callable[[Request], bytes | AsyncIterator[bytes]]] = {
    "its own words as an error": saying({"status": "ERROR", "reason": f"<b>{CANARY}</b>"}),
    "words of megabytes": saying({"status": "ERROR", "reason": CANARY * 20_000}),
    "a page": lambda _: raw("200 OK", f"<html>{CANARY}</html>".encode()),
    "a failure with a page": lambda _: raw("500 Oops", CANARY.encode()),
    "no end": endless,
    "no depth": deep,
    "no JSON object": saying([CANARY]),
    "not even HTTP": lambda _: f"SSH-2.0-{CANARY}\r\n".encode(),
    "a cookie and a redirect to a file": lambda _: raw(
        f"302 Found\r\nSet-Cookie: a={CANARY}\r\nLocation: file:///etc/passwd"
    ),
    "a redirect to metadata": lambda _: raw(
        "302 Found\r\nLocation: http://169.254.169.254/latest/meta-data/"
    ),
    "a redirect with a password": lambda _: raw(
        f"302 Found\r\nLocation: https://user:{CANARY}@example.com/"
    ),
    "a login": saying({"tag": "login", "k1": CANARY, "callback": "https://example.com"}),
    "a withdrawal": saying({"tag": "withdrawRequest", "k1": CANARY}),
    "amounts of nonsense": saying(
        {
            "tag": "payRequest",
            "minSendable": CANARY,
            "maxSendable": -5,
            "metadata": CANARY,
            "callback": "https://example.com",
        }
    ),
}


def fixed(reply: httpx.Response, what: str) -> dict[str, str]:
    """The error of an answer, which holds nothing but what we have written ourselves."""
    assert reply.status_code == 400, (what, reply.text)
    error = reply.json()["error"]
    assert (
        error.keys() == {"code", "message", "reason"} and error["code"] == "bad_lightning_address"
    )
    assert CANARY not in reply.text and len(reply.text) < 400, what
    assert not any(CANARY in value for value in reply.headers.values())
    return error


async def test_whatever_its_server_says_a_stranger_gets_a_fixed_error(
    router: Rig, caplog: pytest.LogCaptureFixture
):
    """Asked again he is told the same, from memory: the server is not asked again on his behalf."""
    caplog.set_level(logging.DEBUG, "billing")
    for what, answer in HOSTILE.items():
        async with serving() as wallet:
            wallet.first = answer
            asked = {"ln_url": wallet.address}
            told = [
                fixed(await router.http.post("/worker/check-address", json=asked), what)
                for _ in range(2)
            ]
            assert told[0] == told[1], what
            assert wallet.server.connections <= 3, what
    ours = [r.getMessage() for r in caplog.records if r.name.startswith(("billing", "router"))]
    assert CANARY not in "\n".join(ours)


LYING: dict[str, Callable[[int], object]] = {
    "another amount": lambda msat: {"pr": invoice(msat + 1000)},
    "no amount": lambda _: {"pr": invoice(None)},
    "another network": lambda msat: {"pr": invoice(msat, prefix="bc")},
    "no invoice": lambda _: {"pr": CANARY},
    "nothing": lambda _: {},
    "its words": lambda _: {"status": "ERROR", "reason": CANARY},
    "a page": lambda _: raw("200 OK", CANARY.encode()),
    "a redirect": lambda _: raw(f"302 Found\r\nLocation: https://example.com/{CANARY}"),
}


async def test_a_withdrawal_to_a_server_that_lies_moves_no_money(router: Rig):
    _, proof, _ = await paid(router, 1_000_000)
    for what, make in LYING.items():
        async with serving() as wallet:
            wallet.make = make
            order = {"address": wallet.address, "amount_msat": 500_000}
            ordered = await router.http.post("/balance/withdrawals", json=order, headers=proof)
            assert CANARY not in ordered.text, what
            if ordered.status_code == 202:
                async with asyncio.timeout(PATIENCE_S):
                    path = f"/balance/withdrawals/{ordered.json()['id']}"
                    while True:
                        shown = await router.http.get(path, headers=proof)
                        if shown.json()["state"] == "failed":
                            break
                        await asyncio.sleep(0.02)
                assert CANARY not in shown.text, what
            left = await balance(router, proof)
            assert left["balance_msat"] == 1_000_000, what
    assert await router.network.paid_out("router") == []
    assert (await router.books()).in_order
