"""Projects of the DecentralGPT door: registered, paid, changed, found, kept over a restart."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from router.api.decentralgpt import comes_directly
from router.projects import BACK_AT_ONCE
from tests.door_tools import CHAT, balance_msat, post_job, set_rates, until_state, workers_left
from tests.ports import free_port
from tests.router_rig import MODEL, PATIENCE_S, Rig, running_rig
from tests.test_http_workers import Model, model_server, said
from tests.test_openai_images import PIXEL

PROJECT = "/api/v0/ai/project"
ONE_MODEL = "/api/v0/ai/model"
KEY = {"Authorization": f"Bearer {'k' * 64}"}
OTHER_KEY = {"Authorization": f"Bearer {'o' * 64}"}
THROUGH_A_PROXY = {"X-Forwarded-For": "127.0.0.1"}
OK = {"code": 0, "message": "ok"}


def project(model: Model, **changes: Any) -> dict[str, Any]:
    api = f"{model.url}/v1/chat/completions"
    given = {"project": "DecentralGPT", "models": [{"model": MODEL, "api": api, "type": 0}]}
    return given | changes


async def register(
    router: Rig, body: dict[str, Any], headers: dict[str, str] | None = None
) -> httpx.Response:
    return await router.http.post(f"{PROJECT}/register", json=body, headers=headers)


async def registered(router: Rig, body: dict[str, Any], headers: Any = None) -> None:
    reply = await register(router, body, headers)
    assert reply.status_code == 200, reply.text
    assert reply.json() == OK


async def unregister(
    router: Rig, headers: Any = None, name: str = "DecentralGPT"
) -> httpx.Response:
    return await router.http.post(f"{PROJECT}/unregister", json={"project": name}, headers=headers)


async def test_a_project_registers_serves_and_is_paid_at_its_address(router: Rig):
    """DG-6, DG-7, DG-8: the story of a project, from its registration to its last job."""
    await set_rates(router)
    payer = await router.bearer()
    async with model_server() as model:
        await registered(router, project(model, ln_url=f"project@{router.lnurl_host}"))
        await registered(router, project(model, ln_url=f"project@{router.lnurl_host}"))  # twice
        (worker,) = router.core.fleet.all()
        assert worker.payable
        asked = router.http.post("/v1/chat/completions", json=CHAT, headers=payer)
        model.answer(said("Hello.", usage={"prompt_tokens": 3, "completion_tokens": 2}))
        reply, (path, _) = await asyncio.gather(asked, model.next())
        assert path == "/v1/chat/completions" and reply.json()["code"] == 0
        assert reply.json()["choices"][0]["message"]["content"] == "Hello."
        fee_msat = int(reply.headers["x-satherd-fee-msat"])
        assert await balance_msat(router, payer) == 1_000_000 - fee_msat
        gone = await unregister(router)
        assert gone.json() == OK
        await workers_left(router, 0)
        again = await unregister(router)
        assert again.status_code == 500 and again.json()["code"] == 1007
    books = await router.books()
    assert books.in_order
    assert books.lines["liabilities:worker"] == -(fee_msat - fee_msat * 50_000 // 1_000_000)


async def test_each_type_is_called_at_its_own_path(router: Rig):
    """DG-6: type 0 text, 1 text to image, 2 image edit; 0 when it is missing."""
    payer = await router.bearer()
    async with model_server() as model:
        models = [
            {"model": "text", "api": f"{model.url}/v1/chat/completions"},
            {"model": "paint", "api": f"{model.url}/v1/images/generations", "type": 1},
            {"model": "edit", "api": f"{model.url}/v1/images/edits", "type": 2},
        ]
        await registered(router, project(model, models=models))
        picture = {"kind": "image", "model": "paint", "prompt": "a sea otter"}
        edit = {"kind": "image_edit", "model": "edit", "prompt": "a beret"}
        edit["image"] = f"data:image/png;base64,{PIXEL}"
        for wanted, path, answer in (
            ({"model": "text"}, "/v1/chat/completions", said("Hello.")),
            (picture, "/v1/images/generations", {"data": [{"b64_json": PIXEL}]}),
            (edit, "/v1/images/edits", {"data": [{"b64_json": PIXEL}]}),
        ):
            model.answer({"code": 0, "message": "success", "created": 1, **answer})
            links = await post_job(router, payer, **wanted)
            await until_state(router, links["id"], "succeeded")
            assert (await model.next())[0] == path


async def test_registering_again_changes_a_project(router: Rig):
    """DG-6: it also updates."""
    async with model_server() as model:
        await registered(router, project(model))
        api = f"{model.url}/v1"
        await registered(router, project(model, models=[{"model": "other", "api": api}]))
        (worker,) = router.core.fleet.all()
        assert [served.id for served in worker.models] == ["other"]


async def test_copies_of_a_model_are_told_apart_by_their_container(router: Rig):
    """DG-13: `cid`; each copy is a worker of its own, and the last to go takes the project along."""
    async with model_server() as model:
        one = {"project": "p", "model": MODEL, "api": f"{model.url}/v1"}
        for cid in ("aaa", "bbb"):
            reply = await router.http.post(f"{ONE_MODEL}/register", json=one | {"cid": cid})
            assert reply.json() == OK
        assert len(router.core.fleet.all()) == 2
        peers = await router.http.get(f"/api/v0/ai/projects/peers?project=p&model={MODEL}")
        assert len(peers.json()["data"]) == 2
        missing = one | {"cid": "ccc"}
        unknown = await router.http.post(f"{ONE_MODEL}/unregister", json=missing)
        assert unknown.json()["code"] == 1007
        for cid, left in (("aaa", 1), ("bbb", 0)):
            await router.http.post(f"{ONE_MODEL}/unregister", json=one | {"cid": cid})
            await workers_left(router, left)
    assert await router.query("select 1 from projects") == []


async def test_discovery_lists_projects_models_and_peers(router: Rig):
    """DG-13, by query as now and by body as before."""
    async with model_server() as model:
        await registered(router, project(model))
        listed = "/api/v0/ai/projects"
        names = (await router.http.get(f"{listed}/list?number=100")).json()
        assert names == OK | {"data": ["DecentralGPT"]}
        assert (await router.http.post(f"{listed}/list")).json() == names
        body = {"project": "DecentralGPT"}
        models = (await router.http.post(f"{listed}/models", json=body)).json()
        assert models == OK | {"data": [MODEL]}
        where = {"project": "DecentralGPT", "model": MODEL, "number": "20"}
        (peer,) = (await router.http.get(f"{listed}/peers", params=where)).json()["data"]
        (worker,) = router.core.fleet.all()
        assert peer == {"node_id": worker.id, "connectivity": 1, "latency": 0, "idle": 1}
        none = await router.http.get(f"{listed}/models?project=nobody")
        bad = await router.http.get(f"{listed}/list?number=-1")
    assert none.json()["code"] == 1007 and bad.json()["code"] == 1001


@pytest.mark.parametrize(
    ("peer", "headers", "direct"),
    [
        ("127.0.0.1", {}, True),
        ("127.8.9.1", {}, True),
        ("::1", {}, True),
        ("::ffff:127.0.0.1", {}, True),
        ("10.0.0.7", {}, False),
        ("::ffff:10.0.0.7", {}, False),
        ("", {}, False),
        ("127.0.0.1", {"x-forwarded-for": "127.0.0.1"}, False),
        ("127.0.0.1", {"forwarded": "for=127.0.0.1"}, False),
        ("127.0.0.1", {"x-real-ip": "127.0.0.1"}, False),
        ("127.0.0.1", {"via": "1.1 nginx"}, False),
        ("127.0.0.1", {"origin": "https://evil.example"}, False),
    ],
)
def test_only_a_program_on_this_machine_comes_directly(peer: str, headers: Any, direct: bool):
    assert comes_directly(peer, headers) is direct


async def test_through_a_proxy_a_worker_key_is_needed(tmp_path: Path, database_url: str):
    """Also where the proxy is trusted: what it says of the client's address opens nothing."""
    async with (
        running_rig(tmp_path, database_url, trusted_proxies="127.0.0.0/8") as router,
        model_server() as model,
    ):
        refused = await register(router, project(model), THROUGH_A_PROXY)
        assert (refused.status_code, refused.json()["code"]) == (403, 1010)
        assert router.core.fleet.all() == []
        # And with one, only servers elsewhere: what listens here is not theirs to sell.
        one = {"project": "DecentralGPT", "model": MODEL, "api": f"{model.url}/v1"}
        for reply in (
            await register(router, project(model), THROUGH_A_PROXY | KEY),
            await router.http.post(
                f"{ONE_MODEL}/register", json=one, headers=THROUGH_A_PROXY | KEY
            ),
        ):
            assert (reply.status_code, reply.json()["code"]) == (403, 1010)
        assert router.core.fleet.all() == []
        await registered(router, project(model), KEY)
        assert len(router.core.fleet.all()) == 1


