"""QueenBee's workers on `WS /worker`: registration, jobs, answers, pay."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from typing import Any

import pytest
from coincurve import PrivateKey
from openai import AsyncOpenAI

from router import queenbee_sessions, worker_gate
from router.api import worker_socket
from tests.door_tools import CHAT, balance_msat, code, post_job, set_rates, until_state
from tests.router_rig import Rig
from tests.workerbee import (
    SMALL,
    WorkerBee,
    registered,
    registration_031,
    wiki_registration,
    workerbee,
)

ASK: dict[str, Any] = CHAT | {"model": SMALL}
HELLO: list[Any] = [{"role": "user", "content": "Say hello to the world, please."}]


@pytest.fixture
async def client(router: Rig) -> AsyncIterator[AsyncOpenAI]:
    key = await router.key()
    async with AsyncOpenAI(
        base_url=f"{router.url}/v1", api_key=key, max_retries=0, timeout=10
    ) as made:
        yield made


def ask(router: Rig, payer: dict[str, str], **changes: Any) -> asyncio.Task[Any]:
    return asyncio.create_task(
        router.http.post("/v1/chat/completions", json=ASK | changes, headers=payer)
    )


# --- registration -------------------------------------------------------------------------------


async def test_the_wikis_worker_registers_with_an_address_and_hardware_and_is_paid(router: Rig):
    """QB-W1…W6, QB-P10, QB-P12, QB-R16: what is missing in the answer is filled in."""
    await set_rates(router)
    payer = await router.bearer()
    address = f"bee@{router.lnurl_host}"
    async with workerbee(router, wiki_registration(address)) as bee:
        (worker,) = await registered(router)
        asked = ask(router, payer)
        url, body = await bee.job()
        assert url == "/v1/chat/completions"
        assert body["model"] == SMALL and body["messages"] == ASK["messages"]
        assert body["max_tokens"] == 64 and body["stream"] is False
        await bee.answer("Hello, world.", tokens=3)
        reply = await asked
    said = reply.json()
    assert said["choices"][0]["message"]["content"] == "Hello, world."
    assert said["object"] == "chat.completion" and said["model"] == SMALL
    assert said["id"] and said["created"] > 0
    assert said["usage"]["completion_tokens"] == 3
    assert (worker.ln_url, worker.payable) == (address, True)
    (earned,) = await router.query(
        "select balance_msat from ledger_balances where account = $1",
        f"liabilities:worker:{worker.id}",
    )
    fee = int(reply.headers["x-satherd-fee-msat"])
    assert fee == 1003 and earned["balance_msat"] == fee - fee * 50_000 // 1_000_000


async def test_a_signature_made_before_the_cards_were_filled_in_makes_the_key_an_identity(
    router: Rig,
):
    """QB-P9, E1-4: the same key is the same worker, whatever hardware it has by now."""
    key = PrivateKey()
    async with workerbee(router, registration_031(key=key, gpu=False)):
        (first,) = await registered(router)
        async with workerbee(router, registration_031(key=key, gpu=True)):
            assert router.core.gate.sessions[first.id].worker is not first
    other = registration_031(key=key, gpu=True, slug="c2x1Zw==")
    older = registration_031(key=key, hex_signature=True)
    async with workerbee(router, other), workerbee(router, older):
        ids = {worker.id for worker in await registered(router, 2)}
    assert first.id in ids
    (hardware,) = await router.query("select hardware from workers where id = $1", first.id)
    assert "auth_key" not in hardware["hardware"] and "sig" not in hardware["hardware"]


@pytest.mark.parametrize(
    "spoilt",
    [
        {"sig": "00" * 64},
        {"sig": "no hex"},
        {"sig": ""},
        {"ln_url": "thief@example.org"},
        {"pubkey": "AAAA"},
        {"pubkey": "not base64!"},
    ],
)
async def test_a_key_without_its_signature_is_nobodys_identity(router: Rig, spoilt: dict[str, Any]):
    """QB-P9, E1-4: whoever claims another's key serves, and is somebody else."""
    key = PrivateKey()
    async with workerbee(router, registration_031(key=key)):
        (owner,) = await registered(router)
        claimed = registration_031(key=key) | {"ln_address": "DONT_PAY_ME"} | spoilt
        async with workerbee(router, claimed | {"ln_url": ""}):
            workers = await registered(router, 2)
            assert len({worker.id for worker in workers}) == 2
            assert owner in workers


