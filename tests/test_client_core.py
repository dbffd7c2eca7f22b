"""The client's pure parts: event streams, challenges, invoices, credentials, errors, retries."""

from __future__ import annotations

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client import errors
from client.challenge import (
    invoice_amount_msat,
    invoice_network,
    is_preimage_of,
    parse_challenge,
)
from client.credentials import L402, ApiKey, ClaimToken, parse_credential
from client.errors import NotQueued, UnexpectedAnswer, refusal
from client.events import Ended, Position, Restarted, StateChanged
from client.exchange import Answer, Patience, is_worth_repeating
from client.following import Tracker
from client.sse import EventParser, ServerEvent

STREAM = (
    b"\xef\xbb\xbf: a comment\n"
    b"retry: 1500\n\n"
    b'id: 1\nevent: chunk\ndata: {"text":"gr\xc3\xbcn"}\n\n'
    b"data:two\r\ndata: lines\r\n\r\n"
    b"id\revent: done\rdata: x\r\r"
    b"event: only-a-name\n\n"
    b"id: 9\ndata: cut off"
)
EXPECTED = [
    ServerEvent("chunk", '{"text":"grün"}', "1"),
    ServerEvent("message", "two\nlines", "1"),
    ServerEvent("done", "x", ""),
]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 10_000])
def test_events_are_the_same_however_the_bytes_are_cut(size: int):
    parser = EventParser()
    events = [
        event
        for start in range(0, len(STREAM), size)
        for event in parser.feed(STREAM[start : start + size])
    ]
    assert events == EXPECTED
    assert (parser.retry_ms, parser.comments) == (1500, 1)


@given(
    st.lists(
        st.tuples(
            st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), min_size=1),
            st.sampled_from(["\n", "\r", "\r\n"]),
        )
    ),
    st.data(),
)
def test_whatever_was_sent_arrives_in_any_cut_and_with_any_line_ends(sent, data):
    stream = "".join(f"data: {text}{end}{end}" for text, end in sent)
    raw = stream.encode() + b"\n"
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=8)))
    parser = EventParser()
    got = []
    for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True):
        got += [event.data for event in parser.feed(raw[start:end])]
    assert got == [text for text, _ in sent]


def test_an_event_without_its_empty_line_is_not_delivered():
    parser = EventParser()
    assert list(parser.feed(b"data: half\n")) == []
    assert list(parser.feed(b"\n")) == [ServerEvent("message", "half")]


def test_an_event_whose_data_is_no_object_is_refused():
    with pytest.raises(ValueError, match="JSON object"):
        ServerEvent("chunk", "[1]").json()


@pytest.mark.parametrize(
    "header",
    [
        'L402 macaroon="AG==", invoice="lnbcrt1", version="0", token="AG=="',
        'L402 version="0", token="AG==", invoice="lnbcrt1"',
        'lsat invoice="lnbcrt1",macaroon="AG=="',
        'Bearer realm="x", L402 token=AG==, invoice=lnbcrt1, unknown="a, b"',
        'L402 token="AG==", invoice="lnbcrt1", Payment id="1", request="zz"',
    ],
)
def test_challenges_are_read_as_all_their_writers_write_them(header: str):
    """lightning.md 3.1 and 3.2."""
    challenge = parse_challenge(["Basic", header], {"quote": {"claim_token": "c"}})
    assert challenge is not None
    assert (challenge.token, challenge.invoice) == ("AG==", "lnbcrt1")
    assert challenge.claim_token == "c"


@pytest.mark.parametrize(
    "header", ["", 'Bearer token="AG==", invoice="lnbcrt1"', 'L402 token="AG=="', "L402"]
)
def test_what_is_no_l402_challenge_is_none(header: str):
    assert parse_challenge([header]) is None