async def test_what_is_no_worker_key_is_refused(router: Rig):
    async with model_server() as model:
        for authorization in ("Bearer short", "Basic " + "k" * 64, "Bearer"):
            refused = await register(router, project(model), {"Authorization": authorization})
            assert (refused.status_code, refused.json()["code"]) == (401, 1010), authorization


@pytest.mark.parametrize(("owner", "stranger"), [(None, KEY), (KEY, None), (KEY, OTHER_KEY)])
async def test_only_its_owner_changes_a_project(router: Rig, owner: Any, stranger: Any):
    async with model_server() as model:
        await registered(router, project(model), owner)
        api = f"{model.url}/v1"
        theirs = project(model, models=[{"model": "theirs", "api": api}])
        one = {"project": "DecentralGPT", "model": "theirs", "api": api}
        replies = [
            await register(router, theirs, stranger),
            await unregister(router, stranger),
            await router.http.post(f"{ONE_MODEL}/register", json=one, headers=stranger),
            await router.http.post(f"{ONE_MODEL}/unregister", json=one, headers=stranger),
        ]
        assert [(r.status_code, r.json()["code"]) for r in replies] == [(403, 1010)] * 4
        (worker,) = router.core.fleet.all()
        assert [served.id for served in worker.models] == [MODEL]


