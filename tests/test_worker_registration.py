"""Who is let in to serve, who is not and why, and how workers come back and leave."""

from __future__ import annotations

import asyncio
import json
import secrets
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from tests.door_tools import post_job, until_state, workers_left
from tests.ports import free_port
from tests.router_rig import MODEL, PATIENCE_S, Rig, running_rig
from tests.worker_stand_ins import http_server

MODELS = [{"id": MODEL, "kind": "text", "context_length": 2048, "max_tokens": 1024}]


def registration(**changes: Any) -> dict[str, Any]:
    return {
        "protocol": "satherd/1",
        "worker_key": secrets.token_hex(32),
        "slots": 1,
        "models": MODELS,
    } | changes


async def first_frame(router: Rig, frame: Any) -> tuple[dict[str, Any], int | None]:
    """The router's answer to a first frame, and the code that it closes with, if it does."""
    async with connect(router.url.replace("http", "ws") + "/worker") as wire:
        await wire.send(frame if isinstance(frame, str | bytes) else json.dumps(frame))
        answered = json.loads(await asyncio.wait_for(wire.recv(), PATIENCE_S))
        if answered["type"] == "registered":
            return answered, None
        with pytest.raises(ConnectionClosed):
            await asyncio.wait_for(wire.recv(), PATIENCE_S)
        return answered, wire.close_code


async def test_a_registration_is_answered_with_who_the_worker_is_and_how_it_is_paid(router: Rig):
    key = secrets.token_hex(32)
    async with router.worker(key=key) as worker:
        first = worker.registered
        assert first["payable"] is True and first["ln_url"] == f"worker@{router.lnurl_host}"
        assert first["commission_ppm"] == 50_000
        model = (await router.http.get("/info")).json()["models"][0]
        assert (model["id"], model["workers"], model["servable"]) == (MODEL, 1, True)
    # Earnings and reputation belong to the key: the same one is the same worker.
    async with router.worker(key=key, ln_url=None) as worker:
        assert worker.id == first["worker_id"]
    async with router.worker(ln_url=None) as other:
        assert other.id != first["worker_id"]
        assert other.registered["payable"] is False and other.registered["ln_url"] is None
    stored = await router.query("select row_to_json(w)::text as row from workers w")
    assert not [row for row in stored if key in row["row"]]


async def test_a_registration_with_every_hardware_field_or_unknown_ones_is_taken(router: Rig):
    hardware = {
        "cpu_count": 8,
        "disk_space": 10**15,
        "vram": 2**50,
        "nv_gpu_count": 1,
        "nv_driver_version": "1",
        "nv_gpus": [{"name": "x", "memory": 1e9}],
        "pubkey": "",
        "anything": {"else": None},
    }
    answered, _ = await first_frame(router, registration(**hardware))
    assert answered["type"] == "registered"
    assert (await router.query("select hardware from workers"))[0]["hardware"]


BAD = {
    "no key": {"worker_key": None},
    "a short key": {"worker_key": "short"},
    "no models": {"models": []},
    "a model twice": {"models": MODELS * 2},
    "a model without a name": {"models": [{"id": ""}]},
    "a name with NUL": {"name": "a\0b"},
    "a model with NUL": {"models": [{"id": "a\0b"}]},
    "no slots": {"slots": 0},
    "too many slots": {"slots": 5000},
    "a context of nothing": {"models": [{"id": "m", "context_length": 0}]},
    "an endless context": {"models": [{"id": "m", "context_length": 10**12}]},
    "another protocol": {"protocol": "satherd/9"},
    "a kind that nobody knows": {"models": [{"id": "m", "kind": "telepathy"}]},
}


async def test_a_registration_that_makes_no_sense_is_refused_and_not_to_be_repeated(router: Rig):
    for what, changes in BAD.items():
        answered, closed = await first_frame(router, registration(**changes))
        assert answered["type"] == "refused", what
        assert answered["code"] == "bad_registration", what
        assert answered["retryable"] is False and closed == 1008, what
    for frame in ("{", "[]", "5", '"x"', b"\xff\x00"):
        answered, closed = await first_frame(router, frame)
        assert (answered["code"], closed) == ("bad_registration", 1008), frame
    assert await router.query("select 1 from workers") == []
    assert router.core.fleet.all() == []


async def test_an_address_that_cannot_be_paid_is_refused_at_once(tmp_path: Path, database_url: str):
    """E1-4, and the SSRF filter: addresses on private networks only where they are allowed."""
    async with running_rig(tmp_path, database_url, lnurl_allow_private=False) as rig:
        for ln_url in (f"worker@{rig.lnurl_host}", "me@127.0.0.1", "http://10.0.0.1/lnurl", "x"):
            answered, closed = await first_frame(rig, registration(ln_url=ln_url))
            assert answered["type"] == "refused", ln_url
            assert "ln_url" in answered["message"] and closed == 1008
        answered, _ = await first_frame(rig, registration(ln_url=""))
        assert answered["type"] == "registered" and answered["payable"] is False
        assert len(await rig.query("select 1 from workers")) == 1


