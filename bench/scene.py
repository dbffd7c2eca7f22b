"""One real router in a process of its own, with a real PostgreSQL and a simulated Lightning network.

    core A   the router, alone
    cores B  PostgreSQL, the simulated network, and this process: workers and clients

On a machine with one core, or without processor affinity (macOS), nothing is pinned, and `pinned`
says so. CPU times are those the system has charged to the router's process, and to PostgreSQL's
processes together.
"""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import httpx
import psutil

from billing.trial_balance import trial_balance
from router.embedded_postgres import EmbeddedPostgres

ADMIN_TOKEN = "bench-admin-token-0123456789"
READY_S = 60.0
STOP_S = 60.0
TOPUP_MSAT = 2_000_000_000
_UNLIMITED = "1000000000"


@dataclass(frozen=True, slots=True)
class Usage:
    """Processor time used so far, in seconds, and when that was."""

    at_s: float
    router_s: float
    postgres_s: float
    load_s: float


class Scene:
    """A running router and how to reach it. `lightning_url` is the network's own address."""

    def __init__(
        self,
        url: str,
        lightning_url: str,
        postgres: EmbeddedPostgres,
        router_pid: int,
        *,
        pinned: bool,
    ) -> None:
        assert postgres.pid is not None
        self.url = url
        self.lightning_url = lightning_url
        self.database_url = postgres.url
        self.router_pid = router_pid
        self.pinned = pinned
        self._router = psutil.Process(router_pid)
        self._postgres = psutil.Process(postgres.pid)
        self.http = httpx.AsyncClient(base_url=url, timeout=30, trust_env=False)
        self.lightning = httpx.AsyncClient(base_url=lightning_url, timeout=30, trust_env=False)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @property
    def worker_url(self) -> str:
        return self.url.replace("http", "ws", 1) + "/worker"

    @property
    def ln_host(self) -> str:
        return self.lightning_url.removeprefix("http://")

    def usage(self) -> Usage:
        """What router, database and this process have used up to now."""
        mine = self._router.cpu_times()
        server = self._postgres.cpu_times()
        postgres_s = server.user + server.system + server.children_user + server.children_system
        for child in self._postgres.children(recursive=True):
            try:
                times = child.cpu_times()
            except psutil.NoSuchProcess:
                continue
            postgres_s += times.user + times.system
        return Usage(time.perf_counter(), mine.user + mine.system, postgres_s, time.process_time())

    def memory_bytes(self) -> int:
        """Memory that is the router's alone."""
        return self._router.memory_full_info().uss

    async def key(self) -> str:
        """A prepaid key with plenty of money, bought as every client buys one."""
        made = (await self.http.post("/balance/topups", json={"amount_msat": TOPUP_MSAT})).json()
        preimage = await self.pay(made["invoice"])
        shown = await self.http.get(
            f"/balance/topups/{made['payment_hash']}",
            headers={"Authorization": f"L402 {made['l402_token']}:{preimage}"},
        )
        return shown.raise_for_status().json()["key"]

    async def pay(self, invoice: str) -> str:
        """Pay at the simulated network, past the router; returns the preimage."""
        reply = await self.lightning.post("/v1/pay", json={"invoice": invoice})
        return reply.raise_for_status().json()["preimage"]

    async def books_in_order(self) -> bool:
        """Whether all money is where it should be, seen in one snapshot."""
        connection = await asyncpg.connect(self.database_url)
        try:
            async with connection.transaction(isolation="repeatable_read"):
                return (await trial_balance(connection)).in_order
        finally:
            await connection.close()


@asynccontextmanager
async def scene(
    *, throw_away: bool, pin: bool = True, more_settings: dict[str, str] | None = None
) -> AsyncIterator[Scene]:
    """Start everything, yield, stop everything. `throw_away`: a PostgreSQL that does not fsync."""
    logging.getLogger("httpx").setLevel(logging.WARNING)
    async with AsyncExitStack() as stack:
        folder = passable(stack.enter_context(tempfile.TemporaryDirectory(prefix="satherd-bench-")))
        router_cores = part_cores(stack) if pin else None
        postgres = EmbeddedPostgres(folder / "postgres", throw_away=throw_away)
        await stack.enter_async_context(postgres)
        lightning, lightning_url = await _child(
            ["billing.lightning.simulated", "--data-dir", str(folder / "lightning"), "--port", "0"],
            {},
            folder / "lightning.log",
        )
        stack.push_async_callback(_stop, lightning)
        settings = {
            "SATHERD_DATA_DIR": str(folder / "router"),
            "SATHERD_DATABASE_URL": postgres.url,
            "SATHERD_SIMULATED_URL": lightning_url,
            "SATHERD_LNURL_ALLOW_PRIVATE": "true",
            "SATHERD_ADMIN_TOKEN": ADMIN_TOKEN,
            "SATHERD_PORT": "0",
            # The limits count as usual; they are only too high to be met.
            "SATHERD_JOBS_PER_MINUTE": _UNLIMITED,
            "SATHERD_INVOICES_PER_MINUTE": _UNLIMITED,
            **(more_settings or {}),
        }
        log_path = folder / "router.log"
        router, url = await _child(["cli.main", "router"], settings, log_path, router_cores)
        stack.push_async_callback(_stop, router)
        made = Scene(url, lightning_url, postgres, router.pid, pinned=bool(router_cores))
        stack.push_async_callback(made.http.aclose)
        stack.push_async_callback(made.lightning.aclose)
        yield made


def passable(folder: str) -> Path:
    """The folder, opened for PostgreSQL, which may run as another user and has to pass through."""
    path = Path(folder)
    path.chmod(0o711)
    return path


def _end_of(log_path: Path) -> str:
    return log_path.read_text()[-2000:]


def part_cores(stack: AsyncExitStack) -> set[int] | None:
    """Keep this process, and the children it will have, off the core for the router."""
    if not hasattr(os, "sched_setaffinity"):
        return None
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        return None
    os.sched_setaffinity(0, cores[1:])
    stack.callback(os.sched_setaffinity, 0, cores)
    return {cores[0]}


async def _child(
    module: list[str], settings: dict[str, str], log_path: Path, cores: set[int] | None = None
) -> tuple[asyncio.subprocess.Process, str]:
    """Start `python -m MODULE …` and wait until it says where it is. Raises RuntimeError."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("SATHERD_")}
    with log_path.open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            *module,
            env=inherited | settings,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
        )
    if cores:
        # At once, so that every thread it starts will be there, too.
        os.sched_setaffinity(process.pid, cores)
    assert process.stdout is not None
    async with asyncio.timeout(READY_S):
        while line := (await process.stdout.readline()).decode():
            if line.startswith("ready: "):
                return process, line.split()[1]
    raise RuntimeError(f"{module[0]} did not start:\n{_end_of(log_path)}")


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.terminate()
    try:
        await asyncio.wait_for(process.wait(), STOP_S)
    except TimeoutError:
        process.kill()
        await process.wait()
