"""What the tests of the polling doors share: keys in `apikey`, bodies, waiting for a status."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx

from tests.router_rig import MODEL, PATIENCE_S, Rig

KOBOLD_PROMPT: dict[str, Any] = {
    "prompt": "Once upon a time",
    "username": "Alice",
    "models": [MODEL],
    "params": {"max_length": 64},
}
HORDE_PROMPT: dict[str, Any] = {
    "prompt": "Once upon a time",
    "models": [MODEL],
    "params": {"max_length": 64, "max_context_length": 1024},
}


async def apikey(router: Rig, amount_msat: int = 1_000_000) -> dict[str, str]:
    """A prepaid key as clients of these dialects bring it: 22 characters, without `sk-` (RC-1)."""
    return {"apikey": (await router.key(amount_msat)).removeprefix("sk-")}


async def known_model(router: Rig) -> None:
    """Make the model of the tests known, with nobody there who serves it."""
    async with router.worker():
        pass
    async with asyncio.timeout(PATIENCE_S):
        while router.core.fleet.all():
            await asyncio.sleep(0.02)


async def kobold_prompt(router: Rig, headers: dict[str, str], **changes: Any) -> str:
    reply = await router.http.post(
        "/generate/prompt", json=KOBOLD_PROMPT | changes, headers=headers
    )
    assert reply.status_code == 200, reply.text
    assert set(reply.json()) == {"id"}
    return reply.json()["id"]


async def horde_prompt(router: Rig, headers: dict[str, str], **changes: Any) -> str:
    reply = await router.http.post(
        "/api/v2/generate/text/async", json=HORDE_PROMPT | changes, headers=headers
    )
    assert reply.status_code == 202, reply.text
    return reply.json()["id"]


async def kobold_status(router: Rig, prompt_id: str) -> dict[str, Any]:
    return _json(await router.http.get(f"/generate/prompt/{prompt_id}"))


async def horde_status(router: Rig, request_id: str) -> dict[str, Any]:
    return _json(await router.http.get(f"/api/v2/generate/text/status/{request_id}"))


def _json(reply: httpx.Response) -> dict[str, Any]:
    assert reply.status_code == 200, reply.text
    return reply.json()


async def until_done(router: Rig, request_id: str, *, horde: bool = False) -> dict[str, Any]:
    """Poll, as these clients do, until all answers are there."""
    ask = horde_status if horde else kobold_status
    async with asyncio.timeout(PATIENCE_S):
        while not (status := await ask(router, request_id))["done"]:
            await asyncio.sleep(0.02)
    return status
