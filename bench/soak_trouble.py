"""What happens to router and nodes during a soak."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable

import httpx

from tests.regtest.network import LightningNetwork
from tests.regtest.router_process import RouterProcess
from tests.regtest.rpc import RpcError

_LONGEST_S = 6.0


class Trouble:
    """One after another, with pauses of `pause_s` on average; a seed gives the same ones again."""

    def __init__(
        self,
        router: RouterProcess,
        network: LightningNetwork,
        chance: random.Random,
        pause_s: float,
    ) -> None:
        self._router = router
        self._network = network
        self._random = chance
        self._pause_s = pause_s
        self.happened: Counter[str] = Counter()

    def words(self) -> str:
        return ", ".join(f"{name} {count}" for name, count in sorted(self.happened.items()))

    async def go_on(self) -> None:
        """For ever; a trouble that has begun is ended also when this is cancelled."""
        acts: list[tuple[int, str, Callable[[], Awaitable[None]]]] = [
            (3, "router killed", self._kill_router),
            (3, "node killed", self._kill_node),
            (2, "both killed", self._kill_both),
            (3, "held", self._hold),
            (2, "refused", self._refuse),
            (1, "worker gone", self._lose_worker),
        ]
        while True:
            await asyncio.sleep(self._random.expovariate(1 / self._pause_s))
            weights = [weight for weight, _, _ in acts]
            [(_, name, act)] = self._random.choices(acts, weights)
            self.happened[name] += 1
            await act()
            # For an hour the router's node would avoid a channel that failed meanwhile.
            await self._network.router.forgive()

    def _moment(self) -> float:
        return self._random.uniform(0, _LONGEST_S)

    async def _kill_router(self) -> None:
        await self._router.kill()
        await asyncio.sleep(self._moment() / 2)
        await self._router.revive_as_the_one()

    async def _kill_node(self) -> None:
        self._network.router.kill()
        await asyncio.sleep(self._moment() / 2)
        await self._network.router.revive()

    async def _kill_both(self) -> None:
        await self._router.kill()
        await self._kill_node()
        await self._router.revive_as_the_one()

    async def _hold(self) -> None:
        await self._mood("hold")
        await asyncio.sleep(self._moment())
        # Half of the time the router or its node dies while an HTLC is held.
        if self._random.random() < 0.5:
            await self._random.choice((self._kill_router, self._kill_node))()
        await self._mood("take")
        await self._let_go()

    async def _refuse(self) -> None:
        await self._mood("refuse")
        await asyncio.sleep(self._moment())
        await self._mood("take")

    async def _lose_worker(self) -> None:
        self._network.worker.kill()
        await asyncio.sleep(self._moment())
        await self._network.worker.revive()
        await self._network.worker.ready()

    async def _mood(self, mood: str) -> None:
        await self._network.worker.call("set_mood", mood=mood)

    async def _let_go(self) -> None:
        for payment_hash in await self._network.worker.call("list_held"):
            settle = self._random.random() < 0.5
            self.happened["held, taken" if settle else "held, given back"] += 1
            await self._network.worker.resolve(payment_hash, settle=settle)

    async def end(self) -> None:
        """Everything is up and well again."""
        for node in (self._network.router, self._network.worker):
            if not node.running:
                await node.revive()
            try:
                await node.call("load_wallet")
            except (RpcError, httpx.HTTPError):
                await node.revive()
        if not self._router.running:
            await self._router.revive_as_the_one()
        await self._network.ready()
        await self._mood("take")
        await self._let_go()
