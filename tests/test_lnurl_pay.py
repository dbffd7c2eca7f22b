"""What an LNURL-pay server may answer, and what is refused (LUD-06, LUD-12, LUD-18)."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import bolt11
import pytest
from bolt11.models.tags import Tag, TagChar, Tags
from coincurve import PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from billing.errors import BadLightningAddress
from billing.lightning_address import (
    PayeeError,
    PayTerms,
    parse_ln_url,
    payable_msat,
)
from billing.lnurl_pay import read_invoice, read_json, read_terms
from billing.outside_http import OutsideAnswer
from billing.outside_url import OutsideRules
from tests.lnurl_wallet import (
    DEVELOPMENT,
    KEY,
    NOW,
    Wallet,
    addresses,
    invoice,
    payee_of,
    refused,
    serving,
    terms_of,
)
from tests.loopback_http import http, http_json


@pytest.fixture
async def wallet() -> AsyncIterator[Wallet]:
    async with serving() as wallet:
        yield wallet


# Amounts


def terms_between(least: int, most: int) -> PayTerms:
    payee = payee_of("worker@localhost:3000")
    return PayTerms(payee, payee.url, least, most, 0, "00" * 32)


@pytest.mark.parametrize(
    "least, most, amount, payable",
    [
        (1000, 10_000, 5999, 5000),
        (1000, 10_000, 10_000, 10_000),
        (1000, 10_500, 999_999, 10_000),
        (1000, 10_000, 999, 0),
        (5000, 10_000, 4999, 0),
        (5001, 5999, 5999, 0),  # no whole satoshi between them
        (1, 999, 10_000, 0),
        (1, 10**15, 0, 0),
        (1, 10**15, -5000, 0),
    ],
)
def test_the_payable_amount_is_whole_satoshis_within_the_bounds(least, most, amount, payable):
    assert payable_msat(terms_between(least, most), amount) == payable


@given(st.integers(1, 10**9), st.integers(1, 10**9), st.integers(-(10**9), 10**10))
def test_nothing_more_could_be_paid(least, span, amount):
    terms = terms_between(least, least + span)
    payable = payable_msat(terms, amount)
    assert payable % 1000 == 0 and 0 <= payable <= max(amount, 0)
    assert payable == 0 or least <= payable <= least + span
    next_sat = payable + 1000 if payable else -(-max(least, 1000) // 1000) * 1000
    assert next_sat > min(amount, least + span)


@pytest.mark.parametrize("amount", [0, -1000, 999, 1500, 100_001_000])
async def test_an_amount_that_is_not_payable_is_never_asked_for(wallet, amount):
    ours = addresses()
    terms = await ours.resolve(payee_of(wallet.address))
    with refused("amount_out_of_range"):
        await ours.request_invoice(terms, amount)
    assert len(wallet.server.requests) == 1


# The first answer


@pytest.mark.parametrize(
    "changed",
    [
        {"minSendable": "1000", "maxSendable": 1e8},
        {"minSendable": 1000.0, "maxSendable": "100000000"},
        {"metadata": '[["text/plain", 5], "odd", null, {"a": 1}]'},
        {"metadata": "[]"},
        {"payerData": {"name": {"mandatory": False}, "odd": 1}},
        {"commentAllowed": "many", "disposable": None, "unknown": {"a": []}},
        {"commentAllowed": -5, "allowsNostr": True, "nostrPubkey": "00"},
        {"status": "OK"},
    ],
)
async def test_odd_but_usable_terms_are_taken(wallet, changed):
    wallet.terms |= changed
    terms = await terms_of(wallet)
    assert (terms.min_sendable_msat, terms.max_sendable_msat) == (1000, 100_000_000)
    assert terms.comment_max_length == 0


@pytest.mark.parametrize(
    "changed, code",
    [
        ({"tag": "withdrawRequest"}, "not_a_payment"),
        ({"tag": None}, "not_a_payment"),
        ({"tag": ["payRequest"]}, "not_a_payment"),
        ({"minSendable": 0}, "bad_answer"),
        ({"minSendable": -1}, "bad_answer"),
        ({"minSendable": 2000, "maxSendable": 1999}, "bad_answer"),
        ({"minSendable": None}, "bad_answer"),
        ({"minSendable": True}, "bad_answer"),
        ({"minSendable": 1000.5}, "bad_answer"),
        ({"maxSendable": "1e9"}, "bad_answer"),
        ({"maxSendable": "٣٠٠٠"}, "bad_answer"),
        ({"maxSendable": [1]}, "bad_answer"),
        ({"metadata": [["text/plain", "x"]]}, "bad_answer"),
        ({"metadata": "{}"}, "bad_answer"),
        ({"metadata": "no json"}, "bad_answer"),
        ({"metadata": "[" * 100_000}, "bad_answer"),
        ({"metadata": '["\ud800"]'}, "bad_answer"),
        ({"metadata": None}, "bad_answer"),
        ({"payerData": {"email": {"mandatory": True}}}, "payer_data_required"),
        ({"callback": None}, "bad_answer"),
        ({"callback": "/relative"}, "bad_url"),
        ({"callback": "https://user@example.com/"}, "bad_url"),
        ({"callback": "https://example.com:22/"}, "bad_url"),
        ({"callback": "https://example.com/#x"}, "bad_url"),
        ({"callback": "ftp://example.com/"}, "bad_url"),
        ({"callback": "javascript:alert(1)"}, "bad_url"),
    ],
)
async def test_terms_that_break_the_rules_are_refused(wallet, changed, code):
    wallet.terms |= changed
    with refused(code):
        await terms_of(wallet)


def test_in_production_the_callback_must_be_https_at_a_public_name():
    payee = parse_ln_url("worker@example.com")
    assert payee is not None
    found = Wallet().terms
    for callback in ["http://example.com/cb", "https://10.0.0.1/cb", "https://localhost/cb"]:
        with refused("bad_url"):
            read_terms(payee, found | {"callback": callback}, OutsideRules())
    good = read_terms(payee, found | {"callback": "https://other.example/cb"}, OutsideRules())
    assert str(good.callback) == "https://other.example/cb"


def test_a_maximum_beyond_all_money_is_cut():
    found = Wallet().terms | {"callback": "http://localhost:3000/", "maxSendable": 10**30}
    terms = read_terms(payee_of("worker@localhost:3000"), found, DEVELOPMENT)
    assert terms.max_sendable_msat == 21_000_000 * 100_000_000 * 1000


@pytest.mark.parametrize("status", [200, 400, 404, 500])
async def test_an_error_is_read_whatever_the_status_and_keeps_its_reason_short(wallet, status):
    reason = "<script>alert(1)</script>\x00\n" + "x" * 1000
    wallet.first = lambda request: http_json({"status": "error", "reason": reason}, status)
    with refused("payee_error") as caught:
        await terms_of(wallet)
    assert isinstance(caught.value, PayeeError)
    assert len(caught.value.reason) <= 200 and caught.value.reason.isprintable()
    assert "script" not in str(caught.value)


@pytest.mark.parametrize("status", [400, 404, 502])
async def test_good_json_is_used_whatever_the_status(wallet, status):
    terms = {"callback": wallet.server.url("/callback")} | wallet.terms
    wallet.first = lambda request: http_json(terms, status)
    assert (await terms_of(wallet)).min_sendable_msat == 1000


@pytest.mark.parametrize(
    "status, body, code",
    [
        (500, b"<html>oops</html>", "unreachable"),
        (503, b"", "unreachable"),
        (404, b"<html>not found</html>", "bad_answer"),
        (200, b"", "bad_answer"),
        (200, b"null", "bad_answer"),
        (200, b"[]", "bad_answer"),
        (200, b'"payRequest"', "bad_answer"),
        (200, b"\xff\xfe{\x00}\x00", "bad_answer"),  # UTF-16
        (200, b'{"a": "\xff"}', "bad_answer"),
        (200, b"[" * 200_000, "bad_answer"),
        (200, b'{"a":' * 40_000, "bad_answer"),
        (200, b'{"minSendable": ' + b"9" * 5000 + b"}", "bad_answer"),
        (200, b"x" * 300_000, "bad_answer"),
        (302, b"", "bad_answer"),
    ],
)
async def test_an_answer_that_is_no_json_object_is_refused(wallet, status, body, code):
    wallet.first = lambda request: http(status, body)
    with refused(code):
        await terms_of(wallet)


async def test_a_byte_order_mark_is_no_reason_to_refuse(wallet):
    body = json.dumps({"callback": wallet.server.url("/callback")} | wallet.terms)
    wallet.first = lambda request: http(200, b"\xef\xbb\xbf" + body.encode())
    assert (await terms_of(wallet)).min_sendable_msat == 1000


# The invoice


def without_secret(amount_msat: int) -> str:
    tags = Tags([Tag(TagChar.payment_hash, "11" * 32), Tag(TagChar.description, "x")])
    made = bolt11.Bolt11("bcrt", int(NOW.timestamp()), tags, bolt11.MilliSatoshi(amount_msat))
    return bolt11.encode(made, KEY.secret.hex(), ignore_exceptions=True)


BROKEN = invoice(1000)
BROKEN = BROKEN[:-1] + ("q" if BROKEN[-1] != "q" else "p")


@pytest.mark.parametrize(
    "pr, code",
    [
        (lambda amount: invoice(amount + 1000), "invoice_amount"),
        (lambda amount: invoice(amount - 1), "invoice_amount"),
        (lambda amount: invoice(None), "invoice_amount"),
        (lambda amount: invoice(amount, prefix="bc"), "invoice_network"),
        (lambda amount: invoice(amount, prefix="tb"), "invoice_network"),
        (lambda amount: invoice(amount, expiry_s=59), "invoice_expiry"),
        (lambda amount: invoice(amount, created_at_s=1_600_000_000), "invoice_expiry"),
        (lambda amount: invoice(amount, min_final_cltv=1009), "invoice_unpayable"),
        (without_secret, "invoice_unpayable"),
        (lambda amount: invoice(amount, key=PrivateKey(bytes([2]) * 32)), "invoice_ours"),
        (lambda amount: BROKEN, "invoice_unreadable"),
        (lambda amount: "lnbcrt10u1", "invoice_unreadable"),
        (lambda amount: "", "invoice_unreadable"),
        (lambda amount: f"lightning:{invoice(amount)}", "invoice_unreadable"),
        (lambda amount: "q" * 8000, "bad_answer"),
        (lambda amount: None, "bad_answer"),
        (lambda amount: 5, "bad_answer"),
        (lambda amount: [invoice(amount)], "bad_answer"),
    ],
)
async def test_an_invoice_other_than_the_one_asked_for_is_refused(wallet, pr, code):
    ours = addresses(own_pubkey=PrivateKey(bytes([2]) * 32).public_key.format().hex())
    terms = await ours.resolve(payee_of(wallet.address))
    wallet.make = lambda amount_msat: {"pr": pr(amount_msat)}
    with refused(code) as caught:
        await ours.request_invoice(terms, 21_000)
    assert "lnbc" not in str(caught.value)
    wallet.make = lambda amount_msat: {"pr": invoice(amount_msat)}
    assert (await ours.request_invoice(terms, 21_000)).amount_msat == 21_000


@pytest.mark.parametrize(
    "changed", [{"expiry_s": 60}, {"min_final_cltv": 1008}, {"description": "plain"}]
)
async def test_an_invoice_at_the_edge_is_taken(wallet, changed):
    terms = await terms_of(wallet)
    wallet.make = lambda amount_msat: {"pr": invoice(amount_msat, **changed).upper()}
    made = await addresses().request_invoice(terms, 21_000)
    assert made.bolt11 == made.bolt11.lower()
    assert made.hash_ok is (None if "description" in changed else True)


async def test_a_hash_of_other_metadata_is_noted_and_paid_anyway(wallet):
    """luds #234: wallets no longer refuse it."""
    terms = await terms_of(wallet)
    wallet.make = lambda amount_msat: {"pr": invoice(amount_msat, description_hash=bytes(32))}
    assert (await addresses().request_invoice(terms, 21_000)).hash_ok is False


