"""Workers that poll: jobs for them, what they bring, what they earn (KC-5…KC-8, AH-7…AH-14, KP-*)."""

from __future__ import annotations

import asyncio
import base64
import secrets
from pathlib import Path
from typing import Any

import pytest

from billing.ledger import balance_msat as ledger_msat
from billing.ledger import worker as worker_account
from router.pull_sessions import MORE_JOBS, STALE_S, PullSession
from tests.door_tools import CHAT, post_job, set_rates, until_state
from tests.poll_tools import (
    HORDE_PROMPT,
    apikey,
    horde_prompt,
    horde_status,
    known_model,
    kobold_prompt,
    kobold_status,
    until_done,
)
from tests.pull_stand_ins import ClusterBridge, HordeBridge, KoboldCpp
from tests.router_rig import MODEL, PATIENCE_S, Rig, running_rig

POP, SUBMIT = "/api/v2/generate/text/pop", "/api/v2/generate/text/submit"


def a_key() -> str:
    return secrets.token_urlsafe(16)


def session(router: Rig) -> PullSession:
    (only,) = router.core.gate.sessions.values()
    assert isinstance(only, PullSession)
    return only


async def owed_msat(router: Rig) -> int:
    async with router.core.database.connection() as connection:
        return await ledger_msat(connection, worker_account(session(router).worker.id))


# --- the loops of real workers ------------------------------------------------------------------


async def test_koboldcpp_pops_generates_submits_and_earns(router: Rig):
    """KP-2…KP-6: a job of the Horde door, its params inside the payload, a numeric reward."""
    await set_rates(router)
    worker = KoboldCpp(router, a_key(), name=f"mine alice@{router.lnurl_host}")
    assert not await worker.once()
    params = {"max_length": 64, "rep_pen": 1.1, "rep_pen_range": 300, "stop_sequence": ["\nYou"]}
    request_id = await horde_prompt(router, await apikey(router), params=params)
    assert await worker.once()
    payload = worker.payloads[0]
    assert payload.pop("genkey") == "HORDEREQ_123"
    assert payload == {
        "prompt": "Once upon a time",
        "n": 1,
        "max_length": 64,
        "max_context_length": 4096,
        "rep_pen": 1.1,
        "rep_pen_range": 300,
        "stop_sequence": ["\nYou"],
    }
    status = await until_done(router, request_id, horde=True)
    assert status["generations"][0]["text"] == ", a rabbit lived in the wood."
    assert status["generations"][0]["worker_name"] == "mine alice"
    # 30 bytes are 8 tokens, of 1 msat each; 5 % are the router's.
    assert status["kudos"] == 1.008
    assert worker.rewards == [0.958]
    assert await owed_msat(router) == 958
    assert session(router).worker.ln_url == f"alice@{router.lnurl_host}"
    assert (await router.books()).in_order


async def test_the_horde_bridge_finds_the_keys_it_reads(router: Rig):
    """KP-9; what it sends after it has lost an id gets a 4xx (E3-40)."""
    worker = HordeBridge(router, a_key())
    assert not await worker.once()
    prompt_id = await kobold_prompt(router, await apikey(router))
    assert await worker.once()
    assert (await until_done(router, prompt_id))["generations"]
    assert (await worker.give_up()).status_code == 400


async def test_the_cluster_bridge_of_2022_joins_with_name_and_password(router: Rig):
    """KC-5, KC-7, KC-10: the reward are words, and its user's contributions grow."""
    worker = ClusterBridge(router, name="old", password="pw")
    assert await worker.pop() == {
        "id": None,
        "skipped": {"model": 0, "max_length": 0, "max_content_length": 0},
    }
    prompt_id = await kobold_prompt(router, await apikey(router))
    assert await worker.once()
    assert worker.rewards == [7]
    assert (await until_done(router, prompt_id))["generations"] == [", a rabbit lived in the wood."]
    assert (await router.http.get("/contributions")).json() == {"Bob": 8}
    (server,) = (await router.http.get("/servers")).json()
    assert (server["name"], server["model"], server["max_length"]) == ("old", MODEL, 80)


async def test_a_pull_worker_serves_chats_of_the_openai_door(router: Rig):
    """One queue: written out by a plain template, and cut where its next turn would begin."""
    worker = KoboldCpp(router, a_key())
    await worker.pop()
    links = await post_job(router, await router.bearer())
    assert await worker.once(lambda _: " Hello!\n### Instruction:\nand more")
    prompt = CHAT["messages"][0]["content"]
    assert worker.payloads[0]["prompt"] == f"### Instruction:\n{prompt}\n\n### Response:\n"
    row = await until_state(router, links["id"], "succeeded")
    assert '" Hello!\\n"' in row["result"]


