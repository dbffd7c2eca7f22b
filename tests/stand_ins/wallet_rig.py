"""The conformance suite's rig for wallets that promise little: NWC, LNbits and Electrum."""

from __future__ import annotations

from pathlib import Path

from billing.lightning import LightningBackend
from billing.lightning.electrum import ElectrumBackend
from billing.lightning.electrum_rpc import ElectrumRpc
from billing.lightning.lnbits import LnbitsBackend
from billing.lightning.lnbits_feed import LnbitsFeed
from billing.lightning.node_http import NodeHttp
from billing.lightning.nwc import NwcBackend
from billing.lightning.nwc_link import NwcLink, read_connection
from billing.lightning.simulated.faults import FaultKind
from billing.lightning.simulated.network import Network
from tests.lightning_rig import SimulatedRig
from tests.stand_ins import electrum, lnbits
from tests.stand_ins.core import Disk, NodeCore, Served
from tests.stand_ins.electrum import ElectrumStandIn
from tests.stand_ins.lnbits import LnbitsStandIn
from tests.stand_ins.nwc import NwcStandIn


class NwcRig(SimulatedRig):
    """`options` are those of NwcStandIn. Keys and address outlive a restart of the wallet."""

    def __init__(self, data_dir: Path, **options: object) -> None:
        super().__init__(data_dir, over_http=False)
        self._options = options
        self._earlier: NwcStandIn | None = None
        self.wallet: NwcStandIn
        self.backend: LightningBackend

    async def start(self) -> None:
        self.network = await Network.open(self._data_dir, clock=self._clock)
        await self.network.ensure_wallet("worker")
        self.wallet = NwcStandIn(self.network, **self._options)  # type: ignore[arg-type]
        if self._earlier is not None:
            self.wallet.take_over(self._earlier)
        self._earlier = self.wallet
        await self.wallet.start()
        link = NwcLink(read_connection(self.wallet.uri), clock=self._clock)
        self.backend = NwcBackend(link, clock=self._clock)

    async def stop(self) -> None:
        await self.backend.aclose()
        await self.wallet.stop()
        await self.network.aclose()

    async def go_wrong(self, kind: FaultKind, operation: str, *, delay_s: float = 0.0) -> None:
        if operation == "settlements" and kind is FaultKind.DROP_AFTER:
            self.wallet.settlements_until_drop = 1
        else:
            await super().go_wrong(kind, operation, delay_s=delay_s)


class WalletRig(SimulatedRig):
    """A stand-in over HTTP: `kind` is lnbits or electrum."""

    def __init__(self, data_dir: Path, kind: str, *, version: str = "4.3.4") -> None:
        super().__init__(data_dir, over_http=False)
        self._kind = kind
        self._version = version
        self._disk = Disk()
        self._served: Served
        self.core: NodeCore
        self.lnbits: LnbitsStandIn
        self.electrum: ElectrumStandIn
        self.backend: LightningBackend

    @property
    def url(self) -> str:
        return self._served.url

    async def start(self) -> None:
        self.network = await Network.open(self._data_dir, clock=self._clock)
        await self.network.ensure_wallet("worker")
        self.core = NodeCore(self.network, self._disk)
        self.lnbits = LnbitsStandIn(self.core)
        self.electrum = ElectrumStandIn(self.core, version=self._version)
        stand_in = self.lnbits if self._kind == "lnbits" else self.electrum
        self._served = Served(self.core, stand_in.routes(), port=self._port)
        self._port = self._served.port
        await self._served.start()
        self.backend = self.lnbits_backend() if self._kind == "lnbits" else self.electrum_backend()

    def lnbits_backend(
        self, *, key: str = lnbits.INVOICE_KEY, pay_key: str | None = lnbits.ADMIN_KEY
    ) -> LnbitsBackend:
        receive = NodeHttp("lnbits", self.url, headers={"X-Api-Key": key})
        return LnbitsBackend(
            receive,
            NodeHttp("lnbits", self.url, headers={"X-Api-Key": pay_key}) if pay_key else None,
            feed=LnbitsFeed(receive, f"ws{self.url.removeprefix('http')}/api/v1/ws/{key}"),
            wallet_name="name",
            clock=self._clock,
        )

    def electrum_backend(self, *, password: str = electrum.PASSWORD) -> ElectrumBackend:
        return ElectrumBackend(ElectrumRpc(self.url, electrum.USER, password), clock=self._clock)

    async def stop(self) -> None:
        await self.backend.aclose()
        await self._served.stop()
        await self.network.aclose()

    async def go_wrong(self, kind: FaultKind, operation: str, *, delay_s: float = 0.0) -> None:
        if operation == "settlements" and kind is FaultKind.DROP_AFTER:
            self.core.settlements_until_drop = 1
        else:
            await super().go_wrong(kind, operation, delay_s=delay_s)
