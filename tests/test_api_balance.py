"""The payer's account over HTTP: what it holds, top-ups and the key that they show."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.balance_tools import CHAT, balance, bearer, code, credential, let_through, paid, topup
from tests.router_rig import PATIENCE_S, Rig, running_rig

# --- top-ups --------------------------------------------------------------------------------------


async def test_a_paid_topup_shows_its_key_once(router: Rig):
    made = await topup(router, 100_000)
    assert made["simulated"] is True
    assert made["amount_msat"] == 100_000
    assert made["expires_in_s"] > 3500
    path = f"/balance/topups/{made['payment_hash']}"
    proof = await credential(router, made)
    first = (await router.http.get(path, headers=proof)).json()
    again = (await router.http.get(path, headers=proof)).json()
    assert first["key"].startswith("sk-") and len(first["key"]) == 25
    assert first["balance_msat"] == again["balance_msat"] == 100_000
    assert "key" not in again and "shown before" in again["message"]
    shown = await balance(router, bearer(first["key"]))
    assert shown == {
        "balance_msat": 100_000,
        "held_msat": 0,
        "network": "regtest",
        "simulated": True,
    }
    assert (await balance(router, proof))["balance_msat"] == 100_000


async def test_of_parallel_readers_of_a_paid_topup_one_gets_the_key(router: Rig):
    made = await topup(router)
    proof = await credential(router, made)
    path = f"/balance/topups/{made['payment_hash']}"
    replies = await asyncio.gather(*(router.http.get(path, headers=proof) for _ in range(8)))
    assert {reply.status_code for reply in replies} == {200}
    assert sum("key" in reply.json() for reply in replies) == 1
    assert len(await router.query("select 1 from account_keys")) == 1


async def test_the_claim_token_shows_the_key_as_the_credential_does(router: Rig):
    made = await topup(router)
    claim = {"X-Claim-Token": made["claim_token"]}
    path = f"/balance/topups/{made['payment_hash']}"
    waiting = await router.http.get(path, headers=claim)
    assert code(waiting) == (402, "payment_required")
    assert waiting.json()["state"] == "open"
    assert waiting.json()["expires_in_s"] > 3500
    await router.pay(made["invoice"])
    assert (await router.http.get(path, headers=claim)).json()["key"].startswith("sk-")


async def test_a_topup_paid_late_is_credited_and_shows_its_key(router: Rig):
    made = await topup(router)
    # Its time is over for us before it is for the node, so that the payment comes too late.
    await router.query("update invoices set expires_at = now() - interval '1 minute'")
    proof = await credential(router, made)
    shown = await router.http.get(f"/balance/topups/{made['payment_hash']}", headers=proof)
    assert shown.json()["state"] == "late"
    assert shown.json()["key"].startswith("sk-")
    assert shown.json()["balance_msat"] == 100_000


async def test_strangers_see_nothing_of_a_topup(router: Rig):
    made = await topup(router)
    path = f"/balance/topups/{made['payment_hash']}"
    other, other_proof, other_key = await paid(router)
    assert code(await router.http.get(path)) == (401, "unauthorized")
    assert code(await router.http.get(path, headers=other_proof)) == (404, "not_found")
    assert code(await router.http.get(path, headers=other_key)) == (404, "not_found")
    forged = {"Authorization": f"L402 {made['l402_token']}:{'00' * 32}"}
    assert code(await router.http.get(path, headers=forged)) == (401, "unauthorized")
    wrong_claim = {"X-Claim-Token": "x" * 32}
    assert code(await router.http.get(path, headers=wrong_claim)) == (401, "unauthorized")
    # A claim token of one unpaid top-up says nothing about another.
    third = await topup(router)
    unpaid = {"X-Claim-Token": third["claim_token"]}
    assert code(await router.http.get(path, headers=unpaid)) == (404, "not_found")
    nowhere = await router.http.get(f"/balance/topups/{'ab' * 32}", headers=other_proof)
    assert code(nowhere) == (404, "not_found")
    # Nor does a quote's invoice pass for a top-up.
    async with router.worker():
        proof, challenge = await router.buy("/v1/chat/completions", CHAT)
        quote_hash = challenge.json()["payment_hash"]
        as_topup = await router.http.get(f"/balance/topups/{quote_hash}", headers=proof)
        assert code(as_topup) == (404, "not_found")
    assert other["payment_hash"] != made["payment_hash"]


async def test_a_key_in_the_header_is_topped_up_and_no_other_key_is_made(router: Rig):
    _, _, key = await paid(router, 100_000)
    more = await topup(router, 50_000, key)
    waiting = await router.http.get(f"/balance/topups/{more['payment_hash']}", headers=key)
    assert code(waiting) == (402, "payment_required")
    proof = await credential(router, more)
    shown = await router.http.get(f"/balance/topups/{more['payment_hash']}", headers=proof)
    assert shown.status_code == 200
    assert "key" not in shown.json()
    assert shown.json()["balance_msat"] == 150_000
    assert "account of the key" in shown.json()["message"]
    by_key = await router.http.get(f"/balance/topups/{more['payment_hash']}", headers=key)
    assert by_key.json()["balance_msat"] == 150_000 and "key" not in by_key.json()
    assert len(await router.query("select 1 from account_keys")) == 1


async def test_paying_into_somebodys_account_gives_no_right_to_it(router: Rig):
    """Or else a key with a limit buys itself the whole account for one satoshi."""
    _, owner, _ = await paid(router, 1_000_000)
    made = await router.http.post("/balance/keys", json={"limit_msat": 5_000}, headers=owner)
    limited = bearer(made.json()["key"])
    more = await topup(router, 1_000, limited)
    proof = await credential(router, more)
    for claim in (proof, {"X-Claim-Token": more["claim_token"]}):
        assert code(await router.http.get("/balance", headers=claim)) == (401, "unauthorized")
        keys = await router.http.post("/balance/keys", json={}, headers=claim)
        assert code(keys) == (401, "unauthorized")
        out = {"address": f"thief@{router.lnurl_host}"}
        away = await router.http.post("/balance/withdrawals", json=out, headers=claim)
        assert code(away) == (401, "unauthorized")
        again = await router.http.post("/balance/topups", json={"amount_msat": 1000}, headers=claim)
        assert code(again) == (403, "forbidden")
        rotated = await router.http.post(
            f"/balance/topups/{more['payment_hash']}/rotate", headers=claim
        )
        assert code(rotated) == (401, "unauthorized")
        async with router.worker():
            bought = await router.http.post("/v1/chat/completions", json=CHAT, headers=claim)
            assert bought.status_code in (401, 402), bought.text
    assert (await balance(router, owner))["balance_msat"] == 1_001_000


async def test_raising_somebodys_job_gives_no_right_to_his_account(router: Rig):
    """A job's token lets anybody raise its offer; the payment's credential is not the payer's."""
    _, owner, key = await paid(router, 100_000)
    async with router.worker() as worker:
        jobs = []
        for _ in range(2):
            reply = await router.http.post("/jobs", json={"kind": "chat", **CHAT}, headers=key)
            assert reply.status_code == 202, reply.text
            jobs.append(reply.json()["jobs"][0])
        running = await worker.job()
        waiting = next(job for job in jobs if job["id"] != running["job_id"])
        path = f"/jobs/{waiting['id']}/bump"
        token = {"Authorization": f"Bearer {waiting['token']}"}
        due = await router.http.post(path, json={"offer_msat": 900_000}, headers=token)
        assert code(due) == (402, "payment_required")
        proof = await credential(router, due.json())
        for claim in (proof, {"X-Claim-Token": due.json()["claim_token"]}):
            assert code(await router.http.get("/balance", headers=claim)) == (401, "unauthorized")
            away = await router.http.post(
                "/balance/withdrawals",
                json={"address": f"thief@{router.lnurl_host}"},
                headers=claim,
            )
            assert code(away) == (401, "unauthorized")
            made = await router.http.post("/balance/keys", json={}, headers=claim)
            assert code(made) == (401, "unauthorized")
            more = await router.http.post(
                "/balance/topups", json={"amount_msat": 1000}, headers=claim
            )
            assert code(more) == (401, "unauthorized")
            bought = await router.http.post("/v1/chat/completions", json=CHAT, headers=claim)
            assert bought.status_code in (401, 402)
        # What it does open is the job that it was paid for.
        shown = await router.http.get(f"/jobs/{waiting['id']}", headers=proof)
        assert shown.json()["held_msat"] == 900_000
        await worker.finish(running, tokens=1)
        await worker.serve()
        async with asyncio.timeout(PATIENCE_S):
            while (await balance(router, owner))["held_msat"]:
                await asyncio.sleep(0.02)
    assert (await router.books()).in_order