@pytest.mark.parametrize(
    ("human_part", "amount_msat"),
    [
        ("lnbc", None),
        ("lnbcrt20n", 2000),
        ("lnbcrt2u", 200_000),
        ("lnbc2500u", 250_000_000),
        ("lntb1m", 100_000_000),
        ("lnbc10p", 1),
        ("lnbc9678785340p", 967_878_534),
        ("lntbs3", 300_000_000_000),
        ("LNBCRT20N", 2000),
        ("lightning:lnbc1n", 100),
    ],
)
def test_an_invoices_amount_is_read_from_its_human_part(human_part: str, amount_msat: int | None):
    data = "1QQQQQQQ" if human_part.isupper() else "1qqqqqqq"
    assert invoice_amount_msat(human_part + data) == amount_msat


@pytest.mark.parametrize(
    "invoice",
    [
        "",
        "lnbc",
        "bc1qqqqqqq",
        "lnbc1p1qqqqqqq",
        "lnbc020n1qqqqqqq",
        "lnbc2x1qqqqqqq",
        "lnXY1qqqqqqq",
        "LNbc20n1qqqqqqq",
        "lnbc-20n1qqqqqqq",
        "lnurl1qqqqqqq",
        "lnbc20n1q",
    ],
)
def test_what_is_no_invoice_is_refused(invoice: str):
    with pytest.raises(ValueError, match="invoice"):
        invoice_amount_msat(invoice)


def test_an_invoice_names_its_network():
    assert invoice_network("lnbcrt20n1qqqqqqq") == "regtest"
    assert invoice_network("lnbc20n1qqqqqqq") == "mainnet"


def test_a_preimage_belongs_to_its_hash_and_to_no_other():
    payment_hash = hashlib.sha256(bytes(32)).hexdigest()
    assert is_preimage_of("00" * 32, payment_hash)
    assert not is_preimage_of("01" * 32, payment_hash)
    assert not is_preimage_of("not hexadecimal", payment_hash)


@pytest.mark.parametrize(
    "credential", [ApiKey("sk-abc"), L402("AG==", "ab" * 32), ClaimToken("c1")]
)
def test_a_credential_survives_its_text_and_hides_in_repr(credential):
    assert parse_credential(credential.as_text()) == credential
    assert parse_credential(credential) is credential
    secret = credential.as_text().split()[-1]
    assert secret not in repr(credential)


@pytest.mark.parametrize("text", ["", "abc", "L402 AG==:zz", "L402 AG==", "claim ", "sk-a b"])
def test_what_is_no_credential_is_refused_without_repeating_it(text: str):
    with pytest.raises(ValueError, match="a credential is") as raised:
        parse_credential(text)
    assert not text or f"'{text}'" not in str(raised.value)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, errors.BadRequest),
        (401, errors.NotAllowed),
        (402, errors.PaymentNeeded),
        (403, errors.NotAllowed),
        (404, errors.BadRequest),
        (409, errors.Conflict),
        (410, errors.Gone),
        (413, errors.BadRequest),
        (429, errors.TooManyRequests),
        (500, errors.Unavailable),
        (503, errors.Unavailable),
    ],
)
def test_a_status_becomes_an_error_with_code_and_facts(status, kind):
    body = {"error": {"code": "too_little", "message": "no", "balance_msat": 7}}
    error = refusal(status, body, retry_after_s=3)
    assert type(error) is kind
    assert (error.code, error.status, str(error)) == ("too_little", status, "no")
    assert error.facts == {"balance_msat": 7}
    assert error.retry_after_s == 3


@pytest.mark.parametrize(
    "body", [None, [], "text", {"error": None}, {"detail": "?"}, {"error": {}}]
)
def test_a_refusal_of_unknown_shape_keeps_the_class_code(body):
    error = refusal(402, body)
    assert error.code == "payment_required"
    assert "402" in str(error)


def answer(status: int, retry_after: str | None = None, code: str | None = None) -> Answer:
    body = json.dumps({"error": {"code": code}}).encode() if code else b"<html>"
    return Answer(status, {"retry-after": retry_after} if retry_after else {}, body)


