"""One run of a crash test: load, kills at random moments, everything up again, quiet, checks."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests import crash_checks
from tests.crash_load import Clients
from tests.crash_market_rig import CrashMarketRig, running_crash_market
from tests.crash_rig import CrashRig, running_crash_rig


@dataclass(slots=True)
class Report:
    """What happened in a run. `wrong` is empty when every invariant held."""

    seed: int
    kills: dict[str, int] = field(default_factory=dict)
    happened: dict[str, int] = field(default_factory=dict)
    ended: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


async def run(
    folder: Path,
    *,
    seed: int,
    kills: int,
    clients: int = 6,
    victims: tuple[str, ...] | None = None,
    routers: int = 1,
    longest_pause_s: float = 2.0,
    payouts_s: float = 240,
    payouts_must: bool = True,
    say: Callable[[str], None] = print,
) -> Report:
    """Who is killed, when, and for how long is drawn from `seed`; the load is as well. One
    router has its PostgreSQL inside; several have one, and a NATS server, between them."""
    say(f"crash run: seed {seed}, {kills} kills")
    draw = random.Random(seed)
    running = running_crash_market(folder, routers) if routers > 1 else running_crash_rig(folder)
    async with running as rig:
        opening_msat = await crash_checks.opening_msat(rig.network_url)
        shoppers = Clients(rig.urls, rig.network_url, random.Random(draw.random()))
        try:
            await shoppers.open_accounts(3)
            async with asyncio.TaskGroup() as group:
                for _ in range(clients):
                    group.create_task(shoppers.shop())
                await _torment(rig, draw, kills, victims or rig.victims, longest_pause_s, say)
                await rig.until_healthy()
                shoppers.stop()
            async with rig.database() as connection:
                await crash_checks.until_quiet(
                    connection, payouts_s=payouts_s, payouts_must=payouts_must
                )
            # Whoever has paid and was never answered comes back once more, as he may.
            for credential in shoppers.notes.credentials:
                await shoppers.use(credential)
            async with rig.database() as connection:
                await crash_checks.until_quiet(
                    connection, payouts_s=payouts_s, payouts_must=payouts_must
                )
                report = Report(seed, rig.kills(), dict(shoppers.notes.happened))
                rows = await connection.fetch(
                    "select state || ' ' || coalesce(end_reason, '') as ended, count(*) as jobs"
                    " from jobs group by 1"
                )
                report.ended = {row["ended"]: row["jobs"] for row in rows}
                report.wrong = await crash_checks.everything(
                    connection, shoppers.notes, rig.network_url, opening_msat=opening_msat
                )
        finally:
            await shoppers.aclose()
        report.wrong += _complaints(rig)
    return report


async def _torment(
    rig: CrashRig | CrashMarketRig,
    draw: random.Random,
    kills: int,
    victims: tuple[str, ...],
    longest_pause_s: float,
    say: Callable[[str], None],
) -> None:
    for turn in range(kills):
        pause_s, down_s = draw.uniform(0.1, longest_pause_s), draw.uniform(0, 0.8)
        struck = rig.struck(draw.choice(victims), draw)
        await asyncio.sleep(pause_s)
        names = " and ".join(struck)
        say(f"  {turn + 1}/{kills}: kill {names} after {pause_s:.2f} s, for {down_s:.2f} s")
        await asyncio.gather(*(rig.kill(name) for name in struck))
        await asyncio.sleep(down_s)
        for name in struck:
            await rig.revive(name)
        # Now and then one falls while another is still getting up.
        if draw.random() < 0.7:
            await rig.until_healthy()


# What a router may call an error while things around it are killed.
_EXPECTED = re.compile(
    r"PostgreSQL ended by itself|PostgreSQL did not start: PostgreSQL ended with status -9"
    r"|it will be tried again: (ConnectionBroke|DatabaseUnavailable|Backend)"
)


def _complaints(rig: CrashRig | CrashMarketRig) -> list[str]:
    """What a router logs only when it has a bug."""
    return [
        f"{router.name}.log: {line[:300]}"
        for router in rig.routers
        for line in router.log_text().splitlines()
        if ("[error " in line and not _EXPECTED.search(line)) or "never retrieved" in line
    ][:10]
