"""Projects of the DecentralGPT door, changed at a router that does not keep them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from router import far_projects, http_endpoints, projects
from tests.door_tools import CHAT, workers_left
from tests.pair_rig import running_pair
from tests.reading import until
from tests.router_rig import MODEL, Rig
from tests.test_decentralgpt_projects import (
    KEY,
    ONE_MODEL,
    OTHER_KEY,
    project,
    register,
    registered,
    unregister,
)
from tests.test_http_workers import Model, model_server, said


class NearBy:
    """A name server by which every name is this machine's, though none of them says so."""

    async def __call__(self, host: str, port: int) -> list[str]:
        return ["127.0.0.1"]


@pytest.fixture(name="pair")
async def with_servers_elsewhere(
    tmp_path: Path, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Rig, Rig]]:
    monkeypatch.setattr(http_endpoints, "SystemResolver", NearBy)
    async with running_pair(
        tmp_path, database_url, lines=(None, None), http_workers="outside"
    ) as rigs:

        async def know_each_other() -> bool:
            return all(rig.core.presence.others for rig in rigs)

        await until(know_each_other)
        yield rigs


def elsewhere(model: Model, **changes: Any) -> dict[str, Any]:
    """A project whose server is on no router's machine."""
    api = model.url.replace("127.0.0.1", "models.example") + "/v1"
    return project(model, models=[{"model": MODEL, "api": api}]) | changes


def one(model: Model, name: str) -> dict[str, Any]:
    api = elsewhere(model)["models"][0]["api"]
    return {"project": "DecentralGPT", "model": name, "api": api}


def served(rig: Rig) -> list[list[str]]:
    return sorted(sorted(m.id for m in worker.models) for worker in rig.core.fleet.all())


async def kept_by(rig: Rig) -> list[str]:
    return [row["router_id"] for row in await rig.query("select router_id from projects")]


async def change(rig: Rig, what: str, body: dict[str, Any]) -> None:
    reply = await rig.http.post(f"{ONE_MODEL}/{what}", json=body, headers=KEY)
    assert (reply.status_code, reply.json()["code"]) == (200, 0), reply.text


async def test_a_project_is_changed_and_taken_out_at_any_router(pair: tuple[Rig, Rig]):
    a, b = pair
    payer = await a.bearer()
    async with model_server() as model:
        await registered(a, elsewhere(model), KEY)
        await change(b, "register", one(model, "second"))
        assert (served(a), served(b)) == ([["second", MODEL]], [])
        await registered(b, elsewhere(model, slots=3), KEY)
        assert served(a) == [[MODEL]] and not served(b)
        (worker,) = a.core.fleet.all()
        assert worker.slots == 3
        await change(b, "register", one(model, "third"))
        await change(b, "unregister", {"project": "DecentralGPT", "model": MODEL})
        assert served(a) == [["third"]]
        assert await kept_by(b) == [a.core.router_id]
        model.answer(said("From afar."))
        reply = await b.http.post(
            "/v1/chat/completions", json=CHAT | {"model": "third"}, headers=payer
        )
        assert reply.json()["choices"][0]["message"]["content"] == "From afar."
        assert (await unregister(b, KEY)).json()["code"] == 0
        await workers_left(a, 0)
        assert await kept_by(b) == []
        for rig in pair:
            assert (await unregister(rig, KEY)).json()["code"] == 1007


async def test_what_is_refused_there_is_refused_here_with_the_same_words(pair: tuple[Rig, Rig]):
    a, b = pair
    async with model_server() as model:
        await registered(a, elsewhere(model), KEY)
        for body in (
            elsewhere(model, models=[{"model": "m", "api": "http://models.example:1/admin"}]),
            elsewhere(model, ln_url="nobody@nowhere.invalid"),
        ):
            replies = [await register(rig, body, KEY) for rig in pair]
            assert replies[0].json() == replies[1].json() and replies[0].status_code >= 400
        nothing = {"project": "DecentralGPT", "model": "nothing"}
        replies = [
            await rig.http.post(f"{ONE_MODEL}/unregister", json=nothing, headers=KEY)
            for rig in pair
        ]
        assert replies[0].json() == replies[1].json() and replies[0].status_code >= 400
        # Whose it is not, for them there is no such thing elsewhere.
        assert (await unregister(b, OTHER_KEY)).json()["code"] == 1007
        assert served(a) == [[MODEL]]


async def test_one_that_is_registered_at_two_routers_at_once_is_kept_by_one(
    pair: tuple[Rig, Rig],
):
    async with model_server() as model:
        both = [register(rig, elsewhere(model), KEY) for rig in pair]
        for reply in await asyncio.gather(*both):
            assert reply.json()["code"] == 0, reply.text

        async def one_serves() -> bool:
            return sum(len(served(rig)) for rig in pair) == 1

        await until(one_serves)
        assert len(await kept_by(pair[0])) == 1


async def test_servers_on_a_router_s_machine_are_that_router_s(pair: tuple[Rig, Rig]):
    """Another router could not reach them; but they are taken out anywhere."""
    a, b = pair
    async with model_server() as model:
        for rig in pair:
            await registered(rig, project(model), KEY)
        assert served(a) == served(b) == [[MODEL]]
        assert (await unregister(b, KEY)).json()["code"] == 0
        assert (served(a), served(b)) == ([[MODEL]], [])
        assert (await unregister(b, KEY)).json()["code"] == 0
        await workers_left(a, 0)


async def test_a_router_that_does_not_answer_leaves_it_open(
    pair: tuple[Rig, Rig], monkeypatch: pytest.MonkeyPatch
):
    a, b = pair
    monkeypatch.setattr(far_projects, "ANSWER_S", 0.3)
    async with model_server() as model:
        await registered(a, elsewhere(model), KEY)
        monkeypatch.setattr(a.core.relay.bus, "on_message", lambda sender, message: None)
        reply: httpx.Response = await unregister(b, KEY)
        assert (reply.status_code, reply.json()["code"]) == (500, 1017)
        assert int(reply.headers["Retry-After"]) > 0
        assert await kept_by(b) == [a.core.router_id]


async def test_the_project_of_a_router_that_has_died_is_taken_over(
    pair: tuple[Rig, Rig], monkeypatch: pytest.MonkeyPatch
):
    """Should it live after all, it finds that it keeps the project no more."""
    a, b = pair
    monkeypatch.setattr(projects, "AGAIN_S", 0.1)
    monkeypatch.setattr(b.core.far_projects, "_is_lost", lambda name: name == a.core.router_id)
    async with model_server() as model:
        await registered(a, elsewhere(model), KEY)
        # What A would hear of it on the bus is lost as well.
        monkeypatch.setattr(a.core.relay.bus, "on_message", lambda sender, message: None)
        await change(b, "register", one(model, "second"))
        assert await kept_by(b) == [b.core.router_id]
        assert served(b) == [["second", MODEL]]
        await a.core.projects._bring_back()
        assert not served(a)
        assert (await unregister(b, KEY)).json()["code"] == 0
        await workers_left(b, 0)
