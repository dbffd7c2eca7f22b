"""`python -m billing.lightning.simulated --data-dir DIR`: serve a simulated Lightning network.

Prints one line when it is ready, `ready: http://127.0.0.1:9740 ...`, and stops cleanly on SIGTERM
and SIGINT. With `--parent-pid` it also stops when that process, its parent, is gone.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import uvloop

from billing.lightning.simulated.network import Network, NetworkInUse
from billing.lightning.simulated.serving import DEFAULT_PORT, NetworkServer

_PR_SET_PDEATHSIG = 1
_PARENT_POLL_S = 1.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 after a clean stop, 1 when it cannot start."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING)
    # Scripted faults cut connections on purpose, which uvicorn takes for errors of ours.
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    try:
        uvloop.run(_serve(options))
    except (NetworkInUse, OSError) as error:
        print(f"the simulated Lightning network cannot start: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m billing.lightning.simulated",
        description="A simulated Lightning network (regtest, no real money) over HTTP.",
    )
    parser.add_argument("--data-dir", type=Path, required=True, help="where its state is kept")
    parser.add_argument("--host", default="127.0.0.1", help="default: this machine only")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="0 takes a free one")
    parser.add_argument(
        "--latency-ms", type=int, default=0, help="how long every payment travels; default 0"
    )
    parser.add_argument("--parent-pid", type=int, help="stop when this parent process is gone")
    return parser


async def _serve(options: argparse.Namespace) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    watch = _watch_parent(options.parent_pid, stop) if options.parent_pid else None
    network = await Network.open(options.data_dir, latency_s=options.latency_ms / 1000)
    try:
        server = NetworkServer(network, host=options.host, port=options.port)
        await server.start()
        print(
            f"ready: {server.url} simulated Lightning network (regtest, no real money)", flush=True
        )
        await stop.wait()
        await server.stop()
    finally:
        if watch is not None:
            watch.cancel()
        await network.aclose()


def _watch_parent(parent_pid: int, stop: asyncio.Event) -> asyncio.Task[None]:
    """Set `stop` once `parent_pid` is no longer our parent: at once on Linux, else in a second."""
    loop = asyncio.get_running_loop()

    def look() -> None:
        if os.getppid() != parent_pid:
            stop.set()

    if sys.platform == "linux":
        # The kernel sends this when the *thread* that started us ends, which need not be the end
        # of the process. So it is only a reason to look, and not SIGTERM.
        loop.add_signal_handler(signal.SIGHUP, look)
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGHUP)

    async def poll() -> None:
        while not stop.is_set():
            look()
            await asyncio.sleep(_PARENT_POLL_S)

    return asyncio.create_task(poll())


if __name__ == "__main__":
    sys.exit(main())
