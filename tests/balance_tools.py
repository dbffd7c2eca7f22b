"""What the tests of the account doors share: buying a balance, asking for it, reading errors."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import httpx

from tests.router_rig import MODEL, AnyRig

CHAT: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Say hello."}],
    "max_tokens": 64,
}


async def topup(
    router: AnyRig, amount_msat: Any = 100_000, headers: dict[str, str] | None = None
) -> dict[str, Any]:
    made = await router.http.post(
        "/balance/topups", json={"amount_msat": amount_msat}, headers=headers
    )
    assert made.status_code == 201, made.text
    return made.json()


async def credential(router: AnyRig, made: dict[str, Any]) -> dict[str, str]:
    """Pay a top-up; the header that proves it."""
    return {"Authorization": f"L402 {made['l402_token']}:{await router.pay(made['invoice'])}"}


async def paid(
    router: AnyRig, amount_msat: int = 100_000
) -> tuple[dict[str, Any], dict[str, str], dict[str, str]]:
    """A paid top-up, its credential, and the key that it shows."""
    made = await topup(router, amount_msat)
    proof = await credential(router, made)
    shown = await router.http.get(f"/balance/topups/{made['payment_hash']}", headers=proof)
    assert shown.status_code == 200, shown.text
    return made, proof, bearer(shown.json()["key"])


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def balance(router: AnyRig, headers: dict[str, str]) -> dict[str, Any]:
    shown = await router.http.get("/balance", headers=headers)
    assert shown.status_code == 200, shown.text
    return shown.json()


def code(reply: httpx.Response) -> tuple[int, str]:
    return reply.status_code, reply.json()["error"]["code"]


async def let_through(ask: Callable[[], Awaitable[httpx.Response]], *, most: int) -> int:
    """How many requests were answered before one was refused as too many.

    A minute that ends meanwhile lets a few more through: the windows are an approximation.
    """
    for count in range(most + 6):
        reply = await ask()
        if reply.status_code == 429:
            assert code(reply) == (429, "too_many_requests")
            assert int(reply.headers["Retry-After"]) > 0
            return count
    raise AssertionError(f"not refused after {most + 6} requests")
