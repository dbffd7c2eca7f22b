"""What strangers try at the doors: sizes, names and numbers that nobody in earnest sends."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from billing import ledger
from router.api.kobold_worker import NEW_PER_MINUTE
from router.dispatcher import MOST_PROBES
from router.models import MOST_KNOWN
from router.paid_quotes import PaidQuotes
from router.pull_records import Passwords
from router.rate_limits import KEY_FAILURES_PER_MINUTE, UNPAID_UNITS_PER_MINUTE
from tests.poll_tools import HORDE_PROMPT, apikey
from tests.pull_stand_ins import ClusterBridge, KoboldCpp
from tests.router_rig import MODEL, PATIENCE_S, Rig, running_rig
from worker.protocol import ModelKind, ServedModel


async def test_the_sign_for_every_model_is_no_model_that_can_be_bought(router: Rig):
    """It would be had at nobody's price, and sent to a worker that has no such model."""
    payer = await router.bearer()
    asked = {"model": "*", "prompt": "hello", "max_tokens": 5}
    grid = {"tag": "*", "commandLine": '{"inputs": ["hello"]}'}
    message = {"Action": "Transfer", "Quantity": "5", "X-Prompt": "hello", "X-Tokens": "5"}
    async with router.worker():
        for path, body in (
            ("/v1/completions", asked),
            ("/jobs", asked | {"kind": "completion"}),
            ("/remotejobs/v2/jobs", grid),
            ("/herder", message | {"X-Model": "*"}),
        ):
            reply = await router.http.post(path, json=body, headers=payer)
            assert reply.status_code == 404, (path, reply.text)
    assert await router.query("select * from jobs") == []
    assert (await router.books()).in_order


async def test_no_worker_serves_the_sign_for_every_model(router: Rig):
    bridge = KoboldCpp(router, "k" * 22)
    bridge._pop["models"] = ["*"]
    reply = await router.http.post(
        "/api/v2/generate/text/pop", json=bridge._pop, headers=bridge._headers
    )
    assert reply.status_code == 400 and "name of a model" in reply.json()["message"]
    with pytest.raises(AssertionError, match="bad_registration"):
        async with router.worker(models=[{"id": "*"}]):
            pass


async def test_limits_without_number_make_no_lanes_without_number(router: Rig):
    """Each pop may name other limits; every one of them would be an edge for good."""
    for limit in range(2001, 2041):
        bridge = KoboldCpp(router, "k" * 22, max_length=limit, max_context_length=limit + 1000)
        assert (await bridge.pop())["id"] is None
    edges = router.core.fleet.edges
    assert len(edges.context) < 40 and len(edges.answer) < 40
    (kept,) = await router.query("select count(*) as n from lane_edges")
    assert kept["n"] <= 80


async def test_a_worker_with_thousands_of_lanes_is_still_given_its_job(router: Rig):
    models = [
        {"id": f"m{n}", "kind": "text", "context_length": 1 << 20, "max_tokens": 1 << 20}
        for n in range(199)
    ] + [{"id": MODEL, "kind": "text", "context_length": 4096, "max_tokens": 4096}]
    payer = await router.bearer()
    async with router.worker(models=models) as worker:
        (connected,) = router.core.fleet.all()
        assert len(connected.lanes) > MOST_PROBES
        await router.http.post(
            "/jobs", json={"model": MODEL, "prompt": "hi", "kind": "completion"}, headers=payer
        )
        await worker.serve()


@pytest.mark.parametrize(
    ("workers", "status"),
    [(["nobody"] * 100_000, 404), ([["x"]], 400), ({"a": 1}, 400), ([{"a": 1}], 400)],
    ids=["many", "nested", "object", "objects"],
)
async def test_a_list_of_workers_is_not_looked_up_one_by_one(
    router: Rig, workers: Any, status: int
):
    reply = await router.http.post(
        "/api/v2/generate/text/async",
        json=HORDE_PROMPT | {"workers": workers},
        headers=await apikey(router),
    )
    assert reply.status_code == status and len(reply.text) < 300


