"""A real LNbits 1.6.2 with its FakeWallet: in CI, and where `SATHERD_TEST_LNBITS=1` asks for it.

It is installed from PyPI into an environment of its own, 270 MB and a minute the first time:
`SATHERD_TEST_LNBITS_VENV`, or `.cache/lnbits-1.6.2` in the repository. Its invoices look like
mainnet's and no node stands behind them: money moves between its own wallets only.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import sys
from asyncio.subprocess import Process
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.ports import free_port

VERSION = "1.6.2"
# bitstring 5 breaks the bolt11 that it brings along.
_PACKAGES = (f"lnbits=={VERSION}", "bitstring<5")
REPOSITORY = Path(__file__).parent.parent
_PASSWORD = "a password of 20 letters"
_START_TIMEOUT_S = 180.0


@dataclass(frozen=True)
class RealWallet:
    id: str
    key: str
    pay_key: str


def environment() -> Path:
    named = os.environ.get("SATHERD_TEST_LNBITS_VENV")
    return Path(named) if named else REPOSITORY / ".cache" / f"lnbits-{VERSION}"


def wanted() -> bool:
    """A laptop is spared the 270 MB."""
    asked = os.environ.get("SATHERD_TEST_LNBITS")
    return asked == "1" or (asked is None and os.environ.get("CI") == "true")


class RealLnbits:
    """One server at `url`, its state in `data_dir`, so that it can be killed and started again."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self._process: Process | None = None

    async def install(self) -> None:
        """Once; later runs find it there."""
        folder = environment()
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Tests in other processes may want it in the same moment.
        with (folder.parent / f"{folder.name}.lock").open("w") as lock:
            await asyncio.to_thread(fcntl.flock, lock, fcntl.LOCK_EX)
            complete = folder / "complete"
            if complete.exists():
                return
            await _run(sys.executable, "-m", "venv", "--clear", str(folder))
            await _run(str(folder / "bin" / "pip"), "install", "--quiet", *_PACKAGES)
            complete.touch()

    async def start(self) -> None:
        folder = environment()
        # It looks for `lnbits/static` below its working directory.
        [packages] = folder.glob("lib/python*/site-packages")
        self._data_dir.mkdir(parents=True, exist_ok=True)
        # A session of its own, since it leaves a child behind when only the parent is stopped.
        self._process = await asyncio.create_subprocess_exec(
            str(folder / "bin" / "lnbits"),
            *("--host", "127.0.0.1", "--port", str(self._port)),
            cwd=packages,
            env=os.environ
            | {
                "LNBITS_DATA_FOLDER": str(self._data_dir),
                "LNBITS_BACKEND_WALLET_CLASS": "FakeWallet",
                "LNBITS_ADMIN_UI": "true",
            },
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )
        async with asyncio.timeout(_START_TIMEOUT_S), httpx.AsyncClient(trust_env=False) as http:
            while True:
                with contextlib.suppress(httpx.RequestError):
                    answer = await http.get(f"{self.url}/api/v1/health")
                    if answer.status_code in (200, 307):
                        return
                assert self._process.returncode is None, "LNbits has ended by itself"
                await asyncio.sleep(0.2)

    async def kill(self) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()

    async def wallets(self, *credits_sat: int) -> list[RealWallet]:
        """As many wallets as sums, each of an account of its own and holding that much."""
        async with httpx.AsyncClient(base_url=self.url, trust_env=False, timeout=20) as http:
            install = {
                "username": "admin",
                "password": _PASSWORD,
                "password_repeat": _PASSWORD,
            }
            answer = await http.put("/api/v1/auth/first_install", json=install)
            token = {"Authorization": f"Bearer {answer.json()['access_token']}"}
            found = []
            for credit_sat in credits_sat:
                made = (await http.post("/api/v1/account", json={"name": "wallet"})).json()
                found.append(RealWallet(made["id"], made["inkey"], made["adminkey"]))
                if credit_sat:
                    credit = {"id": made["id"], "amount": credit_sat}
                    answer = await http.put("/users/api/v1/balance", json=credit, headers=token)
                    assert answer.json() == {"success": True, "message": "Balance updated."}
            return found


async def _run(*command: str) -> None:
    process = await asyncio.create_subprocess_exec(*command)
    assert await process.wait() == 0, command[0]
