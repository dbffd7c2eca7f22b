"""What strangers try at the doors: sizes, names and numbers that nobody in earnest sends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from router.dispatcher import MOST_PROBES
from tests.poll_tools import HORDE_PROMPT, apikey
from tests.pull_stand_ins import KoboldCpp
from tests.router_rig import MODEL, Rig, running_rig


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
            timeout=5,
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