async def test_a_worker_key_sees_what_its_project_earned(router: Rig):
    payer = await router.bearer()
    async with model_server() as model:
        address = f"project@{router.lnurl_host}"
        await registered(router, project(model, ln_url=address), KEY)
        model.answer(said("Hello."))
        links = await post_job(router, payer)
        await until_state(router, links["id"], "succeeded")
        me = (await router.http.get("/workers/me", headers=KEY)).json()
    assert me["earned_msat"] > 0 and me["ln_url"] == address


APIS: list[tuple[Any, int]] = [
    ("https://models.example/v1/chat/completions", 1010),
    ("http://10.0.0.7:1042/v1/chat/completions", 1010),
    ("http://127.0.0.1:1042/admin/fees", 1001),
    ("http://127.0.0.1:1042/v1/../admin", 1001),
    ("http://user:password@127.0.0.1:1042/v1", 1001),
    ("file:///etc/passwd", 1001),
    ("ROUTER/v1/chat/completions", 1010),
    ("LIGHTNING/v1/chat/completions", 1010),
    ("", 1001),
    (7, 1001),
]


async def test_only_models_on_this_machine_are_called_and_nothing_else(router: Rig):
    """DG-8; never a port of the router or its Lightning node, never a path outside /v1."""
    lightning = router.core.settings.simulated_url or ""
    for given, number in APIS:
        api = given
        if isinstance(api, str):
            api = api.replace("ROUTER", router.url).replace("LIGHTNING", lightning)
        refused = await register(router, {"project": "p", "models": [{"model": "m", "api": api}]})
        assert refused.json()["code"] == number and refused.status_code in (403, 500), given
    assert router.core.fleet.all() == [] and not await router.query("select 1 from projects")


