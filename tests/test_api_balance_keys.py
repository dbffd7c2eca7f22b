"""Further keys of an account: who may make, see and revoke which."""

from __future__ import annotations

import asyncio
from typing import Any

from billing.l402 import mint
from billing.l402_caveats import write_caveats
from tests.balance_tools import balance, bearer, code, paid
from tests.router_rig import Rig


async def test_keys_are_made_listed_and_revoked(router: Rig):
    _, owner, primary = await paid(router)
    made = await router.http.post(
        "/balance/keys", json={"label": "a bot", "limit_msat": 5_000}, headers=primary
    )
    assert made.status_code == 201
    assert made.json()["limit_msat"] == 5_000 and made.json()["withdraw"] is False
    limited = bearer(made.json()["key"])
    shown = await balance(router, limited)
    assert (shown["limit_msat"], shown["spent_msat"]) == (5_000, 0)
    listed = (await router.http.get("/balance/keys", headers=owner)).json()["keys"]
    assert [(key["label"], key["primary"], key["limit_msat"]) for key in listed] == [
        (None, True, None),
        ("a bot", False, 5_000),
    ]
    assert "sk-" not in str(listed)
    path = f"/balance/keys/{made.json()['id']}"
    assert code(await router.http.delete(path)) == (401, "unauthorized")
    _, _, stranger = await paid(router)
    assert code(await router.http.delete(path, headers=stranger)) == (404, "not_found")
    assert (await balance(router, limited))["balance_msat"] == 100_000
    assert (await router.http.delete(path, headers=owner)).status_code == 200
    assert code(await router.http.get("/balance", headers=limited)) == (401, "unauthorized")
    assert code(await router.http.delete(path, headers=owner)) == (404, "not_found")


async def test_a_limited_key_sees_and_makes_no_keys_and_revokes_only_itself(router: Rig):
    _, owner, primary = await paid(router)
    made = (await router.http.post("/balance/keys", json={"limit_msat": 9}, headers=owner)).json()
    limited = bearer(made["key"])
    assert code(await router.http.get("/balance/keys", headers=limited)) == (403, "forbidden")
    more = await router.http.post("/balance/keys", json={"limit_msat": 9}, headers=limited)
    assert code(more) == (403, "forbidden")
    keys = (await router.http.get("/balance/keys", headers=owner)).json()["keys"]
    others = await router.http.delete(f"/balance/keys/{keys[0]['id']}", headers=limited)
    assert code(others) == (403, "forbidden")
    assert (await balance(router, primary))["balance_msat"] == 100_000
    itself = await router.http.delete(f"/balance/keys/{made['id']}", headers=limited)
    assert itself.status_code == 200


async def test_only_who_may_withdraw_makes_and_revokes_a_key_that_may(router: Rig):
    _, owner, primary = await paid(router)
    refused = await router.http.post("/balance/keys", json={"withdraw": True}, headers=primary)
    assert code(refused) == (403, "forbidden")
    made = await router.http.post("/balance/keys", json={"withdraw": True}, headers=owner)
    assert made.status_code == 201 and made.json()["withdraw"] is True
    able = bearer(made.json()["key"])
    second = await router.http.post("/balance/keys", json={"withdraw": True}, headers=able)
    assert second.status_code == 201
    kept = await router.http.delete(f"/balance/keys/{made.json()['id']}", headers=primary)
    assert code(kept) == (403, "forbidden")
    both = await router.http.post(
        "/balance/keys", json={"withdraw": True, "limit_msat": 5}, headers=owner
    )
    assert code(both) == (400, "bad_request")


async def narrowed(router: Rig, made: dict[str, Any], proof: dict[str, str], caveat: str) -> Any:
    """The credential of a top-up with a restriction more, as its holder may hand it on."""
    rows = await router.query(
        "select token_id from invoices where payment_hash = $1", made["payment_hash"]
    )
    token = mint(
        router.core.secrets,
        payment_hash=made["payment_hash"],
        token_id=rows[0]["token_id"].hex(),
        caveats=(*write_caveats(), caveat),
    )
    return {"Authorization": f"L402 {token}:{proof['Authorization'].rpartition(':')[2]}"}


async def test_a_narrowed_credential_gets_nothing_wider_by_way_of_a_key(router: Rig):
    made, proof, _ = await paid(router)
    keys_only = await narrowed(router, made, proof, "llm_capabilities=keys")
    able = await router.http.post("/balance/keys", json={"withdraw": True}, headers=keys_only)
    assert code(able) == (401, "unauthorized")
    assert able.json()["error"]["reason"] == "insufficient"
    plain = await router.http.post("/balance/keys", json={}, headers=keys_only)
    assert plain.status_code == 201
    looking = await narrowed(router, made, proof, "llm_capabilities=balance,topup,chat")
    assert (await balance(router, looking))["balance_msat"] == 100_000
    for path in ("/balance/keys", f"/balance/topups/{made['payment_hash']}/rotate"):
        assert code(await router.http.post(path, headers=looking)) == (401, "unauthorized")
    limited = await narrowed(router, made, proof, "llm_budget_msat=5000")
    assert code(await router.http.get("/balance", headers=limited)) == (401, "unauthorized")


NO_KEYS: list[dict[str, Any]] = [
    {"limit_msat": 0},
    {"limit_msat": -5},
    {"limit_msat": 1.5},
    {"limit_msat": True},
    {"limit_msat": "5"},
    {"limit_msat": 10**19},
    {"label": 5},
    {"label": "x" * 101},
    {"label": "nul\0"},
    {"withdraw": "yes"},
    {"withdraw": 1},
    {"limit": 5},
]


async def test_a_key_that_is_asked_for_wrongly_is_not_made(router: Rig):
    _, owner, _ = await paid(router)
    for body in NO_KEYS:
        reply = await router.http.post("/balance/keys", json=body, headers=owner)
        assert code(reply) == (400, "bad_request"), body
    assert len(await router.query("select 1 from account_keys")) == 1


async def test_an_account_has_at_most_a_hundred_keys(router: Rig):
    _, owner, _ = await paid(router)
    account = (await router.query("select account_id from account_keys"))[0]["account_id"]
    await router.query(
        "insert into account_keys (key_hash, id, account_id, can_withdraw, is_primary)"
        " select ('key ' || n)::bytea, 'k' || n, $1, false, false from generate_series(1, 98) n",
        account,
    )
    replies = await asyncio.gather(
        *(router.http.post("/balance/keys", json={}, headers=owner) for _ in range(5))
    )
    assert sorted(reply.status_code for reply in replies) == [201, 409, 409, 409, 409]
    assert {r.json()["error"]["code"] for r in replies if r.status_code == 409} == {"too_many_keys"}
