"""AI Horde's text door for clients: what known ones send and read (AH-1…AH-18, KL-*)."""

from __future__ import annotations

import asyncio
import json
import uuid
from typing import Any

from tests.door_tools import balance_msat, busy_worker, set_rates
from tests.poll_tools import (
    HORDE_PROMPT,
    apikey,
    horde_prompt,
    horde_status,
    known_model,
    until_done,
)
from tests.router_rig import MODEL, PATIENCE_S, Rig

ASYNC = "/api/v2/generate/text/async"
STATUS = "/api/v2/generate/text/status/"
STATUS_KEYS = {
    "finished",
    "processing",
    "restarted",
    "waiting",
    "done",
    "faulted",
    "wait_time",
    "queue_position",
    "kudos",
    "is_possible",
    "generations",
}


def bearer(key: dict[str, str]) -> dict[str, str]:
    return {"Authorization": f"Bearer sk-{key['apikey']}"}


async def test_a_request_is_taken_watched_and_answered(router: Rig):
    """AH-1, AH-5, KL-5, KL-6: with the exact keys, and kudos in satoshi."""
    await set_rates(router)
    key = await apikey(router)
    async with router.worker() as worker:
        taken = await router.http.post(ASYNC, json=HORDE_PROMPT, headers=key)
        assert taken.status_code == 202
        assert set(taken.json()) == {"id", "kudos"}
        assert taken.json()["kudos"] == 1.064
        request_id = taken.json()["id"]
        assert uuid.UUID(request_id).version == 4
        job = await worker.job()
        running = await horde_status(router, request_id)
        assert set(running) == STATUS_KEYS
        assert (running["processing"], running["queue_position"]) == (1, 0)
        await worker.say(job, ", a hare", tokens=3)
        await worker.finish(job, tokens=3)
        status = await until_done(router, request_id, horde=True)
        (generation,) = status.pop("generations")
        assert generation == {
            "text": ", a hare",
            "seed": 0,
            "gen_metadata": [],
            "worker_id": str(uuid.UUID(worker.id)),
            "worker_name": f"worker-{worker.id[:8]}",
            "model": MODEL,
            "state": "ok",
        }
    assert status == {
        "finished": 1,
        "processing": 0,
        "restarted": 0,
        "waiting": 0,
        "done": True,
        "faulted": False,
        "wait_time": 0,
        "queue_position": 0,
        "kudos": 1.003,
        "is_possible": True,
    }
    assert await balance_msat(router, bearer(key)) == 1_000_000 - 1003
    assert (await router.books()).in_order


async def test_a_dry_run_costs_nothing(router: Rig):
    """AH-1."""
    await set_rates(router)
    await known_model(router)
    key = await apikey(router)
    body = HORDE_PROMPT | {"dry_run": True, "fee_multiplier": 2}
    priced = await router.http.post(ASYNC, json=body, headers=key)
    assert (priced.status_code, priced.json()) == (200, {"kudos": 2.128})
    assert await balance_msat(router, bearer(key)) == 1_000_000


async def test_the_checks_of_the_dialect_have_their_return_codes(router: Rig):
    """AH-2, AH-3."""
    await known_model(router)
    key = await apikey(router)

    def params(**changes: Any) -> dict[str, Any]:
        return {"params": changes}

    cases: list[tuple[dict[str, Any], int, str]] = [
        ({"prompt": ""}, 400, "MissingPrompt"),
        (params(max_length=2000, max_context_length=1000), 400, "TokenOverflow"),
        (params(sampler_order=[6, 0, 1, 0, 0, 0, 0]), 400, "MissingFullSamplerOrder"),
        (params(stop_sequence=[str(i) for i in range(129)]), 400, "TooManyStopSequences"),
        (params(stop_sequence=["x" * 2001]), 400, "ExcessiveStopSequence"),
        ({"workers": [str(uuid.uuid4())]}, 404, "WorkerNotFound"),
        (params(n=21), 400, "ValidationError"),
        (params(n=0), 400, "ValidationError"),
        (params(max_length=15), 400, "ValidationError"),
        (params(max_length=-1), 400, "ValidationError"),
        (params(temperature=6), 400, "ValidationError"),
        (params(top_p="x"), 400, "ValidationError"),
        ({"params": 3}, 400, "ValidationError"),
        ({"models": MODEL}, 400, "ValidationError"),
    ]
    for changes, status, rc in cases:
        reply = await router.http.post(ASYNC, json=HORDE_PROMPT | changes, headers=key)
        assert (reply.status_code, reply.json()["rc"]) == (status, rc), (changes, reply.text)
        assert reply.json()["message"]
        if rc == "ValidationError":
            assert len(reply.json()["errors"]) == 1
    assert await balance_msat(router, bearer(key)) == 1_000_000


