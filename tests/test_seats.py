"""A job bought where a worker waits starts in the statement that buys it; it overtakes nobody."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from billing import ledger
from billing.trial_balance import trial_balance
from router import dispatcher, job_store, job_submits
from router.database import Database
from router.errors import NotEnoughBalance
from router.job_records import Claim, Claimed, Seat, Submission, Submitted
from router.job_states import State
from router.worker_sessions import WorkerSession
from router.workers import Worker
from tests.door_tools import JOB
from tests.job_tools import LANE, OFFER_MSAT, RATES, new_job, new_quote, payer, state_of
from tests.router_rig import MODEL, PATIENCE_S, Rig

LEASE = datetime.now(UTC) + timedelta(seconds=60)
OTHER_LANE = "text/512/512/other-model"


def seat(job_id: str, *lanes: str, worker_id: str = "w1") -> Seat:
    return Seat(Claim(job_id, worker_id, "r1", 50_000, LEASE), frozenset(lanes or [LANE]))


async def bought(connection: Any, account_id: str, *lanes: str, **changes: Any) -> bool:
    """Buy a job for which a worker of these lanes has a seat; whether it started."""
    job = new_job(**changes)
    rows = [Submission(new_quote(job), account_id)]
    (done,) = await job_submits.submit_plain(connection, rows, [seat(job.id, *lanes)])
    assert isinstance(done, Submitted)
    assert [claimed.job_id for claimed in done.started] in ([], [job.id])
    started = bool(done.started)
    assert await state_of(connection, job.id) is (State.RUNNING if started else State.QUEUED)
    places = await connection.fetchval("select count(*) from queue where job_id = $1", job.id)
    tries = await connection.fetchval("select count(*) from attempts where job_id = $1", job.id)
    assert (places, tries) == ((0, 1) if started else (1, 0))
    return started


# --- the statement -------------------------------------------------------------------------------


async def test_it_leaves_what_a_submission_and_a_claim_leave(database: Database):
    async with database.transaction() as connection:
        account_id = await payer(connection)
        quotes = [new_quote(new_job(prefix=7, webhook="https://a.example/b")) for _ in range(2)]
        at_once, steps = (Submission(q, account_id, attached_to="r2") for q in quotes)
        job, other = quotes[0].jobs[0], quotes[1].jobs[0]
        (done,) = await job_submits.submit_plain(connection, [at_once], [seat(job.id)])
        await job_submits.submit_plain(connection, [steps])
        (claimed,) = await job_store.claim_many(connection, [seat(other.id).claim])
        tables = ("quotes", "jobs", "attempts", "queue", "ledger_transfers", "ledger_balances")
        left = [await _left(connection, table, q) for q in quotes for table in tables]
        counts = [await connection.fetchval(f"select count(*) from {table}") for table in tables]
    assert left[: len(tables)] == left[len(tables) :]
    assert counts[:4] == [2, 2, 2, 0] and counts[5] == 3
    (started,) = done.started
    texts = [repr(c) for c in (started, claimed)]
    assert texts[0].replace(job.id, other.id).replace(quotes[0].id, quotes[1].id) == texts[1]


async def _left(connection: Any, table: str, quote: Any) -> str:
    """What a table holds of a quote with one job, without the order in which it came."""
    (job,) = quote.jobs
    rows = await connection.fetch(f"select * from {table}")
    own = [row for row in rows if job.id in repr(row) or quote.id in repr(row)]
    shown = [{k: v for k, v in row.items() if k not in ("seq", "request_hash")} for row in own]
    text = repr(shown).replace(job.id, "JOB").replace(quote.id, "QUOTE")
    return text.replace(ledger.transfer_id(job.id, "hold"), "HOLD")


@pytest.mark.parametrize(
    "waits, in_lane, starts",
    [
        (3000, LANE, False),
        (1500, LANE, False),  # it was there first
        (1400, LANE, True),
        (3000, OTHER_LANE, True),  # nothing for that worker
    ],
)
async def test_it_goes_after_what_its_worker_would_have_taken(
    database: Database, waits: int, in_lane: str, starts: bool
):
    async with database.transaction() as connection:
        account_id = await payer(connection)
        first = new_job(multiplier_milli=waits, lane=in_lane)
        await job_submits.submit_plain(connection, [Submission(new_quote(first), account_id)])
        assert await bought(connection, account_id) is starts
        assert (await trial_balance(connection)).in_order


async def test_all_lanes_of_the_worker_count_and_those_of_another_do_not(database: Database):
    async with database.transaction() as connection:
        account_id = await payer(connection)
        first = new_job(multiplier_milli=2000, lane=OTHER_LANE)
        await job_submits.submit_plain(connection, [Submission(new_quote(first), account_id)])
        narrow, broad = new_job(), new_job()
        seats = [seat(narrow.id, LANE), seat(broad.id, LANE, OTHER_LANE, worker_id="w2")]
        rows = [Submission(new_quote(job), account_id) for job in (broad, narrow)]
        done = await job_submits.submit_plain(connection, rows, seats)
        assert [[c.job_id for c in d.started] for d in done] == [[], [narrow.id]]
        assert done[1].started[0].worker_id == "w1"


async def test_who_cannot_pay_takes_no_seat_and_the_others_wait_then(database: Database):
    async with database.transaction() as connection:
        poor, rich = await payer(connection, OFFER_MSAT - 1), await payer(connection)
        jobs = [new_job(), new_job()]
        rows = [Submission(new_quote(j), a) for j, a in zip(jobs, (poor, rich), strict=True)]
        done = await job_submits.submit_plain(connection, rows, [seat(job.id) for job in jobs])
        assert isinstance(done[0], NotEnoughBalance)
        assert isinstance(done[1], Submitted) and not done[1].started
        assert await state_of(connection, jobs[1].id) is State.QUEUED
        assert not await connection.fetch("select from attempts")
        assert (await trial_balance(connection)).in_order


# --- the dispatcher ------------------------------------------------------------------------------


class Buyers:
    """What is bought at the router, with what the dispatcher keeps for it; `starts` of them do."""

    def __init__(self, router: Rig, starts: int = 100) -> None:
        self.dispatcher = router.core.dispatcher
        self.router, self.starts = router, starts
        self.kept: list[Seat] = []
        self.free: list[int] = []

    async def buy(self, seats: Sequence[Seat]) -> list[Any]:
        self.kept = list(seats)
        self.free = [worker.free_slots for worker in self.router.core.fleet.all()]
        return []


async def lane_of(router: Rig) -> str:
    (worker,) = router.core.fleet.all()
    return max(worker.lanes)


async def test_seats_are_kept_while_a_job_is_bought_and_free_again_where_it_has_to_wait(
    router: Rig,
):
    async with router.worker(slots=3):
        buyers = Buyers(router)
        jobs = [new_job(lane=await lane_of(router)) for _ in range(2)]
        await router.core.dispatcher.start_bought([(j, j.lanes) for j in jobs], buyers.buy)
        assert [s.claim.job_id for s in buyers.kept] == [job.id for job in jobs]
        assert buyers.free == [1]
        assert [worker.free_slots for worker in router.core.fleet.all()] == [3]


async def test_what_fails_to_be_bought_keeps_no_seat(router: Rig, monkeypatch: pytest.MonkeyPatch):
    async with router.worker(slots=1):
        woken = 0

        def wake() -> None:
            nonlocal woken
            woken += 1

        async def fail(seats: Sequence[Seat]) -> list[Any]:
            assert len(seats) == 1
            raise RuntimeError("no")

        job = new_job(lane=await lane_of(router))
        monkeypatch.setattr(router.core.dispatcher, "wake", wake)
        with pytest.raises(RuntimeError):
            await router.core.dispatcher.start_bought([(job, job.lanes)], fail)
        assert [worker.free_slots for worker in router.core.fleet.all()] == [1]
        # Whoever came meanwhile saw no room.
        assert woken == 1


async def test_of_those_bought_together_the_dearest_gets_the_seat_and_then_the_first(router: Rig):
    async with router.worker(slots=2):
        lane = await lane_of(router)
        jobs = [new_job(lane=lane, multiplier_milli=m) for m in (1000, 1500, 1500, 2000)]
        buyers = Buyers(router)
        await router.core.dispatcher.start_bought([(j, j.lanes) for j in jobs], buyers.buy)
        assert [s.claim.job_id for s in buyers.kept] == [jobs[3].id, jobs[1].id]


async def test_one_statement_does_not_look_into_the_lanes_of_everybody(
    router: Rig, monkeypatch: pytest.MonkeyPatch
):
    """Workers with hundreds of lanes each, all of them different, would make all buyers wait."""
    names = [f"model-{n}" for n in range(3)]
    async with AsyncExitStack() as stack:
        for n, name in enumerate(names):
            served = {"id": name, "kind": "text", "context_length": 2048, "max_tokens": 1000 + n}
            await stack.enter_async_context(router.worker(slots=2, models=[served]))
        workers = {worker.models[0].id: worker for worker in router.core.fleet.all()}
        lanes = {
            name: next(x for x in worker.lanes if name in x) for name, worker in workers.items()
        }
        jobs = [new_job(lane=lanes[name], model=name) for name in names for _ in range(2)]
        most = sum(len(worker.lanes) for worker in list(workers.values())[:2])
        monkeypatch.setattr(dispatcher, "MOST_PROBES", most)
        buyers = Buyers(router)
        await router.core.dispatcher.start_bought([(j, j.lanes) for j in jobs], buyers.buy)
        assert len({seat.drains for seat in buyers.kept}) == 2
        assert [s.claim.job_id for s in buyers.kept] == [job.id for job in jobs[:4]]


async def test_what_pays_less_than_the_only_worker_asks_gets_no_seat(router: Rig):
    """Also where today's rates would pay it: those of the job's own quote count."""
    async with router.worker(slots=1, min_fees={MODEL: {"prompt_fee_msat": 900}}):
        (worker,) = router.core.fleet.all()
        worker.floors = {}
        lane = await lane_of(router)
        for prompt_fee_msat, seats in ((500, 0), (1000, 1)):
            rates = json.dumps(RATES | {"prompt_fee_msat": prompt_fee_msat})
            job = new_job(lane=lane, rates=rates, multiplier_milli=1000)
            buyers = Buyers(router)
            await router.core.dispatcher.start_bought([(job, job.lanes)], buyers.buy)
            assert len(buyers.kept) == seats


@pytest.mark.parametrize("why", ["paused", "choice", "elsewhere", "demanded"])
async def test_nobody_keeps_a_seat_for_what_the_lanes_cannot_tell(router: Rig, why: str):
    async with router.worker(slots=1):
        lane = await lane_of(router)
        changes = {"choices": "{}"} if why == "choice" else {}
        job = new_job(lane="text/1/1/unheard-of" if why == "elsewhere" else lane, **changes)
        router.core.dispatcher.paused = why == "paused"
        if why == "demanded":
            router.core.fleet.demanded_at = asyncio.get_running_loop().time()
        buyers = Buyers(router)
        await router.core.dispatcher.start_bought([(job, job.lanes)], buyers.buy)
        assert buyers.kept == []


# --- a router ------------------------------------------------------------------------------------


async def test_a_prepaid_job_never_waits_where_a_worker_does(
    router: Rig, monkeypatch: pytest.MonkeyPatch
):
    key = await router.bearer()

    async def look() -> bool:
        return False

    monkeypatch.setattr(router.core.dispatcher, "dispatch_once", look)
    async with router.worker(slots=2) as worker:
        asking = asyncio.create_task(router.http.post("/jobs", json=JOB, headers=key))
        job = await worker.serve("Hi.")
        made = await asking
        assert made.status_code == 202 and made.json()["jobs"][0]["id"] == job["job_id"]
        async with asyncio.timeout(PATIENCE_S):
            while await router.query("select from jobs where state <> 'succeeded'"):
                await asyncio.sleep(0.02)
    assert await router.query("select count(*) as n from queue_changes") == [(0,)]
    assert (await router.books()).in_order


async def test_what_cannot_start_at_once_starts_when_its_turn_comes(router: Rig):
    """With more jobs than slots all are served, the dearest first, and none is lost or doubled."""
    key = await router.bearer()
    async with router.worker(slots=1) as worker:
        multipliers = ["1.0", "1.0", "3.0", "2.0"]
        ids = []
        for multiplier in multipliers:
            made = await router.http.post(
                "/jobs", json=JOB | {"fee_multiplier": multiplier}, headers=key
            )
            ids.append(made.json()["jobs"][0]["id"])
        served = [(await worker.serve("Hi."))["job_id"] for _ in ids]
        assert served == [ids[0], ids[2], ids[3], ids[1]]
    assert await router.query("select max(attempt) as n from jobs") == [(1,)]
    assert (await router.books()).in_order


async def test_one_whose_worker_leaves_meanwhile_waits_for_another(
    router: Rig, monkeypatch: pytest.MonkeyPatch
):
    key = await router.bearer()
    core = router.core
    submit_plain = job_submits.submit_plain
    left = asyncio.Event()

    async def slowly(*about: Any) -> list[Any]:
        results = await submit_plain(*about)
        for session in list(core.gate.sessions.values()):
            session.cut("gone", blame="nobody")
        while core.gate.sessions:
            await asyncio.sleep(0.01)
        left.set()
        return results

    async with router.worker(slots=1):
        monkeypatch.setattr(job_submits, "submit_plain", slowly)
        made = await router.http.post("/jobs", json=JOB, headers=key)
        assert made.status_code == 202 and left.is_set()
    monkeypatch.setattr(job_submits, "submit_plain", submit_plain)
    async with router.worker() as worker:
        job = await worker.serve("Hi.")
        assert (job["job_id"], job["attempt"]) == (made.json()["jobs"][0]["id"], 2)
    assert (await router.books()).in_order


@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize("paid_by", ["balance", "invoice"])
async def test_what_cannot_be_sent_to_its_worker_is_bought_all_the_same(
    router: Rig, monkeypatch: pytest.MonkeyPatch, begun: bool, paid_by: str
):
    """Its buyer, and those whose jobs were bought with it, are told of no error after the commit."""
    assign, faulty = WorkerSession.assign, []

    def faulted(self: WorkerSession, claimed: Claimed) -> None:
        if faulty:
            assign(self, claimed)
            return
        faulty.append(claimed.job_id)
        if begun:
            self._attempts.begin(claimed, self.worker, lambda: None)
        raise ValueError("a fault in how jobs are sent")

    monkeypatch.setattr(WorkerSession, "assign", faulted)
    async with router.worker(slots=3) as worker:
        if paid_by == "balance":
            key = await router.bearer()
            asks = [router.http.post("/jobs", json=JOB, headers=key) for _ in range(2)]
            made = [reply.status_code for reply in await asyncio.gather(*asks)]
            assert made == [202, 202]
        else:
            await router.buy("/jobs", JOB | {"n": 2})
        first = await worker.serve("Hi.")
        assert faulty and first["job_id"] not in faulty
        if not begun:
            await router.query("update jobs set started_at = now() - interval '1 hour' returning 1")
        second = await worker.serve("Hi.")
        assert ([second["job_id"]], second["attempt"]) == (faulty, 2)
        async with asyncio.timeout(PATIENCE_S):
            while await router.query("select from jobs where state <> 'succeeded'"):
                await asyncio.sleep(0.02)
        assert [w.free_slots for w in router.core.fleet.all()] == [3]
    assert (await router.books()).in_order


async def test_whoever_reads_a_job_that_started_finds_it_though_its_buyer_has_gone(
    router: Rig, monkeypatch: pytest.MonkeyPatch
):
    core = router.core
    async with core.database.transaction() as connection:
        account_id = await payer(connection)
    assign, seen = core.dispatcher._assign, []

    def cancelling(claimed: Claimed, worker: Worker) -> None:
        assign(claimed, worker)
        seen.append(core.attempts.running[claimed.job_id])
        buyer.cancel()

    monkeypatch.setattr(core.dispatcher, "_assign", cancelling)
    async with router.worker() as worker:
        quote = new_quote(new_job(lane=await lane_of(router)))
        buyer = asyncio.create_task(core.jobs.submit(quote, account_id=account_id))
        with pytest.raises(asyncio.CancelledError):
            await buyer
        (running,) = seen
        assert core.jobs.hub.get(quote.jobs[0].id) is running.stream
        await worker.serve("Hi.")
    assert (await router.books()).in_order
