"""`/admin`: who may, prices, settings, pauses, the books, the audit."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx

from billing import ledger
from billing.fee_schedule import FIRST_RATES
from billing.ledger import Transfer
from tests.balance_tools import CHAT, code, let_through
from tests.router_rig import ADMIN_TOKEN, Rig, running_rig

ADMIN = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
ROUTES = [
    ("GET", "/admin/fees"),
    ("PUT", "/admin/fees"),
    ("GET", "/admin/fees/some/model"),
    ("PUT", "/admin/fees/some/model"),
    ("DELETE", "/admin/fees/some/model"),
    ("GET", "/admin/settings"),
    ("PUT", "/admin/settings"),
    ("POST", "/admin/pause"),
    ("POST", "/admin/resume"),
    ("GET", "/admin/workers"),
    ("POST", "/admin/workers/w/ban"),
    ("POST", "/admin/workers/w/unban"),
    ("POST", "/admin/workers/w/drain"),
    ("POST", "/admin/workers/w/resume"),
    ("GET", "/admin/jobs"),
    ("POST", "/admin/jobs/j/refund"),
    ("GET", "/admin/payouts"),
    ("POST", "/admin/payouts/p/retry"),
    ("POST", "/admin/payouts/p/decide"),
    ("POST", "/admin/payouts/pause"),
    ("POST", "/admin/payouts/resume"),
    ("GET", "/admin/payouts/unknown"),
    ("POST", "/admin/payouts/unknown/h/confirm"),
    ("GET", "/admin/ledger"),
    ("POST", "/admin/ledger/book"),
    ("POST", "/admin/ledger/reconcile"),
    ("GET", "/admin/audit"),
    ("GET", "/admin/checks"),
    ("POST", "/admin/checks"),
    ("DELETE", "/admin/checks/c"),
]


async def admin(router: Rig, method: str, path: str, body: Any = None) -> httpx.Response:
    return await router.http.request(method, f"/admin{path}", json=body, headers=ADMIN)


async def changes(router: Rig) -> list[tuple[str, str, Any, Any]]:
    """The audit, oldest first."""
    reply = await admin(router, "GET", "/audit")
    assert reply.status_code == 200, reply.text
    rows = reply.json()["changes"]
    assert all(row["who"] == "admin" and row["at"].endswith("Z") for row in rows)
    return [(r["action"], r["subject"], r["before"], r["after"]) for r in reversed(rows)]


# --- who may --------------------------------------------------------------------------------------


async def test_every_route_wants_the_admin_token(router: Rig):
    """And the list above is complete."""
    documented = (await router.http.get("/openapi.json")).json()["paths"]
    there = [
        (method.upper(), path)
        for path, methods in documented.items()
        if path.startswith("/admin")
        for method in methods
    ]
    assert len(there) == len(ROUTES), there
    key = await router.bearer()
    wrong = [
        {},
        {"Authorization": "Bearer"},
        {"Authorization": f"Bearer {ADMIN_TOKEN}x"},
        {"Authorization": f"Bearer {ADMIN_TOKEN[:-1]}"},
        {"Authorization": f"Basic {ADMIN_TOKEN}"},
        {"Authorization": ADMIN_TOKEN},
        {"Authorization": "Bearer \xe9\xff"},
        {"X-Claim-Token": ADMIN_TOKEN},
        key,
    ]
    for method, path in ROUTES:
        for headers in wrong if path == "/admin/fees" else wrong[:3]:
            raw = {name: value.encode("latin-1") for name, value in headers.items()}
            reply = await router.http.request(method, path, headers=raw)
            assert code(reply) == (401, "unauthorized"), (method, path, headers)
            assert ADMIN_TOKEN not in reply.text
    assert await router.query("select 1 from audit") == []


async def test_wrong_tokens_are_throttled(tmp_path: Path, database_url: str):
    async with running_rig(tmp_path, database_url, rate_limits="on") as router:
        wrong = {"Authorization": "Bearer wrong"}
        guesses = await let_through(lambda: router.http.get("/admin/fees", headers=wrong), most=10)
        assert 10 <= guesses <= 15
        assert (await admin(router, "GET", "/fees")).status_code == 200


async def test_without_a_token_in_the_settings_there_is_no_admin_api(
    tmp_path: Path, database_url: str
):
    async with running_rig(tmp_path, database_url, admin_token="") as router:
        for headers in ({}, {"Authorization": "Bearer"}, ADMIN):
            reply = await router.http.get("/admin/fees", headers=headers)
            assert code(reply) == (404, "not_found")
            assert "SATHERD_ADMIN_TOKEN" in reply.json()["error"]["message"]


async def test_no_origin_but_its_own_may_read_it(router: Rig):
    origin = ADMIN | {"Origin": "https://evil.example"}
    reply = await router.http.get("/admin/fees", headers=origin)
    assert "access-control-allow-origin" not in reply.headers


# --- prices ---------------------------------------------------------------------------------------


async def quote(router: Rig) -> dict[str, Any]:
    reply = await router.http.post("/quotes", json=CHAT)
    assert reply.status_code == 201, reply.text
    return reply.json()


async def test_the_next_quote_has_the_new_rates_and_an_earlier_one_keeps_its_own(router: Rig):
    async with router.worker():
        before = await quote(router)
        reply = await admin(router, "PUT", "/fees", {"prompt_fee_msat": 7000})
        assert reply.json()["fees"] == {**FIRST_RATES.as_json(), "prompt_fee_msat": 7000}
        after = await quote(router)
        assert after["base_fee_msat"] == before["base_fee_msat"] + 6000
        invoice = (await router.http.post(f"/quotes/{before['quote_id']}/invoice")).json()
        assert invoice["amount_msat"] == -(-before["offer_msat"] // 1000) * 1000
    assert await changes(router) == [
        (
            "fees.set",
            "default",
            FIRST_RATES.as_json(),
            {**FIRST_RATES.as_json(), "prompt_fee_msat": 7000},
        )
    ]
    shown = (await admin(router, "GET", "/fees")).json()
    assert shown["default"]["prompt_fee_msat"] == 7000 and shown["models"] == {}
    assert [change["who"] for change in shown["history"]] == ["admin"]


async def test_a_model_has_rates_of_its_own_until_they_are_removed(router: Rig):
    path = "/fees/some/model"
    made = await admin(router, "PUT", path, {"output_msat_per_mtok": 5})
    assert made.json()["fees"] == {**FIRST_RATES.as_json(), "output_msat_per_mtok": 5}
    # Its own rates no longer follow the default's.
    await admin(router, "PUT", "/fees", {"prompt_fee_msat": 1})
    shown = (await admin(router, "GET", path)).json()
    assert shown["own"] is True and shown["fees"]["prompt_fee_msat"] == 1000
    assert (await admin(router, "GET", "/fees")).json()["models"].keys() == {"some/model"}
    removed = await admin(router, "DELETE", path)
    assert removed.json()["fees"]["prompt_fee_msat"] == 1
    assert code(await admin(router, "DELETE", path)) == (404, "not_found")
    shown = (await admin(router, "GET", path)).json()
    assert shown["own"] is False
    assert [change["fees"] is None for change in shown["history"]] == [True, False]
    log = [(action, subject) for action, subject, *_ in await changes(router)]
    assert log == [
        ("fees.set", "some/model"),
        ("fees.set", "default"),
        ("fees.remove", "some/model"),
    ]


async def test_rates_that_are_none_change_nothing(router: Rig):
    wrong: list[Any] = [
        {},
        [],
        {"prompt_fee_msat": -1},
        {"prompt_fee_msat": 1.5},
        {"prompt_fee_msat": 1000.0},
        {"prompt_fee_msat": True},
        {"prompt_fee_msat": None},
        {"prompt_fee_msat": "1000"},
        {"prompt_fee_msat": 10**15},
        {"prompt_fee_msat": 10**30},
        {"prompt_fee": 1},
        {"prompt_fee_msat": 5, "typo_msat": 5},
    ]
    for path in ("/fees", "/fees/some/model"):
        for body in wrong:
            reply = await admin(router, "PUT", path, body)
            assert code(reply) == (400, "bad_request"), body
    for raw in (b'{"prompt_fee_msat": NaN}', b'{"prompt_fee_msat": 1e999}', b"{", b""):
        reply = await router.http.put("/admin/fees", content=raw, headers=ADMIN)
        assert code(reply) == (400, "bad_request"), raw
    assert code(await admin(router, "PUT", f"/fees/{'x' * 201}", {"prompt_fee_msat": 1})) == (
        400,
        "bad_request",
    )
    assert code(await admin(router, "PUT", "/fees/a%00b", {"prompt_fee_msat": 1}))[0] == 404
    assert await router.query("select 1 from fee_changes") == []
    assert await changes(router) == []


async def test_setting_what_is_set_leaves_no_trace(router: Rig):
    for _ in range(2):
        await admin(router, "PUT", "/fees", {"prompt_fee_msat": 5})
        await admin(router, "PUT", "/fees/m", {"prompt_fee_msat": 5})
        await admin(router, "PUT", "/settings", {"quote_ttl_s": 60})
        await admin(router, "POST", "/pause", {"message": "tea"})
    assert len(await changes(router)) == 4
    assert len(await router.query("select 1 from fee_changes")) == 2


async def test_parallel_changes_of_rates_are_a_chain(router: Rig):
    """Each one's `before` is the `after` of the one that came before it."""
    await asyncio.gather(
        *(admin(router, "PUT", "/fees", {"prompt_fee_msat": fee}) for fee in range(1, 9))
    )
    log = await changes(router)
    assert len(log) == 8
    assert [before for _, _, before, _ in log[1:]] == [after for *_, after in log[:-1]]


