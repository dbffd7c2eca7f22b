"""The KoboldAI-cluster door for clients (KC-1…KC-15)."""

from __future__ import annotations

import asyncio
import json
import uuid
from pathlib import Path
from typing import Any

import pytest

from tests.door_tools import balance_msat, set_rates, until_state
from tests.poll_tools import (
    KOBOLD_PROMPT,
    apikey,
    known_model,
    kobold_prompt,
    kobold_status,
    until_done,
)
from tests.router_rig import MODEL, Rig, running_rig

STATUS_KEYS = {"finished", "processing", "waiting", "done", "generations", "queue_position"}


def bearer(key: dict[str, str]) -> dict[str, str]:
    return {"Authorization": f"Bearer sk-{key['apikey']}"}


async def test_a_prompt_is_queued_watched_and_answered(router: Rig):
    """KC-1, KC-4: the counts move from waiting to processing to finished, then the texts are there."""
    await set_rates(router)
    key = await apikey(router)
    async with router.worker() as worker:
        prompt_id = await kobold_prompt(router, key)
        assert uuid.UUID(prompt_id).version == 4
        job = await worker.job()
        running = await kobold_status(router, prompt_id)
        assert set(running) == STATUS_KEYS
        assert (running["processing"], running["waiting"], running["done"]) == (1, 0, False)
        assert job["job"]["prompt"] == KOBOLD_PROMPT["prompt"]
        assert job["job"]["max_tokens"] == 64
        await worker.say(job, ", a rabbit", tokens=3)
        await worker.finish(job, tokens=3)
        status = await until_done(router, prompt_id)
    assert status | {"queue_position": 0} == {
        "finished": 1,
        "processing": 0,
        "waiting": 0,
        "done": True,
        "generations": [", a rabbit"],
        "queue_position": 0,
    }
    assert await balance_msat(router, bearer(key)) == 1_000_000 - 1003
    assert (await router.books()).in_order


async def test_n_answers_are_written_by_as_many_workers_as_are_idle(router: Rig):
    """KC-2: fanned out one generation a server; a seed is not the same for each."""
    async with router.worker() as one, router.worker() as two:
        params = {"n": 3, "max_length": 32, "sampler_seed": 7}
        prompt_id = await kobold_prompt(router, await apikey(router), params=params)
        first, second = await one.job(), await two.job()
        status = await kobold_status(router, prompt_id)
        assert (status["processing"], status["waiting"], status["queue_position"]) == (2, 1, 1)
        await one.say(first, "A")
        await one.finish(first)
        third = await one.job()
        await one.say(third, "B")
        await one.finish(third)
        await two.say(second, "C")
        await two.finish(second)
        done = await until_done(router, prompt_id)
        assert sorted(done["generations"]) == ["A", "B", "C"]
        seeds = {job["job"]["sampling"]["seed"] for job in (first, second, third)}
        assert len(seeds) == 3


async def test_params_of_koboldai_become_sampling_and_others_are_ignored(router: Rig):
    """KC-2, KL-5: unknown ones are not refused; samplers of this family travel with the job."""
    params = {
        "max_length": 20,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 40.0,
        "rep_pen": 1.1,
        "rep_pen_range": 512,
        "sampler_order": [6, 0, 1, 3, 4, 2, 5],
        "stop_sequence": ["\nYou:", "###"],
        "sampler_seed": -1,
        "memory": "a prompt that nobody counted",
        "no_such_thing": {"at": "all"},
    }
    async with router.worker() as worker:
        await kobold_prompt(router, await apikey(router), params=params, softprompts=["x"])
        job = (await worker.job())["job"]
        sampling = {k: v for k, v in job["sampling"].items() if v is not None}
        assert sampling == {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "repeat_penalty": 1.1}
        assert job["stop"] == ["\nYou:", "###"]
        assert job["kobold"] == {"rep_pen_range": 512, "sampler_order": [6, 0, 1, 3, 4, 2, 5]}


async def test_the_defaults_are_one_answer_of_eighty_tokens(router: Rig):
    """KC-3; no models named: any will do (E3-27: a list is a list, not its characters)."""
    async with router.worker() as worker:
        await kobold_prompt(router, await apikey(router), params={}, models=[])
        job = (await worker.job())["job"]
        assert (job["max_tokens"], job["model"]) == (80, MODEL)


