"""The Llama-Herder door: Info, paid prompts, payments that are too small, and what is refused."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from billing.fees import Rates
from tests.door_tools import balance_msat, busy_worker, set_rates, token, until_state
from tests.router_rig import MODEL, PATIENCE_S, Rig

RATES = Rates(prompt_fee_msat=1000, input_msat_per_mtok=0, output_msat_per_mtok=1_000_000)
PROMPT = "What is the meaning of life?"
# 1000 msat and 20 tokens of a msat each: 1020 msat, so two satoshi are needed.
TRANSFER: dict[str, Any] = {
    "Action": "Transfer",
    "Quantity": "3",
    "X-Prompt": PROMPT,
    "X-Tokens": "20",
    "X-Reference": "7",
}


async def send(
    router: Rig, headers: dict[str, str] | None = None, **changes: Any
) -> httpx.Response:
    message = {**TRANSFER, **{name.replace("_", "-"): value for name, value in changes.items()}}
    message = {name: value for name, value in message.items() if value is not None}
    return await router.http.post("/herder", json=message, headers=headers)


async def test_info_is_six_texts_and_the_same_as_in_info(router: Rig):
    """LH-9."""
    await set_rates(router, RATES)
    await set_rates(router, Rates(3000, 0, 2_000_000), model=MODEL)
    async with router.worker():
        said = (await router.http.post("/herder", json={"Action": "Info"})).json()
        block = (await router.http.get("/info")).json()["herder"]
    assert said.pop("Action") == "Info-Response" and isinstance(said.pop("Data"), str)
    assert said == block
    # Any model may answer, so what it says is the dearest one's price.
    assert (said["Base-Fee"], said["Token-Fee"]) == ("4", "0.002")
    assert (said["Last-Multiplier"], said["Queue-Length"]) == ("1.000", "0")


async def test_a_transfer_from_a_key_is_answered_and_what_was_not_used_comes_back(router: Rig):
    """LH-6 ... LH-8: the prompt as it is, the tokens as the most, the termination as a stop string."""
    await set_rates(router, RATES)
    key = await router.bearer()
    async with router.worker() as worker:
        asked = asyncio.create_task(send(router, key, X_Termination="\n"))
        job = await worker.serve("Forty-two.")
        reply = await asked
    assert reply.status_code == 200, reply.text
    assert reply.json() == {
        "Action": "Inference-Response",
        "X-Reference": "7",
        "Data": "Forty-two.",
    }
    spec = job["job"]
    assert (spec["kind"], spec["prompt"], spec["max_tokens"]) == ("completion", PROMPT, 20)
    assert spec["stop"] == ["\n"] and spec["model"] == MODEL
    # 3000 over 1020 is 2.941; 1003 msat were used.
    assert reply.headers["x-satherd-fee-msat"] == "2950"
    assert await balance_msat(router, key) == 1_000_000 - 2950
    assert (await router.books()).in_order


async def test_a_transfer_without_a_key_is_an_invoice_of_quantity_satoshi(router: Rig):
    async with router.worker() as worker:
        due = await send(router)
        body = due.json()
        assert due.status_code == 402 and "www-authenticate" in due.headers
        assert (body["Action"], body["Quantity"], body["X-Reference"]) == (
            "Transfer-Error",
            "3",
            "7",
        )
        assert body["amount_msat"] == 3000 and body["quote"]["queue"]["position"] == 1
        preimage = await router.pay(body["invoice"])
        proof = {"Authorization": f"L402 {body['l402_token']}:{preimage}"}
        await worker.serve("Paid for.")
        first, again = await send(router, proof), await send(router, proof)
        await worker.nothing()
    assert first.json()["Data"] == "Paid for." and again.json() == first.json()
    assert (await router.books()).in_order


@pytest.mark.parametrize("paid", [True, False])
async def test_too_little_goes_back_with_the_reason_and_what_was_needed(router: Rig, paid: bool):
    """LH-3, E2-18: to the payer, that is: it never leaves the payer's account."""
    await set_rates(router, RATES)
    key = await router.bearer()
    async with router.worker() as worker:
        reply = await send(router, key if paid else None, Quantity="1")
        await worker.nothing()
    assert reply.status_code == 402
    assert reply.json() == {
        "Action": "Transfer",
        "Quantity": "1",
        "X-Reference": "7",
        "X-Reason": "Insufficient payment",
        "X-Needed": "2",
    }
    assert (reply.headers["x-reason"], reply.headers["x-needed"]) == ("Insufficient payment", "2")
    assert await balance_msat(router, key) == 1_000_000
    assert len(await router.query("select 1 from invoices")) == 1  # that of the key


