"""Money out: to an invoice, to an address, once for each order, and only for who may."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from billing import ledger, withdrawals
from tests.balance_tools import balance, bearer, code, paid, topup
from tests.router_rig import PATIENCE_S, Rig


async def their_invoice(router: Rig, amount_msat: int) -> str:
    await router.network.ensure_wallet("alice")
    made = await router.network.create_invoice(
        "alice", amount_msat=amount_msat, description="cash out", expiry_s=600
    )
    return made.bolt11


async def ended(router: Rig, withdrawal_id: str, headers: dict[str, str]) -> dict[str, Any]:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            shown = await router.http.get(f"/balance/withdrawals/{withdrawal_id}", headers=headers)
            assert shown.status_code == 200, shown.text
            if shown.json()["state"] in ("paid", "failed"):
                return shown.json()
            await asyncio.sleep(0.02)


async def order(router: Rig, headers: dict[str, str], **body: Any) -> httpx.Response:
    return await router.http.post("/balance/withdrawals", json=body, headers=headers)


async def test_an_invoice_is_withdrawn_to_and_the_true_fee_is_charged(router: Rig):
    _, proof, _ = await paid(router, 200_000)
    invoice = await their_invoice(router, 50_000)
    ordered = await order(router, proof, invoice=invoice)
    assert ordered.status_code == 202, ordered.text
    assert ordered.json()["simulated"] is True
    assert ordered.json()["fee_cap_msat"] == 5_000
    done = await ended(router, ordered.json()["id"], proof)
    assert done["state"] == "paid"
    assert len(done["preimage"]) == 64
    left = await balance(router, proof)
    assert left["balance_msat"] == 150_000 - done["fee_msat"]
    again = await order(router, proof, invoice=invoice)
    assert again.json()["id"] == ordered.json()["id"]
    assert (await balance(router, proof))["balance_msat"] == left["balance_msat"]
    books = await router.books()
    assert books.in_order, books


async def test_parallel_orders_of_one_invoice_are_one_withdrawal(router: Rig):
    _, proof, _ = await paid(router, 200_000)
    invoice = await their_invoice(router, 50_000)
    replies = await asyncio.gather(*(order(router, proof, invoice=invoice) for _ in range(6)))
    assert {reply.status_code for reply in replies} == {202}
    assert len({reply.json()["id"] for reply in replies}) == 1
    await ended(router, replies[0].json()["id"], proof)
    assert len(await router.network.paid_out("router")) == 1


async def test_everything_is_withdrawn_to_an_address_once_for_each_idempotency_key(router: Rig):
    _, proof, _ = await paid(router, 200_000)
    headers = proof | {"Idempotency-Key": "cash-out-1"}
    address = f"alice@{router.lnurl_host}"
    replies = await asyncio.gather(*(order(router, headers, address=address) for _ in range(4)))
    assert {reply.status_code for reply in replies} == {202}, [r.text for r in replies]
    assert len({reply.json()["id"] for reply in replies}) == 1
    long = proof | {"Idempotency-Key": "x" * 256}
    assert code(await order(router, long, address=address)) == (400, "bad_request")
    done = await ended(router, replies[0].json()["id"], proof)
    assert done["state"] == "paid"
    assert done["amount_msat"] == 195_000
    other = await order(router, headers, address=address, amount_msat=10_000)
    assert code(other) == (409, "idempotency_conflict")
    rest = await balance(router, proof)
    assert rest["balance_msat"] == 200_000 - 195_000 - done["fee_msat"]
    assert (await router.books()).in_order


async def test_the_same_order_that_comes_while_the_first_is_taken_is_the_same_withdrawal(
    router: Rig, monkeypatch: pytest.MonkeyPatch
):
    _, proof, _ = await paid(router, 200_000)
    headers = proof | {"Idempotency-Key": "cash-out-2"}
    address = f"alice@{router.lnurl_host}"
    first: list[httpx.Response] = []
    find_payout = withdrawals.find_payout

    async def meanwhile(connection: Any, payout_id: str) -> Any:
        monkeypatch.setattr(withdrawals, "find_payout", find_payout)
        found = await find_payout(connection, payout_id)
        first.append(await order(router, headers, address=address))
        return found

    monkeypatch.setattr(withdrawals, "find_payout", meanwhile)
    second = await order(router, headers, address=address)
    assert (first[0].status_code, second.status_code) == (202, 202), second.text
    assert first[0].json()["id"] == second.json()["id"]
    await ended(router, second.json()["id"], proof)
    assert (await router.books()).in_order


async def test_only_who_may_withdraw_withdraws(router: Rig):
    _, proof, key = await paid(router, 200_000)
    invoice = await their_invoice(router, 20_000)
    assert code(await order(router, {}, invoice=invoice)) == (401, "unauthorized")
    assert code(await order(router, key, invoice=invoice)) == (403, "forbidden")
    made = await router.http.post("/balance/keys", json={"withdraw": True}, headers=proof)
    ordered = await order(router, bearer(made.json()["key"]), invoice=invoice)
    assert ordered.status_code == 202
    path = f"/balance/withdrawals/{ordered.json()['id']}"
    assert code(await router.http.get(path)) == (401, "unauthorized")
    assert code(await router.http.get(path, headers=key)) == (403, "forbidden")
    _, stranger, _ = await paid(router)
    assert code(await router.http.get(path, headers=stranger)) == (404, "not_found")
    theirs = await order(router, stranger, invoice=invoice)
    assert code(theirs) == (400, "bad_invoice")
    await ended(router, ordered.json()["id"], proof)


NO_ORDERS: list[dict[str, Any]] = [
    {},
    {"invoice": ""},
    {"invoice": 5},
    {"invoice": "x" * 10_001},
    {"address": ["a@b.c"]},
    {"address": "alice@pay.example", "amount_msat": -1},
    {"address": "alice@pay.example", "amount_msat": 0},
    {"address": "alice@pay.example", "amount_msat": 1.5},
    {"address": "alice@pay.example", "amount_msat": 10**30},
    {"address": "alice@pay.example", "amount_msat": "5000"},
    {"address": "alice@pay.example", "invoice": "lnbcrt1"},
    {"invoice": "lnbcrt1", "amount_msat": 1000},
    {"adress": "alice@pay.example"},
]


async def test_orders_that_are_none_hold_nothing(router: Rig):
    _, proof, _ = await paid(router)
    for body in NO_ORDERS:
        reply = await router.http.post("/balance/withdrawals", json=body, headers=proof)
        assert code(reply) == (400, "bad_request"), body
    assert (await balance(router, proof))["balance_msat"] == 100_000


async def test_what_cannot_be_paid_holds_nothing(router: Rig):
    _, proof, _ = await paid(router, 100_000)
    assert code(await order(router, proof, invoice="lnbcrt1nonsense")) == (400, "bad_invoice")
    mine = (await topup(router, 20_000))["invoice"]
    assert code(await order(router, proof, invoice=mine)) == (400, "bad_invoice")
    small = await order(router, proof, invoice=await their_invoice(router, 5_000))
    assert code(small) == (400, "bad_amount")
    much = await order(router, proof, invoice=await their_invoice(router, 100_000))
    assert code(much) == (402, "insufficient_balance")
    nobody = await order(router, proof, address="not an address")
    assert code(nobody) == (400, "bad_lightning_address")
    odd = await order(router, proof, address=f"alice@{router.lnurl_host}", amount_msat=20_001)
    assert code(odd) == (400, "bad_amount")
    assert (await balance(router, proof))["balance_msat"] == 100_000
    sending = await router.query(
        "select 1 from ledger_balances where account = $1 and balance_msat > 0", ledger.SENDING
    )
    assert sending == []