@pytest.mark.parametrize("missing", ["prompt", "username"])
async def test_a_missing_argument_is_named(router: Rig, missing: str):
    """KC-1: flask-restful's `{"message": {...}}`."""
    body = {k: v for k, v in KOBOLD_PROMPT.items() if k != missing}
    reply = await router.http.post("/generate/prompt", json=body, headers=await apikey(router))
    assert reply.status_code == 400
    assert set(reply.json()["message"]) == {missing}


async def test_bad_values_are_refused_before_any_money_moves(router: Rig):
    await known_model(router)
    key = await apikey(router)
    bad: list[dict[str, Any]] = [
        {"prompt": ""},
        {"prompt": 7},
        {"username": "a\0b"},
        {"params": []},
        {"params": {"n": 0}},
        {"params": {"n": -3}},
        {"params": {"n": 1_000_000}},
        {"params": {"max_length": -5}},
        {"params": {"max_length": "many"}},
        {"params": {"temperature": "hot"}},
        {"params": {"stop_sequence": "x"}},
        {"models": "abc"},
        {"models": [""]},
        {"models": [7]},
        {"fee_multiplier": 0},
        {"fee_multiplier": 0.5},
    ]
    for changes in bad:
        reply = await router.http.post(
            "/generate/prompt", json=KOBOLD_PROMPT | changes, headers=key
        )
        assert reply.status_code == 400, (changes, reply.text)
        assert reply.json()["message"]
    assert await balance_msat(router, bearer(key)) == 1_000_000


async def test_an_unknown_id_is_answered_with_a_bare_text(router: Rig):
    """KC-4, KC-9."""
    for path, text in (("/generate/prompt/", "ID not found"), ("/servers/", "Not found")):
        for unknown in (str(uuid.uuid4()), "nonsense"):
            reply = await router.http.get(path + unknown)
            assert (reply.status_code, reply.json()) == (404, text)


async def test_without_a_key_the_402_says_how_to_pay_and_paying_buys_it(router: Rig):
    async with router.worker() as worker:
        credential, challenge = await router.buy("/generate/prompt", KOBOLD_PROMPT)
        assert challenge.json()["message"]
        assert challenge.json()["quote"]["max_tokens"] == 64
        prompt_id = await kobold_prompt(router, credential)
        assert await kobold_prompt(router, credential) == prompt_id
        await worker.serve("hello")
        assert (await until_done(router, prompt_id))["generations"] == ["hello"]


async def test_a_wrong_key_is_refused_and_a_poor_one_told_what_it_buys(router: Rig):
    await known_model(router)
    wrong = await router.http.post(
        "/generate/prompt", json=KOBOLD_PROMPT, headers={"apikey": "x" * 22}
    )
    assert wrong.status_code == 401 and wrong.json()["message"]
    poor = await router.http.post(
        "/generate/prompt",
        json=KOBOLD_PROMPT | {"params": {"max_length": 512, "n": 100}},
        headers=await apikey(router, 2_000),
    )
    assert poor.status_code == 402
    assert {"balance_msat", "fee_msat", "affordable_max_tokens"} <= set(poor.json())


async def test_a_prepaid_prompt_waits_for_a_worker_and_goes_on_without_its_client(router: Rig):
    """AH-4 at this door, too: nobody is there, and the prompt waits."""
    await known_model(router)
    prompt_id = await kobold_prompt(router, await apikey(router))
    status = await kobold_status(router, prompt_id)
    assert (status["waiting"], status["queue_position"]) == (1, 1)
    async with router.worker() as worker:
        await worker.serve("late, but here")
        assert (await until_done(router, prompt_id))["generations"] == ["late, but here"]


async def test_a_prompt_that_failed_everywhere_ends_and_is_refunded(router: Rig):
    """E3-29: done becomes true whatever happens."""
    key = await apikey(router)
    async with router.worker() as worker:
        prompt_id = await kobold_prompt(router, key)
        for _ in range(3):
            await worker.fail(await worker.job(), "engine_error")
        status = await until_done(router, prompt_id)
    assert (status["finished"], status["generations"]) == (1, [])
    assert await balance_msat(router, bearer(key)) == 1_000_000


async def test_an_empty_answer_is_an_answer(router: Rig):
    """E3-33."""
    async with router.worker() as worker:
        prompt_id = await kobold_prompt(router, await apikey(router))
        await worker.finish(await worker.job(), tokens=0)
        assert (await until_done(router, prompt_id))["generations"] == [""]


