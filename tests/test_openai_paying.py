"""Paying at the OpenAI door by invoice: the challenge, the credential in all its forms, and what it
opens besides the request that it was bought for."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import httpx
import pytest
from fastapi import Request

from billing.fees import Rates
from router.api.purchase import brings_key
from tests.door_tools import CHAT, RATES, balance_msat, code, set_rates, until_state
from tests.router_rig import Rig

PATH = "/v1/chat/completions"
OTHER = CHAT | {"messages": [{"role": "user", "content": "Something else altogether."}]}


async def ask(router: Rig, body: dict[str, Any], *headers: tuple[str, str]) -> httpx.Response:
    return await router.http.post(PATH, json=body, headers=list(headers))


async def bought(router: Rig, body: dict[str, Any] = CHAT) -> tuple[str, str, dict[str, Any]]:
    """The token and the preimage of a paid request, and what its 402 said."""
    challenge = await router.http.post(PATH, json=body)
    assert challenge.status_code == 402
    due = challenge.json()
    return due["l402_token"], await router.pay(due["invoice"]), due


async def test_a_challenge_holds_quote_invoice_and_claim_token_in_this_dialect(router: Rig):
    async with router.worker():
        reply = await router.http.post(PATH, json=CHAT, headers={"X-Fee-Multiplier": "2"})
        due = reply.json()
        first, second = reply.headers.get_list("www-authenticate")
        assert second.startswith("Payment ")
        assert first == (
            f'L402 macaroon="{due["l402_token"]}", invoice="{due["invoice"]}", version="0",'
            f' token="{due["l402_token"]}"'
        )
        assert reply.headers["content-type"].startswith("application/json")  # E5-60
        assert reply.headers["cache-control"] == "no-store"
        error = due["error"]
        assert (error["code"], error["type"]) == ("payment_required", "insufficient_quota")
        assert due["quote"]["multiplier"] == "2.000" and due["simulated"] is True
        assert due["amount_msat"] >= due["quote"]["offer_msat"]
        assert 0 < due["expires_in_s"] <= 600 and due["claim_token"]


async def test_a_bad_request_makes_no_invoice(router: Rig):
    """E2-19: checked before an invoice exists."""
    async with router.worker():
        for change in ({"max_tokens": -5}, {"messages": []}, {"model": "x"}, {"n": 0}):
            assert (await router.http.post(PATH, json=CHAT | change)).status_code in (400, 404)
        assert await router.query("select 1 from invoices") == []


FORMS = {
    "as it was given": "L402 {token}:{preimage}",
    "the old name": "LSAT {token}:{preimage}",
    "in lower case": "l402 {token}:{preimage}",
    "preimage in capitals": "L402 {token}:{PREIMAGE}",
    "url-safe and without padding": "L402 {urlsafe}:{preimage}",
    "behind another scheme": "Basic dXNlcjpwYXNz, L402 {token}:{preimage}",
    "before another scheme": "L402 {token}:{preimage}, Basic dXNlcjpwYXNz",
}


async def test_every_form_of_the_credential_is_the_same_job(router: Rig):
    """E5-55: by the grammar, in any order and case."""
    async with router.worker() as worker:
        token, preimage, _ = await bought(router)
        job = await worker.serve("Once.")
        raw = base64.b64decode(token)
        forms = {
            "token": token,
            "preimage": preimage,
            "PREIMAGE": preimage.upper(),
            "urlsafe": base64.urlsafe_b64encode(raw).decode().rstrip("="),
        }
        for what, form in FORMS.items():
            reply = await ask(router, CHAT, ("Authorization", form.format(**forms)))
            assert reply.status_code == 200, (what, reply.text)
            assert reply.headers["x-satherd-job"] == job["job_id"], what
        two = [("Authorization", FORMS["as it was given"].format(**forms))]
        two.insert(0, ("Authorization", "Basic dXNlcjpwYXNz"))
        assert (await ask(router, CHAT, *two)).status_code == 200
        await worker.nothing()
    assert len(await router.query("select 1 from jobs")) == 1


async def test_credentials_that_are_forged_or_foreign_get_no_challenge_and_no_answer(router: Rig):
    """E4-46: the preimage, not the invoice, proves the payment."""
    async with router.worker() as worker:
        token, preimage, due = await bought(router)
        await worker.serve()
        other_token, other_preimage, _ = await bought(router, OTHER)
        await worker.serve()
        tampered = base64.b64encode(base64.b64decode(token)[:-1] + b"\x00").decode()
        refused = {
            "another's preimage": f"L402 {token}:{other_preimage}",
            "another's token": f"L402 {other_token}:{preimage}",
            "no preimage": f"L402 {token}:{'0' * 64}",
            "the payment hash": f"L402 {token}:{due['payment_hash']}",
            "a changed token": f"L402 {tampered}:{preimage}",
            "nonsense": "L402 nonsense",
            "nothing": "L402 :",
            "a short preimage": f"L402 {token}:{preimage[:-2]}",
        }
        for what, value in refused.items():
            reply = await ask(router, CHAT, ("Authorization", value))
            assert code(reply) == (401, "unauthorized"), (what, reply.text)
            assert "www-authenticate" not in reply.headers and "invoice" not in reply.json()
            assert preimage not in reply.text
        claims = [("X-Claim-Token", "x" * 32), ("X-Claim-Token", due["payment_hash"])]
        for claim in claims:
            assert (await ask(router, CHAT, claim)).status_code == 401
        await worker.nothing()


async def test_a_credential_is_worth_nothing_before_the_settlement(router: Rig):
    """E5-62: nodes on the route learn the preimage, and some nodes show it early."""
    async with router.worker() as worker:
        due = (await router.http.post(PATH, json=CHAT)).json()
        unpaid = await ask(router, CHAT, ("X-Claim-Token", due["claim_token"]))
        assert code(unpaid) == (401, "unauthorized")
        assert unpaid.json()["error"]["reason"] == "unpaid"
        preimage = await router.pay(due["invoice"])
        await worker.serve()
        # As it was before we saw the payment: our own record decides, and the node is asked again.
        proof = ("Authorization", f"L402 {due['l402_token']}:{preimage}")
        assert (await ask(router, CHAT, proof)).status_code == 200


async def test_a_claim_token_opens_what_the_credential_opens(router: Rig):
    async with router.worker() as worker:
        _, _, due = await bought(router)
        job = await worker.serve("For wallets that hide preimages.")
        claim = {"X-Claim-Token": due["claim_token"]}
        reply = await router.http.post(PATH, json=CHAT, headers=claim)
        assert reply.status_code == 200 and reply.headers["x-satherd-job"] == job["job_id"]
        assert (await router.http.get(f"/jobs/{job['job_id']}", headers=claim)).status_code == 200
        assert await balance_msat(router, claim) >= 0


async def test_another_request_is_paid_from_the_account_or_challenged_afresh(router: Rig):
    """Clients keep one credential per domain and send it on every path."""
    await set_rates(router, RATES)
    async with router.worker() as worker:
        token, preimage, _ = await bought(router)
        proof = {"Authorization": f"L402 {token}:{preimage}"}
        job = await worker.serve("x")
        await until_state(router, job["job_id"], "succeeded")
        left = await balance_msat(router, proof)
        assert left == 2000 - 1001
        small = OTHER | {"max_tokens": 1}
        challenge = await router.http.post(PATH, json=small, headers=proof)
        assert challenge.status_code == 402 and challenge.json()["l402_token"] != token
        again = await router.pay(challenge.json()["invoice"])
        newer = {"Authorization": f"L402 {challenge.json()['l402_token']}:{again}"}
        await worker.serve("y")
        assert (await router.http.post(PATH, json=small, headers=newer)).status_code == 200
        # Both are names for one account, and change of both lies there.
        assert await balance_msat(router, newer) == await balance_msat(router, proof)
        cheap = OTHER | {"max_tokens": 1, "user": "third"}
        await set_rates(router, Rates(100, 0, 0))
        served = asyncio.create_task(worker.serve("z"))
        replies = await asyncio.gather(
            *(router.http.post(PATH, json=cheap, headers=proof) for _ in range(5))
        )
        await served
        assert {reply.status_code for reply in replies} == {200}
        assert len({reply.headers["x-satherd-job"] for reply in replies}) == 1
        await worker.nothing()
    assert (await router.books()).in_order


@pytest.mark.parametrize("stream", [False, True])
async def test_the_answer_of_a_job_that_has_ended_comes_again_and_again(router: Rig, stream: bool):
    """An L402 client pays first and reads later: the whole answer, tool calls too."""
    body = CHAT | {"stream": stream}
    async with router.worker() as worker:
        token, preimage, _ = await bought(router, body)
        job = await worker.job()
        frame = {"type": "chunk", "job_id": job["job_id"], "attempt": 1}
        await worker.say(job, "Calling.", seq=0)
        call = {"index": 0, "id": "c", "type": "function"}
        delta = {"tool_calls": [call | {"function": {"name": "look", "arguments": "{}"}}]}
        await worker.send(frame | {"seq": 1, "delta": delta, "tokens": 1})
        await worker.finish(job, "tool_calls", tokens=2)
        await until_state(router, job["job_id"], "succeeded")
        proof = ("Authorization", f"L402 {token}:{preimage}")
        texts = [(await ask(router, body, proof)).text for _ in range(2)]
    for text in texts:
        assert "Calling." in text and '"name":"look"' in text and '"tool_calls"' in text
        assert text.rstrip().endswith("[DONE]") is stream


async def test_a_failed_job_is_refunded_and_the_credential_keeps_the_money(router: Rig):
    """E2-18, OR-2: nothing delivered, nothing charged, and the payer can get at it."""
    async with router.worker() as worker:
        token, preimage, due = await bought(router)
        await worker.fail(await worker.job(), "bad_request")
        proof = {"Authorization": f"L402 {token}:{preimage}"}
        for _ in range(2):
            reply = await router.http.post(PATH, json=CHAT, headers=proof)
            assert code(reply) == (400, "bad_request")
            assert reply.headers["x-satherd-fee-msat"] == "0"
        assert await balance_msat(router, proof) == due["amount_msat"]
        await worker.nothing()
    assert (await router.books()).in_order


@pytest.mark.parametrize(
    ("value", "is_key"),
    [
        ("Bearer sk-abc", True),
        ("sk-abc", True),
        ("L402 AGIAJEemVQUTEyNCRsk-DLHsi3vm:00", False),
    ],
)
def test_a_credential_that_holds_the_letters_of_a_key_is_none(value: str, is_key: bool):
    """In base64 they come by chance; when it has expired it deserves a 402, as any other."""
    request = Request({"type": "http", "headers": [(b"authorization", value.encode())]})
    assert brings_key(request) is is_key