async def test_amounts_are_rounded_up_to_whole_satoshis(router: Rig):
    assert (await topup(router, 1_001))["amount_msat"] == 2_000
    assert (await topup(router, 1_000))["amount_msat"] == 1_000


NO_AMOUNTS = [0, -1, 999, True, None, "1000", 1000.0, 1.5, [1000], 10**15, 10**30, 100_000_000_001]


async def test_amounts_that_are_none_make_no_invoice(router: Rig):
    for amount in NO_AMOUNTS:
        reply = await router.http.post("/balance/topups", json={"amount_msat": amount})
        assert code(reply) == (400, "bad_request"), amount
        assert reply.json()["error"]["param"] == "amount_msat"
    assert await router.query("select 1 from invoices") == []
    assert await router.query("select 1 from accounts") == []


NO_BODIES = [b'{"amount_msat": NaN}', b'{"amount_msat": Infinity}', b"[1000]", b"1000", b"{", b""]


async def test_bodies_that_are_no_json_object_make_no_invoice(router: Rig):
    for body in NO_BODIES:
        reply = await router.http.post("/balance/topups", content=body)
        assert code(reply) == (400, "bad_request"), body
    misspelt = await router.http.post("/balance/topups", json={"amount_msat": 1000, "amout": 1})
    assert code(misspelt) == (400, "bad_request")
    assert await router.query("select 1 from invoices") == []


