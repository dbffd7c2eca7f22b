"""Webhooks: told at least once, signed, and no way to knock at others' doors."""

from __future__ import annotations

import asyncio
import base64
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from billing.outside_http import OutsideHttp
from router import webhook_store, webhooks
from router.errors import BadRequest
from router.receipts import verified
from router.webhook_request import read_webhook
from router.webhooks import (
    AT_ONCE,
    GIVE_UP_AFTER,
    LEFT_FOR_OTHERS,
    LIMITS,
    SHARE,
    TAKEN,
    Webhooks,
    pause_s,
)
from tests.door_tools import JOB, code, post_job, token, until_state
from tests.loopback_http import Loopback, Request, http, silence
from tests.outside_tools import STRICT, Names
from tests.router_rig import PATIENCE_S, Rig

URL = "https://client.example/hook"
# What is put in during a test is due by then, however long the test takes.
A_WHILE = timedelta(minutes=1)


async def calls(server: Loopback, count: int) -> list[Request]:
    async with asyncio.timeout(PATIENCE_S):
        while len(server.requests) < count:
            await asyncio.sleep(0.02)
    return server.requests


async def hook_in(router: Rig, state: str, job_id: str) -> Any:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            rows = await router.query("select * from webhooks where job_id = $1", job_id)
            if rows and rows[0]["state"] == state and rows[0]["tries"]:
                return rows[0]
            await asyncio.sleep(0.02)


async def finished_job(router: Rig, webhook: Any, text: str = "Hello there.") -> dict[str, Any]:
    async with router.worker() as worker:
        links = await post_job(router, await router.bearer(), webhook=webhook)
        await worker.serve(text)
        await until_state(router, links["id"], "succeeded")
    return links


def check_signature(request: Request, keys: list[dict[str, Any]]) -> None:
    """As a receiver does it that knows Standard Webhooks and the router's keys."""
    headers = request.headers
    (key,) = [key for key in keys if key["kid"] == headers["webhook-key-id"]]
    public = Ed25519PublicKey.from_public_bytes(base64.urlsafe_b64decode(key["x"] + "="))
    version, _, signature = headers["webhook-signature"].partition(",")
    assert version == "v1a"
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + request.body
    public.verify(base64.b64decode(signature), signed)


async def test_the_end_of_a_job_is_told_with_its_receipt_and_without_its_answer(router: Rig):
    async with Loopback(lambda _: http(204)) as server:
        links = await finished_job(router, server.url("/hook?x=1"))
        (request,) = await calls(server, 1)
        assert (request.method, request.target) == ("POST", "/hook?x=1")
        keys = (await router.http.get("/.well-known/jwks.json")).json()["keys"]
        check_signature(request, keys)
        told = json.loads(request.body)
        assert told["type"] == "job.succeeded"
        assert told["data"]["job"]["id"] == links["id"]
        assert "result" not in told["data"]["job"]
        assert told["data"]["simulated"] is True and told["data"]["network"] == "regtest"
        receipt = await router.http.get(f"{links['status_url']}/receipt", headers=token(links))
        assert told["data"]["receipt"] == receipt.json()["receipt"]
        assert verified(told["data"]["receipt"], keys)["job"] == links["id"]
        text = request.body.decode()
        for secret in (links["token"], "Hello there.", JOB["messages"][0]["content"], "sk-"):
            assert secret not in text
        row = await hook_in(router, "delivered", links["id"])
        assert row["url"] is None and row["last_status"] == 204
        view = (await router.http.get(links["status_url"], headers=token(links))).json()
        assert view["webhook"]["state"] == "delivered" and view["webhook"]["tries"] == 1


async def test_the_answer_is_told_where_it_was_asked_for(router: Rig):
    async with Loopback(lambda _: http(200)) as server:
        await finished_job(router, {"url": server.url(), "include_result": True}, "Yes.")
        (request,) = await calls(server, 1)
        result = json.loads(request.body)["data"]["job"]["result"]
        assert result["choices"][0]["message"]["content"] == "Yes."


async def test_what_was_not_taken_is_told_again_under_the_same_id(router: Rig):
    answers = iter([http(500), http(302, Location="http://127.0.0.1/"), http(200)])
    async with Loopback(lambda _: next(answers)) as server:
        links = await finished_job(router, server.url())
        await calls(server, 1)
        await due_now(router)
        await calls(server, 2)
        await due_now(router)
        told = await calls(server, 3)
        assert len({request.headers["webhook-id"] for request in told}) == 1
        assert (await hook_in(router, "delivered", links["id"]))["tries"] == 3


