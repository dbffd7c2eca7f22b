"""A worker in front of a model server: what `satherd worker --engine openai` takes a job and a token.

    python -m bench.server_worker [--quick] [--seconds S] [--json FILE]

client -> router -> worker -> an instant model server (`bench.instant_upstream`), all processes of their
own, with prepaid keys; nothing is pinned. The worker's core binds where it is near 1.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import psutil

from bench import peer_processes
from bench.figures import Options, Report, Row, run
from bench.paid_jobs import KEYS
from bench.peers import CLIENTS, STEP_S, STREAMS, TOKENS, measured, request_for
from bench.scene import Scene, scene

READY_S = 30.0


async def measure(options: Options) -> Sequence[Report]:
    """Whole answers of one token, and streams."""
    whole = Report(f"a worker before a server: {CLIENTS} clients, whole answers of 1 token")
    streams = Report(
        f"the same: {STREAMS} streams of {TOKENS} tokens, one every {STEP_S * 1000:.0f} ms"
    )
    for report in (whole, streams):
        async with scene(throw_away=True, pin=False) as stage:
            row = await server_worker(stage, streamed=report is streams, seconds=options.seconds)
            report.rows.append(row)
            if not await stage.books_in_order():
                raise RuntimeError("the books do not balance")
    return [whole, streams]


async def server_worker(stage: Scene, *, streamed: bool, seconds: float) -> Row:
    """One row."""
    keys = [await stage.key() for _ in range(KEYS)]
    marks: list[float] = []
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(peer_processes.upstream(STEP_S if streamed else 0.0))
        slots = STREAMS if streamed else CLIENTS
        worker = await stack.enter_async_context(_worker(stage, url, slots))

        def cpu() -> tuple[float, float]:
            times = worker.cpu_times()
            marks.append(times.user + times.system)
            usage = stage.usage()
            return usage.router_s, usage.postgres_s

        asked = [request_for(streamed, key) for key in keys]
        row = await measured("Satherd, paid", stage.port, asked, streamed, seconds, cpu)
    used_s = marks[1] - marks[0]
    per, rate = ("token", "tokens/s") if streamed else ("request", "requests/s")
    row.pop("MiB")
    row["worker core"] = used_s / seconds
    row[f"worker µs/{per}"] = used_s / seconds / row[rate] * 1e6
    return row


@asynccontextmanager
async def _worker(stage: Scene, url: str, slots: int) -> AsyncIterator[psutil.Process]:
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
            async with asyncio.timeout(READY_S):
                while not any(
                    m["workers"] for m in (await stage.http.get("/info")).json()["models"]
                ):
                    await asyncio.sleep(0.1)
            yield psutil.Process(process.pid)
        finally:
            process.terminate()
            await process.wait()


if __name__ == "__main__":
    sys.exit(run(measure, __doc__))
