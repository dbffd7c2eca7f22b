"""Raising the offer of a waiting job."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx

from billing import accounts, ledger
from tests.door_tools import (
    CHAT,
    RATES,
    balance_msat,
    busy_worker,
    code,
    post_job,
    set_rates,
    token,
    until_state,
)
from tests.router_rig import Rig

FUNDS = 100_000
BASE = 1064  # of door_tools.CHAT at door_tools.RATES


async def bump(
    router: Rig, links: dict[str, Any], headers: dict[str, str] | None = None, **body: Any
) -> httpx.Response:
    path = f"{links['status_url']}/bump"
    return await router.http.post(path, json=body, headers=headers or token(links))


async def test_a_bumped_job_overtakes_and_keeps_its_time(router: Rig):
    await set_rates(router, RATES)
    payer = await router.bearer(FUNDS)
    async with router.worker() as worker:
        busy = await busy_worker(router, worker)
        first = await post_job(router, payer)
        second = await post_job(router, payer, fee_multiplier="1.5")
        view = (await bump(router, first, offer_msat=1596)).json()
        # Equal now: the one that was queued first is served first.
        assert (view["multiplier"], view["position"], view["held_msat"]) == ("1.500", 1, 1596)
        raised = (await bump(router, second, fee_multiplier="2")).json()
        assert (raised["multiplier"], raised["position"]) == ("2.000", 1)
        same = await bump(router, second, offer_msat=raised["held_msat"])
        assert same.status_code == 200
        await worker.finish(busy, tokens=0)
        for links in (second, first):
            job = await worker.job()
            assert job["job_id"] == links["id"]
            await worker.finish(job, tokens=0)
        row = await until_state(router, first["id"], "succeeded")
        assert row["charged_msat"] == 1500  # the prompt fee at the new multiplier
    assert await balance_msat(router, payer) == FUNDS - 1500 - 2000
    assert (await router.books()).in_order


async def test_a_bump_that_makes_no_sense_is_refused(router: Rig):
    await set_rates(router, RATES)
    payer = await router.bearer(FUNDS * 100)
    async with router.worker() as worker:
        await busy_worker(router, worker)
        links = await post_job(router, payer, fee_multiplier="1.5")
        wrong: list[dict[str, Any]] = [
            {},
            {"offer_msat": 1595},
            {"offer_msat": -1},
            {"offer_msat": 0},
            {"offer_msat": True},
            {"offer_msat": "2000"},
            {"offer_msat": 2000.5},
            {"offer_msat": 2000, "fee_multiplier": 2},
            {"offer_msat": BASE * 1000 + 1},
            {"offer_msat": 10**30},
            {"fee_multiplier": 1.4},
            {"fee_multiplier": 0.1},
            {"fee_multiplier": "NaN"},
            {"fee_multiplier": 1001},
            {"fee_multiplier": "1e2"},
        ]
        for body in wrong:
            assert code(await bump(router, links, **body)) == (400, "bad_request"), body
        (row,) = await router.query("select held_msat from jobs where id = $1", links["id"])
        assert row["held_msat"] == 1596


async def test_a_bump_without_balance_is_a_402_for_the_difference(router: Rig):
    await set_rates(router, RATES)
    payer = await router.bearer(2000)
    async with router.worker() as worker:
        await busy_worker(router, worker)
        links = await post_job(router, payer)
        refused = await bump(router, links, offer_msat=5064)
        assert code(refused) == (402, "payment_required")
        due = refused.json()
        assert due["offer_msat"] == 5064
        # 4000 more, of which 936 are on the account: 3064, in whole satoshis.
        assert due["amount_msat"] == 4000 and due["simulated"] is True
        assert refused.headers["www-authenticate"].startswith("L402 ")
        await router.pay(due["invoice"])
        async with asyncio.timeout(10):
            while (await router.http.get(links["status_url"], headers=payer)).json()[
                "held_msat"
            ] != 5064:
                await asyncio.sleep(0.02)
        view = (await router.http.get(links["status_url"], headers=payer)).json()
        assert view["multiplier"] == "4.759"
        assert await balance_msat(router, payer) == 936 + 4000 - 4000
    assert (await router.books()).in_order


async def test_a_bump_that_is_paid_too_late_is_credited(router: Rig):
    await set_rates(router, RATES)
    payer = await router.bearer(2000)
    async with router.worker() as worker:
        busy = await busy_worker(router, worker)
        links = await post_job(router, payer)
        due = (await bump(router, links, offer_msat=5064)).json()
        await worker.finish(busy, tokens=0)
        job = await worker.job()
        assert code(await bump(router, links, offer_msat=1100)) == (409, "job_not_waiting")
        await router.pay(due["invoice"])
        async with asyncio.timeout(10):
            while await balance_msat(router, payer) != 936 + 4000:
                await asyncio.sleep(0.02)
        await worker.finish(job, tokens=0)
        row = await until_state(router, links["id"], "succeeded")
        assert (row["held_msat"], row["charged_msat"]) == (BASE, 1000)
    assert await balance_msat(router, payer) == 2000 + 4000 - 1000
    assert (await router.books()).in_order


async def test_a_bump_counts_against_the_limit_of_the_key_that_bought_the_job(router: Rig):
    await set_rates(router, RATES)
    owner = await router.bearer(FUNDS)
    made = await router.http.post("/balance/keys", json={"limit_msat": 3000}, headers=owner)
    limited = {"Authorization": f"Bearer {made.json()['key']}"}
    async with router.worker() as worker:
        busy = await busy_worker(router, worker)
        links = await post_job(router, limited)
        over = await bump(router, links, limited, offer_msat=3001)
        # The account could pay it, the key may not: only fresh money raises the job further.
        assert code(over) == (402, "payment_required")
        assert over.json()["amount_msat"] == 2000 and over.json()["offer_msat"] == 3001
        assert (await bump(router, links, limited, offer_msat=3000)).status_code == 200
        refused = await router.http.post("/jobs", json={"kind": "chat", **CHAT}, headers=limited)
        assert code(refused) == (402, "insufficient_balance")
        await worker.finish(busy, tokens=0)
        await worker.finish(await worker.job(), tokens=0)
        await until_state(router, links["id"], "succeeded")
        keys = (await router.http.get("/balance/keys", headers=owner)).json()["keys"]
        assert [key["spent_msat"] for key in keys if key["limit_msat"]] == [2819]


async def test_paying_a_bump_opens_that_job_and_no_other_of_its_account(router: Rig):
    """Whoever holds a job's token may raise it; that makes nobody the owner of the account."""
    await set_rates(router, RATES)
    payer = await router.bearer(4000)
    async with router.worker() as worker:
        await busy_worker(router, worker)
        raised, other = await post_job(router, payer), await post_job(router, payer)
        due = (await bump(router, raised, offer_msat=9064)).json()
        credential = {
            "Authorization": f"L402 {due['l402_token']}:{await router.pay(due['invoice'])}"
        }
        assert (await router.http.get(raised["status_url"], headers=credential)).status_code == 200
        refused = await router.http.get(other["status_url"], headers=credential)
        assert code(refused) == (403, "forbidden")
        refused = await router.http.delete(other["status_url"], headers=credential)
        assert code(refused) == (403, "forbidden")


