"""A purchase whose line to PostgreSQL is lost while its statement waits there, and is done later."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from billing import ledger
from billing.ledger import Transfer
from router import jobs
from tests.door_tools import JOB, balance_msat
from tests.reading import until
from tests.router_rig import Rig

_WAITING = """
select pid from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()
    and pid <> all($1::int[])"""


def cut_line(router: Rig, pid: int) -> None:
    """The router's end of a line is gone. The server's, which waits for a lock, does not notice."""
    connections = router.core.database._connections
    (line,) = [line for line, (at, _) in connections.in_use(0).items() if at == pid]
    connections.break_off(line)


async def leave_only(router: Rig, account: str, msat: int) -> None:
    async with router.core.database.transaction() as connection:
        has_msat = (await ledger.lock_balances(connection, [account]))[account]
        spent = Transfer(account, ledger.OPERATOR, has_msat - msat, "spent", "by the test")
        await ledger.post(connection, [spent])


@pytest.mark.parametrize("cuts", [1, 2])
@pytest.mark.parametrize("enough_for", [1, 9])
async def test_what_is_done_after_its_line_was_lost_is_done_once_and_its_client_is_told(
    router: Rig, cuts: int, enough_for: int
):
    """Also where the money is not enough to do it twice."""
    key = await router.bearer()
    (payer,) = await router.query("select account_id from account_keys")
    account = ledger.client(payer["account_id"])
    async with router.worker(slots=2) as worker:
        fee_msat = (await router.http.post("/quotes", json=JOB)).json()["offer_msat"]
        await leave_only(router, account, enough_for * fee_msat)
        async with router.core.database.transaction() as connection:
            await ledger.lock_balances(connection, [account])
            asking = asyncio.create_task(router.http.post("/jobs", json=JOB, headers=key))
            cut: list[int] = []

            async def waiting() -> Any:
                return await connection.fetchval(_WAITING, cut)

            for _ in range(cuts):
                cut.append(await until(waiting))
                cut_line(router, cut[-1])
            await until(waiting)
        made = await asking
        assert made.status_code == 202, made.text
        (job,) = await router.query("select id from jobs")
        assert made.json()["jobs"][0]["id"] == job["id"]
        assert await balance_msat(router, key) == (enough_for - 1) * fee_msat
        # No worker was told of it: like lost claims, it is taken back after a while.
        await router.query("update jobs set started_at = now() - interval '1 minute' returning 1")
        assert (await worker.serve())["attempt"] == 2
        await until(lambda: router.query("select 1 from jobs where state = 'succeeded'"))
    holds = await router.query("select from ledger_transfers where code = 'hold'")
    assert len(holds) == 1 and (await router.books()).in_order


async def test_what_is_done_after_its_client_was_told_that_it_was_not_is_cancelled(
    router: Rig, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(jobs, "UNSURE_S", 0.0)
    key = await router.bearer()
    had_msat = await balance_msat(router, key)
    (payer,) = await router.query("select account_id from account_keys")
    async with router.worker(slots=2) as worker:
        async with router.core.database.transaction() as connection:
            await ledger.lock_balances(connection, [ledger.client(payer["account_id"])])
            asking = asyncio.create_task(router.http.post("/jobs", json=JOB, headers=key))
            cut_line(router, await until(lambda: connection.fetchval(_WAITING, [])))
            assert (await asking).status_code == 503
            # He is told, and looked for, before it is done.
            await asyncio.sleep(0.3)
        await until(lambda: router.query("select 1 from jobs where state = 'cancelled'"))
        await worker.nothing()
        (job,) = await router.query("select * from jobs")
        assert (job["end_reason"], job["charged_msat"]) == ("database_unavailable", 0)
        assert await balance_msat(router, key) == had_msat
    assert (await router.books()).in_order
