"""Node and books over real channels: what the operator books, and what the node did by itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from billing import ledger
from tests.regtest import regtest
from tests.regtest.network import LightningNetwork
from tests.regtest.router_rig import RealRig, running_real_rig
from tests.router_rig import ADMIN_TOKEN

pytestmark = regtest

# Electrum tells its balances in whole satoshis, a channel each.
ROUNDING_MSAT = 2_000


@pytest.fixture
async def rig(
    tmp_path: Path, database_url: str, lightning: LightningNetwork
) -> AsyncIterator[RealRig]:
    async with running_real_rig(tmp_path, database_url, lightning) as rig:
        yield rig


async def admin(rig: RealRig, path: str, **body: Any) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
    reply = await rig.http.post(f"/admin{path}", json=body, headers=headers)
    assert reply.status_code == 200, reply.text
    return reply.json()


async def next_second() -> None:
    """Electrum tells times in whole seconds: what it did in the second in which these books began
    counts as done before."""
    began_s = int(time.time())
    while int(time.time()) == began_s:
        await asyncio.sleep(0.05)


async def test_a_real_node_and_the_books_say_the_same_of_each_other(rig: RealRig) -> None:
    """Capital, a sale, a payment by the operator's own hand, and one to him."""
    node = rig.lightning.router
    before = await admin(rig, "/ledger/reconcile")
    assert (before["receipts"], before["unknown_payments"]) == (0, 0), "an old history is not ours"
    await admin(rig, "/ledger/book", kind="deposit", amount_msat=before["difference_msat"])
    await rig.key(2_000_000)
    sold = await admin(rig, "/ledger/reconcile")
    assert abs(sold["difference_msat"]) <= ROUNDING_MSAT
    assert (sold["receipts"], sold["unknown_payments"]) == (0, 0)

    await next_second()
    bolt11, payment_hash = await rig.lightning.worker.invoice(30_000)
    await node.pay(bolt11)
    theirs, _ = await node.invoice(40_000)
    await rig.lightning.client.pay(theirs)

    found = await admin(rig, "/ledger/reconcile")
    assert (found["receipts"], found["unknown_payments"]) == (1, 1)
    headers = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
    shown = (await rig.http.get("/admin/payouts", headers=headers)).json()
    assert shown["unknown_payments"] == 1 and shown["paused"] is not None
    confirmed = await admin(rig, f"/payouts/unknown/{payment_hash}/confirm")
    assert confirmed["booked"] is True
    assert confirmed["amount_msat"] == 30_000 == await node.sent_msat(payment_hash)
    assert confirmed["fee_msat"] == -await node.received_msat(payment_hash) - 30_000
    books = await rig.books()
    assert books.in_order
    assert books.lines[ledger.UNASSIGNED] == -40_000
    assert abs((await admin(rig, "/ledger/reconcile"))["difference_msat"]) <= ROUNDING_MSAT
