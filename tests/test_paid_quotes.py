"""The short way of a settlement leaves what the long one leaves, and nothing in any other case."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import asyncpg
import pytest

from billing import ledger
from billing.invoice_watcher import InvoiceWatcher, Receipt
from billing.invoices import utc_now
from billing.ledger import Transfer
from billing.lightning import Settlement
from router.paid_quotes import PaidQuotes
from tests.door_tools import JOB
from tests.router_rig import Rig

TABLES = ("invoices", "quotes", "jobs", "queue", "ledger_transfers", "ledger_balances")
# Different for each job, or for each moment.
APART = {"payment_hash", "bolt11", "token_id", "claim_hash", "created_at", "expires_at"}
APART |= {"settled_at", "queued_at", "wait_ends_at", "seq"}


@pytest.fixture
async def shop(router: Rig) -> AsyncIterator[Rig]:
    """A router with a worker that is given nothing, so that what is queued stays so."""
    router.core.dispatcher.paused = True
    async with router.worker(slots=2):
        yield router


async def bought(router: Rig) -> dict[str, Any]:
    """A quote of two jobs with an invoice that nobody has paid."""
    made = (await router.http.post("/quotes", json=JOB | {"n": 2})).json()
    due = await router.http.post(f"/quotes/{made['quote_id']}/invoice")
    assert due.status_code == 201, due.text
    return due.json() | {"quote_id": made["quote_id"]}


def receipt(due: dict[str, Any], *, more_msat: int = 0, later_s: float = 0.0) -> Receipt:
    return Receipt(
        due["payment_hash"],
        due["amount_msat"] + more_msat,
        utc_now() + timedelta(seconds=later_s),
        "simulated",
        None,
    )


def settlement(due: dict[str, Any]) -> Settlement:
    # More than was asked: the surplus is the payer's.
    return Settlement(due["payment_hash"], due["amount_msat"] + 7, utc_now(), "1")


async def start(router: Rig, told: Receipt) -> list[str]:
    """Start it by another router, which has not sold it; the ids of its jobs."""
    core = router.core
    paid = PaidQuotes(core.database, core.models, core.dispatcher.start_bought)
    started = await paid.start(told)
    return started.job_ids if started is not None else []


async def everything(router: Rig) -> dict[str, list[dict[str, Any]]]:
    return {
        table: sorted((dict(row) for row in await router.query(f"select * from {table}")), key=repr)
        for table in TABLES
    }


async def left_by(router: Rig, due: dict[str, Any]) -> list[Any]:
    """What the database holds of one purchase, without what is different for each."""
    quote_id = due["quote_id"]
    jobs = await router.query("select * from jobs where quote_id = $1 order by index", quote_id)
    ids = [job["id"] for job in jobs]
    (quote,) = await router.query("select * from quotes where id = $1", quote_id)
    names = {due["payment_hash"]: "HASH", quote_id: "QUOTE", quote["account_id"]: "PAYER"}
    names |= {job_id: f"JOB{n}" for n, job_id in enumerate(ids)}
    accounts = [ledger.client(quote["account_id"]), *map(ledger.escrow, ids)]
    rows = [
        *await router.query("select * from invoices where reference = $1", quote_id),
        quote,
        *jobs,
        *await router.query("select * from queue where job_id = any($1) order by lane, seq", ids),
        *await router.query(
            "select debit, credit, amount_msat, code, reference, id = any($2) as known"
            " from ledger_transfers where reference = any($1)",
            [due["payment_hash"], *ids],
            [ledger.transfer_id(job_id, "hold") for job_id in ids]
            + [ledger.transfer_id(due["payment_hash"], "received")],
        ),
        *await router.query("select * from ledger_balances where account = any($1)", accounts),
    ]
    shown = [{k: v for k, v in dict(row).items() if k not in APART} for row in rows]
    texts = []
    for row in shown:
        text = repr(sorted(row.items()))
        for name, stands_for in names.items():
            text = text.replace(name, stands_for)
        texts.append(text)
    return sorted(texts)


async def test_both_ways_leave_the_same_rows(shop: Rig):
    core = shop.core
    short, long = await bought(shop), await bought(shop)
    began = await core.watcher.record(settlement(short))
    steps = InvoiceWatcher(
        core.database.transaction, core.backend, core.watcher._on_credit, clock=core.clock
    )
    assert began and await steps.record(settlement(long))
    assert await left_by(shop, short) == await left_by(shop, long)
    queued = await shop.query(
        "select state, queued_at, seq, wait_ends_at - queued_at as waits from jobs"
    )
    assert {row["state"] for row in queued} == {"queued"}
    assert len({row["seq"] for row in queued}) == 4 and len({row["waits"] for row in queued}) == 1
    assert (await shop.books()).in_order


@pytest.mark.parametrize("sold", ["a moment ago", "by another router"])
async def test_a_router_takes_the_short_way(shop: Rig, monkeypatch: pytest.MonkeyPatch, sold: str):
    async def steps(*_: Any) -> None:
        raise AssertionError("a paid quote went step by step")

    monkeypatch.setattr(shop.core.quotes, "on_credit", steps)
    due = (await shop.http.post("/jobs", json=JOB | {"n": 2})).json()
    known = shop.core.quotes._paid._sold
    assert due["payment_hash"] in known
    if sold == "by another router":
        known.clear()
    await shop.pay(due["invoice"])
    async with asyncio.timeout(10):
        while not await shop.query("select 1 from jobs where state = 'queued'"):
            await asyncio.sleep(0.02)
    # The stream goes on after it, if it should break.
    assert not known
    (cursor,) = await shop.query("select cursor from node_cursors where backend = 'simulated'")
    (received,) = await shop.network.received("router")
    assert cursor["cursor"] == received.cursor


async def test_of_jobs_that_start_at_once_nothing_is_left_to_tell(router: Rig):
    """Their start is told; only those that wait are told of as paid, with the next word of work."""
    told: list[str] = []
    relay = router.core.relay
    tell_paid = relay.tell_paid
    relay.tell_paid = lambda ids: (told.extend(ids), tell_paid(ids))[1]  # type: ignore[method-assign]
    async with router.worker(slots=1) as worker:
        due = (await router.http.post("/jobs", json=JOB)).json()
        await router.pay(due["invoice"])
        await worker.job()
        assert not told and not relay._paid
        due = await bought(router)
        await router.pay(due["invoice"])
        async with asyncio.timeout(10):
            while len(told) < 2 or relay._paid:
                await asyncio.sleep(0.02)


@pytest.mark.parametrize("case", ["late", "underpaid", "expired", "spent", "foreign"])
async def test_what_is_not_the_usual_case_changes_nothing(shop: Rig, case: str):
    due = await bought(shop)
    told = receipt(due)
    match case:
        case "late":
            told = receipt(due, later_s=86_400)
        case "underpaid":
            told = receipt(due, more_msat=-1)
        case "expired":
            await shop.query("update quotes set state = 'expired' returning id")
        case "spent":
            assert len(await start(shop, told)) == 2
        case "foreign":
            told = receipt(due | {"payment_hash": "00" * 32})
    before = await everything(shop)
    assert not await start(shop, told)
    assert await everything(shop) == before


async def test_a_quote_that_expires_meanwhile_is_not_started(shop: Rig):
    due = await bought(shop)
    async with shop.core.database.transaction() as connection:
        await connection.execute("update quotes set state = 'expired'")
        starting = asyncio.create_task(start(shop, receipt(due)))
        async with asyncio.timeout(10):
            waits = (
                "select 1 from pg_stat_activity where wait_event_type = 'Lock' and query like $1"
            )
            while not await shop.query(waits, "%opened as (%update quotes%"):
                await asyncio.sleep(0.01)
    before = await everything(shop)
    assert not await starting
    assert await everything(shop) == before


@pytest.mark.parametrize("way", ["paid", "expired"])
async def test_the_jobs_of_a_quote_are_locked_in_the_order_in_which_they_are_cancelled(
    shop: Rig, way: str
):
    """By their ids; else a client that cancels them all would hold some, and wait for the others."""
    made = (await shop.http.post("/quotes", json=JOB | {"n": 6})).json()
    due = (await shop.http.post(f"/quotes/{made['quote_id']}/invoice")).json()
    core, ids = shop.core, sorted(row["id"] for row in await shop.query("select id from jobs"))
    if way == "expired":
        await shop.query("update quotes set expires_at = now() - interval '1 hour' returning 1")
    async with core.database.transaction() as connection:
        await connection.execute("select from jobs where id = $1 for update", ids[0])
        change = start(shop, receipt(due)) if way == "paid" else core.maintenance.expire_quotes()
        changing = asyncio.create_task(change)
        async with asyncio.timeout(10):
            while not await connection.fetchval(
                "select exists (select from pg_locks where not granted)"
            ):
                await asyncio.sleep(0.01)
        free = await connection.fetch("select from jobs for update skip locked")
        assert len(free) == len(ids)
    await changing
    assert (await shop.books()).in_order


async def test_money_that_is_in_the_books_already_is_not_booked_again(shop: Rig):
    due = await bought(shop)
    await shop.query(
        "insert into ledger_transfers (id, debit, credit, amount_msat, code, reference)"
        " values ($1, $2, $3, 1, 'received', 'x') returning id",
        ledger.transfer_id(due["payment_hash"], "received"),
        ledger.LIGHTNING,
        ledger.UNASSIGNED,
    )
    before = await everything(shop)
    with pytest.raises(asyncpg.UniqueViolationError):
        await start(shop, receipt(due))
    assert await everything(shop) == before


async def test_it_does_not_wait_for_a_payer_s_other_payment_while_that_waits_for_it(shop: Rig):
    """The cursor comes after the account, by both ways; else PostgreSQL would end one of them."""
    core = shop.core
    due = await bought(shop)
    (invoice,) = await shop.query("select account_id from invoices")
    told = replace(receipt(due), cursor="1")
    follow = (
        "insert into node_cursors (backend, cursor) values ($1, $2)"
        " on conflict (backend) do update set cursor = excluded.cursor"
    )
    async with core.database.transaction() as connection:
        await connection.execute(follow, told.backend, "0")
        await ledger.post(
            connection,
            [Transfer(ledger.LIGHTNING, ledger.client(invoice["account_id"]), 1, "received", "x")],
        )
    async with core.database.transaction() as connection:
        # What going step by step does first, for another payment to this account.
        await ledger.lock_balances(connection, [ledger.client(invoice["account_id"])])
        starting = asyncio.create_task(start(shop, told))
        async with asyncio.timeout(10):
            while not await connection.fetchval(
                "select exists (select from pg_locks where not granted)"
            ):
                await asyncio.sleep(0.01)
        # And last.
        await connection.execute("set local lock_timeout = '500ms'")
        await connection.execute(follow, told.backend, "2")
    assert len(await starting) == 2
    (cursor,) = await shop.query("select cursor from node_cursors where backend = 'simulated'")
    assert cursor["cursor"] == "1"


async def test_told_by_many_at_once_a_payment_counts_once(shop: Rig):
    core = shop.core
    steps = InvoiceWatcher(
        core.database.transaction, core.backend, core.watcher._on_credit, clock=core.clock
    )
    for _ in range(5):
        due = await bought(shop)
        told = settlement(due)
        ways = [core.watcher, steps] * 4
        news = await asyncio.gather(*(watcher.record(told) for watcher in ways))
        assert sorted(news) == [False] * 7 + [True]
        (sums,) = await shop.query(
            "select sum(amount_msat)::bigint as msat from ledger_transfers where reference = $1",
            due["payment_hash"],
        )
        assert sums["msat"] == told.amount_received_msat
    assert (await shop.books()).in_order


async def test_who_is_back_before_the_stream_waits_for_it_and_the_node_is_not_asked(
    shop: Rig, monkeypatch: pytest.MonkeyPatch
):
    watcher = shop.core.watcher
    back = asyncio.Event()
    begin, hear = watcher._at_once, watcher.hear
    assert begin is not None

    async def at_once(told: Receipt) -> Any:
        await back.wait()
        return await begin(told)

    async def heard(payment_hash: str, *, within_s: float) -> None:
        back.set()
        await hear(payment_hash, within_s=10 * within_s)

    async def check(payment_hash: str) -> None:
        raise AssertionError("the node was asked")

    monkeypatch.setattr(watcher, "_at_once", at_once)
    monkeypatch.setattr(watcher, "hear", heard)
    monkeypatch.setattr(watcher, "check", check)
    due = await bought(shop)
    preimage = await shop.pay(due["invoice"])
    proof = {"Authorization": f"L402 {due['l402_token']}:{preimage}"}
    again = await shop.http.post("/jobs", json=JOB | {"n": 2}, headers=proof)
    assert again.status_code == 202 and len(again.json()["jobs"]) == 2, again.text
    assert back.is_set() and not watcher._waiting


async def test_when_the_stream_says_nothing_the_node_is_asked(
    shop: Rig, monkeypatch: pytest.MonkeyPatch
):
    watcher = shop.core.watcher
    due = await bought(shop)
    # Alive, and silent.
    await watcher.stop()
    assert watcher.stream_alive
    preimage = await shop.pay(due["invoice"])
    assert await shop.query("select 1 from invoices where state = 'open'")
    proof = {"Authorization": f"L402 {due['l402_token']}:{preimage}"}
    again = await shop.http.post("/jobs", json=JOB | {"n": 2}, headers=proof)
    assert again.status_code == 202 and len(again.json()["jobs"]) == 2, again.text
    assert not watcher._waiting


async def test_whoever_asked_for_a_check_may_go_and_the_payment_is_credited(
    shop: Rig, monkeypatch: pytest.MonkeyPatch
):
    watcher = shop.core.watcher
    begin = watcher._at_once
    assert begin is not None
    crediting, may_go_on = asyncio.Event(), asyncio.Event()

    async def at_once(told: Receipt) -> Any:
        crediting.set()
        await may_go_on.wait()
        return await begin(told)

    due = await bought(shop)
    await watcher.stop()
    monkeypatch.setattr(watcher, "_at_once", at_once)
    await shop.pay(due["invoice"])
    asking = asyncio.create_task(watcher.check(due["payment_hash"]))
    await crediting.wait()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    stopping = asyncio.create_task(watcher.stop())
    may_go_on.set()
    await stopping
    states = await shop.query("select state from jobs")
    assert [row["state"] for row in states] == ["queued", "queued"]
