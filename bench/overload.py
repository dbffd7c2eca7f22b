"""Three times as many jobs as the workers can do, for a while: what waits, what it costs, what is lost.

    python -m bench.overload [--quick] [--full] [--seconds S] [--json FILE]

Clients come at a fixed rate whether or not others have been answered (open loop), each with a limit to
its patience; the workers can do a third of it. Meanwhile somebody asks for `/info`, `/metrics` and the
operator's lists; a few clients do not read what they are sent, and one worker takes jobs and never
says a word. Afterwards nobody comes any more, and all must be over: every job answered or refunded,
nothing waiting, the books balanced. Two minutes with `--full`, 20 s without.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import asyncpg
import orjson

from bench import load
from bench.figures import Options, Report, Row, milliseconds, percentile, run
from bench.load import Pace, Seen
from bench.scene import ADMIN_TOKEN, Scene, scene

WORKERS = 4
SLOTS = 4
TOKENS = 10
STEP_S = 0.02
# What the workers can do, in jobs a second.
CAPACITY = WORKERS * SLOTS / (TOKENS * STEP_S)
TIMES = 3.0
MAX_WAIT_S = 8
SLOW_READERS = 4
ASK_EVERY_S = 0.25
RECOVERS_WITHIN_S = 60.0

# The silent worker is found out within the patience of whoever waits for it.
SETTINGS = {"SATHERD_FIRST_TOKEN_TIMEOUT_S": "5"}

INFO = ("/info", {})
ADMIN = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
LOOKS = (INFO, ("/metrics", {}), ("/admin/workers", ADMIN), ("/admin/jobs?state=queued", ADMIN))


@dataclass(slots=True)
class Told:
    """What became of the requests of patient clients."""

    asked: int = 0
    answered: int = 0
    refunded: int = 0
    saw_position: int = 0
    other: list[str] = field(default_factory=list)

    def hear(self, status: int, body: bytes) -> None:
        self.saw_position += b": position " in body
        if status == 200 and b"[DONE]" in body:
            self.answered += 1
        elif b'"max_wait"' in body:
            self.refunded += 1
        else:
            self.other.append(f"{status} {body[-300:]!r}")

    @property
    def heard(self) -> int:
        return self.answered + self.refunded + len(self.other)


async def measure(options: Options) -> Sequence[Report]:
    """One overload and its end."""
    seconds = 10.0 if options.quick else 120.0 if options.full else max(20.0, options.seconds)
    report = Report(f"overload: {TIMES:.0f} times what the workers can do")
    async with scene(throw_away=True, more_settings=SETTINGS) as stage:
        report.rows.append(await overload(stage, seconds=seconds))
    report.notes.append("refunded: their time was over, and all they had paid is theirs again")
    report.notes.append("the books balanced at the end, and nothing waited or ran")
    return [report]


async def overload(
    stage: Scene, *, seconds: float, times: float = TIMES, max_wait_s: int = MAX_WAIT_S
) -> Row:
    """Load for `seconds`, then wait until it is over. Raises RuntimeError: something was lost."""
    key = await stage.key()
    paid = {"Authorization": f"Bearer {key}"}
    body = orjson.dumps(load.chat_body(max_tokens=64, stream=True))
    patient = {"X-Max-Wait-S": str(max_wait_s)}
    request = load.http_request("/v1/chat/completions", body, paid | patient)
    told, looks, lengths = Told(), Looks(stage), [0]
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(
            load.workers(
                stage.worker_url,
                Pace(TOKENS, step_s=STEP_S),
                count=WORKERS,
                slots=SLOTS,
                ln_host=stage.ln_host,
            )
        )
        await stack.enter_async_context(load.silent_worker(stage.worker_url, slots=1))
        for _ in range(SLOW_READERS):
            await stack.enter_async_context(_slow_reader(stage, paid))
        before, memory_before = stage.usage(), stage.memory_bytes()
        asking = asyncio.create_task(looks.ask_for_ever(lengths))
        peak_bytes = await _come_and_come(stage, told, request, CAPACITY * times, seconds)
        loaded = stage.usage()
        ended = time.perf_counter()
        while told.heard < told.asked:
            if time.perf_counter() - ended > RECOVERS_WITHIN_S:
                raise RuntimeError(f"{told.asked - told.heard} clients were never told anything")
            await asyncio.sleep(0.1)
        recovered_s = time.perf_counter() - ended
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    if told.other:
        raise RuntimeError(f"{len(told.other)} clients were told something else: {told.other[0]}")
    await _all_over(stage)
    return {
        "asked": told.asked,
        "answered": told.answered,
        "refunded": told.refunded,
        "saw their place": told.saw_position,
        "longest queue": max(lengths),
        "router core": (loaded.router_s - before.router_s) / (loaded.at_s - before.at_s),
        "/info p99 ms": milliseconds(percentile(looks.times_s["/info"], 0.99)),
        "/info p50 ms": milliseconds(percentile(looks.times_s["/info"], 0.5)),
        "admin p99 ms": milliseconds(percentile(looks.admin_s, 0.99)),
        "MiB before": memory_before / 2**20,
        "MiB most": peak_bytes / 2**20,
        "MiB after": stage.memory_bytes() / 2**20,
        "over after s": recovered_s,
    }


class Looks:
    """Somebody who wants to know how it goes, all the time."""

    def __init__(self, stage: Scene) -> None:
        self._stage = stage
        self.times_s: dict[str, list[float]] = {path: [] for path, _ in LOOKS}

    @property
    def admin_s(self) -> list[float]:
        return [t for path, times in self.times_s.items() if path != "/info" for t in times]

    async def ask_for_ever(self, lengths: list[int]) -> None:
        while True:
            for path, headers in LOOKS:
                began = time.perf_counter()
                reply = await self._stage.http.get(path, headers=headers)
                self.times_s[path].append(time.perf_counter() - began)
                reply.raise_for_status()
                if path == "/info":
                    lengths.append(reply.json()["queue_length"])
            await asyncio.sleep(ASK_EVERY_S)


async def _come_and_come(
    stage: Scene, told: Told, request: bytes, per_s: float, seconds: float
) -> int:
    """Send requests at a rate, on connections that are used again; returns the most memory seen."""
    seen = Seen()
    free: list[load.Client] = []
    peak_bytes, looked_at = 0, 0.0
    began = time.perf_counter()
    while (passed_s := time.perf_counter() - began) < seconds:
        while told.asked < passed_s * per_s:
            # The router closes what has been idle for some seconds.
            while free and free[-1].closed.done():
                free.pop()
            client = free.pop() if free else await _connect(stage, seen, told, free)
            client.send(request)
            told.asked += 1
        if passed_s - looked_at > 0.5:
            looked_at = passed_s
            peak_bytes = max(peak_bytes, stage.memory_bytes())
        await asyncio.sleep(0.01)
    return max(peak_bytes, stage.memory_bytes())


async def _connect(stage: Scene, seen: Seen, told: Told, free: list[load.Client]) -> load.Client:
    def answered(status: int, body: bytes) -> None:
        told.hear(status, body)
        free.append(client)

    client = await load.open_client(stage.port, seen, answered, keep_body=True)
    return client


class _slow_reader:
    """A client that buys a long answer and does not read it."""

    def __init__(self, stage: Scene, paid: dict[str, str]) -> None:
        self._stage = stage
        body = orjson.dumps(load.chat_body(max_tokens=1 << 16, stream=True))
        self._request = load.http_request("/v1/chat/completions", body, paid)

    async def __aenter__(self) -> None:
        reader, self._writer = await asyncio.open_connection("127.0.0.1", self._stage.port)
        self._writer.write(self._request)
        self._writer.transport.pause_reading()  # type: ignore[attr-defined]
        self._reader = reader

    async def __aexit__(self, *_: object) -> None:
        self._writer.transport.abort()


async def _all_over(stage: Scene) -> None:
    """Raises RuntimeError when a job is still alive after a while, or money is not where it should."""
    connection = await asyncpg.connect(stage.database_url)
    try:
        async with asyncio.timeout(RECOVERS_WITHIN_S):
            while await connection.fetchval(
                "select count(*) from jobs where state in ('queued', 'running')"
            ):
                await asyncio.sleep(0.2)
        if await connection.fetchval("select count(*) from queue"):
            raise RuntimeError("the queue holds jobs that are over")
        kept = await connection.fetchval(
            "select count(*) from jobs where end_reason = 'max_wait' and charged_msat <> 0"
        )
        if kept:
            raise RuntimeError(f"{kept} jobs that nobody did were charged")
    finally:
        await connection.close()
    if not await stage.books_in_order():
        raise RuntimeError("the books do not balance")


if __name__ == "__main__":
    sys.exit(run(measure, __doc__))