async def test_sync_waits_for_the_texts(router: Rig):
    """KC-15; and a prompt that nobody served in its time is `Prompt Request Expired`."""
    key = await apikey(router)
    async with router.worker() as worker:
        asked = router.http.post("/generate/sync", json=KOBOLD_PROMPT, headers=key)
        reply, _ = await asyncio.gather(asked, worker.serve("at once"))
        assert (reply.status_code, reply.json()) == (200, ["at once"])
        waits = asyncio.create_task(
            router.http.post("/generate/sync", json=KOBOLD_PROMPT, headers=key)
        )
        job = await worker.job()
        await worker.fail(job, "bad_request", retryable=False)
        late = await waits
    assert (late.status_code, late.json()) == (500, "Prompt Request Expired")


async def test_async_is_another_name_for_prompt(router: Rig):
    """KC-15."""
    await known_model(router)
    reply = await router.http.post(
        "/generate/async", json=KOBOLD_PROMPT, headers=await apikey(router)
    )
    assert (reply.status_code, set(reply.json())) == (200, {"id"})


async def test_servers_models_usage_and_contributions(router: Rig):
    """KC-8, KC-9, KC-10, KC-15: with the keys of the dialect, and no address in any name."""
    async with router.worker() as worker:
        prompt_id = await kobold_prompt(router, await apikey(router))
        await worker.serve("hello")
        await until_done(router, prompt_id)
        (server,) = (await router.http.get("/servers")).json()
        assert set(server) == {
            "name",
            "id",
            "model",
            "max_length",
            "max_content_length",
            "tokens_generated",
            "requests_fulfilled",
            "latest_performance",
        }
        assert (server["model"], server["max_content_length"]) == (MODEL, 2048)
        assert server["requests_fulfilled"] == 1
        assert server["latest_performance"].endswith(" seconds per token")
        assert "@" not in json.dumps(server)
        assert (await router.http.get(f"/servers/{server['id']}")).json() == server
        assert (await router.http.get("/models")).json() == {MODEL: 1}
    assert (await router.http.get("/usage")).json() == {"Alice": 4}
    assert (await router.http.get("/contributions")).json() == {}


async def test_what_was_used_stays_counted_when_the_ids_are_forgotten(router: Rig):
    """KC-10, and KC-12: what is asked for no more is deleted."""
    async with router.worker() as worker:
        prompt_id = await kobold_prompt(router, await apikey(router))
        await worker.serve("hello")
        await until_done(router, prompt_id)
    await router.query("update door_ids set created_at = now() - interval '4 days'")
    await router.core.maintenance.wipe()
    assert (await router.http.get(f"/generate/prompt/{prompt_id}")).status_code == 404
    assert (await router.http.get("/usage")).json() == {"Alice": 4}


async def test_answers_are_gone_ten_minutes_after_they_were_last_asked_for(router: Rig):
    """KC-12."""
    async with router.worker() as worker:
        prompt_id = await kobold_prompt(router, await apikey(router))
        await worker.serve("hello")
        await until_done(router, prompt_id)
    await router.query("update jobs set wipe_at = now() - interval '1 second'")
    await router.core.maintenance.wipe()
    reply = await router.http.get(f"/generate/prompt/{prompt_id}")
    assert (reply.status_code, reply.json()) == (404, "ID not found")


async def test_who_asks_too_often_is_told_when_to_come_back(tmp_path: Path, database_url: str):
    """KC-11: 30 looks at a status a minute; any origin may ask."""
    async with running_rig(tmp_path, database_url, rate_limits="on") as router:
        path = f"/generate/prompt/{uuid.uuid4()}"
        origin = {"Origin": "https://lite.example"}
        codes = [(await router.http.get(path, headers=origin)).status_code for _ in range(30)]
        assert set(codes) == {404}
        over = await router.http.get(path, headers=origin)
        assert over.status_code == 429 and int(over.headers["Retry-After"]) > 0
        assert over.json()["message"]
        assert over.headers["Access-Control-Allow-Origin"] == "https://lite.example"


async def test_the_id_is_in_no_log_line_and_opens_the_job_at_our_own_door(
    router: Rig, caplog: pytest.LogCaptureFixture
):
    """KC-4's id is a capability: logs carry the job's own."""
    async with router.worker() as worker:
        prompt_id = await kobold_prompt(router, await apikey(router))
        await worker.serve("hello")
        await until_done(router, prompt_id)
        shown = await router.http.get(f"/jobs/{prompt_id}")
        assert shown.json()["state"] == "succeeded"
        await until_state(router, shown.json()["id"], "succeeded")
    assert prompt_id not in caplog.text and prompt_id.replace("-", "") not in caplog.text