async def test_the_same_worker_named_a_hundred_thousand_times_is_one(router: Rig):
    async with router.worker() as worker:
        reply = await router.http.post(
            "/api/v2/generate/text/async",
            json=HORDE_PROMPT | {"workers": [worker.id] * 100_000, "dry_run": True},
            headers=await apikey(router),
            timeout=20,
        )
        assert reply.status_code == 200, reply.text


async def test_asking_for_what_is_no_request_is_not_remembered(tmp_path: Path, database_url: str):
    """A window for each word that anybody asks for would be memory for the asking."""
    async with running_rig(tmp_path, database_url, rate_limits="on") as router:
        before = len(router.core.limiter._windows)
        for number in range(20):
            path = f"/api/v2/generate/text/status/{number}{'x' * 1000}"
            assert (await router.http.get(path)).status_code == 404
        assert len(router.core.limiter._windows) == before


def nested(levels: int) -> str:
    return "[" * levels + "]" * levels


@pytest.mark.parametrize("levels", [251, 300, 990])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate/prompt", '{"prompt": "x", "username": "a", "a": %s}'),
        ("/api/v2/generate/text/async", '{"prompt": "x", "a": %s}'),
        ("/remotejobs/v2/jobs", '{"tag": "m", "commandLine": "{\\"input\\":\\"x\\"}", "a": %s}'),
        ("/jobs", '{"kind": "chat", "model": "m", "messages": [{"role": "user", "content": %s}]}'),
        ("/v1/chat/completions", '{"model": "m", "messages": [{"role": "user", "a": %s}]}'),
        ("/herder", '{"Action": "Info", "a": %s}'),
    ],
    ids=lambda value: value if value.startswith("/") else "",
)
async def test_a_body_that_is_nested_too_deeply_is_bad_input(
    router: Rig, path: str, body: str, levels: int
):
    """What is made of it, a frame for a worker for instance, could not be written as JSON."""
    reply = await router.http.post(path, content=body % nested(levels))
    assert reply.status_code == 400 and "nested" in reply.text, reply.text


async def test_a_long_body_that_is_flat_is_none_of_these(router: Rig):
    content = [{"type": "text", "text": "x"}] * 500
    body = {"kind": "chat", "model": MODEL, "messages": [{"role": "user", "content": content}]}
    async with router.worker():
        assert (await router.http.post("/jobs", json=body)).status_code == 402


async def test_a_worker_s_delta_that_is_nested_too_deeply_reaches_no_reader(router: Rig):
    payer = await router.bearer()
    body = {"kind": "chat", "model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
    deep: Any = 1
    for _ in range(200):
        deep = [deep]
    async with router.worker() as worker:
        (made,) = (await router.http.post("/jobs", json=body, headers=payer)).json()["jobs"]
        job = await worker.job()
        frame = {"type": "chunk", "job_id": job["job_id"], "attempt": 1, "seq": 0, "text": "a"}
        await worker.send(frame | {"delta": {"tool_calls": [{"index": 0, "x": deep}]}})
        with pytest.raises(ConnectionClosed):
            await worker.receive()
    stream = router.core.jobs.hub.get(made["id"])
    assert stream is None or not stream.all_deltas()


async def test_models_that_nobody_serves_are_forgotten_one_day(router: Rig):
    """Names cost nothing: each pop may bring fifty new ones."""
    core = router.core
    async with router.worker():
        for start in range(0, MOST_KNOWN + 100, 100):
            core.models.learn([ServedModel(id=f"m{start + n}") for n in range(100)])
        assert len(core.models.known) <= MOST_KNOWN
        assert (ModelKind.TEXT, MODEL) in core.models.known
        listed = {facts.id: facts.workers for facts in core.models.facts()}
        assert listed[MODEL] == 1 and listed[f"m{MOST_KNOWN + 99}"] == 0 and "m0" not in listed


async def test_new_names_of_workers_have_a_limit_for_each_address(
    tmp_path: Path, database_url: str
):
    """Each is kept for good, with a record of its own."""
    async with running_rig(tmp_path, database_url, rate_limits="on") as router:
        statuses: list[int] = []
        for number in range(NEW_PER_MINUTE + 2):
            bridge = KoboldCpp(router, "k" * 22, name=f"rig {number}")
            reply = await router.http.post(
                "/api/v2/generate/text/pop", json=bridge._pop, headers=bridge._headers
            )
            statuses.append(reply.status_code)
        assert statuses.count(200) == NEW_PER_MINUTE and statuses[-1] == 429
        # One that is known comes as often as before.
        assert (await KoboldCpp(router, "k" * 22, name="rig 0").pop())["id"] is None


async def test_passwords_that_are_new_have_a_limit_for_each_address(
    tmp_path: Path, database_url: str
):
    """Each takes a core for a while, whether it is right or wrong."""
    async with running_rig(tmp_path, database_url, rate_limits="on") as router:
        worked = 0
        last = 200

        async def stretched(self: Passwords, name: str, password: str, *, before_work: Any):
            nonlocal worked
            before_work()
            worked += 1
            return b"o" * 32

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Passwords, "owner", stretched)
            for number in range(KEY_FAILURES_PER_MINUTE + 5):
                bridge = ClusterBridge(router, name="rig", password=f"password {number}")
                last = (await router.http.post("/generate/pop", json=bridge._pop)).status_code
        assert worked == KEY_FAILURES_PER_MINUTE and last == 429


