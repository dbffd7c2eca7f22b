"""Everything a worker may write to say where it wants to be paid."""

from __future__ import annotations

import lnurl
import pytest
from bech32 import bech32_encode, convertbits
from hypothesis import given
from hypothesis import strategies as st

from billing.errors import BadLightningAddress
from billing.ln_url import Payee, parse_ln_url

URL = (
    "https://service.example/api?q=3fc3645b439ce8e7f2553a69e5267081d96dcd340693afabe04be7b0ccd178df"
)


def read(text: str, **options) -> Payee:
    payee = parse_ln_url(text, **options)
    assert payee is not None
    return payee


def code(text: str, **options) -> str:
    with pytest.raises(BadLightningAddress) as caught:
        parse_ln_url(text, **options)
    return caught.value.code


def encode(data: bytes, prefix: str = "lnurl") -> str:
    groups = convertbits(data, 8, 5)
    assert groups is not None
    return bech32_encode(prefix, groups)


@pytest.mark.parametrize(
    "text, canonical, url",
    [
        (
            "worker@example.com",
            "worker@example.com",
            "https://example.com/.well-known/lnurlp/worker",
        ),
        ("  Worker@EXAMPLE.com\n", "worker@example.com", None),
        ("lightning:worker@example.com", "worker@example.com", None),
        ("LIGHTNING:worker@example.com", "worker@example.com", None),
        ("lightning: worker@example.com", "worker@example.com", None),
        ("a.b-c_d+tag@pay.example.com", "a.b-c_d+tag@pay.example.com", None),
        ("worker@bücher.example", "worker@xn--bcher-kva.example", None),
        ("worker@xn--bcher-kva.example", "worker@xn--bcher-kva.example", None),
    ],
)
def test_a_lightning_address_is_asked_at_its_well_known_place(text, canonical, url):
    payee = read(text)
    assert payee.text == canonical
    user, _, domain = canonical.partition("@")
    assert str(payee.url) == (url or f"https://{domain}/.well-known/lnurlp/{user}")


@pytest.mark.parametrize(
    "text",
    [
        "@example.com",
        "worker@",
        "worker@localhost",
        "worker@example",
        "worker@127.0.0.1",
        "worker@0x7f.1",
        "worker@[::1]",
        "worker@example.com:443",
        "worker@example.com:8443",
        "worker@example.com/path",
        "worker@example.com?x",
        "worker@example.com#x",
        "wor ker@example.com",
        "wor/ker@example.com",
        "../../admin@example.com",
        "wörker@example.com",
        "a@b@example.com",
        "x" * 65 + "@example.com",
        "worker@expyuzz4wqqyqhjn.onion",
        "worker@exa_mple.com",
        "worker@example.com\\@10.0.0.1",
        "%00@example.com",
    ],
)
def test_a_lightning_address_with_a_bad_user_or_domain_is_refused(text):
    assert code(text) == "bad_address"


def test_the_example_of_lud_01_is_read_in_either_case():
    written = (
        "LNURL1DP68GURN8GHJ7UM9WFMXJCM99E3K7MF0V9CXJ0M385EKVCENXC6R2C35XVUKXEFCV5MKVV34X5EKZD3EV56"
        "NYD3HXQURZEPEXEJXXEPNXSCRVWFNV9NXZCN9XQ6XYEFHVGCXXCMYXYMNSERXFQ5FNS"
    )
    url = (
        "https://service.com/api?q=3fc3645b439ce8e7f2553a69e5267081d96dcd340693afabe04be7b0ccd178df"
    )
    for text in (written, written.lower(), f"lightning:{written}"):
        assert read(text).text == url
    assert code(written[:20] + written[20:].lower()) == "bad_lnurl"  # mixed case


@given(
    st.from_regex(
        r"[a-z]{1,10}\.[a-z]{2,5}/[a-zA-Z0-9/_~-]{0,300}(\?[a-zA-Z0-9=&]{1,50})?", fullmatch=True
    )
)
def test_an_lnurl_holds_what_the_lnurl_package_put_in(rest):
    """Far beyond bech32's usual limit of 90 characters."""
    url = f"https://{rest}"
    written = str(lnurl.encode(url).bech32)
    assert read(written).text == url
    assert str(lnurl.decode(written)) == url


def test_what_we_accept_as_lnurl_the_lnurl_package_accepts_too():
    written = encode(URL.encode())
    assert str(lnurl.decode(written)) == read(written).text == URL


def test_every_single_typing_error_in_an_lnurl_is_noticed():
    written = encode(b"https://a.example/x")
    assert read(written).text == "https://a.example/x"
    for at in range(len("lnurl1"), len(written)):
        for wrong in "qpzry9x8gf2tvdw0s3jn54khce6mua7l":
            if wrong != written[at]:
                assert code(written[:at] + wrong + written[at + 1 :]) == "bad_lnurl"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("lnurl1", "bad_lnurl"),
        ("lnurl1qqqqqq", "bad_lnurl"),
        ("lnurl1" + "q" * 3000, "bad_lnurl"),
        (encode(b"https://example.com/" + b"x" * 1300), "bad_lnurl"),  # over 2000 characters
        (encode(b"\xff\xfe"), "bad_lnurl"),
        (encode(b""), "bad_lnurl"),
        (encode(b"worker@example.com"), "not_understood"),
        (encode(encode(URL.encode()).encode()), "not_understood"),  # one inside another
        (encode(b"http://example.com/x"), "bad_url"),
        (encode(b"https://10.0.0.1/x"), "bad_url"),
        (encode(b"file:///etc/passwd"), "bad_url"),
        (encode(b"https://example.com/x?tag=login&k1=00"), "not_a_payment"),
        (encode(b"\x00https://example.com/x"), "not_understood"),
    ],
)
def test_an_lnurl_that_is_broken_or_leads_elsewhere_is_refused(text, expected):
    assert code(text) == expected


