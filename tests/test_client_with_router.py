"""The client against a real router: what the two make of the same contract."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from client import L402, ApiKey, AsyncClient, Client, Patience, SimulatedWallet
from client.errors import (
    BadRequest,
    FeeOverLimit,
    NotAllowed,
    PaymentNeeded,
    Unavailable,
    Unreachable,
    WrongQuote,
)
from client.events import Position
from client.purchase import Terms, check_quote
from tests.paying_clients import PATIENCE, PROMPT, keyed, paying, serving
from tests.router_rig import MODEL, Rig
from tests.test_openai_images import PAINTER, PIXEL, paint

VECTORS = json.loads((Path(__file__).parent / "vectors" / "pricing.json").read_text())
KINDS = {"messages": "chat", "prompt": "completion", "input": "embedding"}


async def test_a_prompt_is_paid_by_lightning_and_settled(router: Rig):
    async with router.worker() as worker, paying(router) as client:
        async with serving(worker, "Hello, world."):
            completion = await client.run(PROMPT, model=MODEL, max_tokens=64)
        assert completion.text == "Hello, world."
        assert isinstance(completion.credential, L402)
        balance = await client.balance(completion.credential)
    purchase = completion.purchase
    assert completion.charged_msat + completion.refunded_msat == purchase.quote.offer_msat
    assert balance.balance_msat == purchase.paid_msat - completion.charged_msat
    assert (await router.books()).in_order


async def test_a_picture_is_bought_like_a_prompt_and_its_price_is_checked(router: Rig):
    async with router.worker(models=PAINTER) as worker, paying(router) as client:
        bought = client.run("a brave rabbit", kind="image", size="64x64")
        completion, _ = await asyncio.gather(bought, paint(worker))
    (job,) = completion.jobs
    assert [picture["b64_json"] for picture in job.images] == [PIXEL] and job.text == ""
    assert completion.charged_msat == completion.purchase.quote.offer_msat
    dearer = replace(completion.purchase.quote, base_fee_msat=completion.charged_msat + 1)
    asked = {"kind": "image", "prompt": "a brave rabbit"}
    with pytest.raises(WrongQuote):
        check_quote(dearer, asked, Terms(max_fee_msat=None))


async def test_the_synchronous_client_does_the_same(router: Rig):
    def buy() -> tuple[str, int]:
        with Client(router.url, wallet=SimulatedWallet(router.url), patience=PATIENCE) as client:
            stream = client.stream(PROMPT, max_tokens=64)
            return "".join(stream.text()), stream.completion.charged_msat

    async with router.worker() as worker, serving(worker, "Hello, world."):
        text, charged_msat = await asyncio.to_thread(buy)
    assert text == "Hello, world."
    assert charged_msat > 1000


async def test_a_prepaid_key_is_bought_spent_rotated_and_dead(router: Rig):
    async with paying(router) as payer:
        top_up = await payer.top_up(100_500)
    assert top_up.key is not None
    assert (top_up.paid_msat, top_up.balance_msat) == (101_000, 101_000)
    async with router.worker() as worker, AsyncClient(router.url, key=top_up.key) as client:
        async with serving(worker, "Yes."):
            completion = await client.run(PROMPT, max_tokens=8)
        assert (await client.balance()).balance_msat == 101_000 - completion.charged_msat
        new_key = await client.rotate(top_up.payment_hash, top_up.credential)
        with pytest.raises((NotAllowed, PaymentNeeded)):
            await client.balance()
        assert (await client.balance(new_key)).balance_msat == 101_000 - completion.charged_msat


async def test_a_key_is_topped_up_and_stays_the_key(router: Rig):
    key = await router.key(50_000)
    wallet = SimulatedWallet(router.url)
    async with AsyncClient(router.url, key=key, wallet=wallet, patience=PATIENCE) as client:
        top_up = await client.top_up(7_000)
        assert top_up.key is None
        assert (await client.balance()).balance_msat == 57_000


async def test_any_door_is_paid_when_it_answers_402(router: Rig):
    """The OpenAI door's challenge: pay once, repeat the same request with the credential."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 8}
    async with router.worker() as worker, paying(router) as client:
        async with serving(worker, "Paid."):
            answer = await client.request("POST", "/v1/chat/completions", body)
        assert answer.json()["choices"][0]["message"]["content"] == "Paid."
        with pytest.raises(FeeOverLimit):
            await client.request("POST", "/v1/chat/completions", body, max_fee_msat=500)
    assert len(await router.query("select 1 from invoices where settled_at is not null")) == 1


async def test_a_wallet_that_hides_preimages_buys_with_the_claim_token(router: Rig):
    def pay(bolt11: str, amount_msat: int) -> None:
        SimulatedWallet(router.url)(bolt11, amount_msat)

    async with (
        router.worker() as worker,
        AsyncClient(router.url, wallet=pay, patience=PATIENCE) as client,
        serving(worker, "Hidden."),
    ):
        completion = await client.run(PROMPT, max_tokens=8)
        balance = await client.balance(completion.credential)
    assert completion.text == "Hidden."
    assert balance.balance_msat == completion.purchase.paid_msat - completion.charged_msat