BAD: list[tuple[dict[str, Any], str]] = [
    ({"X_Tokens": "-5"}, "X-Tokens"),
    ({"X_Tokens": 0}, "X-Tokens"),
    ({"X_Tokens": "1e9"}, "X-Tokens"),
    ({"X_Tokens": "99999999999999"}, "X-Tokens"),
    ({"X_Tokens": "NaN"}, "X-Tokens"),
    ({"X_Tokens": None}, "X-Tokens"),
    ({"X_Tokens": True}, "X-Tokens"),
    ({"X_Prompt": None}, "X-Prompt"),
    ({"X_Prompt": ""}, "X-Prompt"),
    ({"Quantity": "-1"}, "Quantity"),
    ({"Quantity": None}, "Quantity"),
    ({"Quantity": 1.5}, "Quantity"),
    ({"X_Termination": [7]}, "stop"),
    ({"X_Reference": {"a": 1}}, "X-Reference"),
    ({"Action": "Withdraw"}, "Action"),
    ({"X_Tokens": "5000"}, "max_tokens"),
]


async def test_a_bad_message_is_refused_before_any_money_moves(router: Rig):
    """E2-19, E2-20: a missing tag keeps no money, and negative tokens buy no place in the queue."""
    key = await router.bearer()
    async with router.worker() as worker:
        for changes, named in BAD:
            reply = await send(router, key, **changes)
            said = reply.json()
            assert reply.status_code == 400 and said["Action"] == "Transfer-Error", changes
            assert said["error"]["param"] == named, changes
            assert said["X-Reason"] == said["error"]["message"]
        await worker.nothing(0.05)
    assert await balance_msat(router, key) == 1_000_000


async def test_a_multiplier_over_the_limit_is_refused(router: Rig):
    """E2-20: nobody sets an absurd price for those who come after him."""
    key = await router.bearer(10_000_000_000)
    async with router.worker():
        reply = await send(router, key, Quantity="9000000")
    assert reply.status_code == 400
    assert await balance_msat(router, key) == 10_000_000_000


async def test_the_quantity_is_the_place_in_the_queue(router: Rig):
    """LH-4; `Prefer: respond-async` shows the place at once."""
    key = await router.bearer()
    at_once = key | {"Prefer": "respond-async"}
    async with router.worker() as worker:
        busy = await busy_worker(router, worker)
        cheap = (await send(router, at_once, Quantity="3")).json()
        dear = (await send(router, at_once, Quantity="30", X_Prompt="Dear")).json()
        assert cheap["Action"] == "Transfer-Queued" and cheap["X-Reference"] == "7"
        assert (cheap["Position"], dear["Position"]) == ("1", "1")
        info = await router.http.get(cheap["Status-Url"], headers={"X-Job-Token": cheap["Token"]})
        assert info.json()["position"] == 2
        await worker.finish(busy)
        assert (await worker.serve())["job"]["prompt"] == "Dear"
        assert (await worker.serve())["job"]["prompt"] == PROMPT
        await until_state(router, cheap["Job"], "succeeded")


async def test_who_waits_and_goes_away_takes_his_prompt_along(router: Rig):
    """A client that asked to be told later does not: he has the job's token."""
    key = await router.bearer()
    async with router.worker() as worker:
        busy = await busy_worker(router, worker)
        later = (await send(router, key | {"Prefer": "respond-async"})).json()
        waiting = asyncio.create_task(send(router, key, X_Prompt="Never mind"))
        async with asyncio.timeout(PATIENCE_S):
            while len(await router.query("select 1 from jobs where state = 'queued'")) < 2:
                await asyncio.sleep(0.02)
        waiting.cancel()
        gone = "select id from jobs where state = 'cancelled'"
        async with asyncio.timeout(PATIENCE_S):
            while not (rows := await router.query(gone)):
                await asyncio.sleep(0.02)
        assert rows[0]["id"] != later["Job"]
        await worker.finish(busy)
        assert (await worker.serve())["job"]["prompt"] == PROMPT
        await until_state(router, later["Job"], "succeeded")


async def test_a_job_that_no_worker_can_do_gives_the_money_back(router: Rig):
    """E2-21: every payment reaches an end."""
    key = await router.bearer()
    async with router.worker() as worker:
        asked = asyncio.create_task(send(router, key))
        await worker.fail(await worker.job(), "bad_request", retryable=False)
        reply = await asked
    assert reply.status_code == 400 and reply.json()["Refunded"] == "3"
    assert reply.json()["X-Reference"] == "7"
    assert await balance_msat(router, key) == 1_000_000
    assert (await router.books()).in_order


async def test_a_transfer_waits_for_a_worker_that_is_away(router: Rig):
    """LH-13: a herder queues whatever was paid."""
    async with router.worker():
        pass
    key = await router.bearer()
    queued = (await send(router, key | {"Prefer": "respond-async"})).json()
    gone = await router.http.delete(queued["Status-Url"], headers=token({"token": queued["Token"]}))
    assert gone.json()["state"] == "cancelled" and gone.json()["charged_msat"] == 0


async def test_a_named_model_answers_at_its_own_price(router: Rig):
    await set_rates(router, RATES)
    await set_rates(router, Rates(9000, 0, 0), model="dear")
    models = [{"id": MODEL, "context_length": 2048}, {"id": "dear", "context_length": 2048}]
    key = await router.bearer()
    async with router.worker(models=models) as worker:
        short = await send(router, key)
        asked = asyncio.create_task(send(router, key, X_Model=MODEL))
        job = await worker.serve()
        assert (await asked).status_code == 200
    assert short.json()["X-Needed"] == "9" and job["job"]["model"] == MODEL