@pytest.mark.parametrize(
    ("got", "repeatable", "again"),
    [
        (answer(200), True, False),
        (answer(400), True, False),
        (answer(402), True, False),
        (answer(500), True, False),
        (answer(502), True, True),
        (answer(502), False, False),
        (answer(504), True, True),
        (answer(503), True, False),
        (answer(503, "2"), True, True),
        (answer(503, "2"), False, False),
        (answer(503, "5", "draining"), True, True),
        (answer(503, "30", "no_worker"), True, False),
        (answer(503, "5", "paused"), True, False),
        (answer(502, None, "job_failed"), True, False),
        (answer(429, "2"), False, True),
        (answer(429, "3600"), True, False),
        (answer(429), True, False),
    ],
)
def test_only_what_is_safe_and_promising_is_repeated(got, repeatable, again):
    assert is_worth_repeating(got, repeatable=repeatable) is again


def test_waits_double_up_to_a_limit():
    patience = Patience(first_s=1, longest_s=6, jitter=lambda: 1.0)
    assert [patience.delay_s(failures) for failures in (1, 2, 3, 4, 9)] == [1, 2, 4, 6, 6]
    assert Patience(first_s=1, jitter=lambda: 0.0).delay_s(1) == 0.5


def server_event(name: str, event_id: str = "", **data: object) -> ServerEvent:
    text = str(data).replace("'", '"').replace("None", "null")
    return ServerEvent(name, text, event_id)


def test_a_chunk_that_was_seen_is_not_told_again():
    tracker = Tracker(1)
    chunks = [("a", 1, "x"), ("a", 1, "x"), ("b", 1, "z"), ("a", 2, "y")]
    for job, seq, text in chunks:
        list(tracker.take(server_event("chunk", f"{job}{seq}", job=job, seq=seq, text=text)))
    assert tracker.texts == {"a": "xy", "b": "z"}
    assert tracker.last_id == "a2"


def test_events_that_share_the_place_of_a_chunk_are_told():
    """A state or an end comes at the place where the text before it ended."""
    tracker = Tracker(1)
    list(tracker.take(server_event("chunk", "5", job="a", seq=5, text="hello")))
    done = server_event("done", "5", seq=5, job={"id": "a", "state": "succeeded"})
    assert [type(event) for event in tracker.take(done)] == [Ended]


def test_a_job_that_starts_anew_takes_its_shown_text_back():
    tracker = Tracker(1)
    list(tracker.take(server_event("state", "1", job="a", state="running", attempt=1)))
    list(tracker.take(server_event("chunk", "2", job="a", text="lost")))
    events = list(tracker.take(server_event("state", "3", job="a", state="running", attempt=2)))
    assert events == [Restarted("a", 2), StateChanged("a", "running", 2)]
    assert tracker.texts == {}


def test_all_jobs_have_to_end():
    tracker = Tracker(2)
    ends = [
        list(tracker.take(server_event("done", str(n), job={"id": job, "state": "succeeded"})))
        for n, job in [(1, "a"), (2, "a"), (3, "b")]
    ]
    assert [len(end) for end in ends] == [1, 0, 1]
    assert isinstance(ends[0][0], Ended)
    assert tracker.finished


def test_positions_carry_waits_and_the_price_to_be_next():
    event = server_event(
        "position",
        job="a",
        position=3,
        wait_s={"p50": 8.0, "p90": None},
        multiplier_to_be_next="1.4",
    )
    assert list(Tracker(1).take(event)) == [Position("a", 3, 8.0, None, "1.4", True)]


@pytest.mark.parametrize(("name", "code"), [("late", "paid_late"), ("expired", "quote_expired")])
def test_a_payment_that_came_too_late_is_an_error_that_says_where_it_is(name, code):
    with pytest.raises(NotQueued) as raised:
        list(Tracker(1).take(server_event(name, "1", credited_msat=2000)))
    assert raised.value.code == code
    assert raised.value.facts["credited_msat"] == 2000


def test_unknown_events_are_passed_over_and_broken_ones_refused():
    tracker = Tracker(1)
    assert list(tracker.take(server_event("news", "1", anything=1))) == []
    with pytest.raises(UnexpectedAnswer):
        list(tracker.take(ServerEvent("chunk", "no json", "2")))
    with pytest.raises(UnexpectedAnswer):
        list(tracker.take(server_event("chunk", "2", text="of nobody")))
    assert tracker.last_id == "1"
