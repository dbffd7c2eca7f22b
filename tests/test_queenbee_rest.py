"""QueenBee's REST on the OpenAI door: `gpu_filter`, `timeout`, `ft_timeout`, aliases; `/worker/…`."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from coincurve import PrivateKey

from router import demands
from router.conditions import read_conditions
from router.demands import Demand, Traits
from tests.door_tools import CHAT, balance_msat, code, post_job, set_rates, until_state
from tests.router_rig import MODEL, Rig
from tests.workerbee import (
    LARGE,
    SMALL,
    WorkerBee,
    registered,
    registration_031,
    wiki_registration,
    workerbee,
)
from worker.protocol import ChatSpec

ASK: dict[str, Any] = CHAT | {"model": SMALL}


def ask(router: Rig, payer: dict[str, str], **changes: Any) -> asyncio.Task[Any]:
    return asyncio.create_task(
        router.http.post("/v1/chat/completions", json=ASK | changes, headers=payer)
    )


async def served_by(bee: WorkerBee, asked: asyncio.Task[Any]) -> None:
    await bee.job()
    await bee.answer("Hello.")
    assert (await asked).status_code == 200


# --- gpu_filter ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "fits"),
    [
        ({"min_version": "0.3.1"}, True),
        ({"min_version": "0.2.99"}, True),
        ({"min_version": "0.10.0"}, False),
        ({"capabilities": ["llama-infer"]}, True),
        ({"capabilities": ["llama-infer", "llama-fine-tune"]}, False),
        ({"slug": "c2x1Zw=="}, True),
        ({"slug": "other"}, False),
        ({"user_id": 7}, True),
        ({"user_id": "8"}, False),
        ({"min_version": "0.3.0", "slug": "c2x1Zw==", "user_id": "7"}, True),
    ],
)
def test_each_key_of_a_filter_is_met_or_not(wanted: dict[str, Any], fits: bool):
    """QB-R6. A worker without a version that can be read is skipped."""
    traits = Traits(
        version=(0, 3, 1),
        capabilities=frozenset({"llama-infer"}),
        slug="c2x1Zw==",
        user_id="7",
    )
    demand = demand_of(wanted)
    assert traits.meet(demand) is fits
    assert not Traits(capabilities=frozenset({"llama-infer"})).meet(demand) or not (
        {"min_version", "slug", "user_id"} & wanted.keys()
    )
    lane = f"{demand.prefix}text/512/64/repo:Q8/with/slashes"
    assert demands.of_lane(lane) == demand
    assert demands.without(lane) == "text/512/64/repo:Q8/with/slashes"


def demand_of(wanted: dict[str, Any]) -> Demand:
    conditions = read_conditions({"gpu_filter": wanted})
    spec = ChatSpec(model="m", messages=[], max_tokens=1, conditions=conditions)
    demand = demands.of_spec(spec)
    assert demands.of_job(spec.model_dump_json(exclude_none=True)) == demand
    return demand


async def test_a_job_goes_only_to_the_worker_that_it_names_and_others_pass_it(router: Rig):
    """QB-R6: `pubkey`, which must be verified (E1-4), or `worker_id`; a lane of its own."""
    payer = await router.bearer()
    key = PrivateKey()
    named = registration_031(key=key)
    claims = registration_031() | {"pubkey": named["pubkey"]}
    async with workerbee(router, claims) as thief, workerbee(router, named) as bee:
        session = next(
            s
            for s in router.core.gate.sessions.values()
            if named["pubkey"] in s.worker.traits.names
        )
        for wanted in ({"pubkey": named["pubkey"]}, {"worker_id": session.worker.id}):
            # The worker that is named is busy: its job waits, and does not hold up others.
            busy = ask(router, payer, gpu_filter=wanted)
            await bee.job()
            pinned = ask(router, payer, gpu_filter=wanted, fee_multiplier=3)
            other = ask(router, payer)
            await served_by(thief, other)
            await thief.nothing(0.1)
            await bee.answer("First.")
            assert (await busy).status_code == 200
            await served_by(bee, pinned)


async def test_a_filter_that_no_worker_meets_is_refused_before_any_money_moves(router: Rig):
    """QB-R7 says 400 `No workers available`; here it may also wait, as for any worker."""
    payer = await router.bearer()
    before = await balance_msat(router, payer)
    async with workerbee(router) as bee:
        wanted = {"min_version": "0.3.0"}
        reply = await ask(router, payer, gpu_filter=wanted)
        assert code(reply) == (503, "no_worker")
        assert await balance_msat(router, payer) == before
        links = await post_job(
            router, payer | {"X-Max-Wait-S": "60"}, model=SMALL, gpu_filter=wanted
        )
        await bee.nothing()
        async with workerbee(router, registration_031()) as newer:
            await newer.job()
            await newer.send({"error": "it broke"})
            # Back in its own lane, and nobody else's.
            await newer.job()
            await newer.answer("Hello.")
            await until_state(router, links["id"], "succeeded")
        await bee.nothing(0.1)


async def test_a_filter_also_finds_workers_of_our_own_protocol(router: Rig):
    payer = await router.bearer()
    async with router.worker() as worker:
        links = await post_job(router, payer, gpu_filter={"worker_id": worker.id})
        job = await worker.job()
        assert job["job_id"] == links["id"]
        await worker.say(job, "Hello.")
        await worker.finish(job, tokens=1)
        await until_state(router, links["id"], "succeeded")


@pytest.mark.parametrize(
    "wrong",
    [
        {"gpu_filter": "all"},
        {"gpu_filter": {"vram": 24}},
        {"gpu_filter": {"min_version": "new"}},
        {"gpu_filter": {"capabilities": "llama-infer"}},
        {"gpu_filter": {"slug": ["a"]}},
        {"timeout": "soon"},
        {"timeout": 0},
        {"ft_timeout": True},
    ],
)
async def test_what_is_not_understood_is_refused_and_not_ignored(
    router: Rig, wrong: dict[str, Any]
):
    """QB-R4: 400."""
    payer = await router.bearer()
    async with router.worker():
        reply = await router.http.post("/v1/chat/completions", json=CHAT | wrong, headers=payer)
        assert code(reply) == (400, "bad_request")
        assert reply.json()["error"]["param"] == next(iter(wrong))


# --- time-outs ----------------------------------------------------------------------------------


async def test_the_first_client_times_out_and_the_second_sees_nothing_of_its_answer(router: Rig):
    """QB-R12, E1-1, E6-1: 408, refunded; the worker is drained, and not to blame."""
    first, second = await router.bearer(), await router.bearer()
    before = await balance_msat(router, first)
    async with workerbee(router) as bee:
        asked = ask(router, first, timeout=0.3)
        await bee.job()
        reply = await asked
        assert code(reply) == (408, "timeout")
        assert await balance_msat(router, first) == before
        other = ask(router, second)
        await bee.nothing()
        await bee.answer("secret of the first")
        await bee.job()
        await bee.answer("for the second")
        said = (await other).json()
        assert said["choices"][0]["message"]["content"] == "for the second"
        (worker,) = router.core.fleet.all()
        assert worker.failed == 0


async def test_a_stream_that_runs_over_its_time_is_charged_for_what_was_shown(router: Rig):
    """QB-R5, QB-R12: said inside the stream that has begun (E1-8)."""
    await set_rates(router)
    payer = await router.bearer()
    body = ASK | {"stream": True, "timeout": 600}
    async with (
        workerbee(router) as bee,
        router.http.stream("POST", "/v1/chat/completions", json=body, headers=payer) as reply,
    ):
        await bee.job()
        await bee.chunk("Shown before. ")
        text = ""
        async for line in reply.aiter_lines():
            text += line
            if "Shown before. " in line:
                (running,) = router.core.attempts.running.values()
                running.began_at -= 700
        assert '"timeout"' in text
    (job,) = await router.query("select end_reason, charged_msat from jobs")
    # Fourteen bytes are four tokens, and no prompt fee is due.
    assert (job["end_reason"], job["charged_msat"]) == ("timeout", 4)


async def test_a_slow_first_token_sends_a_stream_to_another_worker(router: Rig):
    """QB-R10, QB-R11: `ft_timeout`."""
    payer = await router.bearer()
    async with workerbee(router) as slow:
        links = await post_job(router, payer, model=SMALL, stream=True, ft_timeout=600)
        await slow.job()
        (running,) = router.core.attempts.running.values()
        running.progress_at -= 700
        await until_state(router, links["id"], "queued")
        async with workerbee(router) as other:
            await other.job()
            await other.stream("Fast.")
            row = await until_state(router, links["id"], "succeeded")
            assert row["attempt"] == 2
    (first, _) = await router.query(
        "select outcome, blame from attempts where job_id = $1 order by n", links["id"]
    )
    assert (first["outcome"], first["blame"]) == ("slow", "client")


def test_an_answer_in_one_piece_has_no_tokens_to_wait_for():
    assert read_conditions({"ft_timeout": 5}) is None
    assert read_conditions({"timeout": -1, "stream": True}) is None
    streamed = read_conditions({"ft_timeout": 5, "stream": True, "timeout": 60})
    assert streamed is not None and (streamed.token_s, streamed.timeout_s) == (5, 60)


# --- names, sizes, numbers ----------------------------------------------------------------------


async def test_a_short_name_buys_the_model_it_stands_for(router: Rig):
    """QB-R15; where a worker has a model of that very name, it is that one."""
    payer = await router.bearer()
    async with workerbee(router) as bee:
        asked = ask(router, payer, model="vicuna-7B-q4")
        _, body = await bee.job()
        assert body["model"] == "TheBloke/vicuna-7B-v1.5-GGUF:Q4_K_M"
        await bee.answer("Hello.")
        assert (await asked).json()["model"] == "TheBloke/vicuna-7B-v1.5-GGUF:Q4_K_M"
        own = [{"id": "vicuna-7B-q4", "kind": "text", "context_length": 2048}]
        async with router.worker(models=own) as worker:
            again = ask(router, payer, model="vicuna-7B-q4")
            await worker.serve()
            assert (await again).json()["model"] == "vicuna-7B-q4"


async def test_a_worker_is_told_the_name_that_it_lists(router: Rig):
    """RC-4, RC-6: `Q8` where a client asks for `Q8_0`, on a machine without a card."""
    payer = await router.bearer()
    listed = "TheBloke/CoolModelv2-7B:Q8"
    bare = registration_031(gpu=False, models=[listed])
    async with workerbee(router, bare) as bee:
        asked = ask(router, payer, model=f"{listed}_0")
        _, body = await bee.job()
        assert body["model"] == listed
        await bee.answer("Hello.")
        assert (await asked).json()["model"] == f"{listed}_0"
        assert code(await ask(router, payer, model=LARGE)) == (404, "unknown_model")


async def test_a_request_too_large_for_every_worker_there_is_refused_beforehand(router: Rig):
    """QB-P2."""
    payer = await router.bearer(100_000_000)
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 950_000}}
    content = [{"type": "text", "text": "What is it?"}, picture]
    async with workerbee(router) as bee:
        reply = await ask(router, payer, messages=[{"role": "user", "content": content}])
        assert code(reply) == (400, "bad_request")
        await bee.nothing(0.1)


async def test_the_place_of_a_job_counts_all_that_its_workers_would_take_first(router: Rig):
    """Also jobs for other models that nobody listed, and those that demand something."""
    payer = await router.bearer()
    async with workerbee(router, registration_031()) as bee:
        await post_job(router, payer, model=SMALL)
        await bee.job()
        other = "TheBloke/Another-7B:Q4_K_M"
        await post_job(router, payer, model=other, fee_multiplier=3)
        await post_job(router, payer, model=SMALL, gpu_filter={"min_version": "0.3.0"})
        last = await post_job(router, payer, model=SMALL)
        view = await router.http.get(
            last["status_url"], headers={"Authorization": f"Bearer {last['token']}"}
        )
        assert view.json()["position"] == 3
        await bee.answer("First.")
        _, body = await bee.job()
        assert body["model"] == other


async def test_the_numbers_of_workers_name_nobody(router: Rig):
    """QB-R17, QB-R18."""
    key = PrivateKey()
    address = f"secret@{router.lnurl_host}"
    named = registration_031(address, key=key, capabilities=["llama-infer", "sdxl"])
    named |= {"auth_key": "uid:7"}
    payer = await router.bearer()
    async with workerbee(router, wiki_registration()), workerbee(router, named) as bee:
        await registered(router, 2)
        assert (await router.http.get("/worker/stats")).json() == {"connected": 2, "busy": 0}
        asked = ask(router, payer, gpu_filter={"capabilities": ["sdxl"]})
        await bee.job()
        assert (await router.http.get("/worker/stats")).json() == {"connected": 1, "busy": 1}
        everyone = await router.http.get("/worker/detail")
        # With another auth_key than it signed, it is not the owner of that key.
        for hidden in (named["pubkey"], address, "uid:7", "127.0.0.1"):
            assert hidden not in everyone.text
        one = next(entry for entry in everyone.json() if entry["worker_version"] == "0.3.1")
        assert (one["capabilities"], one["gpu_cnt"], one["busy"]) == (
            ["llama-infer", "sdxl"],
            1,
            True,
        )
        await bee.answer("Hello.")
        assert (await asked).status_code == 200
    async with workerbee(router, registration_031(address, key=key)):
        for query, count in ((named["pubkey"], 1), ("user", 0), ("uid:7", 0), ("nobody", 0)):
            found = await router.http.get("/worker/detail", params={"query": query})
            assert len(found.json()) == count


async def test_any_word_may_stand_before_the_token(router: Rig):
    """QB-R2: QueenBee's clients write `bearer: TOKEN`. Never in a URL, where it would be logged."""
    key = await router.key()
    async with router.worker() as worker:
        for scheme in ("bearer:", "Bearer", "Token"):
            asked = asyncio.create_task(
                router.http.post(
                    "/v1/chat/completions",
                    json=CHAT,
                    headers={"Authorization": f"{scheme} {key}"},
                )
            )
            await worker.serve()
            assert (await asked).status_code == 200
    assert MODEL in (await router.http.get("/v1/models")).text
