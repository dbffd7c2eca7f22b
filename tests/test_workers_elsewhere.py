"""What a worker's owner says at a router that the worker is not connected to."""

from __future__ import annotations

import base64
from typing import Any

from billing.ledger import balance_msat
from billing.ledger import worker as worker_account
from router import worker_views
from tests.pair_rig import worker_at
from tests.pull_stand_ins import KoboldCpp
from tests.reading import CHAT, until
from tests.router_rig import MODEL, Rig
from tests.test_http_workers import model_server


async def post_job(rig: Rig, key: dict[str, str]) -> dict[str, Any]:
    waits = key | {"X-Max-Wait-S": "60"}
    reply = await rig.http.post("/jobs", json=CHAT | {"kind": "chat"}, headers=waits)
    assert reply.status_code == 202, reply.text
    return reply.json()["jobs"][0]


async def test_an_address_that_is_named_at_another_router_is_paid_from_then_on(pair):
    """A first address counts at once, wherever it is said."""
    a, b = pair
    key = await a.bearer()
    async with worker_at(b, known_at=a, ln_url=None) as worker:
        (live,) = b.core.fleet.all()
        assert not live.payable
        owner = {"Authorization": f"Bearer {worker.key}"}
        said = await a.http.put(
            "/workers/me/ln_url", json={"ln_url": f"me@{a.lnurl_host}"}, headers=owner
        )
        assert said.status_code == 200, said.text

        async def payable() -> bool:
            return live.payable and live.ln_url == f"me@{a.lnurl_host}"

        await until(payable)
        link = await post_job(a, key)
        await worker.serve("Paid for.")

        async def owed() -> int:
            async with a.core.database.connection() as connection:
                return await balance_msat(connection, worker_account(worker.id))

        earned_msat = await until(owed)
        token = {"Authorization": f"Bearer {link['token']}"}
        charged = (await a.http.get(link["status_url"], headers=token)).json()["charged_msat"]
        assert 0 < earned_msat < charged
    assert (await a.books()).in_order


async def test_a_worker_rests_and_comes_back_at_a_word_to_any_router(pair):
    a, b = pair
    key = await a.bearer()
    async with worker_at(b, known_at=a) as worker:
        (live,) = b.core.fleet.all()
        owner = {"Authorization": f"Bearer {worker.key}"}

        async def rests() -> bool:
            return live.told_to_drain

        async def works() -> bool:
            return not live.told_to_drain

        assert (await a.http.post("/workers/me/drain", headers=owner)).json()["draining"]
        await until(rests)
        await post_job(b, key)
        await worker.nothing(0.2)
        assert not (await a.http.post("/workers/me/resume", headers=owner)).json()["draining"]
        await until(works)
        await worker.job()


async def test_what_an_owner_is_shown_is_the_same_at_every_router(pair, monkeypatch):
    """How a worker is now, only its router knows: that one is asked."""
    a, b = pair
    key = await a.bearer()
    async with worker_at(b, known_at=a) as worker:
        owner = {"Authorization": f"Bearer {worker.key}"}
        await post_job(a, key)
        job = await worker.job()
        await post_job(a, key)

        async def shown(rig: Rig) -> dict[str, Any]:
            return (await rig.http.get("/workers/me", headers=owner)).json()

        async def noted() -> bool:
            return (await shown(a))["online"] and (await shown(a))["skips"] != []

        await until(noted)
        here, there = await shown(b), await shown(a)
        assert here == there
        assert (there["busy"], there["skips"][0]["code"]) == (1, "busy")
        # Without an answer it is shown what the database knows.
        monkeypatch.setattr(worker_views, "ELSEWHERE_S", 0.0)
        alone = await shown(a)
        assert (alone["online"], alone["busy"]) == (True, 1)
        await worker.finish(job, tokens=1)
        await worker.serve()


async def test_a_worker_that_polls_and_is_away_is_shown_to_its_owner(pair):
    a, b = pair
    key = "a-secret-of-twenty-characters"
    await KoboldCpp(b, key, name="gone").pop()
    basic = base64.b64encode(f"gone:{key}".encode()).decode()
    (session,) = b.core.gate.sessions.values()
    session.cut("as if it had left", blame="nobody")
    for rig in (a, b):
        reply = await rig.http.get("/workers/me", headers={"Authorization": f"Basic {basic}"})
        assert reply.status_code == 200, reply.text
        assert (reply.json()["name"], reply.json()["busy"]) == ("gone", 0)


async def test_the_peers_of_a_project_are_those_of_all_routers(pair):
    """DG-13. A project may be registered at several routers, with servers of each."""
    a, b = pair
    ask = {"project": "DecentralGPT", "model": MODEL}

    async def peers(rig: Rig, **more: Any) -> list[dict[str, Any]]:
        reply = await rig.http.get("/api/v0/ai/projects/peers", params=ask | more)
        assert reply.status_code == 200, reply.text
        return sorted(reply.json()["data"], key=lambda peer: peer["node_id"])

    async with model_server() as one, model_server() as other:
        for rig, model, slots in ((a, one, 1), (b, other, 3)):
            api = {
                "model": MODEL,
                "api": f"{model.url}/v1/chat/completions",
                "type": 0,
                "cid": rig.url,
            }
            body = {"project": "DecentralGPT", "models": [api], "slots": slots}
            reply = await rig.http.post("/api/v0/ai/project/register", json=body)
            assert reply.status_code == 200, reply.text
        ids = [worker.id for rig in pair for worker in rig.core.fleet.all()]
        for rig in pair:
            shown = await peers(rig)
            assert [peer["node_id"] for peer in shown] == sorted(ids)
            assert sorted(peer["idle"] for peer in shown) == [1, 3]
            assert len(await peers(rig, number="1")) == 1
