"""Pictures: OpenAI's image doors and our own, from the request to the worker's money."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from typing import Any

import pytest
from openai import AsyncOpenAI

from billing.fees import Rates
from billing.ledger import balance_msat as ledger_msat
from billing.ledger import worker as worker_account
from tests.door_tools import balance_msat, code, set_rates, token, until_state
from tests.router_rig import MODEL, Rig, ScriptedWorker

PIXEL = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(60)).decode()
PAINTER = [
    {"id": "painter", "kind": "image", "context_length": 4096},
    {"id": "painter", "kind": "image_edit", "context_length": 4096},
]
RATES = Rates(1000, 200_000, 0, image_fee_msat=50_000)
RABBIT: dict[str, Any] = {"model": "painter", "prompt": "a brave rabbit"}
BASE_MSAT = 51_001  # the prompt's 14 bytes are 4 tokens
GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
DATA_URL = f"data:image/png;base64,{PIXEL}"


def sdk(router: Rig, key: dict[str, str]) -> AsyncOpenAI:
    secret = key["Authorization"].split()[1]
    return AsyncOpenAI(base_url=f"{router.url}/v1", api_key=secret, max_retries=0, timeout=10)


async def paint(worker: ScriptedWorker, **picture: Any) -> dict[str, Any]:
    """Take a job and bring a picture; the job's spec."""
    job = await worker.job()
    await worker.finish(job, images=[picture or {"b64_json": PIXEL}])
    return job["job"]


async def paint_all(worker: ScriptedWorker, count: int) -> list[dict[str, Any]]:
    return [await paint(worker) for _ in range(count)]


async def earned_msat(router: Rig, worker: ScriptedWorker) -> int:
    async with router.core.database.connection() as connection:
        return await ledger_msat(connection, worker_account(worker.id))


