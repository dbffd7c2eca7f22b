# pyright: reportMissingImports=false
"""Works off jobs with procrastinate, in an environment that has it: URL JOBS BEHIND AT_ONCE."""

from __future__ import annotations

import asyncio
import json
import sys
import time

from procrastinate import App, PsycopgConnector


async def main() -> None:
    url, jobs, behind, at_once = sys.argv[1], *map(int, sys.argv[2:])
    app = App(connector=PsycopgConnector(conninfo=url, max_size=10))
    left, over = [jobs], asyncio.Event()

    @app.task(queue="first", name="nothing")
    async def nothing(n: int) -> None:
        left[0] -= 1
        if not left[0]:
            over.set()

    async with app.open_async():
        await app.schema_manager.apply_schema_async()
        waiting = app.configure_task("nothing", queue="first", priority=0)
        for start in range(0, behind, 5_000):
            size = min(5_000, behind - start)
            await waiting.batch_defer_async(*({"n": n} for n in range(size)))
        dear = app.configure_task("nothing", queue="first", priority=1)
        await dear.batch_defer_async(*({"n": n} for n in range(jobs)))
        await app.connector.execute_query_async("analyze")
        print("begin", flush=True)
        began, cpu = time.perf_counter(), time.process_time()
        worker = asyncio.create_task(
            app.run_worker_async(
                concurrency=at_once, install_signal_handlers=False, wait=True, queues=["first"]
            )
        )
        await over.wait()
        spent = {"seconds": time.perf_counter() - began, "cpu_s": time.process_time() - cpu}
        worker.cancel()
        await asyncio.gather(worker, return_exceptions=True)
    print(json.dumps(spent), flush=True)


asyncio.run(main())
