"""From the payment of an invoice until the worker has the job: what the router adds to the money's way.

    python -m bench.settled_to_assigned [--quick] [--seconds S] [--json FILE]

One buyer, one idle worker. The client is told to pay and pays at the simulated network. The node
stamps the settlement (`ended_at_s`, which is also the `settled_at` of the payee's invoice) when the
HTLC arrives, before it has written it to its own disk and told anybody; then the router hears of it,
credits it, holds the fee, queues the job and claims it, in two commits, of which the bench says how
long one takes, on the same PostgreSQL in the same minute. Three clocks end when the worker's `assign`
frame is read; all run on this machine:

    from the settlement   the node's stamp: this is what the target means
    of which router       without the time until the node had written it and answered the payer; the
                          router is told at about that moment
    from sending          the payment's own way to the node as well
"""

from __future__ import annotations

import asyncio
import secrets
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import asyncpg
import orjson
from websockets.asyncio.client import ClientConnection, connect

from bench import load
from bench.figures import Options, Report, Row, milliseconds, percentile, run
from bench.load import Seen
from bench.scene import Scene, scene

PATH = "/v1/chat/completions"
PATIENCE_S = 30.0
# The seed of a job, and when its worker read of it.
Assigned = tuple[int | None, float]


async def measure(options: Options) -> Sequence[Report]:
    """A PostgreSQL that syncs every commit, and one that does not."""
    report = Report("from payment to assign, one buyer")
    for throw_away in (False, True):
        async with scene(throw_away=throw_away) as stage:
            row = await settled_to_assigned(stage, seconds=options.seconds)
            report.rows.append({"PostgreSQL": "no fsync" if throw_away else "fsync", **row})
            if not await stage.books_in_order():
                raise RuntimeError("the books do not balance")
    report.notes.append("target: p50 within 3 ms and one commit after the settlement")
    report.notes.append("the books balanced at the end")
    return [report]


async def settled_to_assigned(stage: Scene, *, seconds: float, warm_up: int = 3) -> Row:
    """One row: buy one answer after the other for so long."""
    settled_s: list[float] = []
    answered_s: list[float] = []
    sent_s: list[float] = []
    seen = Seen()
    answers: asyncio.Queue[tuple[int, bytes]] = asyncio.Queue()
    paid: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
    async with _worker(stage) as assigned:
        client = await load.open_client(stage.port, seen, lambda *told: answers.put_nowait(told))
        payer = await _open_payer(stage, paid)
        until, number, first_seed = time.perf_counter() + seconds, 0, secrets.randbits(40)
        while time.perf_counter() < until or len(sent_s) < 3:
            number += 1
            # Every request is another one: the same would be answered without paying again.
            seed = first_seed + number
            body = orjson.dumps(load.chat_body(max_tokens=8, stream=False) | {"seed": seed})
            client.send(load.http_request(PATH, body, {}))
            status, said = await answers.get()
            if status != 402:
                raise RuntimeError(f"402 expected, got {status}: {said[:300]!r}")
            body = orjson.dumps({"invoice": orjson.loads(said)["invoice"]})
            sent_at = time.time()
            payer.send(load.http_request("/v1/pay", body, {}))
            at = await asyncio.wait_for(_assigned(assigned, seed), PATIENCE_S)
            answered_at, said = await asyncio.wait_for(paid.get(), PATIENCE_S)
            if number > warm_up:
                settled_s.append(at - orjson.loads(said)["ended_at_s"])
                answered_s.append(at - answered_at)
                sent_s.append(at - sent_at)
        client.close()
        payer.close()
    commits_s, trips_s = await _commits_and_trips_s(stage)
    return {
        "payments": len(sent_s),
        "p50 ms": milliseconds(percentile(settled_s, 0.5)),
        "p90 ms": milliseconds(percentile(settled_s, 0.9)),
        "of which router p50 ms": milliseconds(percentile(answered_s, 0.5)),
        "from sending p50 ms": milliseconds(percentile(sent_s, 0.5)),
        "one commit p50 ms": milliseconds(percentile(commits_s, 0.5)),
        "one round trip p50 ms": milliseconds(percentile(trips_s, 0.5)),
    }


async def _open_payer(stage: Scene, paid: asyncio.Queue[tuple[float, bytes]]) -> load.Client:
    """A connection to the network that notes when a payment was answered. It is written by hand as the
    clients are: a busier one would take the core that PostgreSQL needs just then."""

    def answered(status: int, said: bytes) -> None:
        if status != 200:
            raise RuntimeError(f"the payment failed, {status}: {said[:300]!r}")
        paid.put_nowait((time.time(), said))

    port = int(stage.lightning_url.rpartition(":")[2])
    return await load.open_client(port, Seen(), answered, keep_body=True)


@asynccontextmanager
async def _worker(stage: Scene) -> AsyncIterator[asyncio.Queue[Assigned]]:
    """A worker that notes when it was given a job, and answers it with one token."""
    assigned: asyncio.Queue[Assigned] = asyncio.Queue()
    async with connect(stage.worker_url, max_size=None, compression=None) as socket:
        await socket.send(load.registration(slots=4, ln_url=f"worker@{stage.ln_host}"))
        await socket.recv()
        serving = asyncio.create_task(_serve(socket, assigned))
        try:
            yield assigned
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)


async def _serve(socket: ClientConnection, assigned: asyncio.Queue[Assigned]) -> None:
    async for message in socket:
        at = time.time()
        frame = orjson.loads(message)
        if frame["type"] != "assign":
            continue
        assigned.put_nowait((frame["job"]["sampling"]["seed"], at))
        of = {"job_id": frame["job_id"], "attempt": frame["attempt"]}
        await socket.send(orjson.dumps({"type": "chunk", **of, "seq": 0, "text": "ok"}).decode())
        done = {"type": "finished", **of, "finish_reason": "stop"}
        await socket.send(orjson.dumps(done).decode())


async def _assigned(assigned: asyncio.Queue[Assigned], seed: int) -> float:
    """When the job with this seed came; what somebody else has bought is passed over."""
    while True:
        of, at = await assigned.get()
        if of == seed:
            return at


async def _commits_and_trips_s(stage: Scene, times: int = 50) -> tuple[list[float], list[float]]:
    """What a commit of one row takes on this PostgreSQL, and a question without one."""
    connection = await asyncpg.connect(stage.database_url)
    commits_s, trips_s = [], []
    try:
        await connection.execute("create table if not exists bench_commits (n int)")
        for n in range(times):
            began = time.perf_counter()
            await connection.execute("insert into bench_commits values ($1)", n)
            commits_s.append(time.perf_counter() - began)
            began = time.perf_counter()
            await connection.fetchval("select $1::int", n)
            trips_s.append(time.perf_counter() - began)
        await connection.execute("drop table bench_commits")
    finally:
        await connection.close()
    return commits_s, trips_s


if __name__ == "__main__":
    sys.exit(run(measure, __doc__))