async def test_what_cannot_be_said_as_a_prompt_waits_for_another_worker(router: Rig):
    worker = KoboldCpp(router, a_key())
    await worker.pop()
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    links = await post_job(router, await router.bearer(), tools=tools, fee_multiplier=9)
    plain = await post_job(router, await router.bearer())
    assert await worker.once()
    await until_state(router, plain["id"], "succeeded")
    assert not await worker.once()
    async with router.worker() as native:
        await native.serve()
        await until_state(router, links["id"], "succeeded")


async def test_two_doors_jobs_are_served_in_the_order_of_their_multipliers(router: Rig):
    """One queue behind every door, drained by pull and by push."""
    await known_model(router)
    key = await apikey(router)
    await kobold_prompt(router, key, prompt="K 2", fee_multiplier="2")
    await horde_prompt(router, key, prompt="H 3", params={"fee_multiplier": 3})
    await kobold_prompt(router, key, prompt="K 1")
    waits = await router.bearer() | {"X-Max-Wait-S": "600"}
    await post_job(router, waits, kind="completion", prompt="J 4", fee_multiplier=4)
    await horde_prompt(router, key, prompt="H 1")
    puller = KoboldCpp(router, a_key())
    for _ in range(3):
        assert await puller.once()
    assert [payload["prompt"] for payload in puller.payloads] == ["J 4", "H 3", "K 2"]
    async with router.worker() as native:
        assert [(await native.serve())["job"]["prompt"] for _ in range(2)] == ["K 1", "H 1"]


async def test_a_request_for_one_worker_goes_to_that_one(router: Rig):
    """AH-1: `workers`; several cannot be named here, and that is said."""
    one, two = (KoboldCpp(router, a_key(), name=name) for name in ("one", "two"))
    await one.pop()
    await two.pop()
    path = "/api/v2/workers/name/"
    ids = [(await router.http.get(path + name)).json()["id"] for name in ("one", "two")]
    request_id = await horde_prompt(router, await apikey(router), workers=[ids[1]], models=[])
    assert not await one.once()
    assert await two.once()
    status = await until_done(router, request_id, horde=True)
    assert status["generations"][0]["worker_id"] == ids[1]
    many = await router.http.post(
        "/api/v2/generate/text/async",
        json=HORDE_PROMPT | {"workers": ids},
        headers=await apikey(router),
    )
    assert (many.status_code, set(many.json()["errors"])) == (400, {"workers"})


async def test_a_pull_worker_is_paid_at_its_address(tmp_path: Path, database_url: str):
    """From a Kobold client's key to the worker's wallet, over the simulated network."""
    async with running_rig(tmp_path, database_url, payout_threshold_msat=1000) as router:
        worker = KoboldCpp(router, a_key(), name=f"gpu1 alice@{router.lnurl_host}")
        await worker.pop()
        for _ in range(3):
            await kobold_prompt(router, await apikey(router))
            assert await worker.once()
        mine = session(router).worker.id
        async with asyncio.timeout(PATIENCE_S):
            while not await router.query(
                "select 1 from payouts where account = $1 and state = 'paid'", worker_account(mine)
            ):
                router.core.payouts.wake()
                await asyncio.sleep(0.1)
        assert (await router.books()).in_order


# --- limits and skip reasons --------------------------------------------------------------------


async def test_skip_reasons_are_true(router: Rig):
    """KC-5, KC-6, AH-8, E3-31: the context is held against the context, not against the length."""
    await known_model(router)
    key = await apikey(router)
    await kobold_prompt(router, key, models=["another"])
    await kobold_prompt(router, key, params={"max_length": 500})
    await kobold_prompt(router, key, params={"max_length": 50, "max_content_length": 1500})
    old = ClusterBridge(router, name="old", password="pw")
    assert await old.pop() == {
        "id": None,
        "skipped": {"model": 1, "max_length": 1, "max_content_length": 1},
    }
    horde = KoboldCpp(router, a_key(), max_length=100, max_context_length=1024)
    assert (await horde.pop())["skipped"] == {
        "models": 1,
        "max_length": 1,
        "max_context_length": 1,
    }
    assert (await KoboldCpp(router, a_key(), name="big").pop())["id"]


