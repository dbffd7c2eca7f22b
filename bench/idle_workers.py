"""Memory that the router needs for each connected worker that has nothing to do.

    python -m bench.idle_workers [--quick] [--full] [--json FILE]

Each worker is registered, with a key and a record of its own, over a WebSocket of its own.
"""

from __future__ import annotations

import asyncio
import resource
import sys
import time
from collections.abc import Sequence

import orjson
from websockets.asyncio.client import ClientConnection, connect

from bench import load
from bench.figures import Options, Report, Row, run
from bench.scene import Scene, scene

WORKERS = 1_000
AT_ONCE = 32
_REST_S = 2.0


async def measure(options: Options) -> Sequence[Report]:
    """A thousand workers; ten thousand with `--full`, if the system allows as many files."""
    report = Report("idle workers")
    counts = [100] if options.quick else [WORKERS]
    if options.full:
        counts.append(10 * WORKERS)
    for count in counts:
        raise_file_limit(count + 200)
        async with scene(throw_away=True) as stage:
            report.rows.append(await idle_workers(stage, count))
    report.notes.append("memory that is the router's alone (USS), after less before")
    return [report]


async def idle_workers(stage: Scene, count: int, *, rest_s: float = _REST_S) -> Row:
    """One row: connect `count` workers and let them be."""
    sockets: list[ClientConnection] = []
    # The first ones make what is made once: caches, pools, buffers.
    await _connect(stage, sockets, 10)
    await asyncio.sleep(rest_s)
    before_bytes = stage.memory_bytes()
    before = stage.usage()
    began = time.perf_counter()
    await _connect(stage, sockets, count)
    connected_s = time.perf_counter() - began
    joined = stage.usage()
    await asyncio.sleep(rest_s)
    after_bytes = stage.memory_bytes()
    after = stage.usage()
    await asyncio.gather(*(socket.close() for socket in sockets))
    return {
        "workers": count,
        "registered/s": count / connected_s,
        "router µs/registration": (joined.router_s - before.router_s) / count * 1e6,
        "KiB each": (after_bytes - before_bytes) / count / 1024,
        "router core, all idle": (after.router_s - joined.router_s) / (after.at_s - joined.at_s),
    }


async def _connect(stage: Scene, sockets: list[ClientConnection], count: int) -> None:
    gate = asyncio.Semaphore(AT_ONCE)

    async def one() -> None:
        async with gate:
            socket = await connect(stage.worker_url, compression=None, ping_interval=None)
            sockets.append(socket)
            await socket.send(load.registration(slots=1))
            answer = orjson.loads(await socket.recv())
            if answer["type"] != "registered":
                raise RuntimeError(f"a worker was refused: {answer}")

    async with asyncio.TaskGroup() as group:
        for _ in range(count):
            group.create_task(one())


def raise_file_limit(files: int) -> None:
    """Allow this process and its children `files` open files. Raises ValueError: not allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))


if __name__ == "__main__":
    sys.exit(run(measure, __doc__))
