"""A model server behind a router: what passing its answers on takes for a job and a token.

    python -m bench.server_worker [--quick] [--seconds S] [--json FILE]

    worker   client -> router -> `satherd worker --engine openai` -> the server
    project  client -> router -> the server, registered at the DecentralGPT door

The server is `bench.instant_upstream`. All are processes of their own, keys are prepaid, nothing is
pinned. A core binds where it is near 1.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager

import psutil

from bench import peer_processes
from bench.figures import Options, Report, Row, run
from bench.load import MODEL
from bench.paid_jobs import KEYS
from bench.peers import CLIENTS, STEP_S, STREAMS, TOKENS, measured, request_for
from bench.scene import Scene, scene
from router.project_requests import MAX_SLOTS

READY_S = 30.0
# How a server is reached: the process between it and the router, if there is one.
By = Callable[[Scene, str, int], AbstractAsyncContextManager[psutil.Process | None]]


async def measure(options: Options) -> Sequence[Report]:
    """Whole answers of one token, and streams."""
    whole = Report(f"a model server: {CLIENTS} clients, whole answers of 1 token")
    streams = Report(
        f"the same: {STREAMS} streams of {TOKENS} tokens, one every {STEP_S * 1000:.0f} ms"
    )
    for report in (whole, streams):
        for by in (by_worker, by_project):
            async with scene(throw_away=True, pin=False) as stage:
                streamed = report is streams
                row = await server_worker(stage, by, streamed=streamed, seconds=options.seconds)
                report.rows.append(row)
                if not await stage.books_in_order():
                    raise RuntimeError("the books do not balance")
    return [whole, streams]


async def server_worker(stage: Scene, by: By, *, streamed: bool, seconds: float) -> Row:
    """One row."""
    keys = [await stage.key() for _ in range(KEYS)]
    marks: list[float] = []
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(peer_processes.upstream(STEP_S if streamed else 0.0))
        slots = STREAMS if streamed else CLIENTS
        worker = await stack.enter_async_context(by(stage, url, slots))

        def cpu() -> tuple[float, float]:
            times = worker.cpu_times() if worker else None
            marks.append(times.user + times.system if times else 0.0)
            usage = stage.usage()
            return usage.router_s, usage.postgres_s

        asked = [request_for(streamed, key) for key in keys]
        name = by.__name__.removeprefix("by_")
        row = await measured(name, stage.port, asked, streamed, seconds, cpu)
    used_s = marks[1] - marks[0]
    per, rate = ("token", "tokens/s") if streamed else ("request", "requests/s")
    row.pop("MiB")
    row["worker core"] = used_s / seconds if worker else None
    row[f"worker µs/{per}"] = used_s / seconds / row[rate] * 1e6 if worker else None
    return row


@asynccontextmanager
async def by_worker(stage: Scene, url: str, slots: int) -> AsyncIterator[psutil.Process | None]:
    """A registered worker's process."""
    with tempfile.TemporaryDirectory(prefix="satherd-bench-worker-") as folder:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "cli.main", "worker", "--router-url", stage.url),
            *("--engine", "openai", "--engine-url", url, "--slots", str(slots)),
            *("--ln-url", f"server@{stage.ln_host}", "--data-dir", folder),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            await _until_served(stage)
            yield psutil.Process(process.pid)
        finally:
            process.terminate()
            await process.wait()


@asynccontextmanager
async def by_project(stage: Scene, url: str, slots: int) -> AsyncIterator[psutil.Process | None]:
    """Projects that have as many slots together."""
    projects = -(-slots // MAX_SLOTS)
    for number in range(projects):
        body = {
            "project": f"bench-{number}",
            "slots": -(-slots // projects),
            "ln_url": f"server@{stage.ln_host}",
            "models": [{"model": MODEL, "api": url, "type": 0}],
        }
        reply = await stage.http.post("/api/v0/ai/project/register", json=body)
        reply.raise_for_status()
    await _until_served(stage)
    yield None


async def _until_served(stage: Scene) -> None:
    async with asyncio.timeout(READY_S):
        while not any(m["workers"] for m in (await stage.http.get("/info")).json()["models"]):
            await asyncio.sleep(0.1)


if __name__ == "__main__":
    sys.exit(run(measure, __doc__))
