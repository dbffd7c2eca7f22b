"""A worker's wallet as the world has them: a Lightning address at a server that is none of ours."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import httpx

from tests.ports import free_port
from tests.regtest.network import HERE, LightningNetwork, Node, Process, until


@asynccontextmanager
async def lnurl_server(
    network: LightningNetwork,
    node: Node,
    folder: Path,
    *,
    names: Sequence[str] = ("worker",),
    expiry_s: int = 3600,
) -> AsyncIterator[str]:
    """`HOST:PORT` of a server that makes the node's invoices for NAME@HOST:PORT."""
    port = free_port()
    server = Process(f"lnurl-{node.name}", folder)
    programs = network.programs
    server.start(
        [
            *(programs.node, HERE / "lnurl_server.js", programs.modules, port),
            *(node.url, node.rpc.user, node.rpc.password, expiry_s),
            *names,
        ]
    )

    async def answers() -> bool:
        async with httpx.AsyncClient(trust_env=False) as http:
            address = f"http://127.0.0.1:{port}/.well-known/lnurlp/{names[-1]}"
            return (await http.get(address)).status_code == 200

    try:
        await until("the LNURL server answers", answers)
        yield f"127.0.0.1:{port}"
    finally:
        server.kill()
