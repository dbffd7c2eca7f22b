"""What a client says about money, and what it is refused before any invoice exists."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from router import requests
from router.requests import Limits, Terms
from tests.door_tools import CHAT, JOB, code, set_rates, workers_left
from tests.router_rig import MODEL, Rig
from worker.protocol import Kind

MAX_FEE = {"X-Max-Fee-Msat": "1063"}


async def quoted(router: Rig, headers: dict[str, str] | None = None, **changes: Any) -> Any:
    return await router.http.post("/quotes", json=JOB | changes, headers=headers)


async def test_an_offer_is_divided_among_the_jobs_and_sets_the_multiplier(router: Rig):
    async with router.worker():
        await set_rates(router)
        made = (await quoted(router, n=3, offer_msat=4000)).json()
        assert made["base_fee_msat"] == 3192 and made["offer_msat"] == 4000
        assert sum(item["offer_msat"] for item in made["items"]) == 4000
        assert made["multiplier"] == "1.252"  # 1333 * 1000 // 1064, the lowest of the three
        low = await quoted(router, offer_msat=1063)
        assert code(low) == (400, "bad_request") and low.json()["error"]["base_fee_msat"] == 1064
        high = await quoted(router, offer_msat=1064 * 1000 + 1)
        assert code(high) == (400, "bad_request")


async def test_a_fee_over_the_clients_limit_is_refused_in_every_door(router: Rig):
    async with router.worker():
        await set_rates(router)
        key = await router.bearer()
        refused = [
            await quoted(router, MAX_FEE),
            await quoted(router, max_fee_msat=1063),
            await router.http.post("/jobs", json=JOB, headers=key | MAX_FEE),
            await router.http.post("/v1/chat/completions", json=CHAT, headers=MAX_FEE),
        ]
        assert {code(reply) for reply in refused} == {(400, "fee_too_high")}
        assert refused[0].json()["error"]["fee_msat"] == 1064
        assert (await quoted(router, max_fee_msat=1064)).status_code == 201
        assert await router.query("select 1 from jobs") == []


async def test_a_missing_max_tokens_is_what_default_context_and_money_allow(router: Rig):
    """OR-1: never a refusal because the maximum is dear."""
    models = [{"id": MODEL, "kind": "text", "context_length": 4096, "max_tokens": 4096}]
    async with router.worker(models=models) as worker:
        await set_rates(router)
        body = {name: value for name, value in JOB.items() if name != "max_tokens"}

        async def length(headers: dict[str, str] | None = None, **changes: Any) -> int:
            made = await router.http.post("/quotes", json=body | changes, headers=headers)
            assert made.status_code == 201, made.text
            return made.json()["max_tokens"]

        assert await length() == 1024
        long = [{"role": "user", "content": "x" * 4 * 3500}]
        assert await length(messages=long) == 4096 - 3500
        assert await length(max_fee_msat=1500) == 500
        assert await length(offer_msat=1300) == 300
        assert 330 <= await length({"X-Fee-Multiplier": "1.5"}, max_fee_msat=2000) <= 333
        key = await router.bearer(1200 + 800)
        started = await router.http.post("/jobs", json=body, headers=key)
        assert started.status_code == 202, started.text
        assert (await worker.job())["job"]["max_tokens"] == 1000


async def test_whatever_is_left_of_a_balance_can_be_spent_to_the_last_job(router: Rig):
    async with router.worker():
        await set_rates(router)
        wanted = {name: value for name, value in CHAT.items() if name != "max_tokens"}
        for copies, multiplier in ((1, "1"), (3, "1.3"), (7, "1.037")):
            terms = Terms(multiplier=Decimal(multiplier))
            body = wanted | {"n": copies}
            asked = requests.parse(Kind.CHAT, body, Limits(), terms)
            for budget_msat in range(20_000, 20_100, 7):
                priced = await router.core.quotes.price(asked, budget_msat=budget_msat)
                assert priced.offer_msat <= budget_msat


async def test_too_small_a_balance_names_balance_fee_and_what_it_buys(router: Rig):
    async with router.worker():
        await set_rates(router)
        key = await router.bearer(2000)
        body = CHAT | {"max_tokens": 1024}
        dear = {"X-Fee-Multiplier": "1.5"}
        refused = await router.http.post("/v1/chat/completions", json=body, headers=key | dear)
        assert code(refused) == (402, "insufficient_balance")
        error = refused.json()["error"]
        assert error["balance_msat"] == 2000 and error["fee_msat"] == 3036
        affordable = error["affordable_max_tokens"]
        assert affordable in (332, 333)
        # What it says is true: so many can be bought, and hardly one more.
        for tokens, status in ((affordable, 201), (affordable + 2, 400)):
            again = await quoted(router, dear, max_tokens=tokens, max_fee_msat=2000)
            assert again.status_code == status


async def test_what_no_worker_can_serve_is_refused_before_any_invoice(router: Rig):
    models = [{"id": MODEL, "kind": "text", "context_length": 300, "max_tokens": 100}]
    unknown = await quoted(router)
    assert code(unknown) == (404, "unknown_model")
    async with router.worker(models=models):
        long = [{"role": "user", "content": "x" * 4 * 300}]
        assert code(await quoted(router, messages=long)) == (400, "prompt_too_long")
        too_many = await quoted(router, max_tokens=101)
        assert code(too_many) == (400, "bad_request")
        assert too_many.json()["error"]["max_tokens_limit"] == 100
        assert code(await quoted(router, model="other")) == (404, "unknown_model")
        wrong_kind = await quoted(router, kind="embedding", input="x")
        assert code(wrong_kind) == (400, "bad_request")
        assert code(await quoted(router, kind="poem")) == (400, "bad_request")
    await workers_left(router, 0)
    path, body = "/v1/chat/completions", CHAT | {"max_tokens": 5}
    away = await router.http.post(path, json=body)
    assert code(away) == (503, "no_worker")
    assert int(away.headers["retry-after"]) > 0
    waits = await router.http.post(path, json=body, headers={"X-Max-Wait-S": "60"})
    assert waits.status_code == 402 and waits.json()["quote"]["queue"]["servable"] is False
    assert len(await router.query("select 1 from invoices")) == 1


async def test_bodies_that_are_broken_or_nested_too_deep_are_refused(router: Rig):
    async with router.worker():
        key = await router.bearer()
        deep = '{"model": "%s", "messages": [{"role": "user", "content": "x", "y": %s}]}'
        for path in ("/quotes", "/jobs", "/v1/chat/completions"):
            for raw in (
                "{",
                "",
                "nonsense",
                '{"a": NaN}',
                '"x"',
                deep % (MODEL, "[" * 300 + "]" * 300),
            ):
                reply = await router.http.post(path, content=raw, headers=key)
                assert code(reply) == (400, "bad_request"), (path, raw[:40])
        assert await router.query("select 1 from jobs") == []
