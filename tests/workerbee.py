"""Stand-ins for QueenBee's workers: the wiki's, and workerbee 0.3.1 (QB-W*, QB-P*).

They are not those programs: they send what the programs send, with the client library and the limits
that they have, and the test decides what their models say.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from coincurve import PrivateKey
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from tests.router_rig import PATIENCE_S, Rig

# A repository as people ask for it (QB-W6), and another of seventy billion parameters.
SMALL = "TheBloke/CoolModelv2-7B:Q4_K_M"
LARGE = "TheBloke/Llama-2-70B-chat-GGUF:Q4_K_M"
CARD = {"name": "NVIDIA GeForce RTX 3090", "memory": 24576.0}


def wiki_registration(ln_url: str | None = None, **changes: Any) -> dict[str, Any]:
    """What the wiki's example sends, in the wiki's units (QB-W3)."""
    registration = {
        "cpu_count": 16,
        "disk_space": 500,
        "vram": 32_000,
        "nv_gpu_count": 1,
        "nv_driver_version": "535.54",
        "nv_gpus": [CARD],
    }
    if ln_url is not None:
        registration["ln_url"] = ln_url
    return registration | changes


def registration_031(
    ln_url: str = "DONT_PAY_ME",
    *,
    key: PrivateKey | None = None,
    gpu: bool = True,
    hex_signature: bool = False,
    **changes: Any,
) -> dict[str, Any]:
    """What workerbee 0.3.1 sends: all keys, signed before the cards are filled in (QB-P3, QB-P9).

    `hex_signature`: as those before it spelled theirs.
    """
    key = key or PrivateKey()
    message: dict[str, Any] = {
        "worker_version": "0.3.1",
        "capabilities": ["llama-infer"],
        "pubkey": base64.urlsafe_b64encode(key.public_key_xonly.format()).decode(),
        "slug": "",
        "ln_url": ln_url,
        "ln_address": ln_url,
        "auth_key": "",
        "cpu_count": 16,
        "disk_space": 500_000,
        "vram": 64_000_000_000,
        "nv_gpu_count": None,
        "nv_driver_version": None,
        "nv_gpus": [],
        "cl_driver_version": None,
        "cl_gpus": [],
        "web_gpus": [],
        "models": [],
    } | changes
    spelled = json.dumps(message, separators=(",", ":"), sort_keys=True, ensure_ascii=False)
    signature = key.sign_schnorr(hashlib.sha256(spelled.encode()).digest(), b"")
    spelled_out = base64.urlsafe_b64encode(signature).decode()
    message["sig"] = signature.hex() if hex_signature else spelled_out
    if gpu:
        cards = [CARD | {"uuid": "GPU-1", "clock": 1700, "clock_unit": "MHz"}]
        message |= {"nv_gpu_count": 1, "nv_driver_version": "535.54", "nv_gpus": cards}
    return message


class WorkerBee:
    """A connected worker; it says nothing but what the test lets it say."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket

    async def send(self, frame: Any) -> None:
        await self.socket.send(json.dumps(frame))

    async def job(self) -> tuple[str, dict[str, Any]]:
        """The next job. Anything else that the router sent would be an error to the worker (RC-5)."""
        frame = json.loads(await asyncio.wait_for(self.socket.recv(), PATIENCE_S))
        assert frame.keys() == {"openai_url", "openai_req"}, frame
        return frame["openai_url"], frame["openai_req"]

    async def nothing(self, for_s: float = 0.3) -> None:
        """Make sure that no job comes for a while."""
        try:
            frame = await asyncio.wait_for(self.socket.recv(), for_s)
        except TimeoutError:
            return
        raise AssertionError(f"unexpected: {frame!r}")

    async def closed(self) -> tuple[int, str]:
        """Wait until the router has closed the socket: its code and reason."""
        try:
            frame = await asyncio.wait_for(self.socket.recv(), PATIENCE_S)
        except ConnectionClosed as gone:
            assert gone.rcvd is not None
            return gone.rcvd.code, gone.rcvd.reason
        raise AssertionError(f"unexpected: {frame!r}")

    async def chunk(self, text: str) -> None:
        await self.send(chunk({"content": text}))

    async def stream(self, *texts: str, reason: str = "stop", end: bool = True) -> None:
        """An answer in the frames of QB-P13."""
        await self.send(chunk({"role": "assistant"}))
        for text in texts:
            await self.chunk(text)
        await self.send(chunk({}, reason))
        if end:
            await self.send({})

    async def answer(self, text: str, *, tokens: int = 3) -> None:
        """An answer in the one frame of QB-P12, as the wiki has it (QB-W5)."""
        message = {"role": "assistant", "content": text}
        await self.send(
            {
                "choices": [{"message": message, "finish_reason": "stop", "index": 0}],
                "usage": {
                    "prompt_tokens": 9,
                    "completion_tokens": tokens,
                    "total_tokens": 9 + tokens,
                },
            }
        )


def chunk(delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
    """One event of the llama server's stream, without usage (QB-P13)."""
    return {
        "id": "chatcmpl-1",
        "model": SMALL,
        "created": 1,
        "object": "chat.completion.chunk",
        "choices": [{"index": 0, "delta": delta, "finish_reason": reason}],
    }


@asynccontextmanager
async def workerbee(
    router: Rig, registration: dict[str, Any] | None = None, *, welcome: bool = True
) -> AsyncIterator[WorkerBee]:
    """A connected worker that has sent its registration (the wiki's, without another), and that is
    let in, unless it is not welcome."""
    before = list(router.core.gate.sessions.values())
    # The limits of its library: frames of 1 MiB, and its pings (QB-P1, QB-P2).
    url = router.url.replace("http", "ws") + "/worker"
    async with connect(url, max_size=1 << 20, ping_interval=10, ping_timeout=120) as socket:
        worker = WorkerBee(socket)
        await worker.send(registration or wiki_registration())
        async with asyncio.timeout(PATIENCE_S):
            # Nothing tells it, so nothing tells the test.
            while welcome and all(s in before for s in router.core.gate.sessions.values()):
                await asyncio.sleep(0.01)
        yield worker


async def registered(router: Rig, count: int = 1) -> list[Any]:
    """Wait until so many workers are in: those."""
    async with asyncio.timeout(PATIENCE_S):
        while len(router.core.fleet.all()) != count:
            await asyncio.sleep(0.01)
    return router.core.fleet.all()
