"""The conformance suite's rig for a back end in front of a stand-in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from starlette.routing import BaseRoute

from billing.lightning import LightningBackend
from billing.lightning.cln import ClnBackend
from billing.lightning.lnd import LndBackend
from billing.lightning.node_http import NodeHttp
from billing.lightning.phoenixd import PhoenixdBackend, basic
from billing.lightning.phoenixd_feed import Feed
from billing.lightning.simulated.faults import FaultKind
from billing.lightning.simulated.network import Network
from tests.lightning_rig import SimulatedRig
from tests.stand_ins import cln, lnd, phoenixd
from tests.stand_ins.core import Disk, NodeCore, Served

ROUTES: dict[str, Callable[[NodeCore], list[BaseRoute]]] = {
    "lnd": lnd.routes,
    "cln": cln.routes,
    "phoenixd": phoenixd.routes,
}


class StandInRig(SimulatedRig):
    """`kind` is a key of ROUTES. The back end reaches its node over HTTP, as it would a real one;
    its clock is the node's, so that time passes for both."""

    def __init__(self, data_dir: Path, kind: str) -> None:
        super().__init__(data_dir, over_http=False)
        self._kind = kind
        self._disk = Disk()
        self._served: Served
        self.core: NodeCore

    @property
    def url(self) -> str:
        return self._served.url

    async def start(self) -> None:
        self.network = await Network.open(self._data_dir, clock=self._clock)
        await self.network.ensure_wallet("worker")
        self.core = NodeCore(self.network, self._disk)
        self._served = Served(self.core, ROUTES[self._kind](self.core), port=self._port)
        self._port = self._served.port
        await self._served.start()
        self.backend = self.backend_with()

    def backend_with(
        self, *, receive: str | None = None, pay: str | None = None, url: str | None = None
    ) -> LightningBackend:
        """A back end with these credentials; without any, with the one that may do all."""
        url = url or self.url
        match self._kind:
            case "lnd":
                name, whole = "Grpc-Metadata-macaroon", lnd.MACAROON
            case "cln":
                name, whole = "Rune", cln.RUNE
            case _:
                name, whole = "Authorization", phoenixd.PASSWORD
        receiving, paying = receive or whole, pay or receive or whole
        if self._kind == "phoenixd":
            receiving, paying = basic(receiving), basic(paying)
        clients = [
            NodeHttp(self._kind, url, headers={name: credential})
            for credential in (receiving, paying)
        ]
        match self._kind:
            case "lnd":
                return LndBackend(*clients, preimage_key=b"\x05" * 32, clock=self._clock)
            case "cln":
                return ClnBackend(*clients, clock=self._clock)
            case _:
                feed = Feed("ws" + url.removeprefix("http") + "/websocket", receiving)
                return PhoenixdBackend(*clients, feed=feed, clock=self._clock)

    async def stop(self) -> None:
        await self.backend.aclose()
        await self._served.stop()
        await self.network.aclose()

    async def go_wrong(self, kind: FaultKind, operation: str, *, delay_s: float = 0.0) -> None:
        if operation == "settlements" and kind is FaultKind.DROP_AFTER:
            self.core.settlements_until_drop = 1
        else:
            await super().go_wrong(kind, operation, delay_s=delay_s)
