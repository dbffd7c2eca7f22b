"""Which URLs and addresses of strangers may be asked: the pure half of the filter."""

from __future__ import annotations

import ipaddress
import re
import socket
from urllib.parse import urlsplit

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from billing.outside_url import (
    BadOutsideUrl,
    OutsideRules,
    OutsideUrl,
    address_allowed,
    parse_outside_url,
)

STRICT = OutsideRules()
HIGH_PORTS = OutsideRules(allow_high_ports=True)
DEVELOPMENT = OutsideRules(allow_private=True)


def parsed(text: str, rules: OutsideRules = STRICT) -> str | None:
    try:
        return str(parse_outside_url(text, rules))
    except BadOutsideUrl:
        return None


@pytest.mark.parametrize(
    "text, canonical",
    [
        ("https://example.com", "https://example.com/"),
        ("HTTPS://Example.COM/Path?Q=1", "https://example.com/Path?Q=1"),
        ("https://example.com:443/", "https://example.com/"),
        ("https://example.com?x=1", "https://example.com/?x=1"),
        ("https://a-b.c--d.example/%2e%2e/?a=b&a=c", "https://a-b.c--d.example/%2e%2e/?a=b&a=c"),
        ("https://bücher.example/ü?ö", "https://xn--bcher-kva.example/%C3%BC?%C3%B6"),
        ("https://BÜCHER。example/", "https://xn--bcher-kva.example/"),
        ("https://1.2.3.4.example/", "https://1.2.3.4.example/"),
        ("https://4chan.example/", "https://4chan.example/"),
        ("https://example.com/a@b", "https://example.com/a@b"),
        (
            "https://example.com/?next=http://10.0.0.1/",
            "https://example.com/?next=http://10.0.0.1/",
        ),
    ],
)
def test_an_ordinary_url_is_read_into_its_canonical_form(text, canonical):
    assert parsed(text) == canonical


@pytest.mark.parametrize(
    "text",
    [
        "",
        "example.com",
        "https://",
        "https:///path",
        "https:example.com",
        "//example.com/",
        "http://example.com/",
        "ftp://example.com/",
        "file:///etc/passwd",
        "gopher://example.com:443/",
        "https://user@example.com/",
        "https://user:password@example.com/",
        "https://example.com@10.0.0.1/",
        "https://10.0.0.1@example.com/",
        "https://example.com#fragment",
        "https://example.com/#",
        "https://example.com\\@10.0.0.1/",
        "https://example.com\\.10.0.0.1/",
        "https://exam ple.com/",
        " https://example.com/",
        "https://example.com/\n",
        "https://example.com/a\tb",
        "https://example.com/\x00",
        "https://example.com/\x7f",
        "https://example.com/" + "a" * 2000,
        "https://example.com/\ud800",
        "https://" + "a" * 64 + ".com/",
        "https://" + "a.b" * 90 + ".com/",
        "https://example..com/",
        "https://.example.com/",
        "https://example.com./",
        "https://-example.com/",
        "https://example-.com/",
        "https://exam_ple.com/",
        "https://exam%70le.com/",
        "https://example.com%00.evil.com/",
        "https://localhost/",
        "https://metadata/",
        "https://service.localhost/",
        "https://expyuzz4wqqyqhjn.onion/",
    ],
)
def test_what_breaks_a_rule_is_refused(text):
    assert parsed(text) is None


@pytest.mark.parametrize(
    "port, strict, high, development",
    [
        ("443", True, True, True),
        ("80", False, False, True),
        ("22", False, False, False),
        ("1023", False, False, False),
        ("1024", False, True, True),
        ("8443", False, True, True),
        ("65535", False, True, True),
        ("65536", False, False, False),
        ("99999", False, False, False),
        ("0443", False, False, False),
        ("0", False, False, False),
        ("", False, False, False),
        ("+443", False, False, False),
        ("４４３", False, False, False),
    ],
)
def test_ports_are_443_and_what_the_operator_opens(port, strict, high, development):
    text = f"https://example.com:{port}/"
    assert (parsed(text) is not None) == strict
    assert (parsed(text, HIGH_PORTS) is not None) == high
    assert (parsed(text, DEVELOPMENT) is not None) == development


LITERALS = [
    "127.0.0.1",
    "8.8.8.8",  # public ones too: a payee has a name, and a certificate for it
    "169.254.169.254",
    "127.1",
    "2130706433",
    "0x7f000001",
    "0x7f.1",
    "0X7F.0.0.0x1",
    "017700000001",
    "0177.0.0.1",
    "127.0.0.0x",
    "0",
    "0x",
    "①②⑦.0.0.1",
    "１２７．０．０．１",
    "127。0。0。1",
    "example.com.1",
    "127.0.0.1.",
    "[::1]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[fe80::1%25eth0]",
    "[fe80::1%eth0]",
    "[2001:4860:4860::8888]",
    "::1",
]


