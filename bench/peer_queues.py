"""Queues on PostgreSQL side by side: what one job costs that does nothing.

    python -m bench.peer_queues [--quick] [--json FILE]

procrastinate and pgqueuer, each as its own documentation says, in a process of its own
(`bench/queue_peers/`), and Satherd's queue as its router uses it: the batching writer, `submit`, look
and `claim`, `end`. All on the same PostgreSQL, which does not sync, 50 jobs at a time. **Satherd's jobs
are paid for**: the fee is held when a job is queued and divided between worker, router and client when
it ends. Jobs are worked off while so many others wait behind them.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
import psutil

from bench.figures import Options, Report, Row, run
from bench.peer_processes import venv_of
from bench.scene import passable
from billing import accounts, ledger
from billing.ledger import Transfer
from router import job_queue, job_store, job_submits, plain_endings
from router.database import BatchingWriter, Database, migrate
from router.embedded_postgres import EmbeddedPostgres
from router.job_records import Claim, Ending, NewJob, NewQuote, Submission
from router.job_states import Event

JOBS = 2_000
AT_ONCE = 50
BEHIND = (1_000, 100_000)
LANE = "text/2048/512/m"
_SCRIPTS = Path(__file__).parent / "queue_peers"
# Names and versions as PyPI has them; each in an environment with nothing else.
PEERS = (
    ("procrastinate", ["procrastinate"], "procrastinate_jobs.py"),
    ("pgqueuer", ["pgqueuer[asyncpg]"], "pgqueuer_jobs.py"),
)


async def measure(options: Options) -> Sequence[Report]:
    """Every queue with few and with many jobs waiting behind."""
    report = Report("queues: jobs that do nothing, 50 at a time")
    for behind in BEHIND[:1] if options.quick else BEHIND:
        for name, packages, script in PEERS:
            python = venv_of(name, packages) / "python"
            command = [str(python), str(_SCRIPTS / script)]
            report.rows.append(await _on_postgres(name, behind, _in_process(command, behind)))
        report.rows.append(await _on_postgres("Satherd, paid", behind, _satherd(behind)))
    report.notes.append(
        f"{JOBS} jobs worked off in one process; queueing them is part of Satherd's row alone"
    )
    return [report]


# Works the jobs off and returns its seconds and its processor seconds; `begin` when it begins.
Work = Callable[[str, Callable[[], None]], Awaitable[tuple[float, float]]]


async def _on_postgres(name: str, behind: int, work: Work) -> Row:
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="satherd-bench-"))
        postgres = EmbeddedPostgres(passable(folder) / "postgres", throw_away=True)
        await stack.enter_async_context(postgres)
        assert postgres.pid is not None
        server = psutil.Process(postgres.pid)
        before = [0.0]

        def begin() -> None:
            before[0] = _cpu_s(server)

        elapsed_s, cpu_s = await work(postgres.url, begin)
        return {
            "queue": name,
            "waiting behind": behind,
            "jobs/s": JOBS / elapsed_s,
            "Python µs/job": cpu_s / JOBS * 1e6,
            "PG µs/job": (_cpu_s(server) - before[0]) / JOBS * 1e6,
        }


def _cpu_s(server: psutil.Process) -> float:
    total = 0.0
    for process in [server, *server.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
        if process is server:
            # Connections that are over by now.
            total += times.children_user + times.children_system
    return total


def _in_process(command: Sequence[str], behind: int) -> Work:
    async def work(url: str, begin: Callable[[], None]) -> tuple[float, float]:
        process = await asyncio.create_subprocess_exec(
            *command, url, str(JOBS), str(behind), str(AT_ONCE), stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        while line := await process.stdout.readline():
            if line.strip() == b"begin":
                begin()
            elif line.startswith(b"{"):
                said = orjson.loads(line)
                await process.wait()
                return said["seconds"], said["cpu_s"]
        raise RuntimeError(f"{command[-1]} ended without a result")

    return work


def _satherd(behind: int) -> Work:
    async def work(url: str, begin: Callable[[], None]) -> tuple[float, float]:
        await asyncio.to_thread(migrate, url)
        database = await Database.open(url)
        writer = BatchingWriter(
            database,
            {
                "submit": job_submits.submit_plain,
                "claim": job_store.claim_many,
                "end": lambda connection, rows: plain_endings.end_plain(
                    connection, rows, router_id="r", wipe_after_s=600
                ),
            },
            single=["submit", "claim", "end"],
        )
        writer.start()
        try:
            async with database.transaction() as connection:
                account_id = await _payer(connection)
            for _ in range(0, behind, 500):
                await asyncio.gather(
                    *(writer.write("submit", _job(account_id, 1_000)) for _ in range(500))
                )
            async with database.connection() as connection:
                await connection.execute("analyze")
            begin()
            began, cpu = time.perf_counter(), time.process_time()
            await _work_off(database, writer, account_id)
            return time.perf_counter() - began, time.process_time() - cpu
        finally:
            await writer.stop()
            await database.close()

    return work


async def _payer(connection: Any) -> str:
    account_id = await accounts.create_account(connection)
    paid = Transfer(ledger.LIGHTNING, ledger.client(account_id), 10**12, "topup", "bench")
    await ledger.post(connection, [paid])
    return account_id


def _job(account_id: str, milli: int) -> Submission:
    job = NewJob(
        id=accounts.new_id(),
        index=0,
        kind="chat",
        model="m",
        spec="{}",
        rates='{"prompt_fee_msat":1000,"input_msat_per_mtok":0,"output_msat_per_mtok":0}',
        prompt_tokens=10,
        max_tokens=10,
        base_fee_msat=1_000,
        offer_msat=1_000,
        multiplier_milli=milli,
        lane=LANE,
    )
    quote = NewQuote(
        id=accounts.new_id(),
        request_hash=b"x",
        base_fee_msat=1_000,
        offer_msat=1_000,
        max_wait_s=3_600,
        jobs=(job,),
    )
    return Submission(quote, account_id)


async def _work_off(database: Database, writer: BatchingWriter, account_id: str) -> None:
    """Queue, claim and end JOBS jobs, AT_ONCE at any time; they are dearer than those behind."""
    lease = datetime.now(UTC) + timedelta(minutes=10)
    for _ in range(0, JOBS, AT_ONCE):
        await asyncio.gather(
            *(writer.write("submit", _job(account_id, 2_000)) for _ in range(AT_ONCE))
        )
        async with database.connection() as connection:
            found = await job_queue.heads(connection, [LANE], most=AT_ONCE)
        claims = [Claim(head.job_id, "w", "r", 50_000, lease) for head in found]
        claimed = await writer.write_all("claim", claims)
        ends = [
            Ending(
                job.job_id,
                Event.FINISH,
                "stop",
                attempt=1,
                charge_msat=900,
                payee="w",
                router_id="r",
                claimed=job,
            )
            for job in claimed
        ]
        ended = await writer.write_all("end", ends)
        assert len(ended) == AT_ONCE and all(ended)


if __name__ == "__main__":
    sys.exit(run(measure, __doc__))