async def test_what_a_payee_adds_to_its_invoice_is_kept_as_its_word_only(wallet):
    terms = await terms_of(wallet)
    wallet.make = lambda amount_msat: {
        "pr": invoice(amount_msat),
        "routes": [],
        "disposable": False,
        "verify": "http://10.0.0.1/verify",
        "successAction": {"tag": "unheard-of", "message": "x"},
    }
    made = await addresses().request_invoice(terms, 21_000)
    assert (made.success_action_tag, made.verify_url) == ("unheard-of", "http://10.0.0.1/verify")
    wallet.make = lambda amount_msat: {"pr": invoice(amount_msat), "verify": 5, "successAction": 1}
    made = await addresses().request_invoice(terms, 21_000)
    assert (made.success_action_tag, made.verify_url) == (None, None)


async def test_an_error_of_the_callback_is_the_payees(wallet):
    terms = await terms_of(wallet)
    wallet.make = lambda amount_msat: {"status": "ERROR", "reason": "wallet locked"}
    with refused("payee_error") as caught:
        await addresses().request_invoice(terms, 21_000)
    assert isinstance(caught.value, PayeeError) and caught.value.reason == "wallet locked"


# Fuzz


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3)
    ),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    [
        "tag",
        "callback",
        "minSendable",
        "maxSendable",
        "metadata",
        "payerData",
        "commentAllowed",
        "status",
        "reason",
        "pr",
        "verify",
        "successAction",
    ]
)


@given(st.dictionaries(FIELDS, JSON, max_size=4), st.integers(100, 599))
def test_no_json_can_do_worse_than_be_refused(changed, status):
    payee = payee_of("worker@localhost:3000")
    base = {"callback": "http://localhost:3000/", "pr": invoice(1000)} | Wallet().terms
    body = json.dumps(base | changed).encode()
    try:
        found = read_json(OutsideAnswer(status, body, payee.url))
        terms = read_terms(payee, found, DEVELOPMENT)
        made = read_invoice(
            terms, found, amount_msat=1000, network="regtest", now=NOW, own_pubkey=None
        )
    except BadLightningAddress:
        return
    assert terms.min_sendable_msat >= 1 and terms.max_sendable_msat >= 1
    assert made.amount_msat == 1000


@given(st.binary(max_size=200), st.integers(100, 599))
def test_no_bytes_can_do_worse_than_be_refused(body, status):
    payee = payee_of("worker@localhost:3000")
    try:
        found = read_json(OutsideAnswer(status, body, payee.url))
    except BadLightningAddress as error:
        assert error.code in {"unreachable", "bad_answer", "payee_error"}
    else:
        assert isinstance(found, dict)
