"""The surroundings of a node under test, and the simulated network as the first of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Protocol

from billing import bolt11_codec
from billing.lightning import (
    BackendRejected,
    Invoice,
    LightningBackend,
    PaymentState,
    PaymentStatus,
    Settlement,
)
from billing.lightning.simulated.backend import SimulatedBackend
from billing.lightning.simulated.faults import Fault, FaultKind
from billing.lightning.simulated.network import Network
from billing.lightning.simulated.serving import NetworkServer

ENOUGH_FEE_MSAT = 1_000_000
# Patience only: it is waited out by nothing that goes well.
SOON_S = 20.0


class Rig(Protocol):
    """A node under test, and its surroundings."""

    backend: LightningBackend

    async def pay_us(self, bolt11: str) -> str:
        """Somebody pays our invoice: the preimage they get. Raises BackendRejected if refused."""
        ...

    async def their_invoice(self, amount_msat: int, *, expiry_s: int = 600) -> str:
        """An invoice of somebody whom our node can reach."""
        ...

    async def go_wrong(self, kind: FaultKind, operation: str, *, delay_s: float = 0.0) -> None:
        """The next call of that operation at our node."""
        ...

    async def resolve(self, payment_hash: str, *, settle: bool) -> None:
        """Their node takes the HTLC that it holds, or gives it back."""
        ...

    async def delete_history(self, payment_hash: str) -> None: ...

    def now(self) -> datetime:
        """The nodes' time."""
        ...

    async def pass_time(self, seconds: float) -> None:
        """For the nodes; not for this process."""
        ...

    async def drain(self) -> None:
        """Leave our node with nothing to pay from."""
        ...

    async def restart(self) -> None:
        """Stop our node without ceremony, and start it again with what it had on its disk."""
        ...

    async def left_msat(self, payment_hash: str) -> int:
        """What left our node for that hash, fees not counted: the truth, whatever the node says."""
        ...


class SimulatedRig:
    """A simulated network on disk, reached in process or over HTTP."""

    def __init__(self, data_dir: Path, *, over_http: bool) -> None:
        self._data_dir = data_dir
        self._over_http = over_http
        self._later_s = 0.0
        self._port = 0
        self._server: NetworkServer | None = None
        self.network: Network
        self.backend: LightningBackend

    def _clock(self) -> float:
        return datetime.now(UTC).timestamp() + self._later_s

    def now(self) -> datetime:
        return datetime.fromtimestamp(self._clock(), UTC)

    async def start(self) -> None:
        self.network = await Network.open(self._data_dir, clock=self._clock)
        await self.network.ensure_wallet("worker")
        if self._over_http:
            self._server = NetworkServer(self.network, port=self._port)
            await self._server.start()
            self._port = int(self._server.url.rpartition(":")[2])
            self.backend = SimulatedBackend.over_http(self._server.url)
        else:
            self.backend = SimulatedBackend.in_process(self.network)

    async def stop(self) -> None:
        await self.backend.aclose()
        if self._server is not None:
            await self._server.stop()
        await self.network.aclose()

    async def restart(self) -> None:
        await self.stop()
        await self.start()

    async def pay_us(self, bolt11: str) -> str:
        payer = SimulatedBackend.in_process(self.network, wallet="payer")
        status = await payer.pay_invoice(
            bolt11, max_fee_msat=10**9, timeout_s=SOON_S, max_cltv_blocks=None
        )
        if status.preimage is None:
            raise BackendRejected("payer", "pay_invoice", status.failure_code or "failed")
        return status.preimage

    async def their_invoice(self, amount_msat: int, *, expiry_s: int = 600) -> str:
        invoice = await self.network.create_invoice(
            "worker", amount_msat=amount_msat, description="payout", expiry_s=expiry_s
        )
        return invoice.bolt11

    async def go_wrong(self, kind: FaultKind, operation: str, *, delay_s: float = 0.0) -> None:
        await self.network.script(Fault(kind, operation, delay_s=delay_s))

    async def resolve(self, payment_hash: str, *, settle: bool) -> None:
        # A node may say that a payment is under way a moment before it is.
        async with asyncio.timeout(SOON_S):
            while (ended := await self.network.resolve(payment_hash, settle=settle)) == 0:
                await asyncio.sleep(0.01)
        assert ended == 1

    async def delete_history(self, payment_hash: str) -> None:
        assert await self.network.forget("router", payment_hash) >= 1

    async def pass_time(self, seconds: float) -> None:
        self._later_s += seconds
        await self.network.run_due()

    async def drain(self) -> None:
        for wallet in await self.network.wallets():
            if wallet.name == "router":
                await self.network.fund("router", -wallet.balance_msat)

    async def left_msat(self, payment_hash: str) -> int:
        return await self.network.left_msat("router", payment_hash)


KEYS = count()


async def ask(rig: Rig, amount_msat: int = 21_000, *, expiry_s: int = 600) -> Invoice:
    return await rig.backend.create_invoice(
        amount_msat=amount_msat,
        description="a prompt",
        expiry_s=expiry_s,
        idempotency_key=f"quote-{next(KEYS)}",
    )


async def pay(rig: Rig, bolt11: str, *, timeout_s: float = SOON_S) -> PaymentStatus:
    return await rig.backend.pay_invoice(
        bolt11, max_fee_msat=ENOUGH_FEE_MSAT, timeout_s=timeout_s, max_cltv_blocks=None
    )


def hash_of(bolt11: str) -> str:
    return bolt11_codec.decode(bolt11).payment_hash


def answers(preimage: str | None, payment_hash: str) -> bool:
    return preimage is not None and sha256(bytes.fromhex(preimage)).hexdigest() == payment_hash


async def until(look: Callable[[], Awaitable[PaymentStatus]], state: PaymentState) -> PaymentStatus:
    """Look again until it is so: a node's end of a payment cannot be waited for otherwise."""
    async with asyncio.timeout(SOON_S):
        while (status := await look()).state is not state:
            await asyncio.sleep(0.01)
        return status


async def take(rig: Rig, cursor: str | None, wanted: int) -> list[Settlement]:
    """That many settlements after a cursor, then hang up."""
    taken: list[Settlement] = []
    stream = rig.backend.settlements(cursor)
    async with asyncio.timeout(SOON_S):
        async for settlement in stream:
            taken.append(settlement)
            if len(taken) == wanted:
                break
    await stream.aclose()  # type: ignore[attr-defined]
    return taken


async def beginning(rig: Rig) -> str | None:
    """A cursor from which everything that is settled from now on is streamed.

    For a replayable stream it is that of a first settlement: LND replays nothing without one.
    """
    if rig.backend.capabilities.push != "cursor":
        return None
    first = await ask(rig)
    await rig.pay_us(first.bolt11)
    return (await rig.backend.lookup_invoice(first.payment_hash)).cursor