async def due_now(router: Rig) -> None:
    """Once the last call is noted, let the pause before the next be over."""
    async with asyncio.timeout(PATIENCE_S):
        while not await router.query(
            "update webhooks set next_try_at = now() - interval '1 second' where last_status is not"
            " null and next_try_at < now() + interval '30 seconds' returning id"
        ):
            await asyncio.sleep(0.02)


async def test_a_router_that_dies_in_the_middle_of_a_call_leaves_it_to_another(router: Rig):
    """Never lost: the row is there with the ending, and due again after any death."""
    await router.core.webhooks.stop()
    async with Loopback(lambda _: http(200)) as server:
        links = await finished_job(router, server.url())
        now = datetime.now(UTC)
        async with router.core.database.connection() as connection:

            async def take(at: datetime) -> list[Any]:
                (payer,) = await webhook_store.payers(connection, after="", most=5)
                return await webhook_store.take_due(
                    connection, {payer: 5}, now=at, due_again_at=at + TAKEN, most=5
                )

            assert [row["job_id"] for row in await take(now)] == [links["id"]]
            # One router at a time, until the one that took it must have died.
            assert await take(now + TAKEN / 2) == []
        later = _webhooks(router, now + TAKEN * 2)
        assert await later.call_due() == 1
        await calls(server, 1)
        await hook_in(router, "delivered", links["id"])
        await later.stop()


def _webhooks(router: Rig, now: datetime, **options: Any) -> Webhooks:
    core = router.core
    rules = core.limits.outside
    # All receivers of these tests are one host.
    many = OutsideHttp(rules, limits=replace(LIMITS, per_host=2 * AT_ONCE))
    options = {"rules": rules, "http": many} | options
    return Webhooks(core.database, core.receipts, clock=lambda: now, **options)


@pytest.mark.parametrize("status, age", [(410, timedelta(0)), (503, GIVE_UP_AFTER)])
async def test_a_receiver_that_is_gone_or_silent_for_a_day_is_given_up(
    router: Rig, status: int, age: timedelta
):
    await router.core.webhooks.stop()
    async with Loopback(lambda _: http(status)) as server:
        links = await finished_job(router, server.url())
        late = _webhooks(router, datetime.now(UTC) + age)
        assert await late.call_due() == 1
        row = await hook_in(router, "given_up", links["id"])
        assert row["url"] is None and row["last_status"] == status
        await late.stop()


async def test_a_receiver_that_never_answers_holds_up_nobody_else(router: Rig):
    async with Loopback(silence) as slow, Loopback(lambda _: http(200)) as quick:
        await finished_job(router, slow.url())
        await calls(slow, 1)
        await finished_job(router, quick.url())
        await calls(quick, 1)


async def due_for(router: Rig, payer: str, url: str, count: int) -> None:
    """So many webhooks of one payer that are due, of jobs like those that are there."""
    await router.query(
        "with made as (insert into jobs select (jsonb_populate_record(null::jobs, to_jsonb(j)"
        " || jsonb_build_object('id', $1::text || '-' || n, 'account_id', $1::text))).*"
        " from (select * from jobs order by created_at limit 1) j, generate_series(1, $3::int) n"
        " returning id)"
        " insert into webhooks (id, job_id, account_id, url, include_result, state)"
        " select id, id, $1::text, $2, false, 'pending' from made",
        payer,
        url,
        count,
    )


async def test_a_payer_with_slow_receivers_delays_its_own_calls(router: Rig):
    """However much of it is due, others have their calls made, and each of its own share is used."""
    await router.core.webhooks.stop()
    async with Loopback(silence) as slow, Loopback(lambda _: http(200)) as quick:
        await finished_job(router, None)
        await due_for(router, "slow", slow.url(), 100)
        hooks = _webhooks(router, datetime.now(UTC) + A_WHILE)
        assert await hooks.call_due() == AT_ONCE - LEFT_FOR_OTHERS
        assert await hooks.call_due() == 0
        await due_for(router, "quick", quick.url(), 3)
        await due_for(router, "a third", quick.url(), 10)
        assert await hooks.call_due() == 3 + SHARE
        await calls(quick, 3 + SHARE)

        async def told() -> int:
            async with asyncio.timeout(PATIENCE_S):
                while await hooks.call_due():
                    await asyncio.sleep(0.02)
            rows = await router.query("select 1 from webhooks where state = 'delivered'")
            return len(rows)

        async with asyncio.timeout(PATIENCE_S):
            while await told() < 13:
                await asyncio.sleep(0.02)
        assert len(quick.requests) == 13
        await hooks.stop()


