"""A real router on a real port for tests, with a simulated network, clients that pay, and workers
that do just what a test tells them."""

from __future__ import annotations

import asyncio
import json
import secrets
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from websockets.asyncio.client import ClientConnection, connect

from billing.lightning.simulated.network import Network
from billing.lightning.simulated.serving import NetworkServer
from billing.trial_balance import TrialBalance, trial_balance
from router.app import create_app
from router.bus import Exchange
from router.core import Core
from router.serve import RouterServer
from router.settings import Settings

PATIENCE_S = 10.0
ADMIN_TOKEN = "test-admin-token-0123456789"
MODEL = "test-model"


class AnyRig(ABC):
    """A running router, whatever its Lightning node. `http` is a client of it; `core` are its
    parts; workers are paid at `lnurl_host`."""

    def __init__(self, core: Core, url: str, lnurl_host: str) -> None:
        self.core = core
        self.url = url
        self.lnurl_host = lnurl_host
        self.http = httpx.AsyncClient(base_url=url, timeout=PATIENCE_S, trust_env=False)

    @abstractmethod
    async def pay(self, invoice: str) -> str:
        """A client pays; the preimage."""

    async def key(self, amount_msat: int = 1_000_000) -> str:
        """A prepaid key with a balance, bought like any client buys one."""
        made = (await self.http.post("/balance/topups", json={"amount_msat": amount_msat})).json()
        preimage = await self.pay(made["invoice"])
        credential = {"Authorization": f"L402 {made['l402_token']}:{preimage}"}
        shown = await self.http.get(f"/balance/topups/{made['payment_hash']}", headers=credential)
        assert shown.status_code == 200, shown.text
        return shown.json()["key"]

    async def bearer(self, amount_msat: int = 1_000_000) -> dict[str, str]:
        return {"Authorization": f"Bearer {await self.key(amount_msat)}"}

    async def buy(self, path: str, body: dict[str, Any]) -> tuple[dict[str, str], httpx.Response]:
        """Get a 402, pay it: the headers of the credential, and the 402."""
        challenge = await self.http.post(path, json=body)
        assert challenge.status_code == 402, challenge.text
        due = challenge.json()
        preimage = await self.pay(due["invoice"])
        return {"Authorization": f"L402 {due['l402_token']}:{preimage}"}, challenge

    async def books(self) -> TrialBalance:
        async with self.core.database.transaction("repeatable_read") as connection:
            return await trial_balance(connection)

    async def query(self, sql: str, *values: Any) -> list[Any]:
        async with self.core.database.connection() as connection:
            return await connection.fetch(sql, *values)

    @asynccontextmanager
    async def worker(self, **options: Any) -> AsyncIterator[ScriptedWorker]:
        """A worker of which the test decides every frame."""
        async with connect(self.url.replace("http", "ws") + "/worker", max_size=None) as socket:
            worker = ScriptedWorker(socket, self.lnurl_host, **options)
            await worker.register()
            yield worker


class Rig(AnyRig):
    """On a simulated network."""

    def __init__(self, core: Core, url: str, network: Network, lnurl_host: str) -> None:
        super().__init__(core, url, lnurl_host)
        self.network = network

    async def pay(self, invoice: str) -> str:
        paid = await self.http.post("/simulated/pay", json={"invoice": invoice})
        assert paid.status_code == 200, paid.text
        return paid.json()["preimage"]