async def test_dont_pay_me_serves_unpaid(router: Rig):
    """QB-P6."""
    await set_rates(router)
    payer = await router.bearer()
    async with workerbee(router, registration_031()) as bee:
        (worker,) = await registered(router)
        assert not worker.payable and worker.ln_url is None
        asked = ask(router, payer)
        await bee.job()
        await bee.answer("Hello.")
        assert (await asked).status_code == 200
    books = await router.books()
    assert books.lines.get("liabilities:worker", 0) == 0 and sum(books.lines.values()) == 0


async def test_a_bad_address_is_refused_without_a_word_and_not_at_once(
    router: Rig, monkeypatch: pytest.MonkeyPatch
):
    """RC-5, QB-P19: it would take any frame for a job, and be back in no time."""
    monkeypatch.setattr(worker_socket, "QUEENBEE_PAUSE_S", 0.05)
    async with workerbee(router, wiki_registration("no address"), welcome=False) as bee:
        assert await bee.closed() == (1008, "not_understood")
    async with workerbee(router, wiki_registration(vram="much"), welcome=False) as bee:
        assert await bee.closed() == (1008, "bad_registration")


async def test_a_worker_that_reconnects_for_ever_is_throttled(
    router: Rig, monkeypatch: pytest.MonkeyPatch
):
    """QB-P19, E1-14: told to try again later, after a pause."""
    monkeypatch.setattr(worker_socket, "QUEENBEE_PAUSE_S", 0.05)
    monkeypatch.setattr(worker_gate, "REGISTRATIONS_PER_MINUTE", 2)
    message = registration_031()
    for _ in range(2):
        async with workerbee(router, message):
            await registered(router)
        await registered(router, 0)
    async with workerbee(router, message, welcome=False) as bee:
        assert await bee.closed() == (1013, "too_often")
    async with workerbee(router, registration_031()):
        await registered(router)


async def test_a_worker_is_sent_nothing_but_jobs(router: Rig):
    """RC-5: no word of welcome, none of leaving."""
    async with workerbee(router) as bee:
        (worker,) = await registered(router)
        await bee.nothing()
        router.core.gate.sessions[worker.id].drain()
        await bee.nothing()


# --- answers ------------------------------------------------------------------------------------


async def test_a_stream_without_usage_is_counted_by_the_router(router: Rig, client: AsyncOpenAI):
    """QB-P13, E1-3: the trailing `{}` is consumed, and four bytes are a token."""
    await set_rates(router)
    async with workerbee(router) as bee:
        await registered(router)
        asked = asyncio.create_task(
            client.chat.completions.create(model=SMALL, messages=HELLO, max_tokens=64, stream=True)
        )
        _, body = await bee.job()
        assert body["stream"] is True
        await bee.stream("Hello, ", "world.", reason="length")
        chunks = [chunk async for chunk in await asked]
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == "Hello, world."
        last = next(c for c in chunks if c.choices[0].finish_reason)
        assert last.choices[0].finish_reason == "length"
        assert last.usage is not None and last.usage.model_extra is not None
        assert last.usage.model_extra["satherd"]["completion_tokens"] == 4
        # Free at once, and its next stream is its own (E1-7).
        again = asyncio.create_task(
            client.chat.completions.create(model=SMALL, messages=HELLO, max_tokens=8, stream=True)
        )
        await bee.job()
        await bee.stream("Again.")
        texts = [c.choices[0].delta.content async for c in await again]
        assert "".join(text or "" for text in texts) == "Again."
        (worker,) = router.core.fleet.all()
        assert router.core.gate.sessions[worker.id].dropped_frames == 0


async def test_a_stream_that_ends_without_a_reason_ends_with_stop(router: Rig):
    """QB-R13."""
    payer = await router.bearer()
    async with workerbee(router) as bee:
        links = await post_job(router, payer, model=SMALL, stream=True)
        await bee.job()
        await bee.chunk("Half a")
        await bee.send({})
        row = await until_state(router, links["id"], "succeeded")
        assert row["end_reason"] == "stop"


async def test_a_worker_that_never_ends_its_stream_is_ended_and_its_late_end_is_nobodys(
    router: Rig, monkeypatch: pytest.MonkeyPatch
):
    """E1-7: a `{}` that comes after the socket was given its next job does not end that."""
    monkeypatch.setattr(queenbee_sessions, "END_S", 0.1)
    payer = await router.bearer()
    async with workerbee(router) as bee:
        first = await post_job(router, payer, model=SMALL, stream=True)
        await bee.job()
        await bee.stream("First.", end=False)
        await until_state(router, first["id"], "succeeded")
        second = await post_job(router, payer, model=SMALL, stream=True)
        await bee.job()
        await bee.send({})
        await bee.stream("Second.")
        row = await until_state(router, second["id"], "succeeded", "failed")
        assert "Second." in row["result"]