async def test_a_worker_may_change_what_it_offers_between_pops(router: Rig):
    await known_model(router)
    await kobold_prompt(router, await apikey(router), params={"max_length": 300})
    key = a_key()
    assert not await KoboldCpp(router, key, max_length=100).once()
    assert await KoboldCpp(router, key, max_length=300).once()
    assert len(router.core.gate.sessions) == 1


# --- ends ---------------------------------------------------------------------------------------


async def test_faulted_a_hundred_times_is_one_requeue(router: Rig):
    """E3-34: by compare and set; the payer gets one answer and pays for one."""
    await set_rates(router)
    worker = KoboldCpp(router, a_key())
    await worker.pop()
    request_id = await horde_prompt(router, await apikey(router))
    given_id = (await worker.pop())["id"]
    replies = [await worker.submit(given_id, "faulted", "faulted") for _ in range(100)]
    assert (replies[0].status_code, replies[0].json()) == (200, {"reward": 0.0})
    for reply in replies[1:]:
        assert (reply.status_code, reply.json()["rc"]) == (400, "DuplicateGen")
    assert len(await router.query("select * from queue")) == 1
    (attempt,) = await router.query("select * from attempts")
    assert (attempt["outcome"], attempt["blame"]) == ("faulted", "worker")
    assert await worker.once()
    status = await until_done(router, request_id, horde=True)
    assert (len(status["generations"]), status["restarted"], status["kudos"]) == (1, 1, 1.008)
    assert len(await router.query("select * from attempts")) == 2
    assert (await router.books()).in_order


async def test_an_answer_counts_once(router: Rig):
    """KC-7, AH-10: a second one is refused in the words that bridges look for."""
    worker = KoboldCpp(router, a_key())
    await worker.pop()
    request_id = await horde_prompt(router, await apikey(router))
    given_id = (await worker.pop())["id"]
    assert (await worker.submit(given_id, "one")).status_code == 200
    again = await worker.submit(given_id, "two")
    assert (again.status_code, again.json()["rc"]) == (400, "DuplicateGen")
    assert "already submitted" in again.json()["message"]
    old = ClusterBridge(router, name="old", password="pw")
    await old.pop()
    await kobold_prompt(router, await apikey(router))
    pop = await old.pop()
    body = {"id": pop["id"], "password": "pw", "generation": "x"}
    assert (await router.http.post("/generate/submit", json=body)).status_code == 200
    twice = await router.http.post("/generate/submit", json=body)
    assert (twice.status_code, twice.json()) == (
        400,
        f"Processing Generation with ID {pop['id']} already submitted",
    )
    status = await until_done(router, request_id, horde=True)
    assert [generation["text"] for generation in status["generations"]] == ["one"]


async def test_an_empty_generation_is_a_legal_end(router: Rig):
    """E3-33."""
    worker = KoboldCpp(router, a_key())
    await worker.pop()
    request_id = await horde_prompt(router, await apikey(router))
    assert await worker.once(lambda _: "")
    status = await until_done(router, request_id, horde=True)
    assert [g["text"] for g in status["generations"]] == [""]


async def test_a_job_that_is_never_answered_comes_back_when_its_time_is_over(router: Rig):
    """KP-6, AH-33, E3-29; the late answer is told so, and not used."""
    worker = KoboldCpp(router, a_key())
    await worker.pop()
    request_id = await horde_prompt(router, await apikey(router))
    pop = await worker.pop()
    assert pop["ttl"] == 150
    mine = session(router)
    held = router.core.pull_gate.handed_out.get(pop["id"])
    assert held is not None
    held.popped_at -= pop["ttl"] + 1
    mine.check_progress(first_token_s=1, stall_s=1)
    late = await worker.submit(pop["id"], "too late")
    assert (late.status_code, late.json()["rc"]) == (400, "AbortedGen")
    assert "150 seconds" in late.json()["message"]
    rows = await router.core.door_ids.jobs(request_id)
    await until_state(router, rows[0]["id"], "queued")
    assert await worker.once()
    assert (await until_done(router, request_id, horde=True))["restarted"] == 1


