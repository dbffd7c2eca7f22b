"""Paid jobs per second through one router process, and what each costs it.

    python -m bench.paid_jobs [--quick] [--seconds S] [--json FILE]

Clients with prepaid keys ask for streamed chat answers, each again as soon as it has its answer;
workers speak `satherd/1` and take no time, or one step of 5 ms for each token of a longer answer.
Every job is priced, held, queued, claimed, streamed, settled and committed before its `[DONE]`.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

import orjson

from bench import load
from bench.figures import Options, Report, Row, milliseconds, percentile, run
from bench.load import Pace
from bench.scene import Scene, scene

KEYS = 8
WORKERS = 4
STEP_S = 0.005
# (in flight, tokens a job)
ROWS = ((200, 1), (800, 1), (200, 50), (800, 50))


async def measure(options: Options) -> Sequence[Report]:
    """A real PostgreSQL that syncs every commit, then one that does not."""
    report = Report("paid jobs, prepaid keys, streamed answers")
    pinned = False
    for throw_away in (False, True):
        async with scene(throw_away=throw_away) as stage:
            pinned = stage.pinned
            for in_flight, tokens in ROWS[::2] if options.quick else ROWS:
                row = await paid_jobs(stage, in_flight, tokens, seconds=options.seconds)
                report.rows.append({"PostgreSQL": "no fsync" if throw_away else "fsync", **row})
            if not await stage.books_in_order():
                raise RuntimeError("the books do not balance")
    report.notes += [
        "load core: clients, workers and PostgreSQL; near 1 it is they that bind",
        "router on a core of its own, the rest on the others" if pinned else "nothing was pinned",
        f"{WORKERS} workers, {KEYS} keys; the books balanced after each PostgreSQL's rows",
    ]
    return [report]


async def paid_jobs(
    stage: Scene,
    in_flight: int,
    tokens: int,
    *,
    seconds: float,
    warm_up_s: float = 3.0,
    stream: bool = True,
) -> Row:
    """One row: `in_flight` requests at any time, `tokens` in each answer."""
    body = orjson.dumps(load.chat_body(max_tokens=max(64, tokens), stream=stream))
    keys = [await stage.key() for _ in range(KEYS)]
    requests = [
        load.http_request("/v1/chat/completions", body, {"Authorization": f"Bearer {key}"})
        for key in keys
    ]
    pace = Pace(tokens, step_s=0.0 if tokens == 1 else STEP_S)
    slots = -(-in_flight // WORKERS)
    async with (
        load.workers(stage.worker_url, pace, count=WORKERS, slots=slots, ln_host=stage.ln_host),
        load.closed_loop(stage.port, requests, in_flight=in_flight) as seen,
    ):
        await asyncio.sleep(warm_up_s)
        seen.forget()
        before = stage.usage()
        await asyncio.sleep(seconds)
        after = stage.usage()
        answers, said = seen.answers, seen.tokens
        delays = list(seen.answer_s)
    if seen.failures:
        raise RuntimeError(f"requests failed: {seen.failures} {seen.last_failure}")
    elapsed_s = after.at_s - before.at_s
    router_s = after.router_s - before.router_s
    postgres_s = after.postgres_s - before.postgres_s
    return {
        "in flight": in_flight,
        "tokens/job": tokens,
        "jobs/s": answers / elapsed_s,
        "tokens/s": said / elapsed_s,
        "router core": router_s / elapsed_s,
        "load core": (after.load_s - before.load_s + postgres_s) / elapsed_s,
        "router µs/job": router_s / max(1, answers) * 1e6,
        "router µs/token": router_s / max(1, said) * 1e6,
        "PG µs/job": postgres_s / max(1, answers) * 1e6,
        "answer p50 ms": milliseconds(percentile(delays, 0.5)),
        "answer p99 ms": milliseconds(percentile(delays, 0.99)),
    }


if __name__ == "__main__":
    sys.exit(run(measure, __doc__))
