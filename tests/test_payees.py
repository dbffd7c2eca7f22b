"""Where workers are paid: the first address at once, a change after an hour, failures shown."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from billing import ledger, payees
from billing.domain_breaker import LONGEST, OPENS_AFTER, SHORTEST, DomainBreaker
from billing.ledger import LIGHTNING, Transfer
from billing.payees import CHANGE_DELAY, PayeeAddress, PayeeStatus
from billing.payout_settings import PayoutSettings
from router.database import Database

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
HOUR = timedelta(hours=1)
OLD, NEW, THIRD = "old@pay.example", "new@pay.example", "third@pay.example"


async def put(database: Database, ln_url: str | None, at: datetime) -> PayeeAddress:
    async with database.transaction() as connection:
        return await payees.set_address(connection, "w1", ln_url, now=at)


async def get(database: Database, at: datetime) -> PayeeAddress:
    async with database.connection() as connection:
        found = await payees.get_address(connection, "w1", now=at)
    assert found is not None
    return found


async def owe(database: Database, amount_msat: int = 2_000_000) -> None:
    async with database.transaction() as connection:
        await ledger.post(
            connection,
            [Transfer(LIGHTNING, ledger.worker("w1"), amount_msat, "received", "r1")],
        )


async def due(database: Database, at: datetime) -> list[str]:
    async with database.transaction() as connection:
        found = await payees.due_payees(connection, PayoutSettings(), now=at, limit=10)
    return [payee.ln_url for payee in found]


async def test_a_first_address_counts_at_once(database: Database):
    address = await put(database, OLD, NOW)
    assert (address.ln_url, address.next_ln_url_at) == (OLD, None)
    assert address.status is PayeeStatus.PAYABLE


async def test_a_worker_that_was_never_heard_of_has_no_address(database: Database):
    async with database.connection() as connection:
        assert await payees.get_address(connection, "w1", now=NOW) is None
        assert not await payees.clear_back_off(connection, "w1")


async def test_a_change_counts_an_hour_later_and_is_shown_until_then(database: Database):
    await owe(database)
    await put(database, OLD, NOW)
    address = await put(database, NEW, NOW)
    assert (address.ln_url, address.next_ln_url) == (OLD, NEW)
    assert address.next_ln_url_at == NOW + CHANGE_DELAY
    assert await due(database, NOW + HOUR - timedelta(seconds=1)) == [OLD]
    assert await due(database, NOW + HOUR) == [NEW]
    assert (await get(database, NOW + HOUR)).ln_url == NEW


async def test_a_change_counts_for_readers_even_before_a_runner_has_applied_it(database: Database):
    await put(database, OLD, NOW)
    await put(database, NEW, NOW)
    address = await get(database, NOW + HOUR)
    assert (address.ln_url, address.next_ln_url_at) == (NEW, None)


async def test_saying_the_same_change_again_does_not_restart_its_hour(database: Database):
    await put(database, OLD, NOW)
    await put(database, NEW, NOW)
    address = await put(database, NEW, NOW + HOUR / 2)
    assert address.next_ln_url_at == NOW + HOUR
    address = await put(database, THIRD, NOW + HOUR / 2)
    assert address.next_ln_url_at == NOW + HOUR * 1.5


async def test_naming_the_address_that_counts_takes_a_change_back(database: Database):
    await put(database, OLD, NOW)
    await put(database, NEW, NOW)
    address = await put(database, OLD, NOW + HOUR / 2)
    assert (address.ln_url, address.next_ln_url_at) == (OLD, None)
    assert (await get(database, NOW + 2 * HOUR)).ln_url == OLD


async def test_no_longer_wanting_to_be_paid_is_a_change_too_and_no_way_around_the_hour(
    database: Database,
):
    await owe(database)
    await put(database, OLD, NOW)
    address = await put(database, None, NOW)
    assert (address.ln_url, address.next_ln_url) == (OLD, None)
    assert address.next_ln_url_at == NOW + HOUR
    address = await put(database, NEW, NOW)
    assert (address.ln_url, address.next_ln_url) == (OLD, NEW), "not at once"
    await put(database, None, NOW)
    assert await due(database, NOW + HOUR) == []
    assert (await get(database, NOW + HOUR)).status is PayeeStatus.UNPAID


async def test_an_unpaid_worker_is_never_due_and_can_still_name_an_address(database: Database):
    await owe(database)
    assert (await put(database, None, NOW)).status is PayeeStatus.UNPAID
    assert await due(database, NOW) == []
    assert (await put(database, OLD, NOW)).ln_url == OLD
    assert await due(database, NOW) == [OLD]


async def test_an_address_named_after_the_hour_of_another_waits_for_its_own(database: Database):
    await put(database, OLD, NOW)
    await put(database, NEW, NOW)
    address = await put(database, THIRD, NOW + 2 * HOUR)
    assert (address.ln_url, address.next_ln_url) == (NEW, THIRD)


async def test_failures_are_counted_shown_and_forgotten_with_the_address(database: Database):
    await owe(database)
    await put(database, OLD, NOW)
    at = NOW
    for wait_s in (60, 300, 1_800, 7_200, 43_200, 86_400, 86_400):
        assert await due(database, at) == [OLD]
        async with database.transaction() as connection:
            await payees.note_failure(connection, "w1", "payee_error", now=at, jitter=0.5)
        assert await due(database, at) == []
        assert (await get(database, at)).status is PayeeStatus.RETRYING
        at += timedelta(seconds=wait_s + 1)
    assert (await get(database, NOW + timedelta(days=7))).status is PayeeStatus.ADDRESS_FAILING
    await put(database, NEW, at)
    assert await due(database, at + HOUR) == [NEW]
    address = await get(database, at + HOUR)
    assert (address.status, address.failure_code) == (PayeeStatus.PAYABLE, None)


async def test_being_put_off_is_no_failure(database: Database):
    await owe(database)
    await put(database, OLD, NOW)
    async with database.transaction() as connection:
        await payees.postpone(connection, "w1", "below_minimum", NOW + HOUR)
    assert await due(database, NOW) == []
    address = await get(database, NOW + timedelta(days=8))
    assert (address.status, address.failure_code) == (PayeeStatus.PAYABLE, "below_minimum")
    assert await due(database, NOW + HOUR) == [OLD]


class TestDomainBreaker:
    """One broken server is not asked for each of its payees (lightning.md 5.1)."""

    def broken(self, times: int = OPENS_AFTER) -> DomainBreaker:
        breaker = DomainBreaker()
        for _ in range(times):
            breaker.note("down.example", "unreachable", NOW)
        return breaker

    def test_it_opens_after_a_few_failures_in_a_row_and_for_that_domain_only(self):
        assert self.broken(OPENS_AFTER - 1).closed_at("down.example", NOW) is None
        breaker = self.broken()
        assert breaker.closed_at("down.example", NOW) == NOW + SHORTEST
        assert breaker.closed_at("up.example", NOW) is None

    @pytest.mark.parametrize("code", [None, "payee_error", "invoice_amount"])
    def test_an_answer_closes_it_even_if_it_is_a_payees_mistake(self, code: str | None):
        breaker = self.broken()
        breaker.note("down.example", code, NOW)
        assert breaker.closed_at("down.example", NOW) is None

    def test_after_its_time_one_may_try_and_a_failure_doubles_the_wait(self):
        breaker = self.broken()
        later = NOW + SHORTEST
        assert breaker.closed_at("down.example", later) is None
        assert breaker.closed_at("down.example", later) is not None, "one, not all"
        breaker.note("down.example", "busy", later)
        assert breaker.closed_at("down.example", later) == later + 2 * SHORTEST
        for _ in range(10):
            breaker.note("down.example", "bad_answer", later)
        assert breaker.closed_at("down.example", later) == later + LONGEST

    def test_a_clock_that_was_set_back_does_not_keep_it_open(self):
        assert self.broken().closed_at("down.example", NOW - timedelta(days=1)) is None
