"""The conformance suite's rig around a real Electrum: its payee is two hops away."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

from billing.lightning import BackendRejected, LightningBackend
from billing.lightning.electrum import ElectrumBackend, from_settings
from billing.lightning.simulated.faults import FaultKind
from tests.lightning_rig import hash_of
from tests.regtest.line import Line
from tests.regtest.network import LightningNetwork, Node, until
from tests.regtest.rpc import RpcError

_METHODS = {"pay_invoice": "lnpay", "create_invoice": "add_request", "settlements": "list_requests"}


def electrum_backend(node: Node, url: str | None = None) -> ElectrumBackend:
    return from_settings(url=url or node.url, user=node.rpc.user, password=node.rpc.password)


class ElectrumRig:
    """`go_wrong` with a payment is of the invoice that the worker made last."""

    def __init__(self, network: LightningNetwork) -> None:
        self.network = network
        self._line = Line(network.router.port)
        self._last_hash = ""
        self._late: set[str] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self.backend: LightningBackend

    async def start(self) -> None:
        await self.network.ready()
        await self._line.start()
        self.backend = electrum_backend(self.network.router, self._line.url)

    async def stop(self) -> None:
        for task in self._tasks:
            await task
        await self.backend.aclose()
        await self._line.stop()

    async def pay_us(self, bolt11: str) -> str:
        try:
            return await self.network.client.pay(bolt11)
        except RpcError as error:
            for one in await self.network.client.history():
                if one["payment_hash"] == hash_of(bolt11):
                    return one["preimage"]
            raise BackendRejected("client", "pay_invoice", str(error)) from None

    async def their_invoice(self, amount_msat: int, *, expiry_s: int = 600) -> str:
        bolt11, self._last_hash = await self.network.worker.invoice(amount_msat, expiry_s=expiry_s)
        return bolt11

    async def go_wrong(self, kind: FaultKind, operation: str, *, delay_s: float = 0.0) -> None:
        worker, payment_hash = self.network.worker, self._last_hash
        match kind:
            case FaultKind.DROP_BEFORE:
                self._line.cut_before(_METHODS[operation])
            case FaultKind.DROP_AFTER:
                self._line.cut_after(_METHODS[operation])
            case FaultKind.FAIL:
                await worker.call("refuse_once", payment_hash=payment_hash)
            case FaultKind.HANG:
                await worker.call("hold", payment_hash=payment_hash)
            case FaultKind.FAIL_LATE:
                await worker.call("hold", payment_hash=payment_hash)
                self._late.add(payment_hash)
            case FaultKind.DELAY:
                await worker.call("hold", payment_hash=payment_hash)
                self._tasks.append(asyncio.create_task(self._settle_later(payment_hash, delay_s)))
            case _:
                raise NotImplementedError(kind)

    async def _settle_later(self, payment_hash: str, delay_s: float) -> None:
        await self.network.worker.until_held(payment_hash)
        await asyncio.sleep(delay_s)
        await self.network.worker.resolve(payment_hash, settle=True)

    async def resolve(self, payment_hash: str, *, settle: bool) -> None:
        """Returns when our node knows."""
        await self.network.worker.until_held(payment_hash)
        await self.network.worker.resolve(payment_hash, settle=settle)

        async def known() -> bool:
            node = self.network.router
            channels = await node.call("list_channels")
            out = any(channel["local_unsettled_sent"] for channel in channels)
            invoice = await node.call("get_invoice", invoice_id=payment_hash)
            return not out and invoice["status"] != 4

        await until("the router's node knows the end of the payment", known)

    def now(self) -> datetime:
        return datetime.now(UTC)

    async def pass_time(self, seconds: float) -> None:
        """Time itself does not pass; what was to fail late fails now."""
        while self._late:
            await self.resolve(self._late.pop(), settle=False)

    async def left_msat(self, payment_hash: str) -> int:
        return await self.network.router.sent_msat(payment_hash)

    async def drain(self) -> None:
        raise NotImplementedError

    async def restart(self) -> None:
        raise NotImplementedError

    async def delete_history(self, payment_hash: str) -> None:
        raise NotImplementedError
