"""The whole story with a real Lightning node and real channels; no money is simulated here.

The client pays over its channel with the router's node; workers are two hops behind that, at an
LNURL-pay server that is none of ours. Each story ends with books that sum to zero and say of the
node what its own history says, to the msat.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from billing import bolt11_codec
from tests.balance_tools import CHAT, balance, paid
from tests.lightning_rig import answers, hash_of
from tests.regtest import regtest
from tests.regtest.network import HERE, LightningNetwork
from tests.regtest.router_rig import JOB_FEE_MSAT, RealRig, running_real_rig

pytestmark = regtest

WORKERS_PART_MSAT = JOB_FEE_MSAT * 95 // 100


@pytest.fixture
async def rig(
    tmp_path: Path, database_url: str, lightning: LightningNetwork
) -> AsyncIterator[RealRig]:
    names = ("worker", *(f"w{n}" for n in range(10)))
    async with running_real_rig(tmp_path, database_url, lightning, names=names) as rig:
        yield rig


async def said(rig: RealRig, body: dict[str, Any], headers: dict[str, str]) -> str:
    """The streamed answer."""
    text = ""
    async with rig.http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as reply:
        assert reply.status_code == 200, await reply.aread()
        async for line in reply.aiter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    text += choice["delta"].get("content") or ""
    return text


async def test_a_prompt_is_bought_and_the_worker_paid_over_real_channels(rig: RealRig) -> None:
    async with rig.worker() as worker:
        streamed = CHAT | {"stream": True}
        challenge = await rig.http.post("/v1/chat/completions", json=streamed)
        due = challenge.json()
        assert challenge.status_code == 402
        assert due["simulated"] is False
        invoice = bolt11_codec.decode(due["invoice"])
        assert (invoice.network, invoice.amount_msat) == ("regtest", JOB_FEE_MSAT)

        preimage = await rig.pay(due["invoice"])

        assert answers(preimage, invoice.payment_hash)
        credential = {"Authorization": f"L402 {due['l402_token']}:{preimage}"}
        serving = asyncio.create_task(worker.serve("Hello from two hops away."))
        assert await said(rig, streamed, credential) == "Hello from two hops away."
        await serving
        await rig.paid_out(1)
    [payout] = await rig.query(
        "select p.amount_msat, p.fee_msat, p.target, a.payment_hash from payouts p"
        " join payout_attempts a on a.payout_id = p.id and a.state = 'succeeded'"
    )
    assert payout["target"] == f"worker@{rig.lnurl_host}"
    assert payout["amount_msat"] == WORKERS_PART_MSAT
    # The hop in between took its part, and the router bears it.
    assert payout["fee_msat"] > 0
    received_msat = await rig.lightning.worker.received_msat(payout["payment_hash"])
    assert received_msat == WORKERS_PART_MSAT
    lines = await rig.check_books()
    assert lines["expenses:routing_fees"] == payout["fee_msat"]
    assert lines["income:router_fees"] == -(JOB_FEE_MSAT - WORKERS_PART_MSAT)


async def test_a_foreign_l402_client_buys_a_prompt_unchanged(rig: RealRig) -> None:
    """@getalby/lightning-tools, with a wallet of four lines."""
    network, client = rig.lightning, rig.lightning.client
    async with rig.worker() as worker:
        buyer = await asyncio.create_subprocess_exec(
            *(network.programs.node, str(HERE / "l402_buyer.js"), str(network.programs.modules)),
            *(f"{rig.url}/v1/chat/completions", json.dumps(CHAT)),
            *(client.url, client.rpc.user, client.rpc.password),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        serving = asyncio.create_task(worker.serve("Bought by a stranger."))
        async with asyncio.timeout(30):
            said, complaints = await buyer.communicate()
        assert buyer.returncode == 0, complaints.decode()
        await serving
    bought = json.loads(said)
    assert bought["status"] == 200, bought
    assert bought["payment"]["amountSat"] * 1000 == JOB_FEE_MSAT
    message = json.loads(bought["text"])["choices"][0]["message"]
    assert message["content"] == "Bought by a stranger."
    await rig.paid_out(1)
    await rig.check_books()


async def test_a_balance_is_bought_and_withdrawn_to_an_invoice_and_to_an_address(
    rig: RealRig,
) -> None:
    _, proof, _ = await paid(rig, 5_000_000)
    assert (await balance(rig, proof))["balance_msat"] == 5_000_000
    invoice, payment_hash = await rig.lightning.client.invoice(1_000_000)
    address = f"w1@{rig.lnurl_host}"
    for order in ({"invoice": invoice}, {"address": address, "amount_msat": 2_000_000}):
        ordered = await rig.http.post("/balance/withdrawals", json=order, headers=proof)
        assert ordered.status_code == 202, ordered.text
    await rig.paid_out(2)
    assert await rig.lightning.router.sent_msat(payment_hash) == 1_000_000
    fees = sum(row["fee_msat"] for row in await rig.query("select fee_msat from payouts"))
    # The true routing fee is charged, not the cap that was held.
    assert fees > 0
    assert (await balance(rig, proof))["balance_msat"] == 2_000_000 - fees
    await rig.check_books()


async def test_what_a_failed_job_gives_back_can_be_taken_home(rig: RealRig) -> None:
    async with rig.worker() as worker:
        credential, _ = await rig.buy("/v1/chat/completions", CHAT)
        asking = asyncio.create_task(
            rig.http.post("/v1/chat/completions", json=CHAT, headers=credential)
        )
        await worker.fail(await worker.job(), "engine_error", retryable=False)
        assert (await asking).status_code >= 500
    assert (await balance(rig, credential))["balance_msat"] == JOB_FEE_MSAT
    invoice, payment_hash = await rig.lightning.client.invoice(JOB_FEE_MSAT - 10_000)
    ordered = await rig.http.post(
        "/balance/withdrawals", json={"invoice": invoice}, headers=credential
    )
    assert ordered.status_code == 202, ordered.text
    await rig.paid_out(1)
    assert await rig.lightning.router.sent_msat(payment_hash) == JOB_FEE_MSAT - 10_000
    await rig.check_books()


async def test_a_payment_that_comes_after_the_expiry_is_credited_and_starts_nothing(
    rig: RealRig,
) -> None:
    """An expiry stops new attempts only: the HTLC was out in time, and settles long afterwards."""
    async with rig.worker():
        due = (await rig.http.post("/v1/chat/completions", json=CHAT)).json()
    payment_hash = hash_of(due["invoice"])
    await rig.lightning.router.call("hold", payment_hash=payment_hash)
    paying = asyncio.create_task(rig.pay(due["invoice"]))
    await rig.lightning.router.until_held(payment_hash)
    rig.clock.ahead = timedelta(minutes=15)
    await rig.until("select from invoices where state = 'expired'")

    await rig.lightning.router.resolve(payment_hash, settle=True)

    credential = {"Authorization": f"L402 {due['l402_token']}:{await paying}"}
    rig.clock.ahead = timedelta(minutes=30)
    await rig.until("select from invoices where state = 'late'")
    assert (await balance(rig, credential))["balance_msat"] == JOB_FEE_MSAT
    assert not await rig.query("select from ledger_transfers where code = 'hold'")
    await rig.check_books()


async def test_fifty_payouts_leave_once_each(rig: RealRig) -> None:
    """Ten workers, five rounds; a job earns a payout."""
    _, _, key = await paid(rig, 60 * JOB_FEE_MSAT)
    async with AsyncExitStack() as stack:
        workers = [await stack.enter_async_context(rig.worker(ln_url=f"w{n}")) for n in range(10)]
        for done in range(1, 6):
            asking = [
                asyncio.create_task(
                    rig.http.post(
                        "/v1/chat/completions", json=CHAT | {"user": f"{done}-{n}"}, headers=key
                    )
                )
                for n in range(10)
            ]
            # Each has one before any of them is free again.
            jobs = await asyncio.gather(*(worker.job() for worker in workers))
            for worker, job in zip(workers, jobs, strict=True):
                await worker.say(job, "Here.")
                await worker.finish(job, tokens=1)
            assert {(await one).status_code for one in asking} == {200}
            await rig.paid_out(10 * done)
    paid_out = await rig.query(
        "select p.id, p.amount_msat, p.fee_msat, a.payment_hash from payouts p"
        " join payout_attempts a on a.payout_id = p.id and a.state = 'succeeded'"
    )
    assert len(paid_out) == len({row["id"] for row in paid_out}) == 50
    sent = {one["payment_hash"]: one for one in await rig.lightning.router.history()}
    received = {one["payment_hash"]: one for one in await rig.lightning.worker.history()}
    for row in paid_out:
        assert sent[row["payment_hash"]]["amount_msat"] == -(row["amount_msat"] + row["fee_msat"])
        assert received[row["payment_hash"]]["amount_msat"] == row["amount_msat"]
    lines = await rig.check_books()
    assert lines.get("liabilities:worker", 0) == 0
