"""Kill Satherd's parts at random under load, for as long as you like, and check the books each time.

    python -m bench.chaos                         ten rounds of twelve kills
    python -m bench.chaos --minutes 30            as many rounds as fit
    python -m bench.chaos --seed 7 --rounds 1     the victims and moments of one round again
    python -m bench.chaos --routers 3             always three routers with NATS between them

Each round is a fresh Satherd of real processes, with the simulated Lightning network (no real money):
by turns one router with PostgreSQL inside and a worker, and two or three routers over one PostgreSQL
and one NATS server with two workers, each client request to any router. Clients buy with keys and by
the request, stream, cancel, bump and withdraw, and readers go on at another router when they are cut
off; `kill -9` takes a router, several at once, PostgreSQL, NATS, a worker or the network; in the end
everything is up, nothing is under way, and the invariants must hold (tests/crash_checks.py).
The folder of a round in which one did not is kept, with the logs. Exit status 1 if there was any.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests import crash_story
from tests.crash_market_rig import victims
from tests.crash_rig import CrashRig
from tests.crash_story import Report

# By turns, unless it is said how many.
TURNS = (1, 2, 3)
MOST_ROUTERS = 9


def main() -> int:
    """Play the rounds; 0 when nothing was wrong in any of them."""
    options = _options()
    first = options.seed if options.seed is not None else random.randrange(1 << 30)
    ends_at = time.monotonic() + options.minutes * 60 if options.minutes else None
    rounds = wrong = 0
    while (time.monotonic() < ends_at) if ends_at else rounds < options.rounds:
        routers = options.routers or TURNS[rounds % len(TURNS)]
        report, folder = _round(options, first + rounds, routers)
        rounds += 1
        print(_words(report), flush=True)
        if report.wrong:
            wrong += 1
            print(f"  state and logs: {folder}", flush=True)
        else:
            shutil.rmtree(folder)
    print(f"{rounds} rounds, {wrong} with something wrong; seeds {first} to {first + rounds - 1}")
    return 1 if wrong else 0


def _round(options: argparse.Namespace, seed: int, routers: int) -> tuple[Report, Path]:
    folder = Path(tempfile.mkdtemp(prefix=f"satherd-chaos-{seed}-"))
    # PostgreSQL may run as another user, who has to pass through here.
    folder.chmod(0o755)
    story = crash_story.run(
        folder,
        seed=seed,
        kills=options.kills,
        clients=options.clients,
        victims=tuple(options.victims) if options.victims else None,
        routers=routers,
        longest_pause_s=options.pause,
    )
    try:
        return asyncio.run(story), folder
    except (AssertionError, ExceptionGroup) as failure:
        return Report(seed, wrong=[f"the round did not come to its end: {failure!r}"]), folder


def _words(report: Report) -> str:
    lines = [
        f"seed {report.seed}: {'WRONG' if report.wrong else 'in order'}",
        f"  kills   {report.kills}",
        f"  jobs    {report.ended}",
        f"  clients {report.happened}",
    ]
    return "\n".join(lines + [f"  WRONG   {what}" for what in report.wrong])


def _options() -> argparse.Namespace:
    parser = _parser()
    options = parser.parse_args()
    for routers in [options.routers] if options.routers else TURNS:
        there = victims(routers) if routers > 1 else CrashRig.victims
        if unknown := sorted({*(options.victims or ())} - {*there}):
            parser.error(f"with --routers {routers} there is no {', '.join(unknown)}")
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.chaos", description="kill -9 under load, and check the books"
    )
    parser.add_argument("--rounds", type=int, default=10, help="how many (default 10)")
    parser.add_argument("--minutes", type=float, help="instead of rounds: for so long")
    parser.add_argument("--kills", type=int, default=12, help="in each round (default 12)")
    parser.add_argument("--clients", type=int, default=6, help="at once (default 6)")
    parser.add_argument("--pause", type=float, default=2.0, help="most seconds between two kills")
    parser.add_argument(
        "--routers",
        type=int,
        choices=range(1, MOST_ROUTERS + 1),
        help="in every round (default: by turns 1, 2 and 3)",
    )
    parser.add_argument("--seed", type=int, help="of the first round; the next ones count up")
    parser.add_argument(
        "--victims",
        nargs="+",
        help="who may be killed (default: all), such as router-a, routers (several at once), nats",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
