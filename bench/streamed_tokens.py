"""What the router adds to a token: processor time and delay, with 200 answers under way.

    python -m bench.streamed_tokens [--quick] [--seconds S] [--json FILE]

Paced: four workers decode 50 answers each, one token of every answer a step, one frame a step, as
continuous batching does; or 200 workers one each, with a frame for every token. Unpaced: as fast as the
router reads. Answers are long and begin before the measurement, so that only the relay is measured.
Delay is from just before the worker sends its frame until the client has read the token, in this
process at both ends; it includes what this process itself takes.
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

STREAMS = 200
WORKERS = 4
# (workers, tokens per second of each stream; None is as fast as possible)
ROWS: tuple[tuple[int, int | None], ...] = (
    (WORKERS, 50),
    (WORKERS, 100),
    (WORKERS, 200),
    (STREAMS, 50),
    (STREAMS, 100),
    (WORKERS, None),
)
_ENDLESS = 1 << 18


async def measure(options: Options) -> Sequence[Report]:
    """Every rate on the same router."""
    report = Report(f"streamed tokens, {STREAMS} answers at a time")
    # The database has nothing to commit while answers run; it may as well be a fast one.
    async with scene(throw_away=True) as stage:
        for workers, rate in ROWS:
            row = await streamed_tokens(
                stage, STREAMS, rate, seconds=options.seconds, workers=workers
            )
            report.rows.append(row)
        report.notes.append(
            "router on a core of its own, the rest on the others"
            if stage.pinned
            else "nothing was pinned"
        )
    report.notes.append("paced rows that fall short of their rate: a core was not enough")
    return [report]


async def streamed_tokens(
    stage: Scene,
    streams: int,
    rate: int | None,
    *,
    seconds: float,
    warm_up_s: float = 3.0,
    workers: int = WORKERS,
) -> Row:
    """One row: `streams` answers, each at `rate` tokens a second, or unpaced for None."""
    body = orjson.dumps(load.chat_body(max_tokens=_ENDLESS, stream=True))
    key = await stage.key()
    request = load.http_request("/v1/chat/completions", body, {"Authorization": f"Bearer {key}"})
    # Unpaced, delays would only show how much waits in the sockets.
    pace = Pace(_ENDLESS, step_s=1 / rate if rate else 0.0, stamped=rate is not None)
    slots = -(-streams // workers)
    async with (
        load.workers(stage.worker_url, pace, count=workers, slots=slots, ln_host=stage.ln_host),
        load.closed_loop(stage.port, [request], in_flight=streams) as seen,
    ):
        await asyncio.sleep(warm_up_s)
        seen.forget()
        before = stage.usage()
        await asyncio.sleep(seconds)
        after = stage.usage()
        said, delays = seen.tokens, list(seen.delays_s)
    if seen.failures:
        raise RuntimeError(f"requests failed: {seen.failures} {seen.last_failure}")
    elapsed_s = after.at_s - before.at_s
    router_s = after.router_s - before.router_s
    return {
        "workers": workers,
        "tokens/s per answer": rate or "unpaced",
        "tokens/s wanted": rate * streams if rate else None,
        "tokens/s": said / elapsed_s,
        "router core": router_s / elapsed_s,
        "load core": (after.load_s - before.load_s) / elapsed_s,
        "router µs/token": router_s / max(1, said) * 1e6,
        "delay p50 ms": milliseconds(percentile(delays, 0.5)),
        "delay p99 ms": milliseconds(percentile(delays, 0.99)),
    }


if __name__ == "__main__":
    sys.exit(run(measure, __doc__))
