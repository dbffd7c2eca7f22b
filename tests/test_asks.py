"""Worker asks: rate × multiplier less commission must reach them; quotes do not change."""

from __future__ import annotations

import asyncio

import pytest

from billing.fee_schedule import FeeSchedule
from billing.fees import Rates
from router.asks import Asks, fault_of, needed_milli
from router.workers import NEVER_MILLI, Worker
from tests.door_tools import JOB, info, post_job, set_rates, until_state
from tests.router_rig import MODEL, PATIENCE_S, Rig
from worker.protocol import ModelKind, ServedModel

RATES = Rates(prompt_fee_msat=1000, input_msat_per_mtok=0, output_msat_per_mtok=1_000_000)
PPM = 50_000  # the commission of the tests' router


@pytest.mark.parametrize(
    "ask, needed",
    [
        ({}, 0),
        ({"output_msat_per_mtok": 0}, 0),
        ({"output_msat_per_mtok": 950_000}, 1000),
        ({"output_msat_per_mtok": 950_001}, 1001),
        ({"output_msat_per_mtok": 1_900_000}, 2000),
        ({"output_msat_per_mtok": 950_000, "prompt_fee_msat": 2850}, 3000),
        # Nothing times anything is nothing.
        ({"input_msat_per_mtok": 1}, NEVER_MILLI),
        # Nobody pays for images here.
        ({"image_fee_msat": 10**9}, 0),
    ],
)
def test_an_ask_is_reached_by_rate_times_multiplier_less_commission(
    ask: dict[str, int], needed: int
):
    assert needed_milli(ask, RATES, kind=ModelKind.TEXT, commission_ppm=PPM) == needed


def test_the_least_sufficient_multiplier_is_sufficient_and_the_one_below_is_not():
    for asked in (1, 777, 10**6, 123_456_789):
        for rate in (1, 999, 600_000):
            rates = Rates(prompt_fee_msat=0, input_msat_per_mtok=0, output_msat_per_mtok=rate)
            ask = {"output_msat_per_mtok": asked}
            milli = needed_milli(ask, rates, kind=ModelKind.TEXT, commission_ppm=PPM)
            assert rate * milli * (10**6 - PPM) >= asked * 1000 * 10**6
            assert rate * (milli - 1) * (10**6 - PPM) < asked * 1000 * 10**6


def test_asks_that_mean_nothing_are_named():
    assert fault_of({"m": {"output_msat_per_mtok": 5}}) is None
    assert "no rate 'per_token'" in (fault_of({"m": {"per_token": 5}}) or "")
    assert "out of bounds" in (fault_of({"m": {"prompt_fee_msat": -1}}) or "")


def test_rates_that_were_in_force_not_long_ago_still_count_for_the_floor():
    """A job waits at the rates of its quote, which may have been higher."""
    worker = Worker(
        id="w",
        name=None,
        models=[ServedModel(id="m", context_length=2048)],
        slots=1,
        payable=True,
        ln_url=None,
        speeds={},
        min_fees={"m": {"output_msat_per_mtok": 1_900_000}},
    )
    asks = Asks()
    assert asks.update(FeeSchedule(RATES, {}), PPM, [worker])
    assert worker.floors == {"m": 2000}
    halved = Rates(prompt_fee_msat=1000, input_msat_per_mtok=0, output_msat_per_mtok=500_000)
    assert not asks.update(FeeSchedule(halved, {}), PPM, [worker])
    doubled = Rates(prompt_fee_msat=1000, input_msat_per_mtok=0, output_msat_per_mtok=2_000_000)
    assert asks.update(FeeSchedule(doubled, {}), PPM, [worker])
    assert worker.floors == {}


async def rates_in_force(router: Rig, rates: Rates = RATES) -> None:
    """Until the floors follow them."""
    await set_rates(router, rates)
    schedule = await router.core.quotes.fees.now()
    router.core.asks.update(schedule, PPM, router.core.fleet.all())


ASK = {MODEL: {"output_msat_per_mtok": 1_900_000}}  # a multiplier of 2 at RATES