async def test_a_key_that_is_none_is_401_and_none_at_all_a_402(router: Rig):
    """AH-3; `0000000000` stands for no key, and nothing is free here."""
    await known_model(router)
    for wrong in ("x" * 22, "short", str(uuid.uuid4())):
        reply = await router.http.post(ASYNC, json=HORDE_PROMPT, headers={"apikey": wrong})
        assert (reply.status_code, reply.json()["rc"]) == (401, "InvalidAPIKey")
    for none in ({}, {"apikey": "0000000000"}):
        due = await router.http.post(
            ASYNC, json=HORDE_PROMPT, headers=none | {"X-Max-Wait-S": "600"}
        )
        assert (due.status_code, due.json()["rc"]) == (402, "KudosUpfront")
        assert due.json()["invoice"] and due.headers["WWW-Authenticate"].startswith("L402 ")
    poor = await router.http.post(
        ASYNC,
        json=HORDE_PROMPT | {"params": {"n": 20, "max_length": 1024}},
        headers=await apikey(router, 2_000),
    )
    assert (poor.status_code, poor.json()["rc"]) == (402, "KudosUpfront")
    assert "affordable_max_tokens" in poor.json()


async def test_a_request_that_nobody_can_serve_yet_waits_with_a_warning(router: Rig):
    """AH-4, KL-10: also for a model that was never seen here; it is possible as long as it waits."""
    for models in ([MODEL], []):
        taken = await router.http.post(
            ASYNC, json=HORDE_PROMPT | {"models": models}, headers=await apikey(router)
        )
        assert taken.status_code == 202
        assert taken.json()["message"].startswith("Warning: No available workers can fulfill")
        status = await horde_status(router, taken.json()["id"])
        assert (status["waiting"], status["is_possible"], status["faulted"]) == (1, True, False)
    async with router.worker(slots=2) as worker:
        await worker.serve("one")
        await worker.serve("two")
        done = await until_done(router, taken.json()["id"], horde=True)
        assert done["generations"][0]["text"] in ("one", "two")


async def test_a_busy_market_shows_the_place_and_stays_possible(router: Rig):
    """KL-6, KL-10."""
    async with router.worker() as worker:
        await busy_worker(router, worker)
        first = await horde_prompt(router, await apikey(router), params={"n": 2})
        second = await horde_prompt(
            router, await apikey(router), params={"fee_multiplier": 3, "max_length": 64}
        )
        status = await horde_status(router, first)
        assert (status["waiting"], status["queue_position"]) == (2, 2)
        assert status["is_possible"] and status["wait_time"] > 0
        assert (await horde_status(router, second))["queue_position"] == 1


async def test_cancel_answers_with_the_status_as_it_was(router: Rig):
    """AH-6, KL-7: no header is needed; what waits is refunded, what runs is charged as it stands."""
    await set_rates(router)
    key = await apikey(router)
    async with router.worker() as worker:
        request_id = await horde_prompt(router, key, params={"n": 2, "max_length": 64})
        job = await worker.job()
        await worker.say(job, "half an answer", tokens=4)
        gone = await router.http.delete(STATUS + request_id)
        assert gone.status_code == 200
        assert (gone.json()["processing"], gone.json()["waiting"]) == (1, 1)
        assert (await worker.receive())["type"] == "cancel"
        after = await until_done(router, request_id, horde=True)
        assert [g["text"] for g in after["generations"]] == ["half an answer"]
    assert await balance_msat(router, bearer(key)) == 1_000_000 - 1004
    assert (await router.books()).in_order


