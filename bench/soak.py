"""Many payouts from a real Lightning node, while everything that can be killed is killed.

    python -m bench.soak                    1,000 payouts
    python -m bench.soak --payouts 100 --seed 7

A router as a process at an Electrum node, workers two hops away behind a foreign LNURL-pay server
(tests/regtest; no real money). `kill -9` takes the router, its node, both at once, or the workers'
node, which also keeps HTLCs for a while (and takes them or gives them back) or refuses them. The
money is real to the network: a client pays it in over its channel, and it is moved to workers as a
job would move it.

In the end nothing is under way, and must hold: what left the router's node by its own history is
what the ledger says, to the msat; every worker has what it earned, once; the books sum to zero.
Exit status 1 if not. The router's Electrum writes its whole wallet file several times a payment, so
that the last payouts are slower than the first.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import asyncpg
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.soak_checks import Findings, everything
from bench.soak_trouble import Trouble
from router.embedded_postgres import throw_away_server
from tests.regtest.lnurl_payee import lnurl_server
from tests.regtest.network import LightningNetwork
from tests.regtest.programs import ToolMissing, installed
from tests.regtest.router_process import RouterProcess
from tests.regtest.router_rig import PAYOUT_MSAT

# Those whose payout waits for certainty, minutes after a kill, keep the others from nothing.
WORKERS = 64
# Whole satoshis, since a payout is: what a worker earns is then what it is paid.
MOST_SAT = PAYOUT_MSAT // 1000 + 300
# What a killed router had asked for is given to the node again after two minutes, while its invoice
# lasts; what was refused until that has expired is certain some minutes later, and paid anew.
INVOICE_EXPIRY_S = 600
# The last tenth may end in peace.
PEACE_FROM = 0.9
QUIET_S = 1200.0

console = Console()


def main() -> int:
    options = _parser().parse_args()
    try:
        programs = installed()
    except ToolMissing as missing:
        console.print(f"no real Lightning network: {missing}")
        return 2
    folder = Path(tempfile.mkdtemp(prefix=f"satherd-soak-{options.seed}-"))
    # PostgreSQL may run as another user, who has to pass through here.
    folder.chmod(0o755)
    network = LightningNetwork(folder, programs, files=("router", "worker"))
    try:
        (folder / "postgres").mkdir()
        with throw_away_server(folder / "postgres") as postgres_url:
            findings = asyncio.run(_soak(options, folder, network, postgres_url))
    finally:
        network.stop()
    findings.show(console)
    if findings.wrong:
        console.print(f"state and logs: {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


async def _soak(
    options: argparse.Namespace, folder: Path, network: LightningNetwork, postgres_url: str
) -> Findings:
    await network.start()
    database_url = await _database(postgres_url)
    names = [f"w{n}" for n in range(WORKERS)]
    router = RouterProcess(folder, database_url, network)
    async with lnurl_server(
        network, network.worker, folder, names=names, expiry_s=INVOICE_EXPIRY_S
    ) as host:
        await router.start()
        try:
            await router.fill(options.payouts * MOST_SAT * 1000)
            for name in names:
                await router.worker(name, f"{name}@{host}")
            trouble = Trouble(router, network, random.Random(options.seed), options.pause)
            started = time.monotonic()
            earned = await _pay_all(options, router, names, trouble)
            return await everything(
                router, network, earned, trouble, seconds=time.monotonic() - started
            )
        finally:
            await router.stop()


async def _database(postgres_url: str) -> str:
    connection = await asyncpg.connect(postgres_url)
    await connection.execute("create database soak")
    await connection.close()
    head, _, query = postgres_url.partition("?")
    return f"{head.rpartition('/')[0]}/soak" + (f"?{query}" if query else "")


# A worker earns again when all that it had earned has been paid: one payout for each.
_FREE = """
select name from unnest($1::text[]) as workers (name)
where not exists (select from payouts where account = 'liabilities:worker:' || name
                  and state in ('planned', 'sending'))
  and not exists (select from ledger_balances where account = 'liabilities:worker:' || name
                  and balance_msat > 0)"""


async def _pay_all(
    options: argparse.Namespace, router: RouterProcess, names: list[str], trouble: Trouble
) -> dict[str, int]:
    """Have that many payouts made, under trouble, and wait for their ends; what each earned."""
    chance = random.Random(options.seed + 1)
    earned = dict.fromkeys(names, 0)
    given = 0
    last_change = time.monotonic()
    paid = 0
    with _progress() as progress:
        bar = progress.add_task("payouts", total=options.payouts, kills="")
        troubling = asyncio.create_task(trouble.go_on())
        try:
            while paid < options.payouts:
                if given < options.payouts:
                    for row in await router.connection.fetch(_FREE, names):
                        if given == options.payouts:
                            break
                        amount_msat = chance.randrange(PAYOUT_MSAT // 1000, MOST_SAT) * 1000
                        await router.earn(row["name"], amount_msat)
                        earned[row["name"]] += amount_msat
                        given += 1
                elif paid >= PEACE_FROM * options.payouts and not troubling.done():
                    troubling.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await troubling
                    await trouble.end()
                [(now_paid,)] = await router.connection.fetch(
                    "select count(*) from payouts where state = 'paid'"
                )
                if now_paid != paid:
                    if not console.is_terminal and now_paid // 25 > paid // 25:
                        console.print(
                            f"{now_paid} of {options.payouts} paid; {trouble.words()}",
                            soft_wrap=True,
                        )
                    paid, last_change = now_paid, time.monotonic()
                    progress.update(bar, completed=paid, kills=trouble.words())
                if troubling.done() and not troubling.cancelled():
                    troubling.result()
                if time.monotonic() - last_change > QUIET_S:
                    console.print(f"nothing was paid for {QUIET_S:.0f} s")
                    break
                await asyncio.sleep(0.1)
        finally:
            troubling.cancel()
            await asyncio.gather(troubling, return_exceptions=True)
            await trouble.end()
    return earned


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[kills]}"),
        console=console,
        disable=not console.is_terminal,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.soak", description="payouts over real channels, under kill -9"
    )
    parser.add_argument("--payouts", type=int, default=1000, help="how many (1000)")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    parser.add_argument("--pause", type=float, default=15.0, help="mean seconds between troubles")
    return parser


if __name__ == "__main__":
    sys.exit(main())