async def test_an_address_that_nobody_answers_for_may_be_tried_again(router: Rig):
    nobody = registration(ln_url=f"nobody@127.0.0.1:{free_port()}")
    answered, closed = await first_frame(router, nobody)
    assert answered["type"] == "refused" and answered["retryable"] is True, answered
    assert closed == 1013


async def test_a_worker_comes_back_while_the_server_of_its_address_is_away(router: Rig):
    """Its provider may be down for hours; what it earns meanwhile is kept for it."""
    key = secrets.token_hex(32)
    payees: list[int] = []

    async def pay_terms(request: Request) -> Response:
        payees.append(1)
        terms = {"tag": "payRequest", "callback": f"{url}/pay", "metadata": '[["text/plain","x"]]'}
        return JSONResponse(terms | {"minSendable": 1000, "maxSendable": 10**9})

    async with http_server(Route("/.well-known/lnurlp/worker", pay_terms)) as url:
        ln_url = f"worker@{url.removeprefix('http://')}"
        async with router.worker(key=key, ln_url=ln_url) as worker:
            assert worker.registered["payable"] is True
    async with router.worker(key=key, ln_url=ln_url) as worker:
        assert worker.registered["payable"] is True and worker.registered["ln_url"] == ln_url
    assert payees == [1]
    other = registration(ln_url=ln_url)
    answered, _ = await first_frame(router, other)
    assert answered["type"] == "refused" and answered["retryable"] is True, answered


async def test_a_banned_worker_is_refused(router: Rig):
    key = secrets.token_hex(32)
    async with router.worker(key=key):
        pass
    async with router.core.database.transaction() as connection:
        await connection.execute("update workers set banned_at = now(), ban_reason = 'cheats'")
    answered, closed = await first_frame(router, registration(worker_key=key))
    assert (answered["code"], answered["message"]) == ("banned", "cheats")
    assert answered["retryable"] is False and closed == 1008
    async with router.worker():
        pass  # others are let in


async def test_a_new_connection_of_the_same_worker_replaces_the_old_one(router: Rig):
    """E1-2: the end of the old socket does not take the new one out of the fleet."""
    key = secrets.token_hex(32)
    payer = await router.bearer()
    async with router.worker(key=key) as old:
        links = await post_job(router, payer)
        await old.job()
        async with router.worker(key=key) as new:
            with pytest.raises(ConnectionClosed):
                await asyncio.wait_for(old.socket.recv(), PATIENCE_S)
            again = await new.job()
            assert (again["job_id"], again["attempt"]) == (links["id"], 2)
            assert [w.id for w in router.core.fleet.all()] == [new.id]
            await new.say(again, "Here.")
            await new.finish(again, tokens=1)
            await until_state(router, links["id"], "succeeded")
            (first, _) = await router.query("select * from attempts order by n")
            assert first["outcome"] == "cut" and "replaced" in first["error"]
    await workers_left(router, 0)


async def test_a_worker_that_has_left_is_out_of_the_fleet_and_its_job_waits(router: Rig):
    """E1-2, E6-2."""
    payer = await router.bearer()
    async with router.worker() as worker:
        links = await post_job(router, payer)
        await worker.job()
    row = await until_state(router, links["id"], "queued")
    assert row["worker_id"] is None and row["attempt"] == 1
    await workers_left(router, 0)
    info = (await router.http.get("/info")).json()
    assert info["queue_length"] == 1
    assert (await router.books()).lines["liabilities:escrow"] == -row["held_msat"]


async def test_a_worker_on_its_way_out_gets_no_more_jobs(router: Rig):
    payer = await router.bearer()
    async with router.worker(slots=2) as leaving:
        await post_job(router, payer)
        held = await leaving.job()
        router.core.gate.sessions[leaving.id].drain()
        assert (await leaving.receive())["type"] == "drain"
        links = await post_job(router, payer | {"X-Max-Wait-S": "60"})
        await leaving.nothing()
        async with router.worker() as staying:
            assert (await staying.job())["job_id"] == links["id"]
        await leaving.say(held, "Done.")
        await leaving.finish(held, tokens=1)
        await until_state(router, held["job_id"], "succeeded")


async def test_a_worker_is_offered_only_what_it_registered(router: Rig):
    payer = await router.bearer()
    vectors = [{"id": MODEL, "kind": "embedding", "context_length": 512}]
    small = [{"id": MODEL, "kind": "text", "context_length": 40, "max_tokens": 32}]
    async with (
        router.worker() as text,
        router.worker(models=vectors) as embedder,
        router.worker(models=small) as little,
    ):
        made = await post_job(router, payer, kind="embedding", input=["x"])
        assert (await embedder.job())["job_id"] == made["id"]
        made = await post_job(router, payer)
        assert (await text.job())["job_id"] == made["id"]
        await little.nothing()
        made = await post_job(router, payer, max_tokens=30)
        assert (await little.job())["job_id"] == made["id"]