async def test_a_worker_that_dropped_a_job_without_a_word_gets_another_one(router: Rig):
    """KP-6: it asks again, so it is idle; not without end, or it could empty the queue."""
    worker = KoboldCpp(router, a_key())
    await worker.pop()
    await kobold_prompt(router, await apikey(router), params={"n": 20, "max_length": 8})
    popped = [await worker.pop() for _ in range(12)]
    assert len({pop["id"] for pop in popped if pop["id"]}) == 1 + MORE_JOBS
    assert session(router).worker.slots == 1 + MORE_JOBS
    for pop in popped[: 1 + MORE_JOBS]:
        assert (await worker.submit(pop["id"], "late, but here")).status_code == 200
    assert session(router).worker.slots == 1


async def test_a_bridge_of_2022_is_not_left_in_a_loop_with_a_late_answer(router: Rig):
    """RC-7: it would send it again for ever after any error."""
    old = ClusterBridge(router, name="old", password="pw")
    await old.pop()
    await kobold_prompt(router, await apikey(router))
    pop = await old.pop()
    held = router.core.pull_gate.handed_out.get(pop["id"])
    assert held is not None
    held.popped_at -= 1000
    session(router).check_progress(first_token_s=1, stall_s=1)
    body = {"id": pop["id"], "password": "pw", "generation": "late"}
    reply = await router.http.post("/generate/submit", json=body)
    assert (reply.status_code, reply.json()) == (200, {"reward": 0})


async def test_a_cancelled_job_s_answer_is_taken_and_not_used(router: Rig):
    """At our own door a running job can be cancelled: settled as it stands. The worker cannot be
    told, and is not punished for its answer."""
    await set_rates(router)
    worker = KoboldCpp(router, a_key())
    await worker.pop()
    request_id = await horde_prompt(router, await apikey(router))
    given_id = (await worker.pop())["id"]
    gone = await router.http.delete(f"/jobs/{request_id}")
    assert (gone.json()["state"], gone.json()["charged_msat"]) == ("cancelled", 1000)
    assert session(router).worker.free_slots == 0
    reply = await worker.submit(given_id, "for nobody")
    assert (reply.status_code, reply.json()) == (200, {"reward": 0.0})
    assert session(router).worker.free_slots == 1
    assert (await router.books()).in_order


async def test_horde_s_cancel_lets_a_pull_worker_finish_and_be_paid(router: Rig):
    """AH-6."""
    worker = KoboldCpp(router, a_key())
    await worker.pop()
    request_id = await horde_prompt(router, await apikey(router), params={"n": 2})
    given_id = (await worker.pop())["id"]
    gone = await router.http.delete(f"/api/v2/generate/text/status/{request_id}")
    assert (gone.json()["processing"], gone.json()["waiting"]) == (1, 1)
    assert (await horde_status(router, request_id))["waiting"] == 0
    assert (await worker.submit(given_id, "still here")).json()["reward"] > 0
    status = await until_done(router, request_id, horde=True)
    assert [g["text"] for g in status["generations"]] == ["still here"]


async def test_a_worker_that_is_silent_for_25_hours_is_stale(router: Rig):
    """E3-28: total seconds, which do not wrap after a day; and KC-9 shows it all the same."""
    old = ClusterBridge(router, name="old", password="pw")
    await old.pop()
    (server,) = (await router.http.get("/servers")).json()
    mine = session(router)
    mine.seen_at -= 25 * 3600
    assert STALE_S < 25 * 3600 % 86_400  # else this would show nothing
    mine.check_progress(first_token_s=1, stall_s=1)
    assert router.core.fleet.all() == [] and router.core.gate.sessions == {}
    await router.query("update workers set last_seen_at = now() - interval '1 day 10 seconds'")
    assert (await router.http.get("/servers")).json() == []
    assert (await router.http.get(f"/servers/{server['id']}")).json()["name"] == "old"
    shown = await router.http.get(f"/api/v2/workers/{server['id']}")
    assert shown.json()["online"] is False
    await old.pop()
    assert len((await router.http.get("/servers")).json()) == 1


# --- who it is ----------------------------------------------------------------------------------


async def test_a_name_belongs_to_whoever_popped_with_it_first(router: Rig):
    """KC-5, AH-9, E3-32: by a hash of the secret; at both doors it is one name."""
    await ClusterBridge(router, name="mine", password="right").pop()
    wrong = await router.http.post(
        "/generate/pop",
        json={"username": "Eve", "password": "guess", "name": "mine", "model": MODEL},
    )
    assert (wrong.status_code, wrong.json()) == (
        401,
        "wrong credentials for utilizing instance mine",
    )
    other = await router.http.post(
        POP, json={"name": "mine", "models": [MODEL]}, headers={"apikey": a_key()}
    )
    assert (other.status_code, other.json()["rc"]) == (403, "WrongCredentials")
    (kept,) = await router.query("select * from pull_workers")
    assert b"right" not in kept["owner_hash"]


