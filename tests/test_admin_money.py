"""Node and books, as an operator sees and mends them: `satherd admin ledger`, `satherd ledger check
--node`, `/metrics`."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from billing import ledger
from cli import ledger as ledger_command
from router.metrics import Metrics
from tests.router_rig import PATIENCE_S, Rig
from tests.test_api_admin import admin, changes, code
from tests.test_cli_admin import Admin, as_json, command, nothing_set, status_of

__all__ = ["command", "nothing_set"]


async def spend(router: Rig, user: str, amount_msat: int) -> str:
    """The router's node pays, and not for these books."""
    await router.network.ensure_wallet(user)
    made = await router.network.create_invoice(
        user, amount_msat=amount_msat, description="elsewhere", expiry_s=600
    )
    sent = await router.network.pay_invoice(
        "router", made.bolt11, max_fee_msat=10**9, timeout_s=PATIENCE_S
    )
    assert sent.state == "succeeded"
    return sent.payment_hash


async def metric(router: Rig, name: str) -> float | None:
    text = (await Metrics(router.core, "1").text()).decode()
    for line in text.splitlines():
        if line.startswith(f"satherd_{name} "):
            return float(line.split()[1])
    return None


async def test_the_operator_books_his_capital_and_from_then_on_node_and_books_agree(
    router: Rig, command: Admin
):
    before = (await admin(router, "GET", "/ledger")).json()
    assert before["booked_msat"] == 0 and before["difference_msat"] == before["node"]["held_msat"]
    status, out, err = await command(
        "ledger", "book", "deposit", "--difference", "--reason", "mine"
    )
    assert (status, err) == (0, "") and "booked" in out
    await router.key(50_000)
    shown = await as_json(command, "ledger")
    assert shown["difference_msat"] == 0
    assert shown["lines"]["equity:operator"] == -before["difference_msat"]

    # A channel's cost, told twice by a nervous operator.
    wanted = {"kind": "node_fee", "amount_msat": 7_000, "reference": "channel-1"}
    first = (await admin(router, "POST", "/ledger/book", wanted)).json()
    again = (await admin(router, "POST", "/ledger/book", wanted)).json()
    assert (first["booked"], again["booked"]) == (True, False)
    other = await admin(router, "POST", "/ledger/book", {**wanted, "amount_msat": 8_000})
    assert code(other) == (409, "conflict")
    assert (await as_json(command, "ledger"))["difference_msat"] == 7_000
    status, _, err = await command("ledger", "book", "withdrawal", "--difference")
    assert status == 1 and "no such difference" in err

    found = await as_json(command, "ledger", "reconcile")
    assert found["difference_msat"] == 7_000
    assert await metric(router, "books_difference_msat") == 7_000
    assert await metric(router, "node_held_msat") == found["held_msat"]
    assert await metric(router, "reconciled") == 1
    assert [(action, subject) for action, subject, *_ in await changes(router)][-1] == (
        "ledger.book",
        "channel-1",
    )
    assert (await router.books()).in_order


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"kind": "gift", "amount_msat": 1},
        {"kind": "deposit"},
        {"kind": "deposit", "amount_msat": 0},
        {"kind": "deposit", "amount_msat": -5},
        {"kind": "deposit", "amount_msat": 1.5},
        {"kind": "deposit", "amount_msat": 1, "account": "a"},
        {"kind": "deposit", "amount_msat": 1, "colour": "red"},
    ],
)
async def test_what_is_no_booking_books_nothing(router: Rig, body: dict[str, Any]):
    assert code(await admin(router, "POST", "/ledger/book", body)) == (400, "bad_request")
    assert await changes(router) == []


async def test_a_receipt_without_an_invoice_finds_its_owner(router: Rig):
    made = await router.network.create_invoice(
        "router", amount_msat=9_000, description="elsewhere", expiry_s=600
    )
    await router.pay(made.bolt11)
    async with asyncio.timeout(PATIENCE_S):
        while (await metric_of_liability(router, "unassigned")) != 9_000:
            await asyncio.sleep(0.02)
    key = await router.bearer(1_000)
    account = (await router.query("select id from accounts"))[0]["id"]
    wanted = {"kind": "unassigned", "amount_msat": 9_000, "account": account}
    nobody = await admin(router, "POST", "/ledger/book", {**wanted, "account": "nobody"})
    assert code(nobody) == (404, "not_found")
    more = await admin(router, "POST", "/ledger/book", {**wanted, "amount_msat": 9_001})
    assert code(more) == (409, "conflict") and more.json()["error"]["unassigned_msat"] == 9_000
    given = await admin(router, "POST", "/ledger/book", wanted)
    assert given.status_code == 200
    shown = (await router.http.get("/balance", headers=key)).json()
    assert shown["balance_msat"] == 10_000


async def metric_of_liability(router: Rig, kind: str) -> int:
    async with router.core.database.connection() as connection:
        return await ledger.balance_msat(connection, f"liabilities:{kind}")


async def test_a_payment_that_the_router_did_not_ask_for_is_shown_and_confirmed(
    router: Rig, command: Admin
):
    payment_hash = await spend(router, "baker", 30_000)
    await as_json(command, "ledger", "reconcile")
    assert await metric(router, "payouts_unknown_payments") == 1
    assert await metric(router, "payouts_unknown_msat") == 31_030
    assert await metric(router, "payouts_paused") == 1
    shown = (await admin(router, "GET", "/payouts")).json()
    assert shown["unknown_payments"] == 1 and "do not know" in shown["paused"]
    resumed = (await admin(router, "POST", "/payouts/resume")).json()
    assert resumed["paused"] is True and "do not know" in resumed["reason"]
    status, out, _ = await command("payouts", "unknown")
    assert status == 0 and payment_hash in out and "NOT CONFIRMED" in out
    status, _, err = await command("payouts", "confirm", payment_hash, "--worker", "nobody")
    assert status == 1 and "there is no such worker" in err
    status, out, err = await command("payouts", "confirm", payment_hash)
    assert (status, err) == (0, "") and "equity:operator" in out
    again = await admin(router, "POST", f"/payouts/unknown/{payment_hash}/confirm")
    assert code(again) == (404, "not_found")
    assert code(await admin(router, "POST", "/payouts/unknown/x/confirm")) == (400, "bad_request")
    assert (await admin(router, "GET", "/payouts")).json()["paused"] is None
    assert await metric(router, "payouts_unknown_payments") == 0
    assert (await changes(router))[-1][:2] == ("payment.confirm", payment_hash)


async def test_the_check_of_the_books_shows_the_nodes_side_too(
    router: Rig,
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setenv("SATHERD_SIMULATED_URL", router.core.settings.simulated_url or "")
    line = ["ledger", "check", "--node", "--database-url", database_url]
    assert await asyncio.to_thread(status_of, line) == 0
    out = capsys.readouterr().out
    held_msat = (await router.core.backend.balance()).held_msat
    assert f"so it holds {held_msat}" in " ".join(out.split())
    assert "More than is booked" in out
    monkeypatch.setenv("SATHERD_SIMULATED_URL", "http://127.0.0.1:1")
    assert await asyncio.to_thread(status_of, line) == 2
    assert "the node does not say what it holds" in capsys.readouterr().err


@pytest.mark.parametrize(
    "difference_msat, words", [(0, "holds what is booked"), (5, "More than"), (-5, "Less than")]
)
def test_every_difference_is_explained(difference_msat: int, words: str):
    assert words in ledger_command._explained(difference_msat)
