"""What the tests of jobs in the database share: payers with money, quotes, jobs in every state."""

from __future__ import annotations

import dataclasses
import json
import secrets
from datetime import UTC, datetime, timedelta
from typing import Any

from billing import accounts, ledger
from billing.ledger import Transfer
from router import job_endings, job_records, job_store, job_submits
from router.job_records import Claim, Claimed, Ending, NewJob, NewQuote, Submission, Submitted
from router.job_states import Event, State

RATES = {"prompt_fee_msat": 1000, "input_msat_per_mtok": 0, "output_msat_per_mtok": 0}
LANE = "text/512/512/test-model"
OFFER_MSAT = 1500


def new_job(**changes: Any) -> NewJob:
    job = NewJob(
        id=accounts.new_id(),
        index=0,
        kind="completion",
        model="test-model",
        spec=json.dumps({"kind": "completion", "model": "test-model", "prompt": "x"}),
        rates=json.dumps(RATES),
        prompt_tokens=1,
        max_tokens=10,
        base_fee_msat=1000,
        offer_msat=OFFER_MSAT,
        multiplier_milli=1500,
        lane=LANE,
    )
    return dataclasses.replace(job, **changes)


def new_quote(*jobs: NewJob, request: bytes | None = None) -> NewQuote:
    jobs = jobs or (new_job(),)
    return NewQuote(
        id=accounts.new_id(),
        request_hash=request or secrets.token_bytes(32),
        base_fee_msat=sum(job.base_fee_msat for job in jobs),
        offer_msat=sum(job.offer_msat for job in jobs),
        max_wait_s=600,
        jobs=jobs,
    )


async def payer(connection: Any, amount_msat: int = 1_000_000) -> str:
    """An account that holds `amount_msat`."""
    account_id = await accounts.create_account(connection)
    received = Transfer(
        ledger.LIGHTNING, ledger.client(account_id), amount_msat, "received", account_id
    )
    await ledger.post(connection, [received])
    return account_id


async def submit(connection: Any, account_id: str, *jobs: NewJob) -> Submitted:
    quote = new_quote(*jobs)
    (result,) = await job_submits.submit_plain(connection, [Submission(quote, account_id)])
    assert isinstance(result, Submitted), result
    return result


async def claim(connection: Any, job_id: str, worker_id: str = "w1") -> Claimed | None:
    lease = datetime.now(UTC) + timedelta(seconds=60)
    (claimed,) = await job_store.claim_many(
        connection, [Claim(job_id, worker_id, "r1", 50_000, lease)]
    )
    return claimed


async def end(connection: Any, ending: Ending) -> job_records.Ended | None:
    (ended,) = await job_endings.end_many(connection, [ending], wipe_after_s=600)
    return ended


async def awaiting_job(connection: Any, account_id: str) -> NewJob:
    """A job whose invoice is not paid yet."""
    job = new_job()
    quote = new_quote(job)
    await connection.execute(
        "insert into quotes (id, account_id, state, request_hash, base_fee_msat, offer_msat,"
        " max_wait_s, expires_at) values ($1, $2, 'open', $3, $4, $5, 600, now() + interval '1h')",
        quote.id,
        account_id,
        quote.request_hash,
        quote.base_fee_msat,
        quote.offer_msat,
    )
    await job_submits.store_awaiting(connection, quote, account_id)
    return job


async def job_in(connection: Any, state: State, account_id: str) -> NewJob:
    """A job that came to `state` by the moves that lead there."""
    if state is State.AWAITING_PAYMENT:
        return await awaiting_job(connection, account_id)
    job = new_job()
    await submit(connection, account_id, job)
    if state is State.QUEUED:
        return job
    if state is State.EXPIRED:
        assert await end(connection, Ending(job.id, Event.EXPIRE, "max_wait"))
        return job
    assert await claim(connection, job.id)
    last = {
        State.SUCCEEDED: Event.FINISH,
        State.FAILED: Event.FAIL,
        State.CANCELLED: Event.CANCEL,
    }
    if state in last:
        assert await end(connection, Ending(job.id, last[state], "before", attempt=1))
    return job


async def state_of(connection: Any, job_id: str) -> State:
    return State(await connection.fetchval("select state from jobs where id = $1", job_id))