async def test_only_the_owner_of_the_worker_submits(router: Rig):
    """KC-7, AH-10."""
    worker = KoboldCpp(router, a_key())
    await worker.pop()
    await horde_prompt(router, await apikey(router))
    given_id = (await worker.pop())["id"]
    body = {"id": given_id, "generation": "mine"}
    stolen = await router.http.post(SUBMIT, json=body, headers={"apikey": a_key()})
    assert (stolen.status_code, stolen.json()["rc"]) == (403, "WrongCredentials")
    assert (await worker.submit(given_id, "mine")).status_code == 200


async def test_bad_pops_and_submits_are_refused_in_the_dialect(router: Rig):
    """AH-9, AH-10, KC-5, KC-7, KP-7."""
    key = {"apikey": a_key()}
    good: dict[str, Any] = {"name": "w", "models": [MODEL]}
    cases: list[tuple[dict[str, str], dict[str, Any], int, str]] = [
        ({}, good, 401, "InvalidAPIKey"),
        ({"apikey": "short"}, good, 401, "InvalidAPIKey"),
        ({"apikey": "0000000000"}, good, 403, "AnonForbiddenWorker"),
        (key, {"models": [MODEL]}, 400, "ValidationError"),
        (key, good | {"models": []}, 400, "BadRequest"),
        (key, good | {"models": [7]}, 400, "ValidationError"),
        (key, good | {"max_length": -1}, 400, "ValidationError"),
        (key, good | {"threads": 51}, 400, "ValidationError"),
        (key, good | {"ln_url": "this is none"}, 400, "not_understood"),
    ]
    for headers, body, status, rc in cases:
        reply = await router.http.post(POP, json=body, headers=headers)
        assert reply.status_code == status, (body, reply.text)
        assert reply.json()["rc"] == rc, reply.text
    said = (await router.http.post(POP, json=good, headers={"apikey": "short"})).json()["message"]
    assert "need not be bought" in said
    unknown = await router.http.post(SUBMIT, json={"id": "x", "generation": ""}, headers=key)
    assert (unknown.status_code, unknown.json()["rc"]) == (404, "InvalidJobID")
    old = {"username": "Bob", "password": "pw", "name": "w", "model": MODEL}
    for field in old:
        body = {k: v for k, v in old.items() if k != field}
        reply = await router.http.post("/generate/pop", json=body)
        assert (reply.status_code, set(reply.json()["message"])) == (400, {field})
    reply = await router.http.post(
        "/generate/submit", json={"id": "x", "password": "pw", "generation": ""}
    )
    assert (reply.status_code, reply.json()) == (
        404,
        "Processing Generation with ID x does not exist",
    )


# --- money --------------------------------------------------------------------------------------


@pytest.mark.parametrize("door", ["horde", "kobold"])
async def test_what_is_earned_without_an_address_is_kept_until_one_is_named(router: Rig, door: str):
    key = a_key()
    worker = KoboldCpp(router, key, name="w") if door == "horde" else None
    worker = worker or ClusterBridge(router, name="w", password=key)
    await worker.once()
    prompt_id = await kobold_prompt(router, await apikey(router))
    assert await worker.once()
    await until_done(router, prompt_id)
    earned = await owed_msat(router)
    assert earned > 0
    basic = base64.b64encode(f"w:{key}".encode()).decode()
    mine = {"Authorization": f"Basic {basic}"}
    seen = (await router.http.get("/workers/me", headers=mine)).json()
    assert (seen["pending_msat"], seen["payable"], seen["ln_url"]) == (earned, False, None)
    set_now = await router.http.put(
        "/workers/me/ln_url", json={"ln_url": f"w@{router.lnurl_host}"}, headers=mine
    )
    assert set_now.json()["payable"] is True
    # A later pop without an address does not take it back.
    session(router).cut("a test", blame="nobody")
    await worker.once()
    assert session(router).worker.ln_url == f"w@{router.lnurl_host}"
    wrong = base64.b64encode(f"w:{a_key()}".encode()).decode()
    refused = await router.http.get("/workers/me", headers={"Authorization": f"Basic {wrong}"})
    assert refused.status_code == 401
    assert (await router.books()).in_order