async def test_embeddings_are_bought_like_a_prompt(router: Rig):
    models = [{"id": "vectors", "kind": "embedding", "context_length": 512}]
    async with router.worker(models=models) as worker, await keyed(router) as client:
        task = asyncio.create_task(client.run(kind="embedding", input=["a", "b"]))
        job = await worker.job()
        await worker.finish(job, data=[[1.0, 0.0], [0.0, 1.0]], tokens=0)
        completion = await task
    result = completion.jobs[0].result
    assert result is not None
    assert [entry["embedding"] for entry in result["data"]] == [[1.0, 0.0], [0.0, 1.0]]


async def test_a_stranger_sees_that_a_quote_is_paid_and_nothing_of_its_jobs(router: Rig):
    async with router.worker() as worker, paying(router) as client:
        purchase = await client.submit(PROMPT, max_tokens=8)
        stranger = AsyncClient(router.url, key=await router.key(), patience=Patience(attempts=2))
        async with stranger:
            stolen = replace(purchase, credential=ApiKey(await router.key()))
            with pytest.raises(Unreachable):
                _ = [event async for event in stranger.resume(stolen)]
            with pytest.raises(NotAllowed):
                await stranger.cancel(purchase.jobs[0].id)
        async with serving(worker, "Mine."):
            job = await client.follow(purchase.jobs[0].id, purchase.credential)
    assert job.text == "Mine."


async def test_the_position_is_told_while_the_worker_is_busy(router: Rig):
    async with router.worker() as worker, await keyed(router) as client:
        first = asyncio.create_task(client.run(PROMPT, max_tokens=8))
        busy = await worker.job()
        seen: asyncio.Queue[Position] = asyncio.Queue()
        second = asyncio.create_task(
            client.run("And me?", max_tokens=8, fee_multiplier="1.5", on_position=seen.put_nowait)
        )
        position = await asyncio.wait_for(seen.get(), 10)
        await worker.say(busy, "First.")
        await worker.finish(busy, tokens=1)
        async with serving(worker, "Second."):
            answers = await asyncio.gather(first, second)
    assert (position.position, position.servable) == (1, True)
    assert [answer.text for answer in answers] == ["First.", "Second."]
    assert answers[1].purchase.quote.multiplier == "1.500"


async def test_several_answers_are_told_apart(router: Rig):
    async with (
        router.worker(slots=2) as worker,
        await keyed(router) as client,
        serving(worker, "One.", "Two."),
    ):
        completion = await client.run(PROMPT, max_tokens=8, n=2)
    assert sorted(completion.texts) == ["One.", "Two."]
    assert completion.purchase.quote.jobs == 2


async def test_a_job_is_submitted_polled_and_opened_by_its_token_alone(router: Rig):
    async with router.worker() as worker, paying(router) as client:
        purchase = await client.submit(PROMPT, max_tokens=8)
        [bought] = purchase.jobs
        job = await client.job(bought.id, bought.credential)
        assert not job.ended
        with pytest.raises(NotAllowed):
            await client.job(bought.id, ApiKey("sk-" + "x" * 22))
        async with serving(worker, "Done."):
            ended = await client.follow(bought.id, bought.credential)
    assert (ended.state, ended.text) == ("succeeded", "Done.")


async def test_a_waiting_job_is_cancelled_and_refunded(router: Rig):
    async with router.worker() as worker, await keyed(router) as client:
        await client.submit(PROMPT, max_tokens=8)
        busy = await worker.job()
        waiting = await client.submit("Never mind.", max_tokens=8)
        cancelled = await client.cancel(waiting.jobs[0].id)
        assert (cancelled.state, cancelled.charged_msat) == ("cancelled", 0)
        await worker.finish(busy, tokens=0)
        await worker.nothing()
    assert (await router.books()).in_order


async def test_a_waiting_job_is_raised_with_the_difference_paid_by_lightning(router: Rig):
    async with router.worker() as worker, paying(router) as client:
        await client.submit(PROMPT, max_tokens=8)
        busy = await worker.job()
        waiting = await client.submit("Me first.", max_tokens=8)
        job = waiting.jobs[0]
        raised = await client.bump(job.id, waiting.credential, fee_multiplier=5)
        assert raised.id == job.id
        shown = await client.job(job.id, waiting.credential)
        assert shown.raw["multiplier"] == "5.000"
        await worker.finish(busy, tokens=0)
        await worker.serve("Thanks.")
    assert (await router.books()).in_order