# --- settings and pauses --------------------------------------------------------------------------


async def test_settings_change_the_running_router_and_its_payouts(router: Rig):
    body = {"payout_threshold_msat": 5_000_000, "payout_interval_s": 60, "default_max_tokens": 7}
    reply = await admin(router, "PUT", "/settings", body)
    assert reply.status_code == 200, reply.text
    assert body.items() <= reply.json()["settings"].items()
    assert router.core.payouts.settings.threshold_msat == 5_000_000
    assert router.core.payouts.settings.interval_s == 60
    assert (await router.http.get("/info")).json()["default_max_tokens"] == 7
    shown = (await admin(router, "GET", "/settings")).json()
    assert body.items() <= shown["settings"].items()
    assert shown["bounds"]["commission_ppm"] == [0, 1_000_000]
    before = {
        "payout_threshold_msat": 1_000_000,
        "payout_interval_s": 86_400,
        "default_max_tokens": 1024,
    }
    assert await changes(router) == [("settings.change", "settings", before, body)]


async def test_when_one_setting_is_wrong_none_is_changed(router: Rig):
    before = (await admin(router, "GET", "/settings")).json()["settings"]
    wrong: list[Any] = [
        {"commission_ppm": 1, "no_such": 5},
        {"commission_ppm": 1, "quote_ttl_s": -1},
        {"commission_ppm": 1_000_001},
        {"commission_ppm": 1.5},
        {"commission_ppm": True},
        {"commission_ppm": "5"},
        {"commission_ppm": None},
        {"payout_threshold_msat": 10**30},
        {"paused": "yes"},
        [],
    ]
    for body in wrong:
        reply = await admin(router, "PUT", "/settings", body)
        assert code(reply) == (400, "bad_request"), body
    assert (await admin(router, "GET", "/settings")).json()["settings"] == before
    assert router.core.settings.commission_ppm == 50_000
    assert await changes(router) == []