async def test_a_name_that_only_looks_like_an_address_is_a_name(router: Rig):
    worker = KoboldCpp(router, a_key(), name="me@nowhere.invalid")
    assert not await worker.once()
    assert session(router).worker.ln_url is None
    (shown,) = (await router.http.get("/api/v2/workers?type=text")).json()
    assert shown["name"] == "me"


# --- an owner's own workers ---------------------------------------------------------------------


async def test_workers_are_listed_with_the_keys_that_clients_read(router: Rig):
    """AH-13, KL-4."""
    worker = KoboldCpp(router, a_key(), name="kcpp")
    await worker.once()
    await horde_prompt(router, await apikey(router))
    await worker.once()
    (shown,) = (await router.http.get("/api/v2/workers?type=text")).json()
    assert set(shown) >= {
        "type",
        "name",
        "id",
        "online",
        "requests_fulfilled",
        "kudos_rewards",
        "kudos_details",
        "performance",
        "threads",
        "uptime",
        "maintenance_mode",
        "info",
        "nsfw",
        "trusted",
        "flagged",
        "uncompleted_jobs",
        "models",
        "team",
        "bridge_agent",
        "max_length",
        "max_context_length",
    }
    assert shown["performance"].endswith(" tokens per second")
    assert (shown["name"], shown["requests_fulfilled"]) == ("kcpp", 1)
    assert shown["bridge_agent"].startswith("KoboldCppEmbedWorker:2:")
    assert (await router.http.get(f"/api/v2/workers/{shown['id']}")).json()["id"] == shown["id"]
    assert (await router.http.get("/api/v2/workers/name/kcpp")).json()["id"] == shown["id"]
    assert (await router.http.get("/api/v2/workers?type=image")).json() == []
    missing = await router.http.get("/api/v2/workers/nobody")
    assert (missing.status_code, missing.json()["rc"]) == (404, "WorkerNotFound")


async def test_an_owner_rests_describes_and_gives_up_its_worker(router: Rig):
    """AH-14, KL-8: nobody else may."""
    key = a_key()
    worker = KoboldCpp(router, key, name="kcpp")
    await worker.once()
    mine = {"apikey": key}
    user = (await router.http.get("/api/v2/find_user", headers=mine)).json()
    (worker_id,) = user["worker_ids"]
    path = f"/api/v2/workers/{worker_id}"
    change = {"maintenance": True, "info": "back on Monday"}
    other = await router.http.put(path, json=change, headers={"apikey": a_key()})
    assert (other.status_code, other.json()["rc"]) == (403, "WrongCredentials")
    assert (await router.http.put(path, json=change, headers=mine)).json() == change
    shown = (await router.http.get(path)).json()
    assert (shown["maintenance_mode"], shown["info"]) == (True, "back on Monday")
    await kobold_prompt(router, await apikey(router))
    resting = await worker.pop()  # 200, since a worker punishes everything else (KP-7)
    assert (resting["id"], len(resting["messages"])) == (None, 1)
    none = await router.http.put(path, json={}, headers=mine)
    assert (none.status_code, none.json()["rc"]) == (400, "NoWorkerModSelected")
    await router.http.put(path, json={"maintenance": False}, headers=mine)
    given_id = (await worker.pop())["id"]
    locked = await router.http.delete(path, headers=mine)
    assert (locked.status_code, locked.json()["rc"]) == (423, "Locked")
    await worker.submit(given_id, "done")
    unpaid = await router.http.delete(path, headers=mine)
    assert unpaid.status_code == 423 and "ln_url" in unpaid.json()["message"]
    address = f"w@{router.lnurl_host}"
    set_now = await router.http.put(path, json={"ln_url": address}, headers=mine)
    assert set_now.json() == {"ln_url": address}
    gone = await router.http.delete(path, headers=mine)
    assert gone.json() == {"deleted_id": worker_id, "deleted_name": "kcpp"}
    assert (await router.http.get("/api/v2/find_user", headers=mine)).status_code == 404


async def test_counts_and_places_hold_while_a_pull_worker_is_busy(router: Rig):
    """KC-4, KL-10: it counts as a worker between its pops."""
    worker = KoboldCpp(router, a_key())
    await worker.pop()
    first = await kobold_prompt(router, await apikey(router))
    second = await horde_prompt(router, await apikey(router))
    await worker.pop()
    assert (await kobold_status(router, first))["processing"] == 1
    status = await horde_status(router, second)
    assert (status["queue_position"], status["is_possible"]) == (1, True)