class ScriptedWorker:
    """Speaks `satherd/1` frame by frame."""

    def __init__(
        self,
        socket: ClientConnection,
        lnurl_host: str,
        *,
        slots: int = 1,
        key: str | None = None,
        models: list[dict[str, Any]] | None = None,
        ln_url: str | None = "worker",
        min_fees: dict[str, dict[str, int]] | None = None,
        holding: list[dict[str, Any]] | None = None,
    ) -> None:
        self.socket = socket
        self.key = key or secrets.token_hex(32)
        self.registered: dict[str, Any] = {}
        self._registration = {
            "protocol": "satherd/1",
            "worker_key": self.key,
            "slots": slots,
            "models": models
            or [{"id": MODEL, "kind": "text", "context_length": 2048, "max_tokens": 1024}],
        }
        if min_fees is not None:
            self._registration["min_fees"] = min_fees
        if holding is not None:
            self._registration["holding"] = holding
        if ln_url is not None:
            self._registration["ln_url"] = ln_url if "@" in ln_url else f"{ln_url}@{lnurl_host}"

    async def register(self) -> None:
        await self.send(self._registration)
        self.registered = await self.receive()
        assert self.registered["type"] == "registered", self.registered

    @property
    def id(self) -> str:
        return self.registered["worker_id"]

    async def send(self, frame: dict[str, Any]) -> None:
        await self.socket.send(json.dumps(frame))

    async def receive(self) -> dict[str, Any]:
        return json.loads(await asyncio.wait_for(self.socket.recv(), PATIENCE_S))

    async def job(self) -> dict[str, Any]:
        """The next job that is assigned."""
        frame = await self.receive()
        assert frame["type"] == "assign", frame
        return frame

    async def nothing(self, for_s: float = 0.3) -> None:
        """Make sure that no frame comes for a while."""
        try:
            frame = await asyncio.wait_for(self.socket.recv(), for_s)
        except TimeoutError:
            return
        raise AssertionError(f"unexpected: {frame!r}")

    async def say(self, job: dict[str, Any], text: str, *, seq: int = 0, tokens: int = 1) -> None:
        await self.send(
            {
                "type": "chunk",
                "job_id": job["job_id"],
                "attempt": job["attempt"],
                "seq": seq,
                "text": text,
                "tokens": tokens,
            }
        )

    async def finish(
        self, job: dict[str, Any], reason: str = "stop", *, tokens: int | None = None, **more: Any
    ) -> None:
        frame = {
            "type": "finished",
            "job_id": job["job_id"],
            "attempt": job["attempt"],
            "finish_reason": reason,
            **more,
        }
        if tokens is not None:
            frame["usage"] = {"prompt_tokens": 5, "completion_tokens": tokens}
        await self.send(frame)

    async def fail(self, job: dict[str, Any], code: str, *, retryable: bool = True) -> None:
        await self.send(
            {
                "type": "failed",
                "job_id": job["job_id"],
                "attempt": job["attempt"],
                "code": code,
                "message": "as the test wants it",
                "retryable": retryable,
            }
        )

    async def serve(self, text: str = "Hello there.") -> dict[str, Any]:
        """Take the next job and answer it at once."""
        job = await self.job()
        await self.say(job, text, tokens=3)
        await self.finish(job, tokens=3)
        return job


@asynccontextmanager
async def running_network(
    folder: Path, *, host: str = "127.0.0.1"
) -> AsyncIterator[tuple[Network, str]]:
    """A fresh simulated network, and its URL."""
    network = await Network.open(folder / "network")
    lightning = NetworkServer(network, host=host, port=0)
    await lightning.start()
    try:
        yield network, lightning.url
    finally:
        await lightning.stop()
        await network.aclose()


@asynccontextmanager
async def running_router(
    folder: Path,
    database_url: str,
    network: Network,
    network_url: str,
    *,
    exchange: Exchange | None = None,
    **settings: Any,
) -> AsyncIterator[Rig]:
    """A router with its state in `folder`, on a simulated network that is there."""
    given = {
        "data_dir": folder / "router",
        "database_url": database_url,
        "simulated_url": network_url,
        "lnurl_allow_private": True,
        "admin_token": ADMIN_TOKEN,
        "rate_limits": "off",
        "drain_s": 0.5,
        "payout_threshold_msat": 1_000_000,
    } | settings
    app = create_app(
        Settings(_env_file=None, **given),  # pyright: ignore[reportCallIssue]
        exchange=exchange,
    )
    server = RouterServer(app, host="127.0.0.1", port=0)
    try:
        await server.start()
        rig = Rig(app.state.core, server.url, network, network_url.removeprefix("http://"))
        try:
            yield rig
        finally:
            await rig.http.aclose()
    finally:
        await server.stop()


@asynccontextmanager
async def running_rig(folder: Path, database_url: str, **settings: Any) -> AsyncIterator[Rig]:
    """A router on a fresh simulated network."""
    async with (
        running_network(folder) as (network, network_url),
        running_router(folder, database_url, network, network_url, **settings) as rig,
    ):
        yield rig
