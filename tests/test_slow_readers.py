"""Clients that do not read what they have bought: they are cut, and nobody else notices."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import pytest

from router import connections
from tests.door_tools import CHAT, until_state
from tests.router_rig import MODEL, PATIENCE_S, Rig

PATH = "/v1/chat/completions"
MODELS = [{"id": MODEL, "kind": "text", "context_length": 1 << 20, "max_tokens": 1 << 17}]
# More than the buffers of both ends hold.
TEXT = "x" * 65_536
TIMES = 120


async def _deaf_client(router: Rig, payer: dict[str, str], body: dict[str, Any]) -> socket.socket:
    """A connection that has asked for an answer and will not read it."""
    deaf = socket.socket()
    deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    deaf.setblocking(False)
    port = int(router.url.rpartition(":")[2])
    await asyncio.get_running_loop().sock_connect(deaf, ("127.0.0.1", port))
    said = json.dumps(body | {"stream": True}).encode()
    head = [f"POST {PATH} HTTP/1.1", "Host: x", f"Content-Length: {len(said)}"]
    head += [f"{name}: {value}" for name, value in payer.items()]
    await asyncio.get_running_loop().sock_sendall(
        deaf, "\r\n".join([*head, "", ""]).encode() + said
    )
    return deaf


async def test_a_client_that_does_not_read_is_cut_and_its_job_stopped(
    router: Rig, monkeypatch: pytest.MonkeyPatch
):
    """What it does not read would stay in memory; the worker is free for those who do."""
    monkeypatch.setattr(connections, "SLOW_READER_S", 0.5)
    payer = await router.bearer(500_000_000)
    async with router.worker(models=MODELS, slots=2) as worker:
        deaf = await _deaf_client(router, payer, CHAT | {"max_tokens": 1 << 17})
        job = await worker.job()
        for seq in range(TIMES):
            await worker.say(job, TEXT, seq=seq)
        stop = await worker.receive()
        assert (stop["type"], stop["job_id"]) == ("cancel", job["job_id"])
        await worker.finish(job, "cancelled")
        row = await until_state(router, job["job_id"], "cancelled")
        assert row["end_reason"] == "client_gone"
        deaf.close()
        reading = asyncio.create_task(router.http.post(PATH, json=CHAT, headers=payer))
        await worker.serve("Still here.")
        reply = await asyncio.wait_for(reading, PATIENCE_S)
        assert reply.json()["choices"][0]["message"]["content"] == "Still here."
    assert (await router.books()).in_order


async def test_a_client_that_reads_slowly_is_not_cut(router: Rig):
    payer = await router.bearer(500_000_000)
    async with router.worker(models=MODELS) as worker:
        slow = await _deaf_client(router, payer, CHAT | {"max_tokens": 1 << 17})
        job = await worker.job()
        for seq in range(TIMES):
            await worker.say(job, TEXT, seq=seq)
        await worker.finish(job, tokens=TIMES)
        got, loop = b"", asyncio.get_running_loop()
        async with asyncio.timeout(3 * PATIENCE_S):
            while not got.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
                more = await loop.sock_recv(slow, 1 << 16)
                assert more, "cut off"
                got += more
        assert got.count(b"x") >= len(TEXT) * TIMES
        slow.close()