async def test_a_request_that_failed_everywhere_is_faulted_and_free(router: Rig):
    """AH-33, KL-6."""
    key = await apikey(router)
    async with router.worker() as worker:
        request_id = await horde_prompt(router, key)
        for _ in range(3):
            await worker.fail(await worker.job(), "engine_error")
        status = await until_done(router, request_id, horde=True)
    assert (status["faulted"], status["kudos"], status["restarted"]) == (True, 0.0, 2)
    assert await balance_msat(router, bearer(key)) == 1_000_000


async def test_an_unknown_request_is_not_found(router: Rig):
    """AH-5."""
    request_id = str(uuid.uuid4())
    for call in (router.http.get, router.http.delete):
        reply = await call(STATUS + request_id)
        assert reply.status_code == 404
        assert reply.json() == {
            "message": f"Text Waiting Prompt (Status) with ID '{request_id}' not found.",
            "rc": "RequestNotFound",
        }


async def test_models_are_listed_by_type(router: Rig):
    """AH-11, KL-3: and the default type is image."""
    async with router.worker() as worker:
        await busy_worker(router, worker)
        await horde_prompt(router, await apikey(router))
        (model,) = (await router.http.get("/api/v2/status/models?type=text")).json()
        assert set(model) == {"name", "count", "performance", "queued", "jobs", "eta", "type"}
        assert (model["name"], model["count"], model["type"]) == (MODEL, 1, "text")
        assert (model["queued"], model["jobs"]) == (64.0, 1.0)
        assert (await router.http.get("/api/v2/status/models")).json() == []
        many = await router.http.get("/api/v2/status/models?type=text&min_count=2")
        assert many.json() == []


async def test_performance_heartbeat_and_modes(router: Rig):
    """AH-12, AH-16, AH-17, KL-2."""
    async with router.worker(slots=3) as worker:
        job = await busy_worker(router, worker)
        shown = (await router.http.get("/api/v2/status/performance")).json()
        assert set(shown) == {
            "queued_requests",
            "queued_text_requests",
            "worker_count",
            "text_worker_count",
            "thread_count",
            "text_thread_count",
            "queued_megapixelsteps",
            "past_minute_megapixelsteps",
            "queued_forms",
            "interrogator_count",
            "interrogator_thread_count",
            "queued_tokens",
            "past_minute_tokens",
        }
        assert (shown["text_worker_count"], shown["text_thread_count"]) == (1, 3)
        assert shown["past_minute_tokens"] == 0
        assert (shown["queued_text_requests"], shown["queued_tokens"]) == (1, 64)
        await worker.say(job, "some words", tokens=2)
        await worker.finish(job, tokens=2)
        # It is counted after the commit that readers see.
        async with asyncio.timeout(PATIENCE_S):
            while shown["past_minute_tokens"] != 2:
                await asyncio.sleep(0.02)
                shown = (await router.http.get("/api/v2/status/performance")).json()
    beat = (await router.http.get("/api/v2/status/heartbeat")).json()
    assert set(beat) == {"message", "version", "queue", "threads", "active_count", "db_connection"}
    assert beat["message"] == "OK"
    modes = (await router.http.get("/api/v2/status/modes")).json()
    assert modes == {"maintenance_mode": False, "invite_only_mode": False, "raid_mode": False}


async def test_find_user_shows_the_balance_as_kudos_and_nothing_of_the_account(router: Rig):
    """AH-15, KL-8."""
    key = await apikey(router, 123_000)
    user = (await router.http.get("/api/v2/find_user", headers=key)).json()
    assert (user["kudos"], user["worker_ids"], user["worker_count"]) == (123.0, [], 0)
    assert user["username"].startswith("anonymous#")
    (row,) = await router.query("select * from account_keys")
    assert row["account_id"] not in json.dumps(user) and row["id"] not in json.dumps(user)
    for headers in ({}, {"apikey": "x" * 22}):
        reply = await router.http.get("/api/v2/find_user", headers=headers)
        assert (reply.status_code, reply.json()["rc"]) == (404, "UserNotFound")


async def test_any_origin_may_send_a_key_and_say_which_client_it_is(router: Rig):
    """KL-9."""
    reply = await router.http.options(
        ASYNC,
        headers={
            "Origin": "https://lite.example",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "apikey, client-agent, content-type",
        },
    )
    assert reply.status_code == 204
    assert reply.headers["Access-Control-Allow-Origin"] == "https://lite.example"
    assert "apikey" in reply.headers["Access-Control-Allow-Headers"].lower()