async def test_completions_and_embeddings_of_the_llama_server(router: Rig, client: AsyncOpenAI):
    """QB-P10, QB-P12."""
    async with workerbee(router, registration_031(models=[SMALL])) as bee:
        await registered(router)
        asked = asyncio.create_task(
            client.completions.create(model=SMALL, prompt="Once upon", max_tokens=8)
        )
        url, body = await bee.job()
        assert (url, body["prompt"]) == ("/v1/completions", "Once upon")
        await bee.send({"choices": [{"index": 0, "text": " a time", "finish_reason": "length"}]})
        completed = await asked
        assert completed.choices[0].text == " a time"
        assert completed.choices[0].finish_reason == "length"
        wanted = asyncio.create_task(client.embeddings.create(model=SMALL, input=["one", "two"]))
        url, body = await bee.job()
        assert (url, body["input"]) == ("/v1/embeddings", ["one", "two"])
        await bee.send(
            {
                "object": "list",
                "data": [
                    {"object": "embedding", "embedding": [0.5, 0.25], "index": 1},
                    {"object": "embedding", "embedding": [1.0, -1.0], "index": 0},
                ],
                "usage": {"prompt_tokens": 2, "total_tokens": 2},
            }
        )
        embedded = await wanted
        assert [entry.embedding for entry in embedded.data] == [[1.0, -1.0], [0.5, 0.25]]


async def test_fast_embeddings_go_to_a_worker_that_can(router: Rig, client: AsyncOpenAI):
    """QB-P7, QB-P14: asked for by the prefix, which the worker needs to see."""
    name = "fastembed:BAAI/bge-small-en-v1.5"
    both = ["llama-infer", "fast-embed"]
    async with workerbee(router, registration_031(capabilities=both)) as bee:
        await registered(router)
        async with workerbee(router, registration_031()) as other:
            await registered(router, 2)
            asked = asyncio.create_task(client.embeddings.create(model=name, input="one"))
            url, body = await bee.job()
            assert (url, body) == ("/v1/embeddings", {"model": name, "input": "one"})
            entry = {"object": "embedding", "embedding": [0.5], "index": 0}
            await bee.send({"object": "list", "model": name[10:], "data": [entry]})
            assert (await asked).data[0].embedding == [0.5]
            await other.nothing()


async def test_pictures_go_to_a_worker_that_paints(router: Rig, client: AsyncOpenAI):
    """QB-P7, QB-P15: one frame, however long it took."""
    name = "gputopia/sdxl"
    both = ["llama-infer", "sdxl"]
    async with (
        workerbee(router, registration_031(capabilities=both)) as bee,
        workerbee(router) as other,
    ):
        asked = asyncio.create_task(
            client.images.generate(
                model=name, prompt="A brave rabbit.", size="512x512", response_format="b64_json"
            )
        )
        url, body = await bee.job()
        assert url == "/v1/images/generations"
        assert (body["model"], body["prompt"]) == (name, "A brave rabbit.")
        assert (body["size"], body["n"]) == ("512x512", 1)
        png = base64.b64encode(b"a picture").decode()
        await bee.send({"created": 1, "data": [{"b64_json": png}]})
        made = await asked
        assert made.data is not None and made.data[0].b64_json == png
        await other.nothing()


