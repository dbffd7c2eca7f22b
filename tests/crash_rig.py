"""The parts of Satherd as processes of their own, so that each can be killed alone and started again.

    network    the simulated Lightning network        python -m billing.lightning.simulated
    router     the router, with PostgreSQL inside     python -m cli.main router
    postgres   its postmaster, which the router's supervisor starts again
    worker     a worker with the echo engine          python -m worker.main

`kill` is SIGKILL: nobody gets to tidy up. State lives in one folder and outlives every process.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import asyncpg
import httpx

from tests.ports import free_port

START_S = 60.0
REPOSITORY = Path(__file__).parent.parent
ADMIN_TOKEN = "crash-test-admin-token"


class Part:
    """One process. `healthy` says whether it does its work; output goes to `NAME.log`."""

    def __init__(
        self,
        name: str,
        folder: Path,
        argv: list[str],
        environment: dict[str, str],
        healthy: Callable[[], Any],
    ) -> None:
        self.name = name
        self.kills = 0
        self._log = folder / f"{name}.log"
        self._argv = argv
        self._environment = environment
        self._healthy = healthy
        # What starts it elsewhere than here: a command before its own.
        self.inside: list[str] = []
        # Not asyncio's: a part outlives the event loop of the test that started it.
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    async def start(self) -> None:
        """Start it, without waiting until it is healthy."""
        assert not self.running
        self._process = self._spawn()

    def _spawn(self) -> subprocess.Popen[bytes]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("SATHERD_")}
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [*self.inside, *dying_with_us(), sys.executable, *self._argv],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._log.parent,
                env={
                    **inherited,
                    "PYTHONPATH": str(REPOSITORY),
                    "PYTHONUNBUFFERED": "1",
                    **self._environment,
                },
            )

    async def until_healthy(self) -> None:
        """Raises AssertionError when it ends by itself, or is not healthy in time."""
        try:
            async with asyncio.timeout(START_S):
                while not await self._healthy():
                    assert self.running, f"{self.name} ended: {self.tail()}"
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise AssertionError(f"{self.name} is not up: {self.tail()}") from None

    async def kill(self) -> None:
        """SIGKILL, and wait until the kernel has taken it."""
        if self._process is not None and self.running:
            self.kills += 1
            self._process.kill()
            await asyncio.to_thread(self._process.wait)

    async def ended(self) -> int:
        """Wait until it ends by itself: its exit status. One that does not is killed."""
        assert self._process is not None
        try:
            return await asyncio.to_thread(self._process.wait, START_S / 3)
        except subprocess.TimeoutExpired:
            await self.kill()
            raise AssertionError(f"{self.name} did not end: {self.tail()}") from None

    async def stop(self) -> None:
        """SIGTERM, and SIGKILL if it does not listen."""
        if self._process is None or not self.running:
            return
        self._process.terminate()
        try:
            await asyncio.to_thread(self._process.wait, 20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)

    def tail(self, characters: int = 3000) -> str:
        return self._log.read_text(errors="replace")[-characters:] if self._log.exists() else ""

    def log_text(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""


def dying_with_us() -> list[str]:
    """A prefix that lets Linux kill a part when the test run is killed."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL"] if setpriv else []


async def answers(url: str) -> bool:
    """Whether an HTTP server says yes at `url`."""
    try:
        async with httpx.AsyncClient(timeout=2, trust_env=False) as http:
            return (await http.get(url)).status_code == 200
    except httpx.HTTPError:
        return False


def network_part(folder: Path, port: int) -> Part:
    """The simulated Lightning network, with its state in `folder`."""
    argv = ["-m", "billing.lightning.simulated"]
    argv += ["--data-dir", str(folder / "lightning"), "--port", str(port)]
    return Part("network", folder, argv, {}, lambda: answers(f"http://127.0.0.1:{port}/health"))


def router_part(
    folder: Path,
    *,
    port: int,
    host: str = "127.0.0.1",
    network_url: str | None = None,
    database_url: str | None = None,
    name: str = "router",
    **settings: Any,
) -> Part:
    """A router process; without `database_url` it has a PostgreSQL of its own inside, and without
    `network_url` the settings name a real node."""
    given = {
        "host": host,
        "port": port,
        "data_dir": folder / name,
        "lnurl_allow_private": "true",
        "admin_token": ADMIN_TOKEN,
        "rate_limits": "off",
        "lease_s": 5,
        "payout_threshold_msat": 20_000,
        "payout_interval_s": 1,
        **settings,
    }
    if network_url is not None:
        given["simulated_url"] = network_url
    if database_url is not None:
        given["database_url"] = database_url
    environment = {f"SATHERD_{name.upper()}": str(value) for name, value in given.items()}
    argv = ["-m", "cli.main", "router"]
    url = f"http://{host}:{port}/info"
    return Part(name, folder, argv, environment, lambda: answers(url))