async def test_the_official_package_buys_pictures_and_the_books_balance(router: Rig):
    await set_rates(router, RATES)
    key = await router.bearer()
    async with router.worker(models=PAINTER, slots=2) as worker, sdk(router, key) as client:
        asked = client.images.with_raw_response.generate(
            **RABBIT, n=2, size="512x768", response_format="b64_json"
        )
        reply, specs = await asyncio.gather(asked, paint_all(worker, 2))
        answer = reply.parse()
        assert answer.data is not None and answer.created > 0
        assert [picture.b64_json for picture in answer.data] == [PIXEL, PIXEL]
        assert answer.usage is not None and answer.usage.input_tokens == 8
        assert (specs[0]["width"], specs[0]["height"]) == (512, 768)
        assert specs[0]["prompt"] == RABBIT["prompt"] and specs[0]["kind"] == "image"
        # A picture delivered is charged its whole base fee.
        assert reply.headers["x-satherd-fee-msat"] == str(2 * BASE_MSAT)
        assert await balance_msat(router, key) == 1_000_000 - 2 * BASE_MSAT
        commission_msat = 2 * (BASE_MSAT * 50_000 // 1_000_000)
        assert await earned_msat(router, worker) == 2 * BASE_MSAT - commission_msat
    assert (await router.books()).in_order


async def test_a_picture_is_bought_with_an_invoice_and_fetched_again(router: Rig):
    await set_rates(router, RATES)
    async with router.worker(models=PAINTER) as worker:
        dear = RABBIT | {"fee_multiplier": "1.5"}
        credential, challenge = await router.buy(GENERATIONS, dear)
        assert challenge.json()["quote"]["base_fee_msat"] == BASE_MSAT
        await paint(worker)
        first = await router.http.post(GENERATIONS, json=dear, headers=credential)
        again = await router.http.post(GENERATIONS, json=dear, headers=credential)
        await worker.nothing()
    assert first.status_code == 200, first.text
    assert first.json()["data"][0]["b64_json"] == PIXEL and first.content == again.content
    assert first.headers["x-satherd-fee-msat"] == "76502"  # 51000.8 x 1.5, rounded up once
    assert (await router.books()).in_order


async def test_our_own_door_makes_a_picture_and_wipes_it(router: Rig):
    key = await router.bearer()
    async with router.worker(models=PAINTER) as worker:
        made = await router.http.post("/jobs", json={"kind": "image", **RABBIT}, headers=key)
        assert made.status_code == 202, made.text
        links = made.json()["jobs"][0]
        await paint(worker)
        await until_state(router, links["id"], "succeeded")
        shown = (await router.http.get(links["status_url"], headers=token(links))).json()
        assert shown["kind"] == "image" and shown["result"]["data"][0]["b64_json"] == PIXEL
        async with router.core.database.connection() as connection:
            await connection.execute("update jobs set wipe_at = now() - interval '1 second'")
        await router.core.maintenance.wipe()
        wiped = (await router.http.get(links["status_url"], headers=token(links))).json()
        assert wiped["wiped"] and "result" not in wiped
    (row,) = await router.query("select spec, result from jobs where id = $1", links["id"])
    assert row["spec"] is None and row["result"] is None


async def test_who_asks_for_a_url_gets_one_though_the_worker_sends_data(router: Rig):
    """DG-3: `response_format` url; nothing is kept for anybody to fetch, so it is a data URL."""
    key = await router.bearer()
    async with router.worker(models=PAINTER, slots=2) as worker:
        for picture, url in (
            ({"b64_json": PIXEL}, DATA_URL),
            ({"url": "https://pictures.example/1.png"}, "https://pictures.example/1.png"),
        ):
            wanted = RABBIT | {"response_format": "url", "width": 256, "height": 128}
            asked = router.http.post(GENERATIONS, json=wanted, headers=key)
            reply, spec = await asyncio.gather(asked, paint(worker, **picture))
            assert reply.status_code == 200, reply.text
            assert reply.json()["data"] == [{"b64_json": None, "url": url, "revised_prompt": None}]
            assert (spec["width"], spec["height"]) == (256, 128)


async def test_the_official_package_edits_a_picture_by_form(router: Rig):
    await set_rates(router, RATES)
    key = await router.bearer()
    async with router.worker(models=PAINTER) as worker, sdk(router, key) as client:
        asked = client.images.with_raw_response.edit(
            model="painter",
            image=("rabbit.png", base64.b64decode(PIXEL), "image/png"),
            prompt="make it night",
            n=1,
        )
        reply, spec = await asyncio.gather(asked, paint(worker))
    answer = reply.parse()
    assert answer.data is not None and answer.data[0].b64_json == PIXEL
    assert spec["kind"] == "image_edit" and spec["image"] == DATA_URL
    # 4 tokens of prompt and 765 for the picture that is looked at.
    assert reply.headers["x-satherd-fee-msat"] == "51154"


async def test_an_edit_takes_a_url_as_json(router: Rig):
    """DG-4."""
    key = await router.bearer()
    body = RABBIT | {"image": "https://pictures.example/rabbit.png"}
    async with router.worker(models=PAINTER) as worker:
        reply, spec = await asyncio.gather(
            router.http.post(EDITS, json=body, headers=key), paint(worker)
        )
    assert reply.status_code == 200, reply.text
    assert spec["image"] == body["image"] and "width" not in spec


BAD: list[tuple[str, dict[str, Any], str]] = [
    (GENERATIONS, {"prompt": ""}, "prompt"),
    (GENERATIONS, {"prompt": ["a"]}, "prompt"),
    (GENERATIONS, {"n": 0}, "n"),
    (GENERATIONS, {"n": 129}, "n"),
    (GENERATIONS, {"size": "1024"}, "size"),
    (GENERATIONS, {"size": "99999x8"}, "size"),
    (GENERATIONS, {"width": -1}, "width"),
    (GENERATIONS, {"response_format": "png"}, "response_format"),
    (GENERATIONS, {"stream": True}, "stream"),
    (GENERATIONS, {"model": MODEL}, "model"),
    (EDITS, {}, "image"),
    (EDITS, {"image": "data:image/png;base64,%%%"}, "image"),
    (EDITS, {"image": "file:///etc/passwd"}, "image"),
    # Peers' pitfall 16: a worker is not sent to addresses of its own network.
    (EDITS, {"image": "https://127.0.0.1/a.png"}, "image"),
    (EDITS, {"image": "https://metadata/a.png"}, "image"),
    (EDITS, {"image": DATA_URL, "mask": 7}, "mask"),
]


async def test_a_bad_request_for_a_picture_is_refused_before_any_money_moves(router: Rig):
    async with router.worker(models=[*PAINTER, {"id": MODEL}]):
        for path, changes, param in BAD:
            refused = await router.http.post(path, json=RABBIT | changes)
            assert code(refused) == (400, "bad_request"), changes
            assert refused.json()["error"]["param"] == param, changes
    assert not await router.query("select 1 from invoices")


WANTED = {"kind": "image", **RABBIT, "response_format": "b64_json", "max_wait_s": 60}


@pytest.mark.parametrize(
    "images",
    [
        None,
        [],
        [{"url": "https://pictures.example/1.png"}],  # where b64_json was asked for
    ],
)
async def test_an_answer_without_its_picture_costs_nothing(router: Rig, images: Any):
    key = await router.bearer()
    async with router.worker(models=PAINTER) as worker:
        made = await router.http.post("/jobs", json=WANTED, headers=key)
        for _ in range(router.core.settings.max_attempts):
            await worker.finish(await worker.job(), images=images)
        row = await until_state(router, made.json()["jobs"][0]["id"], "failed")
    assert row["end_reason"] == "attempts_exhausted"
    assert await balance_msat(router, key) == 1_000_000
    assert (await router.books()).in_order


@pytest.mark.parametrize(
    "picture",
    [
        {"revised_prompt": "nothing else"},
        {"b64_json": "not base64!"},
        {"b64_json": "iVBORw0KGgo"},  # cut off
        {"url": "file:///etc/passwd"},
        {"url": "javascript:alert(1)"},
    ],
)
async def test_a_worker_that_sends_no_picture_as_one_is_cut_off(router: Rig, picture: Any):
    key = await router.bearer()
    async with router.worker(models=PAINTER) as worker:
        made = await router.http.post("/jobs", json=WANTED, headers=key)
        await worker.finish(await worker.job(), images=[picture])
        await worker.socket.wait_closed()
    links = made.json()["jobs"][0]
    await until_state(router, links["id"], "queued")
    gone = await router.http.delete(links["status_url"], headers=token(links))
    assert gone.json()["charged_msat"] == 0


async def test_a_picture_has_a_receipt_like_any_answer(router: Rig):
    """The hash of its receipt is that of the picture's bytes."""
    key = await router.bearer()
    async with router.worker(models=PAINTER) as worker:
        made = await router.http.post("/jobs", json={"kind": "image", **RABBIT}, headers=key)
        links = made.json()["jobs"][0]
        await paint(worker)
        await until_state(router, links["id"], "succeeded")
        shown = await router.http.get(f"{links['status_url']}/receipt", headers=token(links))
    facts = shown.json()["facts"]
    assert facts["kind"] == "image"
    assert facts["answer_sha256"] == hashlib.sha256(base64.b64decode(PIXEL)).hexdigest()


async def test_a_picture_whose_worker_is_lost_is_made_by_another_for_one_fee(router: Rig):
    await set_rates(router, RATES)
    key = await router.bearer()
    async with router.worker(models=PAINTER) as lost:
        made = await router.http.post("/jobs", json={"kind": "image", **RABBIT}, headers=key)
        links = made.json()["jobs"][0]
        await lost.job()
    async with router.worker(models=PAINTER) as worker:
        await paint(worker)
        row = await until_state(router, links["id"], "succeeded")
    assert (row["attempt"], row["charged_msat"]) == (2, BASE_MSAT)
    assert await balance_msat(router, key) == 1_000_000 - BASE_MSAT
    assert (await router.books()).in_order


async def test_a_picture_that_is_cancelled_while_it_is_made_costs_the_prompt(router: Rig):
    await set_rates(router, RATES)
    key = await router.bearer()
    async with router.worker(models=PAINTER) as worker:
        made = await router.http.post("/jobs", json={"kind": "image", **RABBIT}, headers=key)
        links = made.json()["jobs"][0]
        await worker.job()
        gone = await router.http.delete(links["status_url"], headers=token(links))
    assert gone.json()["charged_msat"] == 1001
    assert await balance_msat(router, key) == 1_000_000 - 1001


async def test_a_key_with_too_little_is_told_what_a_picture_costs(router: Rig):
    await set_rates(router, RATES)
    key = await router.bearer(10_000)
    async with router.worker(models=PAINTER):
        refused = await router.http.post(GENERATIONS, json=RABBIT, headers=key)
    assert code(refused) == (402, "insufficient_balance")
    assert refused.json()["error"]["fee_msat"] == BASE_MSAT