async def test_a_worker_takes_what_reaches_its_ask_and_nothing_else(router: Rig):
    await rates_in_force(router)
    payer = await router.bearer()
    async with router.worker(min_fees=ASK) as dear:
        cheap = [await post_job(router, payer, fee_multiplier=m) for m in ("1", "1.999")]
        await dear.nothing()
        enough = await post_job(router, payer, fee_multiplier="2")
        assert (await dear.serve())["job_id"] == enough["id"]
        await dear.nothing()
        # What another worker takes is not held up by jobs that nobody here takes, nor the reverse.
        async with router.worker() as other:
            served = [(await other.serve())["job_id"] for _ in cheap]
            assert served == [links["id"] for links in reversed(cheap)]
        for links in (*cheap, enough):
            await until_state(router, links["id"], "succeeded")
        earned = await router.query("select charged_msat from jobs order by seq")
        assert [row["charged_msat"] for row in earned] == [1003, 2005, 2006]
    assert (await router.books()).in_order


async def test_many_jobs_below_an_ask_do_not_hide_those_of_other_workers(router: Rig):
    """A bound of the search, not a filter: or the heads of the queue would be full of them."""
    await rates_in_force(router)
    payer = await router.bearer()
    other = [{"id": "other", "kind": "text", "context_length": 2048, "max_tokens": 1024}]
    async with router.worker(min_fees=ASK) as dear, router.worker(models=other) as cheap:
        for _ in range(3):
            await router.http.post(
                "/jobs", json=JOB | {"n": 10, "fee_multiplier": "1.9"}, headers=payer
            )
        links = await post_job(router, payer, model="other")
        assert (await cheap.serve())["job_id"] == links["id"]
        await dear.nothing()


async def test_the_rates_of_a_jobs_own_quote_decide(router: Rig):
    await rates_in_force(router)
    payer = await router.bearer()
    async with router.worker(min_fees=ASK) as dear:
        before = await post_job(router, payer, fee_multiplier="2")
        await dear.job()  # it is busy now
        assert before
        waiting = await post_job(router, payer, fee_multiplier="2")
        lower = Rates(prompt_fee_msat=1000, input_msat_per_mtok=0, output_msat_per_mtok=500_000)
        await rates_in_force(router, lower)
        too_little = await post_job(router, payer, fee_multiplier="3")
        await router.core.jobs.cancel(before["id"])
        frame = await dear.receive()
        assert frame["type"] == "cancel"
        await dear.finish({"job_id": before["id"], "attempt": 1}, "cancelled")
        assert (await dear.job())["job_id"] == waiting["id"]
        assert (await until_state(router, too_little["id"], "queued"))["attempt"] == 0


async def test_quotes_do_not_change_and_info_says_what_reaches_an_idle_worker(router: Rig):
    """Point 11 of the doors: `multiplier_to_reach_idle`, and a ladder that is true."""
    await rates_in_force(router)
    async with router.worker(min_fees=ASK) as dear:
        (model,) = (await info(router))["models"]
        assert model["multiplier_to_reach_idle"] == "2.000" and model["servable"] is True
        assert [step["multiplier"] for step in model["ladder"]] == ["2.000"]
        quote = (await router.http.post("/quotes", json=JOB)).json()
        assert quote["multiplier"] == "1.000" and quote["base_fee_msat"] == 1064
        assert quote["queue"]["servable"] is False
        assert quote["queue"]["multiplier_to_be_next"] == "2.000"
        quote = (await router.http.post("/quotes", json=JOB | {"fee_multiplier": "2"})).json()
        assert quote["queue"]["servable"] is True
        async with router.worker():
            (model,) = (await info(router))["models"]
            assert model["multiplier_to_reach_idle"] == "1.000"
            assert [step["multiplier"] for step in model["ladder"]] == ["2.000", "1.000"]
        me = {"Authorization": f"Bearer {dear.key}"}
        await post_job(router, await router.bearer(), fee_multiplier="1.5")
        await info(router, waiting=1)
        async with asyncio.timeout(PATIENCE_S):
            while not (skips := (await router.http.get("/workers/me", headers=me)).json()["skips"]):
                await asyncio.sleep(0.02)
        assert skips[0]["code"] == "ask_too_high"
        assert skips[0]["facts"] == {"yours": "2.000", "offered": "1.500"}


async def test_a_registration_with_a_meaningless_ask_is_refused(router: Rig):
    for bad in ({"m": {"per_token": 5}}, {"m": {"output_msat_per_mtok": -1}}):
        with pytest.raises(AssertionError, match="min_fees"):
            async with router.worker(min_fees=bad):
                raise AssertionError("it was let in")