@pytest.mark.parametrize(
    ("path", "keys"),
    [
        ("/api/v2/generate/text/async", {"message", "rc"}),
        ("/generate/prompt", {"message", "code"}),
        ("/remotejobs/v2/jobs", {"success", "error", "code"}),
        ("/herder", {"Action", "X-Reason", "error"}),
        ("/api/v0/chat/completion", {"code", "message"}),
        ("/v1/chat/completions", {"error", "code", "message"}),
    ],
)
async def test_what_no_door_reads_is_refused_in_its_dialect(router: Rig, path: str, keys: set[str]):
    """A body that is too large, a method that is none."""
    large = await router.http.post(path, content=b"x" * (router.core.settings.max_body_bytes + 1))
    other = await router.http.put(path)
    assert (large.status_code, other.status_code) == (413, 405)
    for reply in (large, other):
        assert keys <= set(reply.json()), reply.text
    if "error" in keys and path.startswith("/v1"):
        assert large.json()["error"]["type"] == "invalid_request_error"


async def test_a_registration_that_is_too_long_is_refused(router: Rig):
    """Sockets take large frames, for pictures; of a registration every word would be kept."""
    async with connect(router.url.replace("http", "ws") + "/worker", max_size=None) as socket:
        cards = [{"name": "x" * 100}] * 20_000
        await socket.send(json.dumps({"worker_key": "k" * 32, "nv_gpus": cards}))
        answer = json.loads(await asyncio.wait_for(socket.recv(), PATIENCE_S))
    assert (answer["type"], answer["code"]) == ("refused", "bad_registration")


@pytest.mark.parametrize("character", ["\u4e00", "\x01", "x"], ids=["wide", "control", "plain"])
async def test_a_filter_that_no_index_holds_is_refused_before_anything_is_paid(
    router: Rig, character: str
):
    """Its words are a part of the lane's name. The invoice of such a job was paid and never credited:
    queueing it failed in the transaction of the credit."""
    capabilities = [f"{n:02}" + character * 98 for n in range(20)]
    body = {"kind": "completion", "model": MODEL, "prompt": "hello", "max_tokens": 5}
    body["gpu_filter"] = {"capabilities": capabilities}
    async with router.worker():
        reply = await router.http.post("/jobs", json=body, headers={"X-Max-Wait-S": "60"})
        assert reply.status_code == 400 and reply.json()["error"]["param"] == "gpu_filter"


