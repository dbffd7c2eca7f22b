"""Three router processes, one market: the client at A, the worker at B, and C that had neither.

What two do without each other is in tests/test_router_losses.py; here two of three are killed at once,
or the three have to agree. The long form is `make chaos CHAOS="--routers 3"`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.follower import Follower
from tests.market_rig import ASK, SEEN_FIRST, Market, market_of_processes
from tests.reading import PATIENCE_S, Reader, until

# The processes are started once.
pytestmark = pytest.mark.xdist_group("three processes")

A, B, C = 0, 1, 2
PAYS = "this router is the one that pays now"


@pytest.fixture(scope="module")
def three_processes(postgres_url: str) -> Iterator[Market]:
    with market_of_processes(postgres_url, 3) as market:
        yield market


@pytest.fixture
async def market(three_processes: Market) -> Market:
    await three_processes.start()
    return three_processes


def bearer(link: dict[str, Any]) -> dict[str, str]:
    return {"Authorization": f"Bearer {link['token']}"}


async def test_three_that_start_together_on_an_empty_database_make_its_tables_once(market: Market):
    """Each brings the tables up to date as it starts; the others wait for the first."""
    (made,) = await market.query("select count(*) from alembic_version")
    assert made["count"] == 1
    for part in market.routers:
        assert "router started" in part.log_text() and "error" not in part.log_text()


async def test_a_router_does_not_start_in_the_data_folder_of_another(market: Market):
    """It would take itself for that one after a crash, and take back what that one is at."""
    again = market.another_in_the_folder_of(A)
    await again.start()
    assert await again.ended() == 1
    (said,) = again.log_text().splitlines()
    assert said.startswith("error: ") and "SATHERD_DATA_DIR" in said
    assert market.routers[A].running


async def test_the_dearer_job_wins_wherever_it_was_bought_and_bumped(market: Market):
    """2.0 at A goes before 1.5 at B, though the worker is at C; and a bump counts at any router."""
    key, _ = await market.owner()
    async with market.scripted(C) as worker:
        await market.queue(B, key)
        first = await worker.job()
        plain = await market.queue(C, key)
        cheap = await market.queue(B, key, fee_multiplier=1.5)
        dear = await market.queue(A, key, fee_multiplier=2.0)
        last = await market.queue(A, key)
        async with market.client(B) as b:
            bumped = await b.post(
                f"{last['status_url']}/bump", json={"fee_multiplier": 2.5}, headers=bearer(last)
            )
            assert bumped.status_code == 200 and bumped.json()["position"] == 1
        await worker.finish(first, tokens=1)
        order = []
        for _ in range(4):
            job = await worker.job()
            order.append(job["job_id"])
            await worker.finish(job, tokens=1)
        assert order == [link["id"] for link in (last, dear, cheap, plain)]
        await until(lambda: all_ended(market))
    await market.check_books(jobs=5)


async def test_a_cancel_at_the_third_router_reaches_the_worker(market: Market):
    """The job was bought at A and runs at B; it is charged for what its reader at A was shown."""
    key, _ = await market.owner()
    async with market.scripted(B) as worker, market.client(A) as a, market.client(C) as c:
        link = await market.queue(A, key)
        follower = Follower(link, bearer(link))
        reading = asyncio.create_task(follower.read(a))
        job = await worker.job()
        await worker.say(job, "as far as it came", tokens=4)

        async def shown() -> bool:
            return follower.text == "as far as it came"

        await until(shown)
        cancelled = await c.delete(link["status_url"], headers=bearer(link))
        assert cancelled.status_code == 200
        view = cancelled.json()
        assert view["state"] == "cancelled" and 0 < view["charged_msat"] < view["held_msat"]
        stop = await worker.receive()
        assert (stop["type"], stop["job_id"]) == ("cancel", job["job_id"])
        await asyncio.wait_for(reading, PATIENCE_S)
        assert follower.done is not None and follower.done["charged_msat"] == view["charged_msat"]
    await market.check_books(jobs=1)


async def test_what_the_router_that_pays_leaves_undone_is_done_once_when_it_is_killed(
    market: Market,
):
    """A payment of its hangs in the network: another router asks what became of it, and books it. Jobs
    of its clients have waited too long: both others see to that at the same time."""
    key, owner = await market.owner()
    async with market.network_client() as network:
        await network.post("/v1/wallets/purse/fund", json={"amount_msat": 1000})
        terms = {"amount_msat": 50_000, "description": "change", "expiry_s": 600}
        invoice = (await network.post("/v1/wallets/purse/create_invoice", json=terms)).json()
        await network.post("/v1/faults", json={"kind": "hang", "operation": "pay_invoice"})
        ordered = {await withdraw(market, router, owner, invoice["bolt11"]) for router in (A, B, C)}
        (payout,) = ordered
        await until(lambda: attempts(market, payout, "submitted"))
        payer = who_pays(market)
        other, third = sorted({A, B, C} - {payer})

        async with market.scripted(other) as worker:
            await market.queue(payer, key)
            busy = await worker.job()
            for _ in range(5):
                await market.queue(payer, key, max_wait_s=1)
            await market.kill(payer)
            await end_lease(market)
            # The same order again, as a client that heard nothing would.
            for router in (other, third):
                assert await withdraw(market, router, owner, invoice["bolt11"]) == payout

            async def taken_over() -> bool:
                return who_pays(market) != payer

            async def expired() -> bool:
                return len(await market.query("select 1 from jobs where state = 'expired'")) == 5

            await until(taken_over)
            await until(expired)
            await worker.finish(busy, tokens=1)
        resolved = f"/v1/payments/{invoice['payment_hash']}/resolve"
        await network.post(resolved, json={"settle": True})
        await until(lambda: attempts(market, payout, "succeeded"))
        purse = (await network.get("/v1/wallets/purse")).json()
    assert [record["amount_received_msat"] for record in purse["received"]] == [50_000]
    assert len(await attempts(market, payout)) == 1
    await until(lambda: all_ended(market))
    refunds = await market.query(
        "select count(*) from ledger_transfers t join jobs j on t.reference = j.id"
        " where code = 'refund' and state = 'expired' group by j.id"
    )
    assert [row["count"] for row in refunds] == [1] * 5
    await market.check_books(jobs=6)


async def test_client_and_worker_of_two_killed_routers_meet_at_the_third(market: Market):
    """Not a character is lost or said twice, and both jobs are charged once: one is followed by its
    events, of the other the same request is made again."""
    key, _ = await market.owner()
    once = key | {"Idempotency-Key": "asked at A, answered at C"}
    async with market.worker(B, A, C):
        paid, link = await market.buy(A)
        follower = Follower(link, paid)
        async with market.client(A) as a:
            asked = Reader(a, once, **ASK)
            await follower.read(a, at_least=SEEN_FIRST)

            async def begun() -> bool:
                return len(asked.text) >= SEEN_FIRST

            await until(begun)
            await market.kill(A, B)
            with pytest.raises(httpx.HTTPError):
                await asked.task
        assert follower.done is None and not asked.done
        async with market.client(C) as c:
            again = Reader(c, once, **ASK)
            await asyncio.wait_for(follower.read(c), PATIENCE_S)
            await asyncio.wait_for(again.task, PATIENCE_S)
    assert follower.text == follower.answer == again.text
    assert again.done and again.text.startswith(asked.text)
    assert follower.attempts == {1}
    assert await market.query("select distinct state, attempt from jobs") == [("succeeded", 1)]
    booked = await market.query(
        "select code, count(*) from ledger_transfers t join jobs j on t.reference = j.id"
        " group by 1 order by 1"
    )
    assert dict(booked)["hold"] == dict(booked)["earned"] == 2
    await market.check_books(jobs=2)


async def withdraw(market: Market, router: int, owner: dict[str, str], invoice: str) -> str:
    async with market.client(router) as http:
        ordered = await http.post("/balance/withdrawals", json={"invoice": invoice}, headers=owner)
        assert ordered.status_code == 202, ordered.text
        return ordered.json()["id"]


async def end_lease(market: Market) -> None:
    """That of a dead router runs out by itself, after 20 s; a test does not wait for it."""
    await market.query("update billing_state set expires_at = now() where key = 'payout_lease'")


async def attempts(market: Market, payout_id: str, state: str = "%") -> list[Any]:
    return await market.query(
        "select state from payout_attempts where payout_id = $1 and state like $2",
        payout_id,
        state,
    )


def who_pays(market: Market) -> int:
    """The router that said so last. A line of a log begins with its time."""
    said = [
        (line, router)
        for router, part in enumerate(market.routers)
        for line in part.log_text().splitlines()
        if PAYS in line
    ]
    return max(said)[1]


async def all_ended(market: Market) -> bool:
    return not await market.query("select 1 from jobs where state in ('queued', 'running')")