BAD: list[dict[str, Any]] = [
    {"project": ""},
    {"project": None},
    {"project": "a" * 300},
    {"project": "line\nbreak"},
    {"models": []},
    {"models": "Llama"},
    {"models": [{"model": "m"}]},
    {"models": [{"api": "http://127.0.0.1:1042/v1"}]},
    {"models": [{"model": "m", "api": "http://127.0.0.1:1042/v1", "type": 3}]},
    {"models": [{"model": "m", "api": "http://127.0.0.1:1042/v1", "type": -1}]},
    {"models": [{"model": "m", "api": "http://127.0.0.1:1042/v1"}] * 2},
    {"ln_url": "no address"},
    {"slots": 0},
]


async def test_a_bad_registration_is_a_parameter_error(router: Rig):
    """DG-11: 1001, with a message that says what is wrong."""
    good = {
        "project": "p",
        "models": [{"model": "m", "api": "http://127.0.0.1:1042/v1/chat/completions"}],
    }
    for changes in BAD:
        refused = await register(router, good | changes)
        assert (refused.status_code, refused.json()["code"]) == (500, 1001), changes
        assert refused.json()["message"]
    assert not await router.query("select 1 from projects")


async def test_a_project_is_there_again_after_a_restart(tmp_path: Path, database_url: str):
    async with model_server() as model:
        async with running_rig(tmp_path, database_url) as router:
            await registered(router, project(model, slots=3))
            (before,) = router.core.fleet.all()
        async with running_rig(tmp_path, database_url) as router:
            await workers_left(router, 1)
            (after,) = router.core.fleet.all()
            assert (after.id, after.slots) == (before.id, 3)
            payer = await router.bearer()
            model.answer(said("Still here."))
            links = await post_job(router, payer)
            await until_state(router, links["id"], "succeeded")


async def test_nobody_is_called_where_the_operator_wants_none(tmp_path: Path, database_url: str):
    async with (
        running_rig(tmp_path, database_url, http_workers="off") as router,
        model_server() as model,
    ):
        refused = await register(router, project(model))
    assert refused.json()["code"] == 1010


@pytest.mark.parametrize(
    ("path", "needed"),
    [("/api/v0/chat/completion", {"node_id": "16Uiu2"}), ("/api/v0/chat/completion/proxy", {})],
)
async def test_the_older_chat_paths_answer_for_clients_of_both_ages(
    router: Rig, path: str, needed: dict[str, Any]
):
    """DG-12; whatever wallet, signature and hash are sent, paying is what counts (DG-14)."""
    key = await router.bearer()
    body = CHAT | needed | {"project": "DecentralGPT", "wallet": "w", "signature": "s", "hash": "h"}
    async with router.worker() as worker:
        asked = router.http.post(path, json=body, headers=key)
        reply, _ = await asyncio.gather(asked, worker.serve("Hello there."))
        due = await router.http.post(path, json=body)
        short = await router.http.post(path, json=body | {"project": ""}, headers=key)
    answer = reply.json()
    assert (reply.status_code, answer["code"], answer["message"]) == (200, 0, "success")
    assert answer["choices"][0]["message"]["content"] == "Hello there."
    assert answer["data"] == {n: answer[n] for n in ("created", "choices", "usage")}
    assert (due.status_code, due.json()["code"]) == (402, 1010)
    assert "invoice" in due.json() and "www-authenticate" in due.headers
    assert (short.status_code, short.json()["code"]) == (500, 1001)


async def test_a_time_out_is_504_with_its_own_code(router: Rig):
    """DG-11: 1005."""
    async with router.worker():
        pass
    key = await router.bearer()
    body = CHAT | {"project": "p", "max_wait_s": 1}
    reply = await router.http.post("/api/v0/chat/completion/proxy", json=body, headers=key)
    assert (reply.status_code, reply.json()["code"]) == (504, 1005)
    assert await balance_msat(router, key) == 1_000_000


