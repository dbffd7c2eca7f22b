"""Workers that poll behind a load balancer: a job of one router, its answer brought to another."""

from __future__ import annotations

import asyncio
import secrets
from functools import partial
from typing import Any

import httpx
import pytest

from router import far_calls, pull_submits
from router.far_calls import FarCalls, NoAnswer
from tests.door_tools import set_rates
from tests.poll_tools import apikey, horde_prompt, known_model, kobold_prompt, until_done
from tests.pull_stand_ins import ClusterBridge, KoboldCpp
from tests.reading import until
from tests.router_rig import Rig

SUBMIT = "/api/v2/generate/text/submit"


@pytest.fixture(name="pair")
async def acquainted(pair: tuple[Rig, Rig]) -> tuple[Rig, Rig]:
    await until(lambda: know_each_other(pair))
    return pair


async def know_each_other(rigs: tuple[Rig, Rig]) -> bool:
    return all(rig.core.presence.others for rig in rigs)


async def bring(rig: Rig, key: str, given_id: str, text: str, state: str = "ok") -> httpx.Response:
    return await rig.http.post(
        SUBMIT,
        json={"id": given_id, "generation": text, "state": state},
        headers={"apikey": key},
    )


async def horde_job(a: Rig, **limits: Any) -> tuple[str, str, str]:
    """A prompt and a worker that has popped it at this router: its key, the job's two ids."""
    await known_model(a)
    asked = await horde_prompt(a, await apikey(a))
    key = secrets.token_urlsafe(16)
    pop = await KoboldCpp(a, key, name=f"w-{key[:5]}", **limits).pop()
    assert pop["id"]
    return key, pop["id"], asked


async def test_an_answer_may_be_brought_to_any_router(pair):
    """The reward is that of the router that gave the job; the client reads at either."""
    a, b = pair
    await set_rates(a)
    key, given_id, asked = await horde_job(a)
    stranger = await bring(b, secrets.token_urlsafe(16), given_id, "Mine!")
    assert (stranger.status_code, stranger.json()["rc"]) == (403, "WrongCredentials")
    done = await bring(b, key, given_id, "A rabbit lived in the wood.")
    assert (done.status_code, done.json()) == (200, {"reward": 0.957})
    for rig in (a, b):
        status = await until_done(rig, asked, horde=True)
        assert status["generations"][0]["text"] == "A rabbit lived in the wood."
    assert (await a.books()).in_order


async def test_a_fault_that_is_told_to_another_router_is_one_requeue(pair):
    a, b = pair
    key, given_id, _ = await horde_job(a)
    replies = [await bring(b, key, given_id, "", "faulted") for _ in range(3)]
    assert [(r.status_code, r.json()) for r in replies] == [(200, {"reward": 0.0})] * 3

    async def given_back() -> list[Any]:
        return await a.query("select outcome from attempts where outcome is not null")

    assert [row["outcome"] for row in await until(given_back)] == ["faulted"]
    late = await bring(b, key, given_id, "After all.")
    assert (late.status_code, late.json()["rc"]) == (400, "DuplicateGen")
    unknown = await bring(b, key, given_id[:-1] + ("0" if given_id[-1] != "0" else "1"), "Whose?")
    assert unknown.status_code == 404


async def test_the_bridge_of_a_cluster_submits_where_it_likes(pair):
    """Its password is looked at by the router that it is shown to; only a hash goes further."""
    a, b = pair
    await known_model(a)
    asked = await kobold_prompt(a, await apikey(a))
    worker = ClusterBridge(a, name="bridge", password="correct horse")
    pop = await worker.pop()
    body = {"id": pop["id"], "password": "wrong", "generation": "A wood."}
    assert (await b.http.post("/generate/submit", json=body)).status_code == 401
    body["password"] = worker.password
    for _ in range(2):
        # It repeats itself until it is told something good (RC-7).
        done = await b.http.post("/generate/submit", json=body)
        assert (done.status_code, done.json()) == (200, {"reward": 2})
    assert (await until_done(b, asked))["generations"] == ["A wood."]
    charged = await a.query("select count(*) from attempts")
    assert charged[0][0] == 1


