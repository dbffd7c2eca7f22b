"""What a job that ran is charged, and what its usage says (contract §1)."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from router.charging import Delivered, charge, usage
from router.job_records import Claimed
from tests.door_tools import RATES, balance_msat, post_job, set_rates, until_state
from tests.router_rig import ADMIN_TOKEN, Rig

NOW = datetime(2026, 1, 1, tzinfo=UTC)
FUNDS = 100_000


def job(**changes: Any) -> Claimed:
    given: dict[str, Any] = {
        "job_id": "j",
        "attempt": 1,
        "worker_id": "w",
        "quote_id": "q",
        "account_id": "a",
        "kind": "chat",
        "model": "m",
        "spec": "{}",
        "rates": json.dumps(
            {"prompt_fee_msat": 1000, "input_msat_per_mtok": 10**6, "output_msat_per_mtok": 10**7}
        ),
        "prompt_tokens": 10,
        "max_tokens": 100,
        "held_msat": 2 * (1000 + 10 + 1000),
        "multiplier_milli": 2000,
        "commission_ppm": 0,
        "queued_at": NOW,
        "started_at": NOW,
    }
    return Claimed(**(given | changes))


@pytest.mark.parametrize(
    "utf8_bytes, worker_tokens, charged",
    [
        (100, 20, 20),  # the worker's count
        (100, 90, 50),  # but no more than a token for two bytes
        (101, 90, 51),
        (1000, 300, 100),  # and no more than was asked for
        (100, None, 25),  # without a count, a token for four bytes
        (101, None, 26),
        (1000, None, 100),
        (0, 0, 0),
        (0, 50, 0),
        (0, None, 0),
    ],
)
def test_the_output_charged_is_the_least_that_can_be_defended(
    utf8_bytes: int, worker_tokens: int | None, charged: int
):
    """E4-48: we count ourselves, whatever the worker says or leaves out."""
    made = charge(job(), Delivered(utf8_bytes, worker_tokens), with_prompt_fee=True)
    assert made.output_tokens == charged
    assert made.charge_msat == 2 * (1000 + 10 + 10 * charged)


def test_a_lost_job_pays_no_prompt_fee():
    made = charge(job(), Delivered(40, 20), with_prompt_fee=False)
    assert made.charge_msat == 2 * (10 + 10 * 20)


def test_a_charge_never_exceeds_what_is_held():
    assert charge(job(held_msat=500), Delivered(100, 50), with_prompt_fee=True).charge_msat == 500


def test_usage_shows_the_models_counts_and_ours_beside_them():
    delivered = Delivered(100, 90, 7)
    made = charge(job(), delivered, with_prompt_fee=True)
    said = usage(job(), delivered, made)
    assert (said["prompt_tokens"], said["completion_tokens"], said["total_tokens"]) == (7, 90, 97)
    ours = said["satherd"]
    assert (ours["prompt_tokens"], ours["completion_tokens"]) == (10, 50)
    assert ours["fee_msat"] == made.charge_msat == 2 * (1000 + 10 + 500)
    assert ours["fee_msat"] + ours["refund_msat"] == job().held_msat
    assert ours["multiplier"] == "2.000"
    # Where the worker gives none, ours are all there are.
    bare = Delivered(100, None)
    said = usage(job(), bare, charge(job(), bare, with_prompt_fee=True))
    assert (said["prompt_tokens"], said["completion_tokens"]) == (10, 25)


# What a worker says of its tokens, chunk by chunk and at the end; and what is then charged.
COUNTS: list[tuple[list[int | None], int | None, int]] = [
    ([2, 3], 4, 4),
    ([2, 3], None, 5),
    ([2, None], None, 5),  # 20 bytes and no complete count
    ([None, None], 3, 3),
    ([50, 50], None, 10),  # at most a token for two bytes
    ([], 5, 0),
]


@pytest.mark.parametrize("chunks, finished, charged", COUNTS)
async def test_the_counts_of_a_worker_are_taken_as_far_as_it_gives_them(
    router: Rig, chunks: list[int | None], finished: int | None, charged: int
):
    await set_rates(router, RATES)
    payer = await router.bearer(FUNDS)
    async with router.worker() as worker:
        links = await post_job(router, payer)
        running = await worker.job()
        frame = {"type": "chunk", "job_id": running["job_id"], "attempt": 1}
        for seq, tokens in enumerate(chunks):
            await worker.send(frame | {"seq": seq, "text": "é" * 5, "tokens": tokens})
        await worker.finish(running, tokens=finished)
        row = await until_state(router, links["id"], "succeeded")
    assert row["charged_msat"] == 1000 + charged
    assert await balance_msat(router, payer) == FUNDS - 1000 - charged


async def test_the_commission_is_that_of_the_claim(router: Rig):
    await set_rates(router, RATES)
    payer = await router.bearer(FUNDS)
    admin = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
    async with router.worker() as worker:
        for expected in (50, 500):
            links = await post_job(router, payer)
            running = await worker.job()
            changed = await router.http.put(
                "/admin/settings", json={"commission_ppm": 500_000}, headers=admin
            )
            assert changed.status_code == 200, changed.text
            await worker.finish(running, tokens=0)
            await until_state(router, links["id"], "succeeded")
            earned = await router.query(
                "select amount_msat from ledger_transfers where code = 'commission'"
                " and reference = $1",
                links["id"],
            )
            assert [row["amount_msat"] for row in earned] == [expected]


async def test_a_worker_that_asks_for_no_pay_leaves_its_part_to_the_router(router: Rig):
    await set_rates(router, RATES)
    payer = await router.bearer(FUNDS)
    async with router.worker(ln_url=None) as worker:
        links = await post_job(router, payer)
        await worker.finish(await worker.job(), tokens=0)
        await until_state(router, links["id"], "succeeded")
    books = await router.books()
    assert books.in_order
    assert books.lines["income:router_fees"] == -1000
    assert not books.lines.get("liabilities:worker")
