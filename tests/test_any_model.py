"""A job that any of several models may serve: one place in the queue, in several lanes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from billing.fees import Rates
from router import requests
from router.errors import NoWorker
from router.job_records import NewQuote
from router.lanes import ANY_MODEL
from router.models import Models
from router.requests import Request
from router.workers import Fleet
from tests.door_tools import RATES, busy_worker, set_rates, until_state, workers_left
from tests.router_rig import MODEL, Rig
from worker.protocol import CompletionSpec, Kind, ServedModel

DEAR = Rates(prompt_fee_msat=3000, input_msat_per_mtok=0, output_msat_per_mtok=5_000_000)


def served(*names: str) -> list[dict[str, Any]]:
    return [
        {"id": name, "kind": "text", "context_length": 2048, "max_tokens": 1024} for name in names
    ]


def wanted(*models: str, n: int = 1) -> Request:
    spec = CompletionSpec(model=models[0], prompt="Once upon a time", max_tokens=100)
    return Request(
        kind=Kind.COMPLETION,
        items=tuple(requests.Item(spec, 4, any_of=models) for _ in range(n)),
        max_tokens=100,
        terms=requests.Terms(),
        request_hash=b"x" * 32,
    )


async def bought(router: Rig, request: Request) -> NewQuote:
    """Price a request and pay it from a fresh account."""
    key = await router.core.keys.find(await router.key())
    quote = await router.core.quotes.price(request, anyhow=True)
    await router.core.jobs.submit(quote, account_id=key.account_id)
    return quote


async def test_it_is_priced_at_the_dearest_and_charged_at_the_rates_of_the_one_that_serves(
    router: Rig,
):
    await set_rates(router)
    await set_rates(router, DEAR, "dear")
    async with router.worker(models=served("cheap")) as worker:
        quote = await bought(router, wanted("cheap", "dear"))
        assert quote.base_fee_msat == 3000 + 500
        job = await worker.job()
        assert job["job"]["model"] == "cheap"
        await worker.say(job, "x" * 100, tokens=50)
        await worker.finish(job, tokens=50)
        row = await until_state(router, quote.jobs[0].id, "succeeded")
    assert row["model"] == "cheap"
    assert row["charged_msat"] == RATES.prompt_fee_msat + 50
    assert (await router.books()).in_order


async def test_it_waits_in_the_lane_of_each_and_is_claimed_once(router: Rig):
    async with (
        router.worker(models=served("one")) as one,
        router.worker(models=served("two")) as two,
    ):
        quote = await bought(router, wanted("one", "two", n=2))
        jobs = [await one.job(), await two.job()]
        assert {job["job_id"] for job in jobs} == {job.id for job in quote.jobs}
        await one.nothing(0.1)
        assert await router.query("select * from queue") == []


async def test_a_job_for_any_model_goes_to_whichever_is_there(router: Rig):
    quote = await bought(router, wanted("*"))
    (waits,) = await router.query("select lane from queue")
    assert waits["lane"].endswith("/*")
    async with router.worker(models=served("new-one")) as worker:
        job = await worker.serve("hello")
        assert job["job"]["model"] == "new-one"
        row = await until_state(router, quote.jobs[0].id, "succeeded")
        assert json.loads(row["result"])["model"] == "new-one"


async def test_a_lost_worker_s_job_waits_for_all_its_models_again(router: Rig):
    async with router.worker(models=served("one")) as one:
        quote = await bought(router, wanted("one", "two"))
        await one.job()
    await workers_left(router, 0)
    await until_state(router, quote.jobs[0].id, "queued")
    assert len(await router.query("select * from queue")) == 2
    async with router.worker(models=served("two")) as two:
        job = await two.serve("hello")
        assert job["job"]["model"] == "two"
        await until_state(router, quote.jobs[0].id, "succeeded")


async def test_its_place_counts_each_competitor_once_and_a_bump_moves_it_in_all_lanes(router: Rig):
    async with router.worker(models=served(MODEL, "two")) as worker:
        await busy_worker(router, worker)
        first = await bought(router, wanted(MODEL, "two"))
        second = await bought(router, wanted(MODEL, "two"))
        jobs = router.core.jobs
        assert (await jobs.view(await jobs.row(second.jobs[0].id)))["position"] == 2
        bumped = await jobs.bump(
            second.jobs[0].id, offer_msat=2 * second.offer_msat, multiplier=None
        )
        assert bumped["position"] == 1
        assert (await jobs.view(await jobs.row(first.jobs[0].id)))["position"] == 2
        lanes = await router.query(
            "select multiplier_milli from queue where job_id = $1", second.jobs[0].id
        )
        assert [row["multiplier_milli"] for row in lanes] == [2000, 2000]


async def test_new_lane_edges_move_it_in_each_of_its_lanes(router: Rig):
    await bought(router, wanted("one", "two"))
    async with router.worker(
        models=[{"id": "one", "kind": "text", "context_length": 300, "max_tokens": 150}]
    ) as worker:
        await router.core.maintenance.finer_lanes()
        await worker.serve("hello")


async def test_cancelled_while_it_waits_it_is_in_no_lane(router: Rig):
    quote = await bought(router, wanted("one", "two"))
    await router.core.jobs.cancel(quote.jobs[0].id)
    assert await router.query("select * from queue") == []
    assert (await router.books()).in_order


def test_with_thousands_of_known_names_only_those_that_are_there_are_looked_at():
    """A request for any model is priced before it is paid, for each of its answers."""
    models = Models(Fleet())
    models.learn([ServedModel(id=f"m{n}") for n in range(1000)])
    looked_at: list[str] = []
    fit = models.fit

    def counted(kind: Kind, model: str, **asked: Any) -> int:
        looked_at.append(model)
        return fit(kind, model, **asked)

    models.fit = counted  # type: ignore[method-assign]
    with pytest.raises(NoWorker):
        models.fit_any(
            Kind.COMPLETION,
            [ANY_MODEL],
            prompt_tokens=5,
            max_tokens=5,
            default_max_tokens=5,
            may_wait=False,
        )
    assert looked_at == []