async def test_the_longest_filter_and_name_are_bought_like_any_other(router: Rig):
    # Of words that nothing makes shorter: an index is compressed where it can be.
    words = [
        "".join(random.Random(n).choices("abcdefghijklmnop0123456789", k=95)) for n in range(8)
    ]
    name = "".join(map(chr, random.Random(9).choices(range(0x20000, 0x2A000), k=200)))
    body = {"kind": "completion", "model": name, "prompt": "hello", "max_tokens": 5}
    body["gpu_filter"] = {"capabilities": words, "user_id": "u" * 100}
    async with router.worker(models=[{"id": name, "kind": "text", "context_length": 2048}]):
        due = await router.http.post("/jobs", json=body, headers={"X-Max-Wait-S": "60"})
        assert due.status_code == 402, due.text
        await router.pay(due.json()["invoice"])
        async with asyncio.timeout(PATIENCE_S):
            while not await router.query("select 1 from jobs where state = 'queued'"):
                await asyncio.sleep(0.02)
    (queued,) = await router.query("select octet_length(lane) as bytes from queue")
    assert queued["bytes"] > 1800


@pytest.mark.parametrize(
    "fault", [asyncpg.ProgramLimitExceededError("too long"), KeyError("x")], ids=["sql", "ours"]
)
async def test_a_payment_that_can_start_nothing_is_its_payer_s_and_holds_up_nobody(
    router: Rig, monkeypatch: pytest.MonkeyPatch, fault: Exception
):
    body = {"kind": "completion", "model": MODEL, "prompt": "hello", "max_tokens": 5}
    start = router.core.quotes.on_credit
    async with router.worker():
        due = [(await router.http.post("/jobs", json=body)).json() for _ in range(2)]
        bad = due[0]["quote"]["quote_id"]

        async def on_credit(connection: Any, credit: Any) -> list[str]:
            jobs = await start(connection, credit)
            if credit.reference == bad:
                raise fault
            return jobs

        async def at_once(*_: Any) -> None:
            raise fault

        monkeypatch.setattr(router.core.quotes, "on_credit", on_credit)
        monkeypatch.setattr(PaidQuotes, "start", at_once)
        for one in due:
            await router.pay(one["invoice"])
        async with asyncio.timeout(PATIENCE_S):
            while len(await router.query("select 1 from invoices where state = 'paid'")) < 2:
                await asyncio.sleep(0.02)
    states = await router.query("select quote_id, state from jobs")
    assert {row["quote_id"]: row["state"] for row in states}[bad] == "awaiting_payment"
    books = await router.books()
    assert books.in_order
    (account,) = await router.query("select account_id from jobs where quote_id = $1", bad)
    (balance,) = await router.query(
        "select balance_msat from ledger_balances where account = $1",
        ledger.client(account["account_id"]),
    )
    assert balance["balance_msat"] > 0


@pytest.mark.parametrize("path", ["/quotes", "/jobs"])
async def test_what_is_kept_for_nobody_s_money_has_a_limit_for_each_address(
    tmp_path: Path, database_url: str, path: str
):
    """A quote's texts are kept for ten minutes, paid or not; a picture has megabytes."""
    picture = "data:image/png;base64," + "A" * (4 << 20)
    content = [{"type": "image_url", "image_url": {"url": picture}}]
    body = {"kind": "chat", "model": MODEL, "messages": [{"role": "user", "content": content}]}
    async with running_rig(tmp_path, database_url, rate_limits="on") as router, router.worker():
        window = router.core.limiter._windows
        for _ in range(UNPAID_UNITS_PER_MINUTE - 20):
            window.hit(("unpaid texts", "127.0.0.1"), UNPAID_UNITS_PER_MINUTE)
        first = await router.http.post(path, json=body)
        assert first.status_code in (201, 402)
        second = await router.http.post(path, json=body)
        assert second.status_code == 429 and "unpaid" in second.text
        small = {"kind": "chat", "model": MODEL, "messages": [{"role": "user", "content": "x"}]}
        assert (await router.http.post(path, json=small)).status_code in (201, 402)