async def test_a_dead_or_malformed_key_is_not_taken_for_no_key(router: Rig):
    """Otherwise the money would land in a new account, and its payer would look for it in vain."""
    for header in ("Bearer sk-" + "x" * 22, "Bearer nonsense", "L402 x:y"):
        reply = await router.http.post(
            "/balance/topups", json={"amount_msat": 1000}, headers={"Authorization": header}
        )
        assert code(reply) == (401, "unauthorized")
    assert await router.query("select 1 from invoices") == []


async def test_invoices_are_rationed(tmp_path: Path, database_url: str):
    async with running_rig(
        tmp_path, database_url, rate_limits="on", invoices_per_minute=2
    ) as router:
        made = await let_through(
            lambda: router.http.post("/balance/topups", json={"amount_msat": 1000}), most=2
        )
        assert 2 <= made <= 4
        assert len(await router.query("select 1 from invoices")) == made


async def test_a_rotated_key_is_dead_at_once_and_the_new_one_has_the_balance(router: Rig):
    made, proof, key = await paid(router)
    assert (await balance(router, key))["balance_msat"] == 100_000
    path = f"/balance/topups/{made['payment_hash']}/rotate"
    assert code(await router.http.post(path)) == (401, "unauthorized")
    assert code(await router.http.post(path, headers=key)) == (403, "forbidden")
    _, stranger, _ = await paid(router)
    assert code(await router.http.post(path, headers=stranger)) == (403, "forbidden")
    rotated = await router.http.post(path, headers=proof)
    assert rotated.status_code == 200
    new = bearer(rotated.json()["key"])
    assert new != key
    assert (await balance(router, new))["balance_msat"] == 100_000
    assert code(await router.http.get("/balance", headers=key)) == (401, "unauthorized")
    # The top-up does not show the old key, nor the new one a second time.
    shown = await router.http.get(f"/balance/topups/{made['payment_hash']}", headers=proof)
    assert "key" not in shown.json()


# --- balance --------------------------------------------------------------------------------------


async def test_what_a_live_job_holds_is_shown_as_held(router: Rig):
    _, _, key = await paid(router, 100_000)
    async with router.worker() as worker:
        job = asyncio.create_task(router.http.post("/v1/chat/completions", json=CHAT, headers=key))
        taken = await worker.job()
        running = await balance(router, key)
        await worker.finish(taken, tokens=0)
        reply = await job
    held_msat = int(reply.headers["x-satherd-fee-msat"]) + int(
        reply.headers["x-satherd-refund-msat"]
    )
    assert held_msat > 1000
    assert running["held_msat"] == held_msat
    assert running["balance_msat"] == 100_000 - held_msat
    ended = await balance(router, key)
    assert ended["held_msat"] == 0
    assert ended["balance_msat"] == 100_000 - int(reply.headers["x-satherd-fee-msat"])


async def test_no_credential_no_balance(router: Rig):
    assert code(await router.http.get("/balance")) == (401, "unauthorized")
    wrong = {"Authorization": "Bearer sk-" + "A" * 22}
    assert code(await router.http.get("/balance", headers=wrong)) == (401, "unauthorized")


async def test_guessing_keys_is_throttled(tmp_path: Path, database_url: str):
    async with running_rig(tmp_path, database_url, rate_limits="on") as router:
        wrong = {"Authorization": "Bearer sk-" + "A" * 22}
        first = await router.http.get("/balance", headers=wrong)
        assert code(first) == (401, "unauthorized")
        more = await let_through(lambda: router.http.get("/balance", headers=wrong), most=60)
        assert 59 <= more <= 65
