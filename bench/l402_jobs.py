"""Paid jobs without a key: 402, pay the invoice, ask again with the credential, read the answer.

    python -m bench.l402_jobs [--quick] [--seconds S] [--json FILE]

Each job makes an account, a quote, an invoice that the simulated network signs, a credential, a
settlement that the router hears of from its node, and a second request. The network, which signs and
decodes in Python, runs beside the clients; its processor time is not the router's.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

import orjson

from bench import load
from bench.figures import Options, Report, Row, milliseconds, percentile, run
from bench.load import Pace, Seen
from bench.scene import Scene, scene

PATH = "/v1/chat/completions"
WORKERS = 4
ROWS = (16, 64)


async def measure(options: Options) -> Sequence[Report]:
    """A few clients, then many, on a PostgreSQL that syncs every commit."""
    report = Report("paid jobs, L402, 1 token, streamed answers, PostgreSQL with fsync")
    async with scene(throw_away=False) as stage:
        for buyers in ROWS[:1] if options.quick else ROWS:
            report.rows.append(await l402_jobs(stage, buyers, seconds=options.seconds))
        if not await stage.books_in_order():
            raise RuntimeError("the books do not balance")
        report.notes.append(
            "router on a core of its own, the rest on the others"
            if stage.pinned
            else "nothing was pinned"
        )
    report.notes.append("the books balanced at the end")
    return [report]


async def l402_jobs(stage: Scene, buyers: int, *, seconds: float, warm_up_s: float = 2.0) -> Row:
    """One row: `buyers` that each buy one answer after the other."""
    seen = Seen()
    whole_s: list[float] = []
    slots = -(-buyers // WORKERS)
    async with load.workers(
        stage.worker_url, Pace(1), count=WORKERS, slots=slots, ln_host=stage.ln_host
    ):
        tasks = [asyncio.create_task(_buy_for_ever(stage, seen, whole_s)) for _ in range(buyers)]
        try:
            await _unless_failed(tasks, warm_up_s)
            seen.forget()
            whole_s.clear()
            before = stage.usage()
            await _unless_failed(tasks, seconds)
            after = stage.usage()
            jobs, times_s = len(whole_s), list(whole_s)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    elapsed_s = after.at_s - before.at_s
    router_s = after.router_s - before.router_s
    return {
        "buyers": buyers,
        "jobs/s": jobs / elapsed_s,
        "router core": router_s / elapsed_s,
        "router µs/job": router_s / max(1, jobs) * 1e6,
        "PG µs/job": (after.postgres_s - before.postgres_s) / max(1, jobs) * 1e6,
        "402 to answer p50 ms": milliseconds(percentile(times_s, 0.5)),
        "402 to answer p99 ms": milliseconds(percentile(times_s, 0.99)),
    }


async def _unless_failed(tasks: list[asyncio.Task], seconds: float) -> None:
    done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()


async def _buy_for_ever(stage: Scene, seen: Seen, whole_s: list[float]) -> None:
    loop = asyncio.get_running_loop()
    answers: asyncio.Queue[tuple[int, bytes]] = asyncio.Queue()
    client = await load.open_client(stage.port, seen, lambda *told: answers.put_nowait(told))
    number = 0
    try:
        while True:
            number += 1
            # Every request is another one: the same would be answered without paying again.
            chat = load.chat_body(max_tokens=64, stream=True) | {"seed": number}
            body = orjson.dumps(chat)
            began = loop.time()
            client.send(load.http_request(PATH, body, {}))
            due = orjson.loads(_expect(402, await answers.get()))
            preimage = await stage.pay(due["invoice"])
            credential = {"Authorization": f"L402 {due['l402_token']}:{preimage}"}
            client.send(load.http_request(PATH, body, credential))
            _expect(200, await answers.get())
            whole_s.append(loop.time() - began)
    finally:
        client.close()


def _expect(status: int, told: tuple[int, bytes]) -> bytes:
    if told[0] != status:
        raise RuntimeError(f"{status} expected, got {told[0]}: {told[1][:500]!r}")
    return told[1]


if __name__ == "__main__":
    sys.exit(run(measure, __doc__))