# --- errors, busy workers, frames that are too large ---------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        {"error": "CUDA out of memory", "error_type": "RuntimeError"},
        {"error": "Expected response Content-Type to be SSE", "error_type": "SSEError"},
        {"error": {"message": "it broke", "type": "internal_server_error", "code": None}},
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_an_error_of_the_worker_in_either_shape_sends_the_job_to_another(
    router: Rig, error: dict[str, Any], stream: bool
):
    """QB-P17, RC-3: no `{}` follows an error; E1-8: decided before the first byte has left."""
    payer = await router.bearer()
    async with workerbee(router) as bee:
        await registered(router)
        links = await post_job(router, payer, model=SMALL, stream=stream)
        await bee.job()
        async with workerbee(router) as other:
            await registered(router, 2)
            await bee.send(error)
            await other.job()
            await (other.stream("Good.") if stream else other.answer("Good."))
            row = await until_state(router, links["id"], "succeeded")
        assert row["attempt"] == 2
        # It is idle again, not in want of a `{}`.
        after = await post_job(router, payer, model=SMALL)
        await bee.job()
        await bee.answer("Better.")
        await until_state(router, after["id"], "succeeded")
    (first, *_) = await router.query("select outcome, blame from attempts order by started_at, n")
    assert (first["outcome"], first["blame"]) == ("engine_error", "worker")


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (
            {"message": "too long", "type": "x", "code": "context_length_exceeded"},
            "prompt_too_long",
        ),
        ({"message": "bad stop", "type": "invalid_request_error"}, "bad_request"),
        ("Can't find gguf, ggml or config.json", "model_not_served"),
    ],
)
async def test_what_lies_in_the_job_is_not_tried_again(router: Rig, error: Any, outcome: str):
    """QB-P17, QB-R11, QB-P23."""
    payer = await router.bearer()
    before = await balance_msat(router, payer)
    async with workerbee(router) as bee:
        asked = ask(router, payer)
        await bee.job()
        await bee.send({"error": error})
        assert (await asked).status_code in (400, 502)
    (attempt,) = await router.query("select outcome, blame from attempts")
    assert (attempt["outcome"], attempt["blame"]) == (outcome, "job")
    assert await balance_msat(router, payer) == before


async def test_a_busy_worker_is_left_alone_until_it_says_otherwise(router: Rig):
    """QB-P18: both forms; the job it could not take is nobody's fault."""
    payer = await router.bearer()
    async with workerbee(router) as bee:
        (worker,) = await registered(router)
        await bee.send({"busy": True})
        async with asyncio.timeout(10):
            while not worker.resting:
                await asyncio.sleep(0.01)
        links = await post_job(router, payer, model=SMALL)
        await bee.nothing()
        await bee.send({"busy": False})
        await bee.job()
        await bee.send({"error": "busy"})
        await until_state(router, links["id"], "queued")
        assert worker.resting and worker.failed == 0
        await bee.send({"busy": False})
        await bee.job()
        await bee.answer("Now.")
        await until_state(router, links["id"], "succeeded")
    (attempt, _) = await router.query("select outcome, blame from attempts order by n")
    assert (attempt["outcome"], attempt["blame"]) == ("overloaded", "nobody")


async def test_a_frame_over_its_limit_is_never_sent(router: Rig):
    """QB-P2: a request that a workerbee cannot receive costs it nothing, and goes elsewhere."""
    picture = "data:image/png;base64," + base64.b64encode(bytes(800_000)).decode()
    parts = [{"type": "text", "text": "What is it?"}]
    parts.append({"type": "image_url", "image_url": {"url": picture}})  # pyright: ignore
    content = [{"role": "user", "content": parts}]
    payer = await router.bearer(10_000_000)
    models = [{"id": SMALL, "kind": "text", "context_length": 8192, "max_tokens": 1024}]
    async with workerbee(router) as bee, router.worker(models=models) as native:
        await registered(router, 2)
        links = await post_job(router, payer, model=SMALL, messages=content)
        job = await native.job()
        assert job["job_id"] == links["id"]
        await native.say(job, "A picture.")
        await native.finish(job, tokens=1)
        await until_state(router, links["id"], "succeeded")
        await bee.nothing()
        assert bee.socket.state.name == "OPEN"


async def test_a_worker_that_breaks_the_protocol_is_cut_off(router: Rig):
    payer = await router.bearer()
    async with workerbee(router) as bee:
        links = await post_job(router, payer, model=SMALL)
        await bee.job()
        await bee.socket.send("not JSON")
        assert (await bee.closed())[0] == 1008
    row = await until_state(router, links["id"], "queued")
    assert row["attempt"] == 1


async def test_a_web_worker_is_asked_by_its_own_names_and_says_when_it_is_busy(router: Rig):
    """QB-R7, QB-R15, QB-P18, QB-R13: a browser with a card; its events may say `message`."""
    payer = await router.bearer()
    web = {"worker_version": "web", "vram": 16_000_000_000, "web_gpus": [{"name": "3090"}]}
    async with workerbee(router, web) as bee:
        vicuna = "TheBloke/vicuna-7B-v1.5-GGUF:Q4_K_M"
        links = await post_job(router, payer, model=vicuna, stream=True)
        _, body = await bee.job()
        assert body["model"] == "webgpu/vicuna-v1-7b-q4f32_0"
        await bee.send({"busy": True})
        await bee.send({"choices": [{"message": {"content": "From a browser."}}]})
        await bee.send({})
        row = await until_state(router, links["id"], "succeeded")
        assert "From a browser." in row["result"]
        waits = await post_job(router, payer, model="webgpu/vicuna-v1-7b-q4f32_0")
        await bee.nothing()
        await bee.send({"busy": False})
        await bee.job()
        await bee.answer("Again.")
        await until_state(router, waits["id"], "succeeded")
        reply = await ask(router, payer, model="TheBloke/CoolModelv2-7B:Q4_K_M")
        assert code(reply) == (404, "unknown_model")


