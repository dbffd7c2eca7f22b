"""Satherd beside other gateways and other queues, in one run on one machine.

    python -m bench.peers [--quick] [--seconds S] [--json FILE]          (= make bench-peers)

Gateways: nginx as the floor, vLLM's router (Rust) and LiteLLM's proxy (Python), each in front of the
same instant model server, and Satherd in front of workers that take as little time. Each has the core
that the others leave alone. **Only Satherd does anything about money**: every one of its answers is
priced, held, queued, claimed, settled and committed before it ends, from a prepaid key; what that takes
of PostgreSQL is a column of its own. The others pass bytes on.

Queues: `bench.peer_queues`. Whatever is missing is installed from PyPI below `.cache/bench-peers`, into
environments of its own.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from statistics import median

import orjson

from bench import load, peer_processes, peer_queues
from bench.figures import Options, Report, Row, milliseconds, percentile, run
from bench.load import Pace, Seen
from bench.paid_jobs import KEYS, WORKERS
from bench.peer_processes import Peer
from bench.scene import Scene, part_cores, passable, scene

PATH = "/v1/chat/completions"
CLIENTS = 64
STREAMS = 200
TOKENS = 50
STEP_S = 0.01
WARM_UP_S = 2.0

Cpu = Callable[[], tuple[float, float]]


async def measure(options: Options) -> Sequence[Report]:
    """Two tables of gateways, one of queues."""
    seconds = min(options.seconds, 4.0) if options.quick else options.seconds
    requests = Report(f"requests, {CLIENTS} clients, whole answers of 1 token")
    streams = Report(
        f"streams, {STREAMS} at a time, {TOKENS} tokens each, one every {STEP_S * 1000:.0f} ms"
    )
    peers = [peer_processes.nginx(), peer_processes.vllm_router(), peer_processes.litellm()]
    await _direct(requests, streams, seconds)
    for peer in peers:
        if peer is not None:
            await _peer(peer, requests, streams, seconds)
    await _satherd(requests, streams, seconds)
    for report in (requests, streams):
        _compare(report)
    notes = [
        "CPU: of the gateway; PG: of Satherd's PostgreSQL, which no other has",
        "added: less what the same client waits without a gateway, median",
    ]
    requests.notes += notes
    streams.notes += notes
    return [requests, streams, *await peer_queues.measure(options)]


async def _direct(requests: Report, streams: Report, seconds: float) -> None:
    async with AsyncExitStack() as stack:
        part_cores(stack)
        for report, step_s in ((requests, 0.0), (streams, STEP_S)):
            url = await stack.enter_async_context(peer_processes.upstream(step_s))
            port = int(url.rpartition(":")[2])
            row = await measured(
                "none", port, [request_for(report is streams)], report is streams, seconds
            )
            report.rows.append(row)


async def _peer(peer: Peer, requests: Report, streams: Report, seconds: float) -> None:
    async with AsyncExitStack() as stack:
        cores = part_cores(stack)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="satherd-peer-")))
        for number, (report, step_s) in enumerate(((requests, 0.0), (streams, STEP_S))):
            url = await stack.enter_async_context(peer_processes.upstream(step_s))
            place = passable(str(folder)) / str(number)
            place.mkdir()
            async with peer_processes.running(peer, place, url, cores) as gateway:
                row = await measured(
                    peer.name,
                    gateway.port,
                    [request_for(report is streams)],
                    report is streams,
                    seconds,
                    lambda gateway=gateway: (gateway.cpu_s(), 0.0),
                    memory=gateway.memory_bytes,
                )
            report.rows.append(row)


async def _satherd(requests: Report, streams: Report, seconds: float) -> None:
    async with scene(throw_away=False) as stage:
        keys = [await stage.key() for _ in range(KEYS)]
        for report in (requests, streams):
            streamed = report is streams
            pace = Pace(TOKENS, STEP_S) if streamed else Pace(1)
            slots = -(-(STREAMS if streamed else CLIENTS) // WORKERS)
            async with load.workers(
                stage.worker_url, pace, count=WORKERS, slots=slots, ln_host=stage.ln_host
            ):
                asked = [request_for(streamed, key) for key in keys]
                report.rows.append(
                    await measured(
                        "Satherd, paid", stage.port, asked, streamed, seconds, _cpu_of(stage)
                    )
                )
        if not await stage.books_in_order():
            raise RuntimeError("the books do not balance")


def _cpu_of(stage: Scene) -> Cpu:
    def cpu() -> tuple[float, float]:
        usage = stage.usage()
        return usage.router_s, usage.postgres_s

    return cpu


def request_for(streamed: bool, key: str = "none") -> bytes:
    body = load.chat_body(max_tokens=TOKENS if streamed else 1, stream=streamed)
    return load.http_request(PATH, orjson.dumps(body), {"Authorization": f"Bearer {key}"})


async def measured(
    name: str,
    port: int,
    asked: Sequence[bytes],
    streamed: bool,
    seconds: float,
    cpu: Cpu | None = None,
    memory: Callable[[], int] | None = None,
) -> Row:
    loop = asyncio.get_running_loop()
    in_flight = STREAMS if streamed else CLIENTS
    over_s = TOKENS * STEP_S if streamed else 0.0
    async with load.closed_loop(port, asked, in_flight=in_flight, over_s=over_s) as seen:
        await asyncio.sleep(WARM_UP_S)
        seen.forget()
        before, began = cpu() if cpu else (0.0, 0.0), loop.time()
        await asyncio.sleep(seconds)
        after, ended = cpu() if cpu else (0.0, 0.0), loop.time()
        rss = memory() / 2**20 if memory else None
        row = _figures(name, seen, streamed, ended - began)
    if seen.failures:
        raise RuntimeError(f"{name}: requests failed: {seen.failures} {seen.last_failure}")
    units = max(1, seen.tokens if streamed else seen.answers)
    per = "token" if streamed else "request"
    used = [(a - b) / units * 1e6 if cpu else None for a, b in zip(after, before, strict=True)]
    row[f"CPU µs/{per}"], row[f"PG µs/{per}"] = used[0], used[1] or None
    row["core"] = (after[0] - before[0]) / (ended - began) if cpu else None
    row["MiB"] = rss
    return row


def _figures(name: str, seen: Seen, streamed: bool, elapsed_s: float) -> Row:
    if not streamed:
        return {
            "gateway": name,
            "requests/s": seen.answers / elapsed_s,
            "p50 ms": milliseconds(percentile(seen.answer_s, 0.5)),
            "p99 ms": milliseconds(percentile(seen.answer_s, 0.99)),
        }
    return {
        "gateway": name,
        "tokens/s": seen.tokens / elapsed_s,
        "first token p50 ms": milliseconds(median(seen.first_s) if seen.first_s else None),
        "first token p99 ms": milliseconds(percentile(seen.first_s, 0.99)),
    }


def _compare(report: Report) -> None:
    """Add to each row what it adds to no gateway at all."""
    name = "p50 ms" if "p50 ms" in report.rows[0] else "first token p50 ms"
    base = report.rows[0][name]
    for row in report.rows:
        row["added ms"] = None if row is report.rows[0] else row[name] - base


if __name__ == "__main__":
    sys.exit(run(measure, __doc__))
