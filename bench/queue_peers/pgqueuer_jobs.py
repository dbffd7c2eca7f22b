# pyright: reportMissingImports=false
"""Works off jobs with pgqueuer, in an environment that has it: URL JOBS BEHIND AT_ONCE."""

from __future__ import annotations

import asyncio
import json
import sys
import time

import asyncpg
from pgqueuer import AsyncpgPoolDriver, PgQueuer, Queries


async def main() -> None:
    url, jobs, behind, at_once = sys.argv[1], *map(int, sys.argv[2:])
    pool = await asyncpg.create_pool(url, min_size=2, max_size=10)
    driver = AsyncpgPoolDriver(pool)
    queries = Queries(driver)
    await queries.install()
    queue = PgQueuer(driver)
    left, over = [jobs], asyncio.Event()

    @queue.entrypoint("nothing", concurrency_limit=at_once)
    async def nothing(job) -> None:
        left[0] -= 1
        if not left[0]:
            over.set()

    for start in range(0, behind, 5_000):
        size = min(5_000, behind - start)
        await queries.enqueue(["nothing"] * size, [None] * size, [0] * size)
    await queries.enqueue(["nothing"] * jobs, [None] * jobs, [1] * jobs)
    await pool.execute("analyze")
    print("begin", flush=True)
    began, cpu = time.perf_counter(), time.process_time()
    working = asyncio.create_task(queue.run(batch_size=at_once))
    await over.wait()
    spent = {"seconds": time.perf_counter() - began, "cpu_s": time.process_time() - cpu}
    print(json.dumps(spent), flush=True)
    working.cancel()
    await asyncio.gather(working, return_exceptions=True)


asyncio.run(main())
