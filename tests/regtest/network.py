"""Starting, killing and stopping the network; what tests ask of its nodes."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import httpx

from tests.crash_rig import dying_with_us
from tests.ports import free_port
from tests.regtest.programs import Programs
from tests.regtest.rpc import Rpc, RpcError

HERE = Path(__file__).parent
START_S = 60.0
NODES = ("client", "router", "hop", "worker")
CHANNELS = (("client", "router"), ("router", "hop"), ("hop", "worker"))
# Nearly the most that Electrum puts into a channel, and enough on the other side to pay back.
_FUNDING_BTC, _PUSHED_BTC = "0.16", "0.05"
# From this height on bcoin's segwit is active, and the first coinbases may be spent.
_HEIGHT = 440
# Nobody's; only to mine to.
_NOWHERE = "bcrt1qmvds4mtj4xpngqzyg8g4npe44hnwmr8hx27k69"


async def until(what: str, so: Callable[[], Awaitable[Any]], timeout_s: float = START_S) -> None:
    """Ask until the answer is yes; a server that is not up yet is a no."""
    last: object = None
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                try:
                    if last := await so():
                        return
                except (RpcError, httpx.HTTPError, OSError) as error:
                    last = error
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise AssertionError(f"{what} in {timeout_s:.0f} s; last: {last!r}") from None


class Process:
    """One program of the network; its output goes to `NAME.log`."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self._log = folder / f"{name}.log"
        # Not asyncio's: it outlives the event loop of a test.
        self._running: subprocess.Popen[bytes] | None = None

    def start(self, command: Iterable[object], environment: dict[str, str] | None = None) -> None:
        assert not self.running, self.name
        inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        with self._log.open("ab") as log:
            self._running = subprocess.Popen(
                [*dying_with_us(), *(str(part) for part in command)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=inherited | (environment or {}),
            )

    @property
    def running(self) -> bool:
        return self._running is not None and self._running.poll() is None

    def kill(self) -> None:
        """SIGKILL, and wait until the kernel has taken it."""
        if self._running is not None:
            self._running.kill()
            self._running.wait()

    def tail(self) -> str:
        return self._log.read_text(errors="replace")[-2000:] if self._log.exists() else ""


class Node:
    """An Electrum daemon. `keeps_files`: it can be killed and started again."""

    def __init__(self, name: str, folder: Path, programs: Programs, *, keeps_files: bool) -> None:
        self.name = name
        self.keeps_files = keeps_files
        self.port, self.listens_at = free_port(), f"127.0.0.1:{free_port()}"
        self.url = f"http://127.0.0.1:{self.port}"
        self.rpc = Rpc(self.url, "user", "password-of-a-test")
        self._folder = folder / name
        self._programs = programs
        self._process = Process(f"node-{name}", folder)

    def configure(self, server_port: int) -> None:
        folder = self._folder / "regtest"
        folder.mkdir(parents=True)
        config = {
            "config_version": 3,
            "rpcuser": self.rpc.user,
            "rpcpassword": self.rpc.password,
            "rpchost": "127.0.0.1",
            "rpcport": self.port,
            "server": f"127.0.0.1:{server_port}:t",
            "oneserver": True,
            "auto_connect": False,
            "check_updates": False,
            "use_gossip": True,
            "lightning_forward_payments": True,
            "lightning_listen": self.listens_at,
        }
        (folder / "config").write_text(json.dumps(config))

    def start(self) -> None:
        program = (self._programs.electrum_python, HERE / "electrum_node.py")
        self._process.start(
            [*program, "--regtest", "-D", self._folder, "daemon"],
            {} if self.keeps_files else {"REGTEST_NO_FILES": "1"},
        )

    async def create(self) -> None:
        await until(f"{self.name} answers", lambda: self.call("ping"))
        await self.call("create", encrypt_file=False)
        await self.call("load_wallet")

    async def call(self, method: str, **params: Any) -> Any:
        return await self.rpc.call(method, params)

    @property
    def running(self) -> bool:
        return self._process.running

    def kill(self) -> None:
        assert self.keeps_files, f"{self.name} would forget its channels"
        self._process.kill()

    def stop(self) -> None:
        self._process.kill()

    async def revive(self) -> None:
        """Start it again after a kill, with its wallet; channels come back a moment later."""
        if not self._process.running:
            self.start()
        await until(f"{self.name} answers", lambda: self.call("ping"))
        await self.call("load_wallet")

    async def ready(self) -> None:
        await until(f"the channels of {self.name} are up", self.has_good_channels)

    async def has_good_channels(self) -> bool:
        channels = await self.call("list_channels")
        states = {(channel["state"], channel["peer_state"]) for channel in channels}
        return states == {("OPEN", "GOOD")}

    async def invoice(
        self, amount_msat: int, *, memo: str = "a test", expiry_s: int = 3600, hold: bool = False
    ) -> tuple[str, str]:
        """The invoice and its payment hash."""
        made = await self.call(
            "add_invoice", amount_msat=amount_msat, memo=memo, expiry=expiry_s, hold=hold
        )
        return made["bolt11"], made["payment_hash"]

    async def pay(self, bolt11: str) -> str:
        """The preimage. Raises RpcError, also where it did not succeed."""
        paid = await self.call("lnpay", invoice=bolt11)
        if not paid["success"]:
            raise RpcError(f"lnpay: {paid}")
        return paid["preimage"]

    async def until_held(self, payment_hash: str) -> None:
        """Wait for the HTLC of a held invoice."""
        state = await self.call("wait_invoice", payment_hash=payment_hash, timeout=START_S)
        assert state == "accepted", state

    async def resolve(self, payment_hash: str, *, settle: bool) -> None:
        await self.call("settle_held" if settle else "cancel_held", payment_hash=payment_hash)

    async def forgive(self) -> None:
        """Forget which channels have failed."""
        await self.call("clear_ln_blacklist")
        await self.call("reset_liquidity_hints")

    async def history(self) -> list[dict[str, Any]]:
        """Payments that have settled: `amount_msat` is negative, fee included, where it was sent."""
        return [one for one in await self.call("lightning_history") if one["type"] == "payment"]

    async def sent_msat(self, payment_hash: str) -> int:
        """What left for that hash, the fee not counted."""
        return sum(
            -one["amount_msat"] - (one["fee_msat"] or 0)
            for one in await self.history()
            if one["payment_hash"] == payment_hash
        )

    async def received_msat(self, payment_hash: str) -> int:
        return sum(
            one["amount_msat"]
            for one in await self.history()
            if one["payment_hash"] == payment_hash
        )

    def tail(self) -> str:
        return self._process.tail()


class LightningNetwork:
    """All of it. `files`: the nodes that keep their wallet files, and so can be killed."""

    def __init__(self, folder: Path, programs: Programs, *, files: Iterable[str] = ()) -> None:
        self.folder = folder
        self.programs = programs
        self._chain_rpc = Rpc(f"http://127.0.0.1:{free_port()}", "x", "chain-key")
        self._chain = Process("chain", folder)
        self._electrumx = Process("electrumx", folder)
        self._electrumx_port = free_port()
        self.nodes = {
            name: Node(name, folder, programs, keeps_files=name in set(files)) for name in NODES
        }

    @property
    def client(self) -> Node:
        return self.nodes["client"]

    @property
    def router(self) -> Node:
        return self.nodes["router"]

    @property
    def hop(self) -> Node:
        return self.nodes["hop"]

    @property
    def worker(self) -> Node:
        return self.nodes["worker"]

    async def start(self) -> None:
        try:
            await self._start_chain()
            for node in self.nodes.values():
                node.configure(self._electrumx_port)
                node.start()
            for node in self.nodes.values():
                await node.create()
            await self._fund()
            await self._open_channels()
        except (AssertionError, RpcError) as error:
            tails = "\n".join(node.tail() for node in self.nodes.values())
            self.stop()
            raise AssertionError(f"the network does not start: {error}\n{tails}") from error

    async def _start_chain(self) -> None:
        rpc_port = self._chain_rpc.url.rpartition(":")[2]
        bcoin = self.programs.modules / "bcoin"
        self._chain.start(
            [self.programs.node, HERE / "chain.js", bcoin, rpc_port, self._chain_rpc.password],
            {"NODE_BACKEND": "js"},
        )
        await until("the chain answers", self._height_known)
        data = self.folder / "electrumx"
        data.mkdir()
        self._electrumx.start(
            [self.programs.electrumx],
            {
                "COIN": "Bitcoin",
                "NET": "regtest",
                "DB_DIRECTORY": str(data),
                "DB_ENGINE": "leveldb",
                "ALLOW_ROOT": "1",
                "DAEMON_URL": f"http://x:{self._chain_rpc.password}@127.0.0.1:{rpc_port}",
                "SERVICES": f"tcp://127.0.0.1:{self._electrumx_port}",
                # In ms; 5 s by default.
                "DAEMON_POLL_INTERVAL_BLOCKS": "100",
                "DAEMON_POLL_INTERVAL_MEMPOOL": "100",
                "PEER_DISCOVERY": "off",
                "PEER_ANNOUNCE": "",
                "COST_SOFT_LIMIT": "0",
                "COST_HARD_LIMIT": "0",
            },
        )

        async def listening() -> bool:
            _, writer = await asyncio.open_connection("127.0.0.1", self._electrumx_port)
            writer.close()
            return True

        await until("the Electrum server listens", listening)

    async def _height_known(self) -> bool:
        return await self._height() is not None

    async def _height(self) -> int:
        return await self._chain_rpc.call("getblockcount", [])

    async def mine(self, blocks: int = 1, *, to: str = _NOWHERE) -> None:
        """A node refuses HTLCs when the last block is hours old."""
        await self._chain_rpc.call("generatetoaddress", [blocks, to])

    async def _fund(self) -> None:
        for node in self.nodes.values():
            await until(f"{node.name} is synchronized", lambda n=node: n.call("is_synchronized"))
            await self.mine(2, to=await node.call("getunusedaddress"))
        while await self._height() < _HEIGHT:
            await self.mine(20)

        async def funded(node: Node) -> bool:
            return float((await node.call("getbalance")).get("confirmed", 0)) > 0

        for node in self.nodes.values():
            await until(f"{node.name} has its coins", lambda n=node: funded(n))

    async def _open_channels(self) -> None:
        for payer, payee in CHANNELS:
            await self.nodes[payer].call(
                "open_channel",
                connection_string=await self.nodes[payee].call("nodeid"),
                amount=_FUNDING_BTC,
                push_amount=_PUSHED_BTC,
            )
        await self.mine(6)
        await self.ready()

    async def ready(self) -> None:
        """Every node is up, every channel usable, and old failures forgotten."""
        for node in self.nodes.values():
            if not node.running:
                await node.revive()
        for node in self.nodes.values():
            await node.ready()
            await node.forgive()

    def stop(self) -> None:
        for node in self.nodes.values():
            node.stop()
        self._electrumx.kill()
        self._chain.kill()
