"""Workers that have nothing to do: what each costs, and what happens when all come back at once.

    python -m bench.idle_workers [--quick] [--full] [--json FILE]

Each worker is registered, with a key and a record of its own, over a WebSocket of its own. Then, while
a few clients buy answers from one other worker, all connections are cut in the same moment and made
again as fast as the router lets them, by the same workers: a storm, in which no paid job may be lost.
"""

from __future__ import annotations

import asyncio
import resource
import secrets
import sys
import time
from collections.abc import Sequence

import orjson
from websockets.asyncio.client import ClientConnection, connect

from bench import load
from bench.figures import Options, Report, Row, milliseconds, percentile, run
from bench.load import Pace
from bench.scene import Scene, scene

WORKERS = 1_000
AT_ONCE = 64
BUYERS = 8
_REST_S = 2.0


async def measure(options: Options) -> Sequence[Report]:
    """A thousand workers; ten thousand with `--full`, if the system allows as many files."""
    report = Report("idle workers")
    storms = Report(f"{BUYERS} buyers, while all idle workers are cut off and come back")
    counts = [100] if options.quick else [WORKERS]
    if options.full:
        counts.append(10 * WORKERS)
    for count in counts:
        raise_file_limit(count + 200)
        async with scene(throw_away=True) as stage:
            report.rows.append(await idle_workers(stage, count))
        async with scene(throw_away=True) as stage:
            storms.rows.append(await reconnect_storm(stage, count))
            if not await stage.books_in_order():
                raise RuntimeError("the books do not balance")
    storms.notes.append(
        "no answer was lost, and the books balanced; before: the same without a storm"
    )
    report.notes.append("memory that is the router's alone (USS), after less before")
    return [report, storms]


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


async def reconnect_storm(stage: Scene, count: int, *, calm_s: float = 3.0) -> Row:
    """One row: how buyers fare before a storm of `count` workers, and in it."""
    keys = [secrets.token_hex(32) for _ in range(count)]
    sockets: list[ClientConnection] = []
    await _connect(stage, sockets, count, keys)
    bearer = {"Authorization": f"Bearer {await stage.key()}"}
    body = orjson.dumps(load.chat_body(max_tokens=8, stream=True))
    request = load.http_request("/v1/chat/completions", body, bearer)
    async with (
        load.workers(stage.worker_url, Pace(1), count=1, slots=BUYERS, ln_host=stage.ln_host),
        load.closed_loop(stage.port, [request], in_flight=BUYERS) as seen,
    ):
        await asyncio.sleep(1.0)
        seen.forget()
        await asyncio.sleep(calm_s)
        calm, calm_answers = list(seen.answer_s), seen.answers
        seen.forget()
        began = time.perf_counter()
        for socket in sockets:
            socket.transport.abort()
        sockets.clear()
        await _connect(stage, sockets, count, keys)
        stormed_s = time.perf_counter() - began
        storm, storm_answers = list(seen.answer_s), seen.answers
    if seen.failures:
        raise RuntimeError(f"requests failed: {seen.failures} {seen.last_failure}")
    await asyncio.gather(*(socket.close() for socket in sockets))
    return {
        "workers": count,
        "back after s": stormed_s,
        "jobs/s before": calm_answers / calm_s,
        "jobs/s in it": storm_answers / stormed_s,
        "answer p50 ms before": milliseconds(percentile(calm, 0.5)),
        "p50 in it": milliseconds(percentile(storm, 0.5)),
        "p99 in it": milliseconds(percentile(storm, 0.99)),
        "lost": 0,
    }


async def _connect(
    stage: Scene, sockets: list[ClientConnection], count: int, keys: Sequence[str] = ()
) -> None:
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(number: int) -> None:
        async with gate:
            socket = await connect(
                stage.worker_url, compression=None, ping_interval=None, open_timeout=60
            )
            sockets.append(socket)
            key = keys[number] if keys else None
            # Not the model that is bought: these are to have nothing to do.
            await socket.send(load.registration(slots=1, key=key, model="idle-model"))
            answer = orjson.loads(await socket.recv())
            if answer["type"] != "registered":
                raise RuntimeError(f"a worker was refused: {answer}")

    async with asyncio.TaskGroup() as group:
        for number in range(count):
            group.create_task(one(number))


def raise_file_limit(files: int) -> None:
    """Allow this process and its children `files` open files. Raises ValueError: not allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))


if __name__ == "__main__":
    sys.exit(run(measure, __doc__))