# --- E6, numbers 1 and 2 ------------------------------------------------------------------------


async def test_the_second_client_never_sees_a_byte_of_the_first_that_went(router: Rig):
    """E1-1, E6-1: the first client goes while its answer streams; the worker goes on with it."""
    first, second = await router.bearer(), await router.bearer()
    async with workerbee(router) as bee:
        links = await post_job(router, first, model=SMALL, stream=True)
        await bee.job()
        await bee.chunk("secret of the first ")
        cancelled = await router.http.delete(
            links["status_url"], headers={"Authorization": f"Bearer {links['token']}"}
        )
        assert cancelled.status_code == 200
        asked = ask(router, second)
        await bee.chunk("and more of it")
        await bee.send({"busy": False})
        await bee.nothing()
        await bee.stream("to the end")
        await answered_second(bee, asked)
        (worker,) = router.core.fleet.all()
        assert router.core.gate.sessions[worker.id].dropped_frames == 5


async def answered_second(bee: WorkerBee, asked: asyncio.Task[Any]) -> None:
    await bee.job()
    await bee.answer("for the second")
    reply = await asked
    assert reply.status_code == 200, reply.text
    assert reply.json()["choices"][0]["message"]["content"] == "for the second"


async def test_an_answer_in_one_piece_that_nobody_wants_any_more_is_nobodys(router: Rig):
    """E1-1: embeddings and plain answers are drained as well."""
    first, second = await router.bearer(), await router.bearer()
    async with workerbee(router) as bee:
        links = await post_job(router, first, model=SMALL)
        await bee.job()
        await router.http.delete(
            links["status_url"], headers={"Authorization": f"Bearer {links['token']}"}
        )
        asked = ask(router, second)
        await bee.nothing()
        await bee.answer("secret of the first")
        await answered_second(bee, asked)


async def test_a_worker_that_goes_in_mid_job_is_out_and_its_job_waits_with_its_money(router: Rig):
    """E1-2, E6-2: no zombie is left, and the next worker earns the fee."""
    payer = await router.bearer()
    async with workerbee(router) as bee:
        (worker,) = await registered(router)
        links = await post_job(router, payer, model=SMALL, stream=True)
        await bee.job()
    row = await until_state(router, links["id"], "queued")
    assert await registered(router, 0) == [] and worker.id not in router.core.gate.sessions
    assert (await router.books()).lines["liabilities:escrow"] == -row["held_msat"]
    async with workerbee(router) as other:
        await other.job()
        await other.stream("Done.")
        await until_state(router, links["id"], "succeeded")


async def test_a_worker_deaf_from_loading_is_not_given_up(router: Rig):
    """QB-P21: the first token of a model that it has not loaded yet may take minutes."""
    payer = await router.bearer()
    async with workerbee(router) as bee:
        (worker,) = await registered(router)
        links = await post_job(router, payer, model=SMALL, stream=True)
        await bee.job()
        session = router.core.gate.sessions[worker.id]
        session.check_progress(first_token_s=0.0, stall_s=0.0)
        await bee.stream("Loaded.")
        await until_state(router, links["id"], "succeeded")
        stalls = await post_job(router, payer, model=SMALL, stream=True)
        await bee.job()
        session.check_progress(first_token_s=0.0, stall_s=0.0)
        await until_state(router, stalls["id"], "queued")
        # It may still be at it: nothing more until it has ended.
        await bee.nothing()
        await bee.send({})
        await bee.job()


async def test_a_model_that_no_worker_could_hold_is_unknown(router: Rig):
    """QB-R7: 400 `No workers available` there, 404 here, where nobody ever served it."""
    payer = await router.bearer()
    async with workerbee(router):
        await registered(router)
        reply = await router.http.post(
            "/v1/chat/completions",
            json=ASK | {"model": "TheBloke/Llama-2-70B-chat-GGUF:Q4_K_M"},
            headers=payer,
        )
        assert code(reply) == (404, "unknown_model")
