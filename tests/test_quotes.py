"""Quotes: rates that hold, invoices that start jobs, and what comes of payments that do not fit."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

from billing import invoices
from billing.fees import Rates
from tests.door_tools import (
    CHAT,
    JOB,
    balance_msat,
    code,
    let_quotes_expire,
    set_rates,
    until_state,
)
from tests.router_rig import MODEL, Rig

DOUBLE = Rates(prompt_fee_msat=2000, input_msat_per_mtok=0, output_msat_per_mtok=2_000_000)


async def quote(router: Rig, **changes: Any) -> dict[str, Any]:
    made = await router.http.post("/quotes", json=JOB | changes)
    assert made.status_code == 201, made.text
    return made.json()


async def invoice(router: Rig, quote_id: str) -> dict[str, Any]:
    made = await router.http.post(f"/quotes/{quote_id}/invoice")
    assert made.status_code == 201, made.text
    return made.json()


async def state_of(router: Rig, quote_id: str, **headers: str) -> dict[str, Any]:
    return (await router.http.get(f"/quotes/{quote_id}", headers=headers)).json()


async def settled(router: Rig, payment_hash: str) -> str:
    """The state of an invoice once its payment is recorded."""
    async with asyncio.timeout(10):
        while True:
            (row,) = await router.query(
                "select state from invoices where payment_hash = $1", payment_hash
            )
            if row["state"] not in ("open", "expired"):
                return row["state"]
            await asyncio.sleep(0.02)


async def test_a_quote_costs_nothing_and_says_what_a_request_would(router: Rig):
    async with router.worker():
        await set_rates(router)
        made = await quote(router, n=2, fee_multiplier="1.25")
        assert made["base_fee_msat"] == 2 * (1000 + 64)
        assert made["offer_msat"] == 2 * 1330
        assert made["multiplier"] == "1.250"
        assert made["prompt_tokens"] == 2 * 8 and made["max_tokens"] == 128
        assert [item["offer_msat"] for item in made["items"]] == [1330, 1330]
        assert made["fees"]["output_msat_per_mtok"] == 1_000_000
        assert made["queue"]["position"] == 1 and made["queue"]["servable"] is True
        assert made["queue"]["multiplier_to_be_next"] == "1.000"
        assert 590 <= made["expires_in_s"] <= 600
        assert await router.query("select 1 from invoices") == []
        assert (await state_of(router, made["quote_id"]))["state"] == "open"


async def test_a_quote_keeps_its_rates_and_the_very_next_one_has_the_new_ones(router: Rig):
    async with router.worker() as worker:
        await set_rates(router)
        held = await quote(router)
        await set_rates(router, DOUBLE)
        assert (await quote(router))["base_fee_msat"] == 2 * held["base_fee_msat"] == 2128
        due = await invoice(router, held["quote_id"])
        assert due["amount_msat"] == 2000  # 1064 in whole satoshis
        await router.pay(due["invoice"])
        job = await worker.serve("Hi.")
        row = await until_state(router, job["job_id"], "succeeded")
        assert row["charged_msat"] == 1000 + 2  # the held rates; 3 bytes are at most 2 tokens
        # A model's own rates outrank the default, and leave other models alone.
        await set_rates(router, Rates(7, 0, 0), model=MODEL)
        assert (await quote(router))["base_fee_msat"] == 7
        assert (await router.http.get("/info")).json()["fees"]["prompt_fee_msat"] == 2000
    assert (await router.books()).in_order


async def test_paying_a_quote_in_time_queues_its_jobs_at_once(router: Rig):
    async with router.worker(slots=2) as worker:
        made = await quote(router, n=2)
        due = await invoice(router, made["quote_id"])
        assert due["invoice"].startswith("lnbcrt") and due["simulated"] is True
        preimage = await router.pay(due["invoice"])
        for _ in range(2):
            await worker.serve()
        proof = {"Authorization": f"L402 {due['l402_token']}:{preimage}"}
        mine = await state_of(router, made["quote_id"], **proof)
        assert mine["state"] == "paid" and len(mine["jobs"]) == 2
        by_claim = await state_of(router, made["quote_id"], **{"X-Claim-Token": due["claim_token"]})
        assert [job["id"] for job in by_claim["jobs"]] == [job["id"] for job in mine["jobs"]]
        # Whoever only knows the quote's id sees that it is paid, and no more.
        assert "jobs" not in await state_of(router, made["quote_id"])
        again = await router.http.post("/jobs", json=JOB | {"n": 2}, headers=proof)
        assert [j["id"] for j in again.json()["jobs"]] == [j["id"] for j in mine["jobs"]]


async def test_a_payment_that_comes_late_is_credited_and_starts_nothing(router: Rig):
    async with router.worker() as worker:
        made = await quote(router)
        due = await invoice(router, made["quote_id"])
        await let_quotes_expire(router)
        assert (await state_of(router, made["quote_id"]))["state"] == "expired"
        preimage = await router.pay(due["invoice"])
        assert await settled(router, due["payment_hash"]) == "late"
        shown = await state_of(router, made["quote_id"])
        assert shown["state"] == "late" and shown["credited_msat"] == due["amount_msat"]
        await worker.nothing()
        proof = {"Authorization": f"L402 {due['l402_token']}:{preimage}"}
        assert await balance_msat(router, proof) == due["amount_msat"]
        # The money is not lost: the same request with the credential is paid from it.
        served = asyncio.create_task(worker.serve("Late, but here."))
        reply = await router.http.post("/v1/chat/completions", json=CHAT, headers=proof)
        await served
        assert reply.status_code == 200, reply.text
    assert (await router.books()).in_order


async def test_surplus_and_change_land_on_the_account(router: Rig):
    async with router.worker() as worker:
        await set_rates(router)
        made = await quote(router)
        due = await invoice(router, made["quote_id"])
        preimage = await router.pay(due["invoice"])
        job = await worker.serve("Hi.")
        await until_state(router, job["job_id"], "succeeded")
        proof = {"Authorization": f"L402 {due['l402_token']}:{preimage}"}
        assert await balance_msat(router, proof) == 2000 - (1000 + 2)


async def test_an_underpaid_invoice_is_credited_and_starts_nothing(router: Rig):
    """Nodes that accept less exist; the watcher is told of less than was asked."""
    async with router.worker() as worker:
        made = await quote(router)
        due = await invoice(router, made["quote_id"])
        core = router.core
        async with core.database.transaction() as connection:
            credit = await invoices.record_settlement(
                connection,
                payment_hash=due["payment_hash"],
                received_msat=due["amount_msat"] - 1,
                settled_at=core.clock(),
            )
            assert isinstance(credit, invoices.Credit)
            assert credit.state is invoices.State.UNDERPAID
            assert await core.quotes.on_credit(connection, credit) == []
        assert (await state_of(router, made["quote_id"]))["state"] == "late"
        await worker.nothing()
        claim = {"X-Claim-Token": due["claim_token"]}
        assert await balance_msat(router, claim) == due["amount_msat"] - 1
    assert (await router.books()).in_order


async def test_an_expired_quote_takes_no_invoice_and_its_text_is_deleted(router: Rig):
    async with router.worker():
        untouched, asked = await quote(router), await quote(router)
        due = await invoice(router, asked["quote_id"])
        await router.core.database.pool.execute(
            "update quotes set expires_at = $1", router.core.clock() - timedelta(seconds=60)
        )
        for one in (untouched, asked):
            refused = await router.http.post(f"/quotes/{one['quote_id']}/invoice")
            assert code(refused) == (410, "quote_expired")
        await router.core.maintenance.expire_quotes()
        rows = await router.query("select state, request from quotes")
        assert {(row["state"], row["request"]) for row in rows} == {("expired", None)}
        (job,) = await router.query("select state from jobs")
        assert job["state"] == "expired"
        # Paying it after all is still not lost.
        await router.pay(due["invoice"])
        assert await settled(router, due["payment_hash"]) in ("late", "paid")
        assert (await state_of(router, asked["quote_id"]))["state"] == "late"
        claim = {"X-Claim-Token": due["claim_token"]}
        assert await balance_msat(router, claim) == due["amount_msat"]


async def test_a_quote_has_one_invoice_and_is_started_once(router: Rig):
    """E5-61: one invoice per quote, so that nobody pays twice for one thing."""
    async with router.worker(slots=4) as worker:
        made = await quote(router)
        path = f"/quotes/{made['quote_id']}/invoice"
        replies = await asyncio.gather(*(router.http.post(path) for _ in range(5)))
        assert sorted(reply.status_code for reply in replies) == [201, 409, 409, 409, 409]
        key = await router.bearer(100_000)
        other = await quote(router)
        start = {"quote_id": other["quote_id"]}
        starts = await asyncio.gather(
            *(router.http.post("/jobs", json=start, headers=key) for _ in range(5))
        )
        assert {reply.status_code for reply in starts} == {202}
        assert len({reply.json()["jobs"][0]["id"] for reply in starts}) == 1
        await worker.job()
        await worker.nothing()
        assert await balance_msat(router, key) == 100_000 - other["offer_msat"]
        stranger = await router.bearer(10_000)
        refused = await router.http.post("/jobs", json=start, headers=stranger)
        assert code(refused) == (410, "quote_expired")
        missing = await router.http.post("/jobs", json={"quote_id": "nowhere"}, headers=key)
        assert code(missing) == (404, "no_such_quote")