async def test_a_bump_and_a_submission_of_the_same_key_do_not_wait_for_each_other(router: Rig):
    owner = await router.bearer(FUNDS)
    made = await router.http.post("/balance/keys", json={"limit_msat": 9000}, headers=owner)
    limited = {"Authorization": f"Bearer {made.json()['key']}"}
    async with router.worker() as worker:
        await busy_worker(router, worker)
        links = await post_job(router, limited)
        (job,) = await router.query("select * from jobs where id = $1", links["id"])
        async with router.core.database.transaction() as connection:
            # What a submission does first.
            await ledger.lock_balances(connection, [ledger.client(job["account_id"])])
            raising = asyncio.create_task(bump(router, links, limited, fee_multiplier="2"))
            async with asyncio.timeout(10):
                while not await connection.fetchval(
                    "select exists (select from pg_locks where not granted)"
                ):
                    await asyncio.sleep(0.01)
            # And what it does then: were the bump there before it, PostgreSQL would end one of them.
            await connection.execute("set local lock_timeout = '500ms'")
            assert await accounts.spend(connection, job["key_id"], 1)
        assert (await raising).status_code == 200


async def test_a_paid_bump_and_the_end_of_its_job_do_not_wait_for_each_other(router: Rig):
    """Whoever ends a job locks it, and then balances; so does whoever credits a bump of it."""
    payer = await router.bearer(3000)
    async with router.worker() as worker:
        await busy_worker(router, worker)
        links = await post_job(router, payer)
        due = (await bump(router, links, offer_msat=9064)).json()
        (job,) = await router.query("select * from jobs where id = $1", links["id"])
        async with router.core.database.transaction() as connection:
            await connection.execute("select from jobs where id = $1 for update", job["id"])
            await router.pay(due["invoice"])
            async with asyncio.timeout(10):
                while not await connection.fetchval(
                    "select exists (select from pg_locks where not granted)"
                ):
                    await asyncio.sleep(0.01)
            # Had the payment the balance by now, PostgreSQL would end one of the two.
            await connection.execute("set local lock_timeout = '500ms'")
            assert await ledger.lock_balances(connection, [ledger.client(job["account_id"])])
        async with asyncio.timeout(10):
            while not await router.query("select from jobs where held_msat = 9064"):
                await asyncio.sleep(0.02)
    assert (await router.books()).in_order