async def test_while_paused_nothing_new_is_sold_and_what_is_paid_still_runs(router: Rig):
    async with router.worker() as worker:
        challenge = (await router.http.post("/v1/chat/completions", json=CHAT)).json()
        paused = await admin(router, "POST", "/pause", {"message": "moving house"})
        assert paused.json() == {"paused": "moving house"}
        refused = await router.http.post("/quotes", json=CHAT)
        assert code(refused) == (503, "paused")
        assert refused.json()["error"]["message"] == "moving house"
        assert (await router.http.get("/info")).json()["paused"] == "moving house"
        preimage = await router.pay(challenge["invoice"])
        await worker.serve()
        credential = {"Authorization": f"L402 {challenge['l402_token']}:{preimage}"}
        reply = await router.http.post("/v1/chat/completions", json=CHAT, headers=credential)
        assert reply.status_code == 200
        await admin(router, "POST", "/resume")
        assert (await router.http.post("/quotes", json=CHAT)).status_code == 201
        assert code(await admin(router, "POST", "/pause", {"message": 5})) == (400, "bad_request")
    assert await changes(router) == [
        ("pause", "router", {"paused": None}, {"paused": "moving house"}),
        ("pause", "router", {"paused": "moving house"}, {"paused": None}),
    ]


# --- the books ------------------------------------------------------------------------------------


async def test_the_trial_balance_is_zero_and_stands_beside_what_the_node_holds(router: Rig):
    first = (await admin(router, "GET", "/ledger")).json()
    async with router.worker() as worker:
        key = await router.bearer(1_000_000)
        job = asyncio.create_task(router.http.post("/v1/chat/completions", json=CHAT, headers=key))
        await worker.serve()
        fee_msat = int((await job).headers["x-satherd-fee-msat"])
    books = (await admin(router, "GET", "/ledger")).json()
    assert books["in_order"] is True and books["sum_msat"] == 0 and books["problems"] == []
    assert books["booked_msat"] == books["lines"]["assets:lightning"] == 1_000_000
    commission_msat = fee_msat * 50_000 // 1_000_000
    assert books["owed_msat"] == 1_000_000 - commission_msat
    assert books["node"]["held_msat"] == first["node"]["held_msat"] + 1_000_000
    # What the node had before anybody paid is the operator's own.
    assert books["difference_msat"] == first["difference_msat"] == first["node"]["held_msat"]
    assert books["simulated"] is True


async def test_books_that_do_not_add_up_are_shown(router: Rig):
    async with router.core.database.transaction() as connection:
        given = Transfer(ledger.LIGHTNING, ledger.client("a"), 1000, "received", "x")
        await ledger.post(connection, [given])
        await connection.execute("update ledger_balances set balance_msat = 999")
    books = (await admin(router, "GET", "/ledger")).json()
    assert books["in_order"] is False
    assert "999" in books["problems"][0]


# --- the audit ------------------------------------------------------------------------------------


async def test_the_audit_is_read_in_pages(router: Rig):
    for fee in range(1, 6):
        await admin(router, "PUT", "/fees", {"prompt_fee_msat": fee})
    seen, cursor = [], ""
    for _ in range(3):
        page = (await admin(router, "GET", f"/audit?limit=2&cursor={cursor}")).json()
        seen += [change["after"]["prompt_fee_msat"] for change in page["changes"]]
        cursor = page["cursor"]
    assert seen == [5, 4, 3, 2, 1] and cursor is None
    for query in ("limit=0", "limit=501", "limit=x", "limit=-1", "cursor=x", "cursor=%00"):
        assert code(await admin(router, "GET", f"/audit?{query}")) == (400, "bad_request"), query
