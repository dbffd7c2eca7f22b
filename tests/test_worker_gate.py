"""The gate with workers of other kinds than the native: seats at an address, and those that pull."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from router.attempts import Attempts, RunningAttempt
from router.job_records import Claimed
from router.sessions import Applicant, RefusedWorker
from router.workers import Worker, hash_identity
from tests.door_tools import post_job, until_state
from tests.router_rig import MODEL, PATIENCE_S, Rig
from worker.protocol import FinishReason, ServedModel

SERVED = [ServedModel(id=MODEL, context_length=2048, max_tokens=1024)]


class Hands:
    """A session that holds what it is given until the test says what becomes of it."""

    def __init__(self, worker: Worker, attempts: Attempts) -> None:
        self.worker = worker
        self.closed = False
        self.dropped_frames = 0
        self.held: list[RunningAttempt] = []
        self.given = asyncio.Event()
        self._attempts = attempts

    def assign(self, claimed: Claimed) -> None:
        self.held.append(self._attempts.begin(claimed, self.worker, lambda: None))
        self.given.set()

    def drain(self) -> None:
        self.worker.draining = True

    def check_progress(self, *, first_token_s: float, stall_s: float) -> None:
        assert first_token_s > 0 and stall_s > 0

    def cut(self, reason: str, *, blame: str = "worker") -> None:
        self.end("cut", blame=blame, error=reason)

    def end(
        self, outcome: str = "worker_lost", *, blame: str = "worker", error: str = "it left"
    ) -> None:
        self.closed = True
        held, self.held = self.held, []
        for running in held:
            self._attempts.fail(running, outcome=outcome, blame=blame, error=error)
        self.worker.busy.clear()


async def admit(router: Rig, **facts: Any) -> Hands:
    applicant = Applicant(**{"identity": None, "models": SERVED} | facts)
    return await router.core.gate.admit(
        applicant, lambda worker: Hands(worker, router.core.attempts)
    )


async def test_workers_known_by_an_address_alone_sit_side_by_side_and_come_back_to_their_records(
    router: Rig,
):
    """api.md 5: without a key, earnings belong to the address (QB-W3)."""
    address = f"farm@{router.lnurl_host}"
    first, second = await admit(router, ln_url=address), await admit(router, ln_url=address)
    elsewhere = await admit(router, ln_url=f"other@{router.lnurl_host}")
    unpaid = await admit(router)
    sessions = (first, second, elsewhere, unpaid)
    assert len({session.worker.id for session in sessions}) == 4
    assert [session.worker.ln_url for session in (first, second)] == [address, address]
    assert not unpaid.worker.payable and not any(session.closed for session in sessions)
    router.core.gate.leave(first)
    again = await admit(router, ln_url=address)
    assert again.worker.id == first.worker.id and not second.closed


async def test_an_address_whose_worker_was_banned_finds_no_other_seat(router: Rig):
    address = f"banned@{router.lnurl_host}"
    first = await admit(router, ln_url=address)
    await router.query("update workers set banned_at = now() where id = $1", first.worker.id)
    router.core.gate.leave(first)
    for _ in range(2):
        with pytest.raises(RefusedWorker, match="banned"):
            await admit(router, ln_url=address)
    assert router.core.fleet.all() == []


async def test_an_identity_has_one_session(router: Rig):
    identity = hash_identity("test", "one")
    first = await admit(router, identity=identity)
    second = await admit(router, identity=identity)
    assert first.closed and first.worker.id == second.worker.id
    router.core.gate.leave(first)
    assert router.core.gate.sessions[second.worker.id] is second


async def test_a_worker_that_pulls_is_handed_nothing_and_gets_the_dearest_job_when_it_asks(
    router: Rig,
):
    payer = await router.bearer()
    puller = await admit(router, pulls=True)
    cheap = await post_job(router, payer)
    dear = await post_job(router, payer | {"X-Fee-Multiplier": "3"})
    # A handed-out job would have been claimed by the dispatch that a new worker sets off.
    pusher = await admit(router)
    await asyncio.wait_for(pusher.given.wait(), PATIENCE_S)
    assert pusher.held[0].claimed.job_id == dear["id"] and puller.held == []
    claimed = await router.core.dispatcher.claim_for(puller.worker)
    assert claimed is not None and claimed.job_id == cheap["id"]
    assert puller.worker.busy == {cheap["id"]}
    puller.assign(claimed)
    assert await router.core.dispatcher.claim_for(puller.worker) is None
    running = puller.held.pop()
    router.core.attempts.said(running, "Hello.", None, 1)
    router.core.attempts.finish(running, FinishReason.STOP, None, None)
    row = await until_state(router, cheap["id"], "succeeded")
    assert row["worker_id"] == puller.worker.id
