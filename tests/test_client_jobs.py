"""Both clients over real HTTP: broken lines, refusals, prepaid keys, jobs and the balance."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import pytest

from client import L402, ApiKey, AsyncClient, Client, SatherdError, SimulatedWallet
from client.errors import (
    BadRequest,
    FeeOverLimit,
    JobNotDone,
    NotAllowed,
    NotQueued,
    PaymentNeeded,
    Unavailable,
    Unreachable,
    WrongInvoice,
)
from client.events import Ended, InvoiceDue, Paid, Quoted, Reconnecting, Text
from tests.contract_server import KEY, WORDS, invoice_for
from tests.either_client import (  # noqa: F401 - the fixtures are used by name
    ANSWER,
    PATIENCE,
    PROMPT,
    either_fixture,
    keyed_fixture,
    server_fixture,
)

# --- lost connections ---------------------------------------------------------------------------


@pytest.mark.parametrize("resend", [False, True])
async def test_a_broken_stream_is_resumed_without_loss_or_repetition(either, server, resend):
    """The line breaks within an event, three times; also if the server sends old events again."""
    server.faults.cut_events_after = [2, 3, 4] if resend else [2, 1, 2]
    server.faults.resend_seen_events = resend
    events, stream = await either.events(PROMPT, model="stand-in")
    text = "".join(event.text for event in events if isinstance(event, Text))
    assert (text, stream.completion.text) == (ANSWER, ANSWER)
    assert sum(isinstance(event, Reconnecting) for event in events) == 3
    resumed = [headers.get("last-event-id") for _, headers, _ in server.seen("GET", ".*/events")]
    assert resumed == ([None, "2", "3", "4"] if resend else [None, "2", "3", "5"])
    assert len(either.wallet.paid) == 1


async def test_a_stream_that_never_advances_is_given_up_with_the_credential_kept(either, server):
    server.faults.cut_events_after = [0] * 9
    with pytest.raises(Unreachable) as raised:
        await either.do("run", PROMPT, model="stand-in")
    [quote] = server.quotes.values()
    assert raised.value.credential == L402(quote.id, quote.preimage)
    assert len(server.seen("GET", ".*/events")) == PATIENCE.attempts


async def test_a_settlement_that_the_router_sees_late_is_waited_for(either, server):
    server.faults.unseen_payments = 2
    completion = await either.do("run", PROMPT, model="stand-in")
    assert completion.text == ANSWER
    assert len(either.wallet.paid) == 1


async def test_a_payment_that_came_too_late_says_what_was_credited(either, server):
    server.faults.events = [("late", {"credited_msat": 2000})]
    with pytest.raises(NotQueued) as raised:
        await either.do("run", PROMPT, model="stand-in")
    assert raised.value.facts["credited_msat"] == 2000
    assert isinstance(raised.value.credential, L402)


async def test_lost_requests_are_repeated_where_that_is_harmless(either, server):
    server.faults.drop["/quotes"] = 2
    completion = await either.do("run", PROMPT, model="stand-in")
    assert completion.text == ANSWER
    assert len(server.seen("POST", "/quotes")) == 3


async def test_a_router_that_does_not_answer_is_unreachable(either, server):
    server.faults.drop["/info"] = 99
    with pytest.raises(Unreachable):
        await either.do("info")
    assert len(server.seen("GET", "/info")) == PATIENCE.attempts


async def test_a_submission_that_was_answered_into_the_void_is_one_submission(keyed, server):
    """POST /jobs is repeated with the same Idempotency-Key, so that one job is queued."""
    server.faults.drop["/jobs"] = 1
    purchase = await keyed.do("submit", PROMPT, model="stand-in")
    keys = {headers["idempotency-key"] for _, headers, _ in server.seen("POST", "/jobs")}
    assert len(server.seen("POST", "/jobs")) == 2
    assert len(keys) == 1
    assert [job.id for job in purchase.jobs] == server.quotes[purchase.quote.id].job_ids


async def test_too_many_requests_are_slowed_down(server):
    waits: list[float] = []
    too_many = {"error": {"code": "too_many_requests", "message": "slow down"}}
    server.faults.answers["/quotes"] = [(429, {"Retry-After": "7"}, too_many)]
    wallet = SimulatedWallet(server.url)
    with Client(server.url, wallet=wallet, patience=PATIENCE, sleep=waits.append) as client:
        assert client.run(PROMPT, model="stand-in").text == ANSWER
    assert waits == [7.0]


# --- what the router refuses --------------------------------------------------------------------


async def test_no_worker_is_told_at_once(either, server):
    refused = {"error": {"code": "no_worker", "message": "nobody serves it", "model": "x"}}
    server.faults.answers["/quotes"] = [(503, {"Retry-After": "30"}, refused)]
    with pytest.raises(Unavailable) as raised:
        await either.do("run", PROMPT, model="x")
    assert (raised.value.code, raised.value.facts) == ("no_worker", {"model": "x"})
    assert len(server.seen("POST", "/quotes")) == 1


async def test_a_job_that_failed_is_an_error_with_the_job(either, server):
    job = {"id": "j", "state": "failed", "end_reason": "no_worker", "refunded_msat": 1010}
    server.faults.events = [("done", {"job": job})]
    with pytest.raises(JobNotDone) as raised:
        await either.do("run", PROMPT, model="stand-in")
    assert raised.value.code == "job_failed"
    assert raised.value.facts["job"]["refunded_msat"] == 1010
    assert raised.value.credential is not None


async def test_one_answer_of_two_is_an_answer(either, server):
    def event(job_id: str, state: str) -> tuple[str, dict[str, Any]]:
        return "done", {"job": {"id": job_id, "state": state, "result": {"choices": []}}}

    server.faults.events = [
        ("chunk", {"job": "b", "text": "cut"}),
        event("a", "succeeded"),
        event("b", "failed"),
    ]
    completion = await either.do("run", PROMPT, model="stand-in", n=2)
    assert [job.state for job in completion.jobs] == ["succeeded", "failed"]
    assert completion.texts == ["", "cut"]


async def test_a_done_event_that_only_names_its_job_is_completed_by_asking(either, server):
    server.faults.events = [("done", {"job": "placeholder", "state": "succeeded"})]
    quote_events = server.faults.events

    def name_job(invoice: str) -> str:
        [quote] = server.quotes.values()
        quote_events[0] = ("done", {"job": quote.job_ids[0], "state": "succeeded"})
        return invoice

    server.faults.invoice = name_job
    completion = await either.do("run", PROMPT, model="stand-in")
    assert completion.text == ANSWER
    assert completion.charged_msat == 1010


async def test_a_foreign_credential_is_refused_without_trying_again(keyed, server):
    purchase = replace(
        await keyed.do("submit", PROMPT, model="stand-in"), credential=ApiKey("sk-no")
    )
    async with AsyncClient(server.url, patience=PATIENCE) as stranger:
        with pytest.raises(NotAllowed):
            _ = [event async for event in stranger.resume(purchase)]
    assert len(server.seen("GET", ".*/events")) == 1


async def test_a_purchase_is_followed_again_from_where_another_process_stood(keyed, server):
    purchase = await keyed.do("submit", PROMPT, model="stand-in")
    async with AsyncClient(server.url, patience=PATIENCE) as other:
        stream = other.resume(purchase, last_event_id="4")
        pieces = [piece async for piece in stream.text()]
    assert pieces == WORDS[2:]
    assert stream.completion.text == ANSWER


# --- prepaid keys and jobs ----------------------------------------------------------------------


async def test_a_prepaid_key_pays_without_a_wallet(keyed, server):
    events, stream = await keyed.events(PROMPT, model="stand-in")
    assert not any(isinstance(event, InvoiceDue) for event in events)
    assert [type(event) for event in events[:2]] == [Quoted, Paid]
    assert isinstance(events[-1], Ended)
    assert stream.completion.purchase.paid_msat == 0
    assert stream.completion.credential == ApiKey(KEY)
    assert list(server.submitted.values()) == [stream.completion.purchase.quote.id]


async def test_an_empty_balance_is_told_with_its_figures(server):
    async with AsyncClient(server.url, key="sk-poor", patience=PATIENCE) as client:
        with pytest.raises(PaymentNeeded) as raised:
            await client.run(PROMPT, model="stand-in")
    assert raised.value.facts == {"balance_msat": 5, "fee_msat": 1081}


async def test_a_key_that_starts_no_stored_quote_buys_the_same_request_at_its_price(keyed, server):
    refused = {"error": {"code": "forbidden", "message": "a key with a spending limit"}}
    server.faults.answers["/jobs"] = [(403, {}, refused)]
    completion = await keyed.do("run", PROMPT, model="stand-in", max_tokens=15)
    assert completion.text == ANSWER
    [(_, first, start), (_, second, direct)] = server.seen("POST", "/jobs")
    assert list(start) == ["quote_id"]
    assert direct["messages"] == [{"role": "user", "content": PROMPT}]
    assert second["x-max-fee-msat"] == "1010"
    assert first["idempotency-key"] != second["idempotency-key"]


async def test_a_balance_too_small_for_the_length_that_was_asked_is_not_shortened(keyed, server):
    refused = {"error": {"code": "insufficient_balance", "message": "too little"}}
    server.faults.answers["/jobs"] = [(402, {}, refused)]
    with pytest.raises(PaymentNeeded):
        await keyed.do("run", PROMPT, model="stand-in", max_tokens=15)
    assert len(server.seen("POST", "/jobs")) == 1


async def test_a_submitted_job_paid_by_lightning_has_its_id(either, server):
    purchase = await either.do("submit", PROMPT, model="stand-in")
    job = await either.do("job", purchase.jobs[0].id, purchase.credential)
    assert (job.ended, job.text) == (True, ANSWER)


async def test_cancelling_needs_the_credential_of_the_payment(either, server):
    purchase = await either.do("submit", PROMPT, model="stand-in")
    with pytest.raises(PaymentNeeded):
        await either.do("cancel", purchase.jobs[0].id)
    job = await either.do("cancel", purchase.jobs[0].id, purchase.credential)
    assert job.state == "cancelled"
    assert server.cancelled == [purchase.jobs[0].id]


def test_a_stream_left_early_can_be_cancelled(server):
    with Client(server.url, key=KEY, patience=PATIENCE) as client:
        with client.stream(PROMPT, model="stand-in", n=2) as stream:
            for event in stream:
                if isinstance(event, Text):
                    break
            cancelled = stream.cancel()
        [quote] = server.quotes.values()
        assert [job.id for job in cancelled] == quote.job_ids == server.cancelled
        with pytest.raises(RuntimeError, match="not been read"):
            _ = stream.completion


async def test_a_bump_pays_the_difference_by_lightning(either, server):
    """The 402 of any paid endpoint: header, invoice, and the same request again."""
    purchase = await either.do("submit", PROMPT, model="stand-in")
    job = await either.do(
        "bump", purchase.jobs[0].id, purchase.credential, fee_multiplier=2, max_fee_msat=1000
    )
    assert job.raw["multiplier"] == "2.000"
    assert [amount for _, amount in either.wallet.paid] == [2000, 1000]
    bodies = [body for _, _, body in server.seen("POST", "/jobs/.*/bump")]
    assert bodies == [{"fee_multiplier": "2.000"}] * 2


async def test_a_bump_over_the_limit_is_not_paid(either, server):
    purchase = await either.do("submit", PROMPT, model="stand-in")
    server.faults.invoice = lambda invoice: invoice_for(2000)
    with pytest.raises(FeeOverLimit):
        await either.do(
            "bump", purchase.jobs[0].id, purchase.credential, offer_msat=2000, max_fee_msat=1000
        )
    assert len(either.wallet.paid) == 1


@pytest.mark.parametrize("options", [{}, {"offer_msat": 1, "fee_multiplier": 2}])
async def test_a_bump_names_an_offer_or_a_multiplier(either, options):
    with pytest.raises(ValueError, match="offer_msat or a fee_multiplier"):
        await either.do("bump", "job", ApiKey(KEY), **options)


async def test_a_top_up_makes_a_key(either, server):
    top_up = await either.do("top_up", 1500)
    assert (top_up.key, top_up.paid_msat, top_up.balance_msat) == (ApiKey(KEY), 2000, 2000)
    quote = server.quotes[top_up.payment_hash]
    assert top_up.payment_hash == hashlib.sha256(bytes.fromhex(quote.preimage)).hexdigest()
    assert KEY not in repr(top_up)


async def test_a_top_up_invoice_over_more_is_not_paid(either, server):
    server.faults.invoice = lambda invoice: invoice_for(3000)
    with pytest.raises(WrongInvoice):
        await either.do("top_up", 1500)
    assert either.wallet.paid == []


async def test_the_balance_is_shown(keyed):
    balance = await keyed.do("balance")
    assert (balance.balance_msat, balance.held_msat) == (5000, 1081)


async def test_bad_options_are_refused_before_anything_is_sent(either, server):
    with pytest.raises(ValueError, match="multiplier"):
        await either.do("run", PROMPT, fee_multiplier="0.5")
    with pytest.raises(ValueError, match="not both"):
        await either.do("run", PROMPT, fee_multiplier=2, offer_msat=2000)
    with pytest.raises(ValueError, match="invoice or an address"):
        await either.do("withdraw", ApiKey(KEY))
    assert server.requests == []


async def test_an_unknown_path_is_an_error_of_the_router(keyed):
    with pytest.raises(BadRequest) as raised:
        await keyed.do("keys")
    assert (raised.value.status, raised.value.code) == (404, "not_found")
    assert isinstance(raised.value, SatherdError)