@pytest.mark.parametrize("literal", LITERALS)
def test_an_address_in_any_notation_is_no_host_name(literal):
    assert parsed(f"https://{literal}/") is None


def test_development_opens_plain_http_local_names_and_literals():
    for text in [
        "http://127.0.0.1:8080/x",
        "http://[::1]:8080/x",
        "http://localhost:3000/x",
        "http://wallet/x",
        "http://10.1.2.3/x",
    ]:
        assert parsed(text, DEVELOPMENT) == text
    for text in ["http://127.1/", "http://0x7f.1/", "http://a@localhost/", "ftp://localhost/"]:
        assert parsed(text, DEVELOPMENT) is None


NEVER_ALLOWED = [
    "0.0.0.0",
    "169.254.169.254",  # cloud metadata
    "169.254.0.1",
    "192.0.0.1",
    "192.0.0.9",
    "192.0.2.1",
    "192.88.99.1",
    "198.18.0.1",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "239.255.255.255",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::127.0.0.1",
    "::10.0.0.1",
    "::ffff:169.254.169.254",
    "::ffff:0:127.0.0.1",
    "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe",
    "64:ff9b:1::a00:1",
    "100::1",
    "2001::1",
    "2001:0:4136:e378:8000:63bf:3fff:fdd2",  # Teredo
    "2001:10::1",
    "2001:20::1",
    "2001:db8::1",
    "2002:7f00:1::1",  # 6to4 of 127.0.0.1
    "2002:a9fe:a9fe::1",
    "2002:808:808::1",  # 6to4 even of a public address
    "2a00:1450:4001::5efe:7f00:1",  # ISATAP
    "2a00:1450:4001::200:5efe:a00:1",
    "3fff::1",
    "5f00::1",
    "fe80::1",
    "fe80::1%eth0",
    "fec0::1",
    "ff02::1",
    "",
    "localhost",
    "127.1",
    "2130706433",
]
PRIVATE = ["127.0.0.1", "127.8.9.1", "10.0.0.1", "172.31.0.1", "192.168.1.1", "100.64.0.1"]
PRIVATE += ["::1", "fc00::1", "fd12:3456::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1"]
PUBLIC = ["8.8.8.8", "93.184.216.34", "2606:2800:220:1::1", "2a00:1450:4001::200e"]
PUBLIC += ["::ffff:8.8.8.8"]


@pytest.mark.parametrize("address", NEVER_ALLOWED)
def test_no_rule_opens_addresses_that_are_neither_public_nor_plainly_private(address):
    assert not address_allowed(address, STRICT)
    assert not address_allowed(address, DEVELOPMENT)


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses_are_for_development(address):
    assert not address_allowed(address, STRICT)
    assert address_allowed(address, DEVELOPMENT)


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are_allowed_unless_the_operator_denies_them(address):
    assert address_allowed(address, STRICT)
    everything = (ipaddress.ip_network("0.0.0.0/0"), ipaddress.ip_network("::/0"))
    assert not address_allowed(address, OutsideRules(deny=everything))


def test_a_denied_network_stays_denied_in_development_and_behind_mapping():
    rules = OutsideRules(allow_private=True, deny=(ipaddress.ip_network("10.0.0.0/8"),))
    assert not address_allowed("10.1.1.1", rules)
    assert not address_allowed("::ffff:10.1.1.1", rules)
    assert address_allowed("192.168.0.1", rules)


@given(st.ip_addresses(v=4))
def test_an_ipv4_address_in_disguise_is_never_more_than_itself(address):
    number = int(address)
    disguises = [
        ipaddress.IPv6Address(number),
        ipaddress.IPv6Address((0x64FF9B << 96) | number),
        ipaddress.IPv6Address((0x64FF9B0001 << 80) | number),
        ipaddress.IPv6Address((0x2002 << 112) | (number << 80) | 1),
        ipaddress.IPv6Address((0x20010000 << 96) | (number ^ 0xFFFFFFFF)),
        ipaddress.IPv6Address((0xFFFF0000 << 32) | number),
        ipaddress.IPv6Address((0x2A00 << 112) | (0x5EFE << 32) | number),
    ]
    assert not any(address_allowed(str(disguise), STRICT) for disguise in disguises)
    mapped = str(ipaddress.IPv6Address((0xFFFF << 32) | number))
    assert address_allowed(mapped, STRICT) == address_allowed(str(address), STRICT)
    if address_allowed(str(address), STRICT):
        assert address.is_global and not address.is_multicast and not address.is_private


