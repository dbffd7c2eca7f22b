"""A client that reads a stream while things happen to the routers, and waiting for what must come."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import httpx

from tests.router_rig import MODEL

PATIENCE_S = 20.0
CHAT: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "What happens to me in a crash?"}],
    "max_tokens": 64,
}


async def until(condition: Callable[[], Awaitable[Any]], *, timeout_s: float = PATIENCE_S) -> Any:
    """Wait until `condition()` gives something true, and return it."""
    async with asyncio.timeout(timeout_s):
        while True:
            if found := await condition():
                return found
            await asyncio.sleep(0.02)


class Reader:
    """A client that reads a stream, and remembers what it was shown."""

    def __init__(self, http: httpx.AsyncClient, headers: dict[str, str], **changes: Any) -> None:
        self.text = ""
        self.done = False
        self.errors: list[dict[str, Any]] = []
        self.at_done: Callable[[], Awaitable[None]] | None = None
        self._body = CHAT | {"stream": True} | changes
        self.task = asyncio.create_task(self._read(http, headers))

    async def _read(self, http: httpx.AsyncClient, headers: dict[str, str]) -> None:
        async with http.stream(
            "POST", "/v1/chat/completions", json=self._body, headers=headers
        ) as reply:
            assert reply.status_code == 200, await reply.aread()
            async for line in reply.aiter_lines():
                if line == "data: [DONE]":
                    self.done = True
                    if self.at_done:
                        await self.at_done()
                elif line.startswith("data: "):
                    self._take(json.loads(line.removeprefix("data: ")))

    def _take(self, chunk: dict[str, Any]) -> None:
        if "error" in chunk:
            self.errors.append(chunk["error"])
        for choice in chunk.get("choices", ()):
            self.text += choice["delta"].get("content") or ""

    async def until_shown(self, text: str) -> None:
        async def shown() -> bool:
            return self.text == text

        await until(shown)