async def test_while_the_other_router_is_silent_a_worker_is_told_to_try_again(
    pair, monkeypatch: pytest.MonkeyPatch
):
    """What was said meanwhile may have arrived: the same again is one answer, and one reward."""
    a, b = pair
    key, given_id, asked = await horde_job(a)
    monkeypatch.setattr(pull_submits, "WITHIN_S", 0.3)
    monkeypatch.setattr(far_calls, "AGAIN_S", 0.1)
    send = a.core.relay.bus.send
    monkeypatch.setattr(a.core.relay.bus, "send", lambda to, message: None)
    refused = await bring(b, key, given_id, "Once.")
    assert (refused.status_code, refused.json()["rc"]) == (503, "router_silent")
    assert int(refused.headers["Retry-After"]) > 0
    monkeypatch.setattr(a.core.relay.bus, "send", send)
    rewards = [(await bring(rig, key, given_id, "Once.")) for rig in (b, a)]
    assert [reply.status_code for reply in rewards] == [200, 200]
    assert rewards[0].json() == rewards[1].json() and rewards[0].json()["reward"] > 0
    other = await bring(b, key, given_id, "Twice.")
    assert (other.status_code, other.json()["rc"]) == (400, "DuplicateGen")
    status = await until_done(a, asked, horde=True)
    assert status["generations"][0]["text"] == "Once."


async def test_an_answer_for_a_router_that_is_lost_comes_too_late(
    pair, monkeypatch: pytest.MonkeyPatch
):
    a, b = pair
    key, given_id, _ = await horde_job(a)
    monkeypatch.setattr(b.core.presence, "is_lost", lambda router_id: True)
    late = await bring(b, key, given_id, "Too late.")
    assert (late.status_code, late.json()["rc"]) == (400, "AbortedGen")


async def test_a_client_that_cancels_at_another_router_still_pays_who_cannot_be_told(pair):
    """AH-6: a worker that polls finishes, and is paid, wherever its client says that it has gone."""
    a, b = pair
    key, given_id, asked = await horde_job(a)
    gone = await b.http.delete(f"/api/v2/generate/text/status/{asked}")
    assert (gone.status_code, gone.json()["processing"]) == (200, 1)
    done = await bring(b, key, given_id, "Nobody waits for it.")
    assert done.status_code == 200 and done.json()["reward"] > 0
    (job,) = await a.query("select state from jobs")
    assert job["state"] == "succeeded"


async def test_a_worker_that_polls_at_every_router_is_one_worker(pair):
    """Behind a load balancer each pop comes to another; what it has goes on wherever it got it."""
    a, b = pair
    await known_model(a)
    asked = [await horde_prompt(a, await apikey(a)) for _ in range(2)]
    key = secrets.token_urlsafe(16)
    at = [KoboldCpp(rig, key, name="roams") for rig in (a, b)]
    given = [(await worker.pop())["id"] for worker in (*at, *at, *at)]
    assert all(given[:2]) and not any(given[2:])

    async def counted(worker: int, busy: int) -> bool:
        shown = [(await rig.http.get("/worker/stats")).json() for rig in (a, b)]
        return all(one == {"connected": worker - busy, "busy": busy} for one in shown)

    await until(partial(counted, 1, 1))
    for rig, given_id in zip((a, b), reversed(given[:2]), strict=True):
        assert (await bring(rig, key, given_id, "Told elsewhere.")).status_code == 200
    for request_id in asked:
        status = await until_done(b, request_id, horde=True)
        assert status["generations"][0]["text"] == "Told elsewhere."
    await until(partial(counted, 1, 0))
    for rig in (a, b):
        (model,) = (await rig.http.get("/info")).json()["models"]
        assert model["workers"] == 1
    assert (await a.books()).in_order


async def test_a_question_is_answered_once_however_often_it_is_heard(
    pair, monkeypatch: pytest.MonkeyPatch
):
    a, b = pair
    monkeypatch.setattr(far_calls, "AGAIN_S", 0.1)
    heard = asyncio.Event()
    times = 0

    async def slowly(brings: list[Any]) -> Any:
        nonlocal times
        times += 1
        await heard.wait()
        return brings

    first: FarCalls = a.core.far_calls
    first.answer_with("slowly", slowly)
    asked = asyncio.create_task(
        b.core.far_calls.ask(a.core.router_id, "slowly", 1, "two", within_s=20)
    )
    await asyncio.sleep(0.35)
    heard.set()
    assert await asked == [1, "two"]
    assert times == 1
    with pytest.raises(NoAnswer):
        await b.core.far_calls.ask(a.core.router_id, "slowly", "x" * 1_000_000, within_s=20)