async def test_with_many_payers_each_has_its_turn(router: Rig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(webhooks, "PAYERS", 2)
    monkeypatch.setattr(webhooks, "LOOKS", 1)
    await router.core.webhooks.stop()
    async with Loopback(lambda _: http(200)) as server:
        await finished_job(router, None)
        for payer in ("a", "b", "c", "d", "e"):
            await due_for(router, payer, server.url(f"/{payer}"), 2)
        hooks = _webhooks(router, datetime.now(UTC) + A_WHILE)
        assert [await hooks.call_due() for _ in range(4)] == [4, 4, 2, 0]
        told = await calls(server, 10)
        assert sorted(request.target for request in told) == [f"/{p}" for p in "aabbccddee"]
        await hooks.stop()


async def test_payers_whose_receivers_are_all_dead_take_no_turn_from_others(
    router: Rig, monkeypatch: pytest.MonkeyPatch
):
    """Whoever pays by credential is a new payer each time, and a dead receiver is tried for a day."""
    monkeypatch.setattr(webhooks, "PAYERS", 2)
    await router.core.webhooks.stop()
    async with Loopback(lambda _: http(200)) as server:
        await finished_job(router, None)
        for n in range(9):
            await due_for(router, f"dead {n}", server.url("/dead"), 1)
        await router.query("update webhooks set next_try_at = now() + interval '1 hour'")
        await due_for(router, "sound", server.url("/sound"), 1)
        hooks = _webhooks(router, datetime.now(UTC) + A_WHILE)
        assert await hooks.call_due() == 1
        (told,) = await calls(server, 1)
        assert told.target == "/sound"
        await hooks.stop()


async def test_a_name_that_leads_inside_is_not_called(router: Rig):
    """lightning.md §4.5: what strangers name goes through the SSRF filter when it is called, too."""
    await router.core.webhooks.stop()
    async with Loopback(lambda _: http(200)) as server:
        links = await finished_job(router, server.url())
        await router.query("update webhooks set url = $1", URL)
        names = Names(client_example=[["127.0.0.1"]])
        now = datetime.now(UTC) + timedelta(seconds=1)
        strict = _webhooks(router, now, rules=STRICT, http=OutsideHttp(STRICT, resolve=names))
        assert await strict.call_due() == 1
        async with asyncio.timeout(PATIENCE_S):
            while not (await router.query("select last_error from webhooks"))[0]["last_error"]:
                await asyncio.sleep(0.02)
        row = await hook_in(router, "pending", links["id"])
        assert row["last_error"] == "unreachable" and names.asked == ["client.example"]
        assert server.requests == []
        await strict.stop()


REFUSED: list[Any] = [
    "ftp://client.example/",
    "https://user:secret@client.example/",
    "https://client.example/#part",
    "https://client.example:22/",
    "nonsense",
    7,
    {"url": URL, "secret": "x"},
    {"include_result": True},
    {"url": URL, "include_result": "yes"},
]


async def test_a_webhook_that_may_not_be_called_is_refused_before_anything_is_owed(router: Rig):
    async with router.worker():
        payer = await router.bearer()
        for webhook in REFUSED:
            for path in ("/jobs", "/quotes", "/v1/chat/completions"):
                body = JOB | {"webhook": webhook}
                refused = await router.http.post(path, json=body, headers=payer)
                assert code(refused) == (400, "bad_request"), f"{webhook}: {refused.text}"
                assert refused.json()["error"]["param"] == "webhook"
        assert await router.query("select 1 from quotes") == []


@pytest.mark.parametrize(
    "url", ["http://client.example/", "https://10.0.0.1/", "https://[::1]/", "https://localhost/"]
)
def test_without_the_development_switch_only_https_to_public_names_is_taken(url: str):
    assert read_webhook({"webhook": URL}, STRICT) is not None
    with pytest.raises(BadRequest):
        read_webhook({"webhook": url}, STRICT)


async def test_a_job_that_nobody_paid_for_calls_nobody(router: Rig):
    """Quotes are free: they must be no way to have others knocked at."""
    async with router.worker():
        due = await router.http.post("/jobs", json=JOB | {"webhook": URL})
        assert due.status_code == 402
        (job,) = await router.query("select id, webhook from jobs")
        assert json.loads(job["webhook"])["url"] == URL
        await router.core.jobs.cancel(job["id"])
        assert (await until_state(router, job["id"], "cancelled"))["seq"] is None
        assert await router.query("select 1 from webhooks") == []


def test_pauses_grow_to_an_hour_and_no_further():
    assert 0.8 <= pause_s(1) <= 1.2 and 6.4 <= pause_s(4) <= 9.6
    assert pause_s(40) <= 3600 * 1.2