async def test_a_key_with_a_limit_can_buy_too(router: Rig):
    """It starts no stored quote, so the client buys the same request at the quoted price."""
    async with paying(router) as payer:
        top_up = await payer.top_up(100_000)
        limited = await payer.create_key(top_up.credential, limit_msat=20_000)
    async with (
        router.worker() as worker,
        AsyncClient(router.url, key=limited) as client,
        serving(worker, "Limited."),
    ):
        completion = await client.run(PROMPT, max_tokens=8)
    assert completion.text == "Limited."
    assert completion.charged_msat <= completion.purchase.quote.offer_msat


async def test_keys_are_listed_by_id_and_deleted(router: Rig):
    async with paying(router) as payer:
        top_up = await payer.top_up(10_000)
        second = await payer.create_key(top_up.credential, limit_msat=5_000)
        keys = await payer.keys(top_up.credential)
        [limited] = [key for key in keys if key.get("limit_msat") == 5_000]
        assert second.as_text() not in json.dumps(keys)
        assert (await payer.balance(second)).balance_msat == 10_000
        await payer.delete_key(limited["id"], top_up.credential)
        with pytest.raises((NotAllowed, PaymentNeeded)):
            await payer.balance(second)


async def test_money_is_withdrawn_to_a_lightning_address_and_the_books_stay_in_order(router: Rig):
    async with paying(router) as client:
        top_up = await client.top_up(100_000)
        order = await client.withdraw(
            top_up.credential, address=f"alice@{router.lnurl_host}", amount_msat=50_000
        )
        async with asyncio.timeout(15):
            shown = order
            while shown["state"] not in ("paid", "failed"):
                await asyncio.sleep(0.05)
                shown = await client.withdrawal(order["id"], top_up.credential)
        assert shown["state"] == "paid", shown
        balance = await client.balance(top_up.credential)
        assert balance.balance_msat == 100_000 - 50_000 - shown["fee_msat"]
        with pytest.raises(NotAllowed):
            await client.withdraw(top_up.key, address="a@b.example", amount_msat=1_000)
    assert (await router.books()).in_order


async def test_a_small_balance_buys_a_shorter_answer_when_no_length_was_asked(router: Rig):
    async with router.worker() as worker, await keyed(router, 2_000) as client:
        quote = await client.quote(PROMPT, fee_multiplier="1.5")
        assert quote.offer_msat > 2_000
        async with serving(worker, "Short."):
            completion = await client.run(PROMPT, fee_multiplier="1.5")
        assert completion.text == "Short."
        with pytest.raises(PaymentNeeded) as raised:
            await client.run(PROMPT, fee_multiplier="1.5", max_tokens=1000)
    assert raised.value.code == "insufficient_balance"


async def test_refusals_come_before_anything_is_paid(router: Rig):
    calls: list[Any] = []

    def wallet(bolt11: str, amount_msat: int) -> str:
        calls.append(bolt11)
        raise AssertionError("nothing is to be paid")

    async with AsyncClient(router.url, wallet=wallet, patience=PATIENCE) as client:
        with pytest.raises(BadRequest) as raised:
            await client.run(PROMPT, model="nobody-has-it")
        assert raised.value.code == "unknown_model"
        async with router.worker():
            with pytest.raises(FeeOverLimit):
                await client.run(PROMPT, model=MODEL, max_tokens=8, max_fee_msat=1000)
            with pytest.raises(BadRequest):
                await client.run("", model=MODEL)
            with pytest.raises(BadRequest) as raised:
                await client.run("long " * 5000, model=MODEL)
            assert raised.value.code == "prompt_too_long"
        with pytest.raises(Unavailable) as unavailable:
            await client.run(PROMPT, model=MODEL)
        assert unavailable.value.code == "no_worker"
    assert calls == []
    assert await router.query("select 1 from invoices") == []


async def test_router_and_client_count_every_published_request_the_same(router: Rig):
    """Each request of the published vectors, quoted by a router and held against the rules."""
    counted = 0
    by_kind = {"embedding": "vectors", "image": "painter", "image_edit": "painter"}
    models = [
        {"id": MODEL, "kind": "text", "context_length": 10_000, "max_tokens": 100},
        {"id": "vectors", "kind": "embedding", "context_length": 10_000},
        *PAINTER,
    ]
    async with router.worker(models=models), paying(router) as client:
        for vector in VECTORS["prompt_tokens"]:
            request = {**vector["request"], "max_tokens": 8}
            guessed = (kind for field, kind in KINDS.items() if field in request)
            kind = request.pop("kind", None) or next(guessed)
            request["model"] = by_kind.get(kind, MODEL)
            try:
                quote = await client.quote(kind=kind, **request)
            except BadRequest as error:
                assert vector["utf8_bytes"] == 0, (vector["name"], error)
                continue
            if quote.jobs > 1:
                continue  # several prompts are as many jobs, each counted by itself
            assert quote.prompt_tokens == vector["prompt_tokens"], vector["name"]
            check_quote(quote, {"kind": kind, **request}, Terms())
            counted += 1
    assert counted > 20