def test_lud_17_and_plain_urls_are_read():
    assert read("lnurlp://example.com/path?x=1").text == "https://example.com/path?x=1"
    assert read("LNURLP://Example.com/path").text == "https://example.com/path"
    assert read("lightning:lnurlp://example.com/path").text == "https://example.com/path"
    assert read("https://example.com/path").text == "https://example.com/path"
    assert read("https://example.com/@worker").text == "https://example.com/@worker"
    assert read("https://example.com/x?tag=payRequest").text.endswith("tag=payRequest")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("lnurlw://example.com/x", "not_a_payment"),
        ("keyauth://example.com/x", "not_a_payment"),
        ("lnurlc://example.com/x", "not_a_payment"),
        ("https://example.com/x?tag=login&k1=1", "not_a_payment"),
        ("https://example.com/x?a=1&TAG=withdrawRequest", "not_a_payment"),
        ("https://example.com/x?%74ag=%6cogin", "not_a_payment"),
        ("lnurlp://example.com/x?tag=withdrawRequest", "not_a_payment"),
        ("http://example.com/x", "bad_url"),
        ("https://user@example.com/x", "bad_url"),
        ("https://example.com/x#y", "bad_url"),
        ("https://example.com:22/x", "bad_url"),
        ("https://169.254.169.254/latest", "bad_url"),
        ("lnurlp://10.0.0.1/x", "bad_url"),
        ("lnurlp://user@example.com/x", "bad_url"),
        ("ftp://example.com/x", "bad_url"),
        ("https://example.com/" + "x" * 2000, "bad_url"),
        ("example.com", "not_understood"),
        ("lnbc10u1pj", "not_understood"),
        ("bc1qar0srrr7xfkvy5l643lydnw9re59gtzzwf5mdq", "not_understood"),
        ("lightning:", None),
        ("mailto:worker", "not_understood"),
        ("null", "not_understood"),
    ],
)
def test_other_texts_are_refused_with_a_code_that_says_why(text, expected):
    if expected is None:
        assert parse_ln_url(text) is None
    else:
        assert code(text) == expected


@pytest.mark.parametrize("text", ["", "  ", "DONT_PAY_ME", "dont_pay_me", "lightning:DONT_PAY_ME"])
def test_a_worker_that_wants_no_money_says_so(text):
    assert parse_ln_url(text) is None


@pytest.mark.parametrize(
    "text, url",
    [
        ("worker@localhost:3000", "http://localhost:3000/.well-known/lnurlp/worker"),
        ("worker@127.0.0.1:3000", "http://127.0.0.1:3000/.well-known/lnurlp/worker"),
        ("worker@[::1]:3000", "http://[::1]:3000/.well-known/lnurlp/worker"),
        ("worker@wallet", "http://wallet/.well-known/lnurlp/worker"),
        ("worker@example.com", "https://example.com/.well-known/lnurlp/worker"),
        ("http://localhost:3000/x", "http://localhost:3000/x"),
        ("lnurlp://localhost:3000/x", "http://localhost:3000/x"),
        ("lnurlp://example.com/x", "https://example.com/x"),
        (encode(b"http://localhost:3000/x"), "http://localhost:3000/x"),
    ],
)
def test_development_opens_local_servers_and_production_does_not(text, url):
    payee = read(text, allow_private=True)
    assert str(payee.url) == url
    assert parse_ln_url(payee.text, allow_private=True) == payee
    if not url.startswith("https"):
        assert code(text) in {"bad_address", "bad_url"}


def test_high_ports_are_opened_on_their_own():
    assert code("https://example.com:8443/x") == "bad_url"
    assert read("https://example.com:8443/x", allow_high_ports=True).url.port == 8443
    assert code("http://example.com:8080/x", allow_high_ports=True) == "bad_url"
    assert code("https://localhost:8443/x", allow_high_ports=True) == "bad_url"


def test_what_is_wrong_is_said_without_repeating_the_text():
    for text in ["https://user:hunter2@example.com/", "hunter2", "hunter2!@example.com"]:
        with pytest.raises(BadLightningAddress) as caught:
            parse_ln_url(text)
        assert "hunter2" not in str(caught.value)


PIECES = [*"aZ01@:/.?#&= +-_%\\\x00é", "lnurl1", "lightning:", "lnurlp://", "https://", "tag=login"]
PIECES += ["example.com", "10.0.0.1", "localhost", "DONT_PAY_ME"]


@given(st.one_of(st.text(max_size=100), st.lists(st.sampled_from(PIECES)).map("".join)))
def test_any_text_is_a_payee_nothing_or_a_refusal(text):
    for allow_private in (False, True):
        try:
            payee = parse_ln_url(text, allow_private=allow_private)
        except BadLightningAddress as error:
            assert error.code in {
                "not_understood",
                "bad_address",
                "bad_lnurl",
                "bad_url",
                "not_a_payment",
            }
            continue
        if payee is not None:
            # What is stored is read again at the next payout, and must lead to the same place.
            assert parse_ln_url(payee.text, allow_private=allow_private) == payee
            assert allow_private or payee.url.scheme == "https"


@given(st.binary(max_size=60))
def test_any_bytes_in_an_lnurl_are_read_or_refused(data):
    try:
        payee = parse_ln_url(encode(data))
    except BadLightningAddress:
        return
    assert payee is not None and str(payee.url).startswith("https://")
