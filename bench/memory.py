"""Whether a router's memory grows with the jobs it has done.

    python -m bench.memory [--quick] [--full] [--json FILE]

Prepaid, streamed jobs one after the other, 50 at a time; the memory that is the router's alone (USS) is
looked at eight times on the way. 20,000 jobs; 2,000 with `--quick`, a million with `--full`. What a job
leaves for a while (its answer for readers that come late, statistics of its worker) is there from the
first look on; what grows after that is a leak.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

import orjson

from bench import load
from bench.figures import Options, Report, Row, run
from bench.load import Pace
from bench.scene import Scene, scene

IN_FLIGHT = 50
LOOKS = 8


async def measure(options: Options) -> Sequence[Report]:
    """Jobs and memory, eight times."""
    jobs = 2_000 if options.quick else 1_000_000 if options.full else 20_000
    report = Report("memory of a router over its jobs")
    async with scene(throw_away=True) as stage:
        report.rows += await memory(stage, jobs)
        if not await stage.books_in_order():
            raise RuntimeError("the books do not balance")
    report.notes.append("growth: KiB for each 1,000 jobs since the look before; the books balanced")
    return [report]


async def memory(stage: Scene, jobs: int) -> list[Row]:
    """A row for each look."""
    bearer = {"Authorization": f"Bearer {await stage.key()}"}
    body = orjson.dumps(load.chat_body(max_tokens=8, stream=True))
    request = load.http_request("/v1/chat/completions", body, bearer)
    rows: list[Row] = []
    async with (
        load.workers(stage.worker_url, Pace(1), count=1, slots=IN_FLIGHT, ln_host=stage.ln_host),
        load.closed_loop(stage.port, [request], in_flight=IN_FLIGHT) as seen,
    ):
        before_bytes, before_jobs = 0, 0
        for look in range(1, LOOKS + 1):
            while seen.answers < jobs * look // LOOKS:
                await asyncio.sleep(0.02)
                if seen.failures:
                    raise RuntimeError(f"requests failed: {seen.failures} {seen.last_failure}")
            now_bytes, now_jobs = stage.memory_bytes(), seen.answers
            growth = (now_bytes - before_bytes) / 1024 / max(1, now_jobs - before_jobs) * 1000
            rows.append(
                {
                    "jobs": now_jobs,
                    "MiB": now_bytes / 2**20,
                    "growth": growth if before_bytes else None,
                }
            )
            before_bytes, before_jobs = now_bytes, now_jobs
    return rows


if __name__ == "__main__":
    sys.exit(run(measure, __doc__))
