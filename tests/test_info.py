"""`GET /info`: the prices, the models, and what a place in the queue costs (contract §2)."""

from __future__ import annotations

from billing.fees import Rates
from tests.door_tools import (
    JOB,
    busy_worker,
    info,
    post_job,
    set_rates,
    until_state,
    workers_left,
)
from tests.router_rig import MODEL, Rig

RATES = Rates(prompt_fee_msat=1500, input_msat_per_mtok=200_000, output_msat_per_mtok=600_000)


async def test_it_says_what_everything_costs_and_where_the_limits_are(router: Rig):
    await set_rates(router, RATES)
    async with router.worker():
        said = await info(router)
    assert said["fees"]["prompt_fee_msat"] == 1500
    assert (said["base_fee"], said["token_fee"]) == ("1.5", "0.0006")
    assert (said["network"], said["simulated"]) == ("regtest", True)
    assert said["prompt_token_rule"] == "ceil(utf8_bytes/4)"
    assert (said["last_multiplier"], said["queue_length"]) == ("1.000", 0)
    numbers = ("max_n", "default_max_tokens", "default_max_wait_s", "image_prompt_tokens")
    assert [said[name] for name in numbers] == [128, 1024, 1200, 765]
    assert (said["max_multiplier"], said["min_amount_msat"]) == ("1000", 1000)
    assert (said["commission_ppm"], said["quote_ttl_s"], said["wipe_after_s"]) == (50_000, 600, 600)
    assert said["server_time"].endswith("Z")
    assert {name: said[name] for name in ("paused", "contact", "terms")} == {
        "paused": None,
        "contact": None,
        "terms": None,
    }
    (model,) = said["models"]
    assert (model["id"], model["kind"]) == (MODEL, "text")
    assert (model["workers"], model["idle_workers"], model["servable"]) == (1, 1, True)
    assert (model["context_length"], model["max_tokens"]) == (2048, 1024)
    assert model["wait_s"] == {"p50": 0.0, "p90": 0.0}
    assert [(s["multiplier"], s["position"]) for s in model["ladder"]] == [("1.000", 1)]


async def test_the_fee_that_a_herder_client_computes_is_never_short(router: Rig):
    """LH-9, LH-10: it multiplies in satoshis and rounds down; E2-24."""
    async with router.worker():
        for rates in (RATES, Rates(1, 0, 0), Rates(999, 1, 1), Rates(1000, 333_333, 777_777)):
            await set_rates(router, rates)
            herder = (await info(router))["herder"]
            assert all(isinstance(value, str) for value in herder.values())
            assert (herder["Last-Multiplier"], herder["Queue-Length"]) == ("1.000", "0")
            for tokens in (1, 100, 1000):
                body = JOB | {"max_tokens": tokens, "messages": [{"role": "user", "content": "x"}]}
                quote = (await router.http.post("/quotes", json=body)).json()
                fee = float(herder["Base-Fee"]) + (1 + tokens) * float(herder["Token-Fee"])
                assert int(fee) * 1000 >= quote["base_fee_msat"]


async def test_the_ladder_tells_each_multipliers_place_as_a_quote_finds_it(router: Rig):
    await set_rates(router, RATES)
    payer = await router.bearer()
    async with router.worker() as worker:
        await busy_worker(router, worker)
        for multiplier in ("1", "1", "1.2", "3"):
            await post_job(router, payer, fee_multiplier=multiplier)
        said = await info(router, waiting=4)
        (model,) = said["models"]
        assert (model["queue_length"], model["idle_workers"]) == (4, 0)
        assert (said["queue_length"], said["herder"]["Queue-Length"]) == (4, "4")
        assert model["multiplier_to_be_next"] == "3.001"
        places = {step["multiplier"]: step["position"] for step in model["ladder"]}
        assert places == {"3.001": 1, "1.201": 2, "1.001": 3, "1.000": 5}
        waits = [step["wait_s"]["p50"] for step in model["ladder"]]
        assert waits == sorted(waits) and waits[0] > 0
        for multiplier, place in places.items():
            body = JOB | {"fee_multiplier": multiplier}
            quote = (await router.http.post("/quotes", json=body)).json()
            assert quote["queue"]["position"] == place, multiplier
            assert quote["queue"]["multiplier_to_be_next"] == "3.001"
        # And the place that was told is the place that it gets.
        links = await post_job(router, payer, fee_multiplier="1.201")
        view = (await router.http.get(links["status_url"], headers=payer)).json()
        assert view["position"] == 2


async def test_the_last_multiplier_falls_back_when_nothing_waits(router: Rig):
    """E2-23: no ratchet."""
    payer = await router.bearer()
    async with router.worker() as worker:
        dear = await post_job(router, payer, fee_multiplier="5")
        job = await worker.job()
        waiting = await post_job(router, payer)
        said = await info(router, waiting=1)
        assert said["last_multiplier"] == said["models"][0]["last_multiplier"] == "5.000"
        await worker.finish(job, tokens=0)
        await worker.serve()
        for links in (dear, waiting):
            await until_state(router, links["id"], "succeeded")
        said = await info(router)
        assert said["last_multiplier"] == said["models"][0]["last_multiplier"] == "1.000"


async def test_a_model_whose_workers_have_left_is_known_but_not_servable(router: Rig):
    async with router.worker():
        pass
    await workers_left(router, 0)
    (model,) = (await info(router))["models"]
    assert (model["id"], model["workers"], model["servable"]) == (MODEL, 0, False)


async def test_jobs_that_compete_for_a_worker_count_whatever_their_model(router: Rig):
    """A place counts those who would be taken before by workers able to take it."""
    models = [{"id": name, "kind": "text", "context_length": 2048} for name in ("a", "b")]
    payer = await router.bearer()
    async with router.worker(models=models) as worker:
        await post_job(router, payer, model="a")
        await worker.job()
        await post_job(router, payer, model="a", fee_multiplier="2")
        links = await post_job(router, payer, model="b")
        view = (await router.http.get(links["status_url"], headers=payer)).json()
        assert view["position"] == 2
        by_id = {model["id"]: model for model in (await info(router, waiting=2))["models"]}
        assert (by_id["a"]["queue_length"], by_id["b"]["queue_length"]) == (1, 1)
        assert by_id["b"]["multiplier_to_be_next"] == "2.001"
