"""The rule of resolution as a table, cell by cell, and the moves that there are (lightning.md 5.1)."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billing.lightning import Capabilities, NodeBalance, PaymentState, PaymentStatus
from billing.payout_settings import (
    amount_with_cap_msat,
    back_off,
    batch_fee_cap_msat,
    fee_cap_msat,
    room_msat,
)
from billing.payout_states import (
    AGREE_AFTER,
    AGREE_AFTER_UNCHECKED,
    ATTEMPT_MOVES,
    EXPIRY_MARGIN,
    LIVE_ATTEMPT,
    OPEN_PAYOUT,
    PAYEE_REFUSES,
    PAYOUT_MOVES,
    Alert,
    AskedNode,
    AttemptState,
    Decision,
    Failed,
    PayoutState,
    Resubmit,
    Submitted,
    Succeeded,
    Wait,
    look_again_after,
    next_step,
    proves,
)

SENT = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
EXPIRES = SENT + timedelta(minutes=10)
PREIMAGE = "11" * 32
HASH = sha256(bytes.fromhex(PREIMAGE)).hexdigest()

BEFORE = SENT + timedelta(minutes=1)
LAST_MINUTE = EXPIRES - timedelta(seconds=59)
MARGIN = EXPIRES + EXPIRY_MARGIN - timedelta(seconds=1)
PAST = EXPIRES + EXPIRY_MARGIN

LND_LIKE = Capabilities(
    granularity_msat=1,
    description_max_bytes=639,
    description_hash=True,
    fee_limit=True,
    cancel_invoice=True,
    push="cursor",
    refuses_duplicate_hash=True,
    checks_expiry=True,
    failed_is_definitive=True,
)
CLN_LIKE = replace(LND_LIKE, failed_is_definitive=False)
PHOENIXD_LIKE = replace(LND_LIKE, checks_expiry=False)
UNKNOWN_WALLET = replace(
    LND_LIKE, refuses_duplicate_hash=False, checks_expiry=False, failed_is_definitive=False
)
ALL_NODES = [LND_LIKE, CLN_LIKE, PHOENIXD_LIKE, UNKNOWN_WALLET]
ALL_TIMES = [BEFORE, LAST_MINUTE, MARGIN, PAST, PAST + timedelta(days=3)]

ATTEMPT = Submitted(
    payment_hash=HASH,
    submitted_at=SENT,
    expires_at=EXPIRES,
    calling=False,
    was_known=False,
    was_missing=False,
    agreed_state=None,
    agreed_since=None,
    alert=None,
)


def said(state: PaymentState, code: str | None = None, preimage: str | None = None):
    return PaymentStatus(HASH, state, failure_code=code, preimage=preimage, fee_msat=7)


def asked(capabilities: Capabilities = LND_LIKE, **changes: bool) -> AskedNode:
    return replace(AskedNode(capabilities, True, True, True, True), **changes)


def agreeing(state: PaymentState, since: datetime) -> Submitted:
    return replace(ATTEMPT, agreed_state=state, agreed_since=since)


NOT_FOUND = said(PaymentState.NOT_FOUND)
FAILED = said(PaymentState.FAILED, "no_route")
IN_FLIGHT = said(PaymentState.IN_FLIGHT)
UNKNOWN = said(PaymentState.UNKNOWN)


@pytest.mark.parametrize("now", ALL_TIMES)
@pytest.mark.parametrize("node", ALL_NODES)
def test_a_proved_payment_succeeds_whenever_it_is_found(node: Capabilities, now: datetime):
    found = said(PaymentState.SUCCEEDED, preimage=PREIMAGE)
    for attempt in (ATTEMPT, replace(ATTEMPT, calling=True, was_missing=True, was_known=True)):
        for other in (asked(node), asked(node, same=False, synced=False, remembers=False)):
            assert next_step(attempt, found, other, now) == Succeeded(PREIMAGE, 7)


@pytest.mark.parametrize("preimage", [None, "22" * 32, "no hex", ""])
def test_success_without_the_preimage_is_no_success(preimage: str | None):
    found = said(PaymentState.SUCCEEDED, preimage=preimage)
    assert next_step(ATTEMPT, found, asked(), PAST) == Wait(alert=Alert.WRONG_PREIMAGE)
    assert not proves(preimage, HASH)


@pytest.mark.parametrize("node", ALL_NODES)
@pytest.mark.parametrize("now", ALL_TIMES)
def test_what_is_in_flight_is_waited_for_whatever_the_time(node: Capabilities, now: datetime):
    decision = next_step(agreeing(PaymentState.NOT_FOUND, SENT), IN_FLIGHT, asked(node), now)
    long = now >= PAST and now - SENT >= timedelta(hours=1)
    assert decision == Wait(alert=Alert.IN_FLIGHT_LONG if long else None)


@pytest.mark.parametrize("node", ALL_NODES)
@pytest.mark.parametrize("now", ALL_TIMES)
def test_no_answer_changes_nothing(node: Capabilities, now: datetime):
    before = replace(agreeing(PaymentState.NOT_FOUND, SENT), alert=Alert.NODE_FORGOT)
    assert next_step(before, UNKNOWN, asked(node), now) == Wait(
        PaymentState.NOT_FOUND, SENT, Alert.NODE_FORGOT
    )


CELLS: list[tuple[PaymentStatus, Capabilities, datetime, Decision]] = [
    # the node's word, the node, when, what follows
    (FAILED, LND_LIKE, BEFORE, Failed("no_route")),
    (FAILED, LND_LIKE, MARGIN, Failed("no_route")),
    (FAILED, LND_LIKE, PAST, Failed("no_route")),
    (FAILED, CLN_LIKE, BEFORE, Resubmit()),
    (FAILED, CLN_LIKE, LAST_MINUTE, Wait()),
    (FAILED, CLN_LIKE, MARGIN, Wait()),
    (FAILED, CLN_LIKE, PAST, Wait(PaymentState.FAILED, PAST)),
    (FAILED, UNKNOWN_WALLET, BEFORE, Wait()),
    (NOT_FOUND, LND_LIKE, BEFORE, Resubmit()),
    (NOT_FOUND, CLN_LIKE, BEFORE, Resubmit()),
    (NOT_FOUND, PHOENIXD_LIKE, BEFORE, Resubmit()),
    (NOT_FOUND, UNKNOWN_WALLET, BEFORE, Wait()),
    (NOT_FOUND, LND_LIKE, LAST_MINUTE, Wait()),
    (NOT_FOUND, LND_LIKE, EXPIRES, Wait()),
    (NOT_FOUND, LND_LIKE, MARGIN, Wait()),
    (NOT_FOUND, LND_LIKE, PAST, Wait(PaymentState.NOT_FOUND, PAST)),
    (NOT_FOUND, PHOENIXD_LIKE, PAST, Wait(PaymentState.NOT_FOUND, PAST)),
]


@pytest.mark.parametrize(("word", "node", "now", "decision"), CELLS)
def test_each_cell_of_the_table(
    word: PaymentStatus, node: Capabilities, now: datetime, decision: Decision
):
    assert next_step(ATTEMPT, word, asked(node), now) == decision


@pytest.mark.parametrize(
    ("word", "node", "apart", "code"),
    [
        (NOT_FOUND, LND_LIKE, AGREE_AFTER, "not_sent"),
        (NOT_FOUND, CLN_LIKE, AGREE_AFTER, "not_sent"),
        (NOT_FOUND, PHOENIXD_LIKE, AGREE_AFTER_UNCHECKED, "not_sent"),
        (NOT_FOUND, UNKNOWN_WALLET, AGREE_AFTER_UNCHECKED, "not_sent"),
        (FAILED, CLN_LIKE, AGREE_AFTER, "no_route"),
        (FAILED, UNKNOWN_WALLET, AGREE_AFTER, "no_route"),
    ],
)
def test_two_look_ups_that_agree_long_enough_apart_conclude(
    word: PaymentStatus, node: Capabilities, apart: timedelta, code: str
):
    first = agreeing(word.state, PAST)
    early = next_step(first, word, asked(node), PAST + apart - timedelta(seconds=1))
    assert early == Wait(word.state, PAST), "the first look-up still counts"
    assert next_step(first, word, asked(node), PAST + apart) == Failed(code)


def test_look_ups_that_disagree_begin_again():
    later = PAST + timedelta(hours=1)
    first = agreeing(PaymentState.FAILED, PAST)
    assert next_step(first, NOT_FOUND, asked(CLN_LIKE), later) == Wait(
        PaymentState.NOT_FOUND, later
    )
    assert next_step(first, IN_FLIGHT, asked(CLN_LIKE), PAST) == Wait()


def test_a_clock_that_was_set_back_makes_agreement_begin_again():
    first = agreeing(PaymentState.NOT_FOUND, PAST + timedelta(hours=1))
    assert next_step(first, NOT_FOUND, asked(), PAST) == Wait(PaymentState.NOT_FOUND, PAST)


@pytest.mark.parametrize("now", ALL_TIMES)
@pytest.mark.parametrize("word", [NOT_FOUND, FAILED, IN_FLIGHT, UNKNOWN])
def test_another_node_than_the_one_that_was_asked_concludes_nothing(
    word: PaymentStatus, now: datetime
):
    first = agreeing(word.state, SENT)
    assert next_step(first, word, asked(same=False), now) == Wait(alert=Alert.NODE_CHANGED)


@pytest.mark.parametrize("now", ALL_TIMES)
def test_not_found_means_nothing_from_a_node_that_forgets(now: datetime):
    first = agreeing(PaymentState.NOT_FOUND, SENT)
    forgot = Wait(alert=Alert.NODE_FORGOT)
    assert next_step(first, NOT_FOUND, asked(remembers=False), now) == forgot
    assert next_step(replace(first, was_known=True), NOT_FOUND, asked(), now) == forgot


@pytest.mark.parametrize("now", ALL_TIMES)
def test_not_found_means_nothing_while_a_request_may_be_on_its_way(now: datetime):
    first = agreeing(PaymentState.NOT_FOUND, SENT)
    assert next_step(replace(first, calling=True), NOT_FOUND, asked(), now) == Wait()
    assert next_step(first, NOT_FOUND, asked(synced=False), now) == Wait()


@pytest.mark.parametrize("now", ALL_TIMES)
@pytest.mark.parametrize("node", ALL_NODES)
def test_failed_may_be_of_an_earlier_request_while_another_is_on_its_way(
    node: Capabilities, now: datetime
):
    assert next_step(replace(ATTEMPT, calling=True), FAILED, asked(node), now) == Wait()


@pytest.mark.parametrize("now", ALL_TIMES)
@pytest.mark.parametrize("node", ALL_NODES)
def test_a_payee_that_refuses_after_a_record_was_missing_may_have_been_paid(
    node: Capabilities, now: datetime
):
    refused = said(PaymentState.FAILED, PAYEE_REFUSES)
    missed = replace(agreeing(PaymentState.FAILED, SENT), was_missing=True)
    assert next_step(missed, refused, asked(node), now) == Wait(alert=Alert.MAYBE_PAID)


def test_failed_after_a_record_was_missing_speaks_for_the_last_request_only():
    missed = replace(ATTEMPT, was_missing=True)
    assert next_step(missed, FAILED, asked(), BEFORE) == Resubmit()
    assert next_step(missed, FAILED, asked(), MARGIN) == Wait()
    assert next_step(missed, FAILED, asked(), PAST) == Wait(PaymentState.FAILED, PAST)
    assert next_step(missed, FAILED, asked(remembers=False), PAST) == Wait(alert=Alert.NODE_FORGOT)
    twice = replace(agreeing(PaymentState.FAILED, PAST), was_missing=True)
    assert next_step(twice, FAILED, asked(), PAST + AGREE_AFTER) == Failed("no_route")


def test_failed_is_not_believed_while_a_weak_node_has_money_in_htlcs():
    twice = agreeing(PaymentState.FAILED, PAST)
    now = PAST + AGREE_AFTER
    assert next_step(twice, FAILED, asked(CLN_LIKE, idle=False), now) == Wait()
    assert next_step(ATTEMPT, FAILED, asked(LND_LIKE, idle=False), now) == Failed("no_route")


SUBMITTED = st.builds(
    Submitted,
    payment_hash=st.just(HASH),
    submitted_at=st.just(SENT),
    expires_at=st.just(EXPIRES),
    calling=st.booleans(),
    was_known=st.booleans(),
    was_missing=st.booleans(),
    agreed_state=st.sampled_from([None, PaymentState.NOT_FOUND, PaymentState.FAILED]),
    agreed_since=st.one_of(st.none(), st.datetimes(timezones=st.just(UTC))),
    alert=st.sampled_from([None, *Alert]),
)
WORDS = st.builds(
    PaymentStatus,
    payment_hash=st.just(HASH),
    state=st.sampled_from(PaymentState),
    preimage=st.sampled_from([None, PREIMAGE, "00" * 32]),
    failure_code=st.sampled_from([None, "no_route", PAYEE_REFUSES]),
)
NODES = st.builds(
    AskedNode,
    st.sampled_from(ALL_NODES),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
TIMES = st.datetimes(
    min_value=datetime(2026, 11, 20), max_value=datetime(2026, 11, 25), timezones=st.just(UTC)
)


@given(SUBMITTED, WORDS, NODES, TIMES)
def test_there_is_a_decision_for_everything_and_never_a_dangerous_one(
    attempt: Submitted, word: PaymentStatus, node: AskedNode, now: datetime
):
    decision = next_step(attempt, word, node, now)
    match decision:
        case Succeeded():
            assert word.state is PaymentState.SUCCEEDED and word.preimage == PREIMAGE
        case Resubmit():
            assert node.same and node.synced
            if word.state is PaymentState.NOT_FOUND or attempt.was_missing:
                assert node.remembers
            assert word.state is not PaymentState.NOT_FOUND or not attempt.was_known
            assert node.capabilities.refuses_duplicate_hash
            assert now <= attempt.expires_at - timedelta(seconds=60)
            assert not attempt.calling
            assert word.state in (PaymentState.NOT_FOUND, PaymentState.FAILED)
        case Failed():
            assert node.same and not attempt.calling
            assert word.state in (PaymentState.NOT_FOUND, PaymentState.FAILED)
            definitive = node.capabilities.failed_is_definitive and not attempt.was_missing
            if word.state is PaymentState.NOT_FOUND or not definitive:
                assert now >= attempt.expires_at + EXPIRY_MARGIN
                assert attempt.agreed_state is word.state
                assert attempt.agreed_since is not None
                assert now - attempt.agreed_since >= AGREE_AFTER
        case Wait():
            assert word.state is not PaymentState.SUCCEEDED or word.preimage != PREIMAGE


def test_what_has_ended_moves_no_more_and_what_is_open_can_end():
    for moves, is_open in ((PAYOUT_MOVES, OPEN_PAYOUT), (ATTEMPT_MOVES, LIVE_ATTEMPT)):
        for state, ends in moves.items():
            assert bool(ends) == (state in is_open), state
            assert state not in ends
    assert PayoutState.PAID not in PAYOUT_MOVES[PayoutState.PLANNED], "not without a request"
    assert AttemptState.ABANDONED not in ATTEMPT_MOVES[AttemptState.SUBMITTED]
    assert AttemptState.FAILED not in ATTEMPT_MOVES[AttemptState.INVOICED]


def test_look_ups_come_seldomer_the_longer_it_takes_and_the_more_often_it_was_sent():
    waits = [
        look_again_after(timedelta(seconds=s), 1).total_seconds() for s in (0, 119, 120, 3599, 3600)
    ]
    assert waits == [5, 5, 60, 60, 600]
    sent_again = [look_again_after(timedelta(), n).total_seconds() for n in (1, 2, 3, 7, 8, 1000)]
    assert sent_again == [5, 10, 20, 320, 600, 600]


@pytest.mark.parametrize(
    ("amount_msat", "cap_msat"),
    [(1_000, 5_000), (1_000_000, 5_000), (1_000_200, 5_001), (10_000_000, 50_000)],
)
def test_routing_may_cost_five_satoshis_or_half_a_percent(amount_msat: int, cap_msat: int):
    assert fee_cap_msat(amount_msat) == cap_msat
    assert batch_fee_cap_msat(amount_msat, None) == cap_msat


@pytest.mark.parametrize(
    ("amount_msat", "worst_msat", "cap_msat"),
    [(250_000, 5_000, 5_000), (249_999, 5_000, None), (1_000_000, 8_000, 8_000)],
)
def test_a_node_that_sets_its_fees_itself_may_take_two_percent(
    amount_msat: int, worst_msat: int, cap_msat: int | None
):
    assert batch_fee_cap_msat(amount_msat, worst_msat) == cap_msat


@given(st.integers(min_value=0, max_value=10**12))
def test_an_amount_and_its_cap_fit_into_what_there_is_and_one_more_would_not(total_msat: int):
    amount_msat = amount_with_cap_msat(total_msat)
    if amount_msat:
        assert amount_msat + fee_cap_msat(amount_msat) <= total_msat
    assert amount_msat + 1 + fee_cap_msat(amount_msat + 1) > total_msat


def test_a_quarter_of_all_the_money_may_be_under_way():
    assert room_msat(NodeBalance(1_000, None, 0), 0) == 250
    assert room_msat(NodeBalance(800, None, 200), 200) == 50
    assert room_msat(NodeBalance(600, None, 400), 400) == 0
    assert room_msat(NodeBalance(10, None, 990), 0) == 10, "never more than can be sent"


def test_back_off_grows_to_a_day_and_is_jittered():
    waits = [back_off(n, 0.5) for n in range(1, 9)]
    assert [w.total_seconds() for w in waits] == pytest.approx(
        [60, 300, 1_800, 7_200, 43_200, 86_400, 86_400, 86_400]
    )
    assert back_off(1, 0.0).total_seconds() == pytest.approx(48)
    assert back_off(1, 0.999).total_seconds() < 72