async def test_a_model_that_is_away_loses_its_job_to_another_worker(router: Rig):
    payer = await router.bearer()
    api = f"http://127.0.0.1:{free_port()}/v1"
    await registered(router, {"project": "p", "models": [{"model": MODEL, "api": api}]})
    links = await post_job(router, payer)
    async with router.worker() as worker:
        await asyncio.wait_for(worker.serve(), PATIENCE_S)
        await until_state(router, links["id"], "succeeded")


class SlowAddress:
    """Looks addresses up as the router does, but `slow@…` only after `answered`."""

    def __init__(self, router: Rig) -> None:
        self.asked, self.answered = asyncio.Event(), asyncio.Event()
        self._resolve = router.core.addresses.resolve

    async def __call__(self, payee: Any, **more: Any) -> Any:
        if payee.text.startswith("slow@"):
            self.asked.set()
            await self.answered.wait()
        return await self._resolve(payee, **more)


async def test_a_slow_server_of_an_address_holds_up_its_own_project_only(
    router: Rig, monkeypatch: pytest.MonkeyPatch
):
    """Looking an address up takes as long as a stranger's name server likes."""
    slowly = SlowAddress(router)
    monkeypatch.setattr(router.core.addresses, "resolve", slowly)
    async with model_server() as model:
        slow = asyncio.create_task(
            register(router, project(model, project="slow", ln_url=f"slow@{router.lnurl_host}"))
        )
        await asyncio.wait_for(slowly.asked.wait(), PATIENCE_S)
        again = asyncio.create_task(register(router, project(model, project="slow")))
        await registered(router, project(model, project="quick"))
        assert (await unregister(router, name="quick")).json() == OK
        assert not slow.done() and not again.done()
        slowly.answered.set()
        for waits in (slow, again):
            assert (await asyncio.wait_for(waits, PATIENCE_S)).json() == OK
        (row,) = await router.query("select name, ln_url from projects")
        assert tuple(row) == ("slow", None)


async def test_projects_that_wait_for_one_of_their_owner_let_others_come_back(
    router: Rig, monkeypatch: pytest.MonkeyPatch
):
    """Few are let in again at once; one owner with a slow address and many projects is one of them."""
    slowly = SlowAddress(router)
    async with model_server() as model:
        for n in range(BACK_AT_ONCE + 2):
            address = f"slow@{router.lnurl_host}"
            await registered(router, project(model, project=f"a{n}", ln_url=address), KEY)
        address = f"quick@{router.lnurl_host}"
        await registered(router, project(model, project="b", ln_url=address), OTHER_KEY)
        for session in list(router.core.gate.sessions.values()):
            session.cut("as the test wants it")
        assert not router.core.projects.serving("b", MODEL)
        # Addresses that are known are not looked up again.
        await router.query("update payees set ln_url = null")
        monkeypatch.setattr(router.core.addresses, "resolve", slowly)
        back = asyncio.create_task(router.core.projects._bring_back())
        await asyncio.wait_for(slowly.asked.wait(), PATIENCE_S)
        async with asyncio.timeout(PATIENCE_S):
            while not router.core.projects.serving("b", MODEL):
                await asyncio.sleep(0.02)
        assert not router.core.projects.serving("a0", MODEL)
        slowly.answered.set()
        await asyncio.wait_for(back, PATIENCE_S)
        assert router.core.projects.serving("a0", MODEL)


async def test_of_two_first_projects_at_once_one_is_its_owners_worker(router: Rig):
    async with model_server() as model:
        await asyncio.gather(
            *(registered(router, project(model, project=name), KEY) for name in ("one", "two"))
        )
        rows = await router.query("select has_key_identity from projects")
        assert sorted(row["has_key_identity"] for row in rows) == [False, True]
        assert len(router.core.fleet.all()) == 2