def worker_part(
    folder: Path,
    *,
    router_url: str,
    network_url: str,
    token_s: float = 0.02,
    name: str = "worker",
) -> Part:
    """A worker with the echo engine, paid at a wallet of the simulated network. `router_url`: of one
    router, or of several, comma separated."""
    environment = {
        "SATHERD_ROUTER_URL": router_url,
        "SATHERD_DATA_DIR": str(folder / name),
        "SATHERD_ENGINE": "echo",
        "SATHERD_SLOTS": "4",
        "SATHERD_ECHO_TOKEN_S": str(token_s),
        "SATHERD_LN_URL": f"{WORKER_WALLET}@{network_url.removeprefix('http://')}",
        "SATHERD_RECONNECT_MAX_S": "0.5",
    }

    async def registered() -> bool:
        try:
            async with httpx.AsyncClient(timeout=2, trust_env=False) as http:
                models = (
                    (await http.get(f"{router_url.split(',')[0]}/info")).json().get("models", [])
                )
        except (httpx.HTTPError, ValueError):
            return False
        return any(model["workers"] for model in models)

    return Part(name, folder, ["-m", "worker.main"], environment, registered)


WORKER_WALLET = "worker"


class CrashRig:
    """All four parts. Names of victims are those at the top of this file."""

    victims = ("router", "postgres", "worker", "network")

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.network_url = f"http://127.0.0.1:{(network_port := free_port())}"
        self.url = f"http://127.0.0.1:{(router_port := free_port())}"
        self.network = network_part(folder, network_port)
        self.router = router_part(folder, port=router_port, network_url=self.network_url)
        self.worker = worker_part(folder, router_url=self.url, network_url=self.network_url)
        self.postgres_kills = 0

    @property
    def parts(self) -> dict[str, Part]:
        return {part.name: part for part in (self.network, self.router, self.worker)}

    @property
    def urls(self) -> list[str]:
        return [self.url]

    @property
    def routers(self) -> list[Part]:
        return [self.router]

    @property
    def database_url(self) -> str:
        """Of the PostgreSQL inside the router, while it runs. Raises FileNotFoundError."""
        lines = self._postmaster_file().read_text().splitlines()
        return f"postgresql://satherd@/satherd?host={lines[4]}&port={lines[3]}"

    def _postmaster_file(self) -> Path:
        return self.folder / "router" / "postgres" / "data" / "postmaster.pid"

    async def start(self) -> None:
        for part in self.parts.values():
            await part.start()
            await part.until_healthy()

    def struck(self, victim: str, draw: random.Random) -> list[str]:
        """The parts that fall with a victim."""
        return [victim]

    async def kill(self, victim: str) -> None:
        """SIGKILL to a part; killing what is dead already does nothing."""
        if victim != "postgres":
            await self.parts[victim].kill()
            return
        with suppress(OSError, ValueError, IndexError):
            pid = int(self._postmaster_file().read_text().splitlines()[0])
            # Only a child of our router: the file of a dead server may name anybody.
            if "postgres" in Path(f"/proc/{pid}/cmdline").read_text().split("\0")[0]:
                os.kill(pid, signal.SIGKILL)
                self.postgres_kills += 1

    async def revive(self, victim: str) -> None:
        """Start a killed part again; PostgreSQL is started again by the router."""
        if victim != "postgres" and not self.parts[victim].running:
            await self.parts[victim].start()

    async def until_healthy(self) -> None:
        for name, part in self.parts.items():
            await self.revive(name)
            await part.until_healthy()

    async def stop(self) -> None:
        for part in (self.worker, self.router, self.network):
            await part.stop()

    def kills(self) -> dict[str, int]:
        return {n: p.kills for n, p in self.parts.items()} | {"postgres": self.postgres_kills}

    @asynccontextmanager
    async def database(self) -> AsyncIterator[Any]:
        """A connection of the test's own to the router's database."""
        connection = await asyncpg.connect(self.database_url, timeout=10)
        try:
            yield connection
        finally:
            await connection.close()


@asynccontextmanager
async def running_crash_rig(folder: Path) -> AsyncIterator[CrashRig]:
    """All parts, up and connected; whatever is still alive at the end is stopped."""
    rig = CrashRig(folder)
    try:
        await rig.start()
        yield rig
    finally:
        await rig.stop()