@given(st.ip_addresses(v=6))
def test_an_allowed_ipv6_address_is_assigned_unicast_or_a_mapped_ipv4(address):
    if address_allowed(str(address), STRICT):
        assert address in ipaddress.ip_network("2000::/3") or address.ipv4_mapped is not None


def check_strict(url: OutsideUrl) -> None:
    """What must hold of any URL that the strict rules let through."""
    assert url.scheme == "https" and url.port == 443
    assert re.fullmatch(r"[a-z0-9.-]+\.[a-z0-9-]*[a-z-][a-z0-9-]*", url.host)
    assert re.fullmatch(r"/[!-~]*", url.target) and "#" not in url.target
    with pytest.raises(OSError):
        socket.inet_aton(url.host)  # the most generous reader of addresses there is
    # Other readers must find the same host in it, or one of us is being fooled.
    assert urlsplit(str(url)).hostname == url.host
    assert httpx.URL(str(url)).raw_host.decode() == url.host
    assert parse_outside_url(str(url), STRICT) == url


def strictly(text: str) -> OutsideUrl | None:
    try:
        return parse_outside_url(text, STRICT)
    except BadOutsideUrl:
        return None


@given(st.text(max_size=80))
def test_any_host_is_read_or_refused_and_never_becomes_an_address(host):
    for text in (host, f"https://{host}/", f"https://{host}.example.com/x?y"):
        url = strictly(text)
        if url is not None:
            check_strict(url)


@given(
    st.lists(
        st.sampled_from(
            [
                *"019aZx.:@/\\#?[]%_-",
                "0x7f",
                "127",
                "。",
                "．",
                "１",
                "com",
                "localhost",
                "ß",
                "\u200d",
            ]
        ),
        max_size=12,
    )
)
def test_nor_does_any_arrangement_of_what_fools_readers(pieces):
    url = strictly(f"https://{''.join(pieces)}")
    if url is not None:
        check_strict(url)


@given(st.integers(0, 2**32 - 1), st.data())
def test_a_number_is_refused_however_it_is_written(number, data):
    parts = data.draw(st.integers(1, 4))
    octets = [number >> 24 & 255, number >> 16 & 255, number >> 8 & 255][: parts - 1]
    rest = number & (2 ** (8 * (5 - parts)) - 1)
    written = ".".join(
        data.draw(st.sampled_from(["{}", "{:#x}", "{:#X}", "0{:o}"])).format(value)
        for value in [*octets, rest]
    )
    assert parsed(f"https://{written}/") is None
    assert parsed(f"https://{written}./") is None


def test_a_query_is_added_after_the_one_there_is():
    url = parse_outside_url("https://example.com/cb?id=7", STRICT)
    assert str(url.with_query({"amount": "1000", "comment": "a&b=c d"})) == (
        "https://example.com/cb?id=7&amount=1000&comment=a%26b%3Dc+d"
    )
    bare = parse_outside_url("https://example.com/cb", STRICT)
    assert str(bare.with_query({"amount": "1"})) == "https://example.com/cb?amount=1"


@pytest.mark.parametrize(
    "location, leads_to",
    [
        ("/other?x=1", "https://a.example/other?x=1"),
        ("other", "https://a.example/dir/other"),
        ("//b.example/x", "https://b.example/x"),
        ("https://b.example", "https://b.example/"),
        ("http://a.example/", None),
        ("//10.0.0.1/", None),
        ("//user@b.example/", None),
        ("javascript:alert(1)", None),
        ("https://b.example/#top", None),
        ("/a b", None),
        ("/a\\b", None),
        ("//[::1", None),
        ("/" + "a" * 3000, None),
    ],
)
def test_a_redirect_keeps_the_rules_too(location, leads_to):
    url = parse_outside_url("https://a.example/dir/page", STRICT)
    try:
        followed = str(url.follow(location, STRICT))
    except BadOutsideUrl:
        followed = None
    assert followed == leads_to


def test_no_redirect_leaves_https_even_in_development():
    secure = parse_outside_url("https://a.example/", DEVELOPMENT)
    with pytest.raises(BadOutsideUrl):
        secure.follow("http://a.example/", DEVELOPMENT)
    plain = parse_outside_url("http://a.example/", DEVELOPMENT)
    assert str(plain.follow("https://a.example/", DEVELOPMENT)) == "https://a.example/"


def test_what_is_wrong_is_said_without_repeating_the_url():
    for text in ["https://user:hunter2@example.com/", "https://10.9.8.7/hunter2", "hunter2"]:
        with pytest.raises(BadOutsideUrl) as caught:
            parse_outside_url(text, STRICT)
        assert "hunter2" not in str(caught.value) and "10.9" not in str(caught.value)
