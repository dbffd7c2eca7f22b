"""Invoices as BOLT 11 has them: its own vectors, the `bolt11` package as a second opinion, and
strings from people who wish us ill."""

from __future__ import annotations

import secrets
from datetime import UTC, datetime
from hashlib import sha256

import bolt11
import pytest
from coincurve import PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from billing import bolt11_codec
from billing.errors import BadInvoice

# The key, hash and secret of all examples of the specification.
SPEC_KEY = PrivateKey(
    bytes.fromhex("e126f68f7eafcc8b74f54d269fe206be715000f94dac067d1c04a8ca3b2db734")
)
SPEC_PAYEE = "03e7156ae33b0a208d0744199163177e909e80176e55d97a2f221ede0f934dd9ad"
SPEC_HASH = "0001020304050607080900010203040506070809000102030405060708090102"
SPEC_TIME = datetime.fromtimestamp(1496314658, UTC)

DONATION = (
    "lnbc1pvjluezpp5qqqsyqcyq5rqwzqfqqqsyqcyq5rqwzqfqqqsyqcyq5rqwzqfqypqdpl2pkx2ctnv5sxxmmwwd5kg"
    "etjypeh2ursdae8g6twvus8g6rfwvs8qun0dfjkxaq8rkx3yf5tcsyz3d73gafnh3cax9rn449d9p5uxz9ezhhypd0el"
    "x87sjle52x86fux2ypatgddc6k63n7erqz25le42c4u4ecky03ylcqca784w"
)
COFFEE = (
    "lnbc2500u1pvjluezpp5qqqsyqcyq5rqwzqfqqqsyqcyq5rqwzqfqqqsyqcyq5rqwzqfqypqdq5xysxxatsyp3k7enxv4"
    "jsxqzpuaztrnwngzn3kdzw5hydlzf03qdgm2hdq27cqv3agm2awhz5se903vruatfhq77w3ls4evs3ch9zw97j25emud"
    "upq63nyw24cg27h2rspfj9srp"
)
NONSENSE = (
    "lnbc2500u1pvjluezpp5qqqsyqcyq5rqwzqfqqqsyqcyq5rqwzqfqqqsyqcyq5rqwzqfqypqdpquwpc4curk03c9wlrsw"
    "e78q4eyqc7d8d0xqzpuyk0sg5g70me25alkluzd2x62aysf2pyy8edtjeevuv4p2d5p76r4zkmneet7uvyakky2zr4cu"
    "sd45tftc9c5fh0nnqpnl2jfll544esqchsrny"
)
HASHED = (
    "lnbc20m1pvjluezpp5qqqsyqcyq5rqwzqfqqqsyqcyq5rqwzqfqqqsyqcyq5rqwzqfqypqhp58yjmdan79s6qqdhdzgyn"
    "m4zwqd5d7xmw5fk98klysy043l2ahrqscc6gd6ql3jrc5yzme8v4ntcewwz5cnw92tz0pc8qcuufvq7khhr8wpald05e9"
    "2xw006sq94mg8v2ndf4sefvf9sygkshp5zfem29trqq2yxxz7"
)
TESTNET = (
    "lntb20m1pvjluezhp58yjmdan79s6qqdhdzgynm4zwqd5d7xmw5fk98klysy043l2ahrqspp5qqqsyqcyq5rqwzqfqqqs"
    "yqcyq5rqwzqfqqqsyqcyq5rqwzqfqypqfpp3x9et2e20v6pu37c5d9vax37wxq72un98kmzzhznpurw9sgl2v0nklu2g"
    "4d0keph5t7tj9tcqd8rexnd07ux4uv2cjvcqwaxgj7v4uwn5wmypjd5n69z2xm3xgksg28nwht7f6zspwp3f9t"
)
ROUTE_HINTS = (
    "lnbc20m1pvjluezpp5qqqsyqcyq5rqwzqfqqqsyqcyq5rqwzqfqqqsyqcyq5rqwzqfqypqhp58yjmdan79s6qqdhdzgyn"
    "m4zwqd5d7xmw5fk98klysy043l2ahrqsfpp3qjmp7lwpagxun9pygexvgpjdc4jdj85fr9yq20q82gphp2nflc7jtzrca"
    "zrra7wwgzxqc8u7754cdlpfrmccae92qgzqvzq2ps8pqqqqqqpqqqqq9qqqvpeuqafqxu92d8lr6fvg0r5gv0heeeqgcr"
    "qlnm6jhphu9y00rrhy4grqszsvpcgpy9qqqqqqgqqqqq7qqzqj9n4evl6mr5aj9f58zp6fyjzup6ywn3x6sk8akg5v4tg"
    "n2q8g4fhx05wf6juaxu9760yp46454gpg5mtzgerlzezqcqvjnhjh8z3g2qqdhhwkj"
)
PICO = (
    "lnbc9678785340p1pwmna7lpp5gc3xfm08u9qy06djf8dfflhugl6p7lgza6dsjxq454gxhj9t7a0sd8dgfkx7cmtwd68"
    "yetpd5s9xar0wfjn5gpc8qhrsdfq24f5ggrxdaezqsnvda3kkum5wfjkzmfqf3jkgem9wgsyuctwdus9xgrcyqcjcgpzg"
    "fskx6eqf9hzqnteypzxz7fzypfhg6trddjhygrcyqezcgpzfysywmm5ypxxjemgw3hxjmn8yptk7untd9hxwg3q2d6xjc"
    "mtv4ezq7pqxgsxzmnyyqcjqmt0wfjjq6t5v4khxxqyjw5qcqp2rzjq0gxwkzc8w6323m55m4jyxcjwmy7stt9hwkwe2qx"
    "my8zpsgg7jcuwz87fcqqeuqqqyqqqqlgqqqqn3qq9qn07ytgrxxzad9hc4xt3mawjjt8znfv8xzscs7007v9gh9j569len"
    "cxa8xeujzkxs0uamak9aln6ez02uunw6rd2ht2sqe4hz8thcdagpleym0j"
)
FEATURES = (
    "lnbc25m1pvjluezpp5qqqsyqcyq5rqwzqfqqqsyqcyq5rqwzqfqqqsyqcyq5rqwzqfqypqdq5vdhkven9v5sxyetpdees"
    "sp5zyg3zyg3zyg3zyg3zyg3zyg3zyg3zyg3zyg3zyg3zyg3zyg3zygs9q5sqqqqqqqqqqqqqqqpqsq67gye39hfg3zd8r"
    "gc80k32tvy9xk2xunwm5lzexnvpx6fd77en8qaq424dxgt56cag2dpt359k3ssyhetktkpqh24jqnjyw6uqd08sgptq44"
    "qu"
)
WRONG_LENGTHS = [(kind, length) for kind in "phs" for length in (51, 53)]
# The same, with an unknown field, an unknown fallback, and p, h, s and n of wrong lengths.
IGNORED_FIELDS = "".join(
    (
        FEATURES.partition("67gye39")[0],
        "2qrqqq",
        "fppn" + "q" * 32,
        *(
            f"{kind}p{'n' if length == 51 else '4'}" + "q" * length
            for kind, length in WRONG_LENGTHS
        ),
        "np5" + "q" * 52,
        "npk" + "q" * 54,
        "2jxxfsnucm4jf4zwtznpaxphce606fvhvje5x7d4gw7n73994hgs7nteqvenq8a4ml8aqtchv5d9pf7l558889hp4yyrq",
        "v6a7zpq9fgpskqhza",
    )
)

BAD_VECTORS = {
    "required feature 100": (
        "lnbc25m1pvjluezpp5qqqsyqcyq5rqwzqfqqqsyqcyq5rqwzqfqqqsyqcyq5rqwzqfqypqdq5vdhkven9v5sxyetp"
        "deessp5zyg3zyg3zyg3zyg3zyg3zyg3zyg3zyg3zyg3zyg3zyg3zyg3zygs9q4psqqqqqqqqqqqqqqqpqsqq40wa3"
        "khl49yue3zsgm26jrepqr2eghqlx86rttutve3ugd05em86nsefzh4pfurpd9ek9w2vp95zxqnfe2u7ckudyahsa52"
        "q66tgzcp6t2dyk"
    ),
    "checksum": COFFEE[:-1] + "q",
    "no separator": COFFEE.removeprefix("lnbc2500u1"),
    "mixed case": COFFEE.replace("lnbc2500u1", "LNBC2500u1"),
    "signature": (
        "lnbc2500u1pvjluezpp5qqqsyqcyq5rqwzqfqqqsyqcyq5rqwzqfqqqsyqcyq5rqwzqfqypqdq5xysxxatsyp3k7en"
        "xv4jsxqzpuaxtrnwngzn3kdzw5hydlzf03qdgm2hdq27cqv3agm2awhz5se903vruatfhq77w3ls4evs3ch9zw97j2"
        "5emudupq63nyw24cg27h2rspk28uwq"
    ),
    "short": (
        "lnbc1pvjluezpp5qqqsyqcyq5rqwzqfqqqsyqcyq5rqwzqfqqqsyqcyq5rqwzqfqypqdpl2pkx2ctnv5sxxmmwwd5k"
        "getjypeh2ursdae8g6na6hlh"
    ),
    "multiplier": (
        "lnbc2500x1pvjluezpp5qqqsyqcyq5rqwzqfqqqsyqcyq5rqwzqfqqqsyqcyq5rqwzqfqypqdq5xysxxatsyp3k7en"
        "xv4jsxqzpujr6jxr9gq9pv6g46y7d20jfkegkg4gljz2ea2a3m9lmvvr95tq2s0kvu70u3axgelz3kyvtp2ywwt0y8"
        "hkx2869zq5dll9nelr83zzqqpgl2zg"
    ),
    "fraction of a millisatoshi": (
        "lnbc2500000001p1pvjluezpp5qqqsyqcyq5rqwzqfqqqsyqcyq5rqwzqfqqqsyqcyq5rqwzqfqypqdq5xysxxatsy"
        "p3k7enxv4jsxqzpu7hqtk93pkf7sw55rdv4k9z2vj050rxdr6za9ekfs3nlt5lr89jqpdmxsmlj9urqumg0h9wzpqe"
        "cw7th56tdms40p2ny9q4ddvjsedzcplva53s"
    ),
}


def _sign(**changes: object) -> str:
    terms: dict[str, object] = {
        "prefix": "bcrt",
        "amount_msat": 12_345_000,
        "payment_hash": bytes.fromhex(SPEC_HASH),
        "payment_secret": b"\x11" * 32,
        "created_at_s": 1_496_314_658,
        "expiry_s": 600,
        "description": "a prompt",
    }
    return bolt11_codec.sign(SPEC_KEY, **(terms | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text, network, amount_msat, description, expiry_s",
    [
        (DONATION, "mainnet", None, "Please consider supporting this project", 3600),
        (COFFEE, "mainnet", 250_000_000, "1 cup coffee", 60),
        (NONSENSE, "mainnet", 250_000_000, "ナンセンス 1杯", 60),
        (HASHED, "mainnet", 2_000_000_000, None, 3600),
        (TESTNET, "testnet", 2_000_000_000, None, 3600),
        (ROUTE_HINTS, "mainnet", 2_000_000_000, None, 3600),
        (FEATURES, "mainnet", 2_500_000_000, "coffee beans", 3600),
        (FEATURES.upper(), "mainnet", 2_500_000_000, "coffee beans", 3600),
        (IGNORED_FIELDS, "mainnet", 2_500_000_000, "coffee beans", 3600),
    ],
)
def test_the_examples_of_the_specification_are_read(
    text: str, network: str, amount_msat: int | None, description: str | None, expiry_s: int
) -> None:
    invoice = bolt11_codec.decode(text)
    assert invoice.network == network
    assert invoice.amount_msat == amount_msat
    assert invoice.description == description
    assert invoice.payment_hash == SPEC_HASH
    assert invoice.payee_pubkey == SPEC_PAYEE
    assert invoice.created_at == SPEC_TIME
    assert invoice.expiry_s == expiry_s
    assert (invoice.expires_at - invoice.created_at).total_seconds() == expiry_s
    assert invoice.has_payment_secret == ("zyg3zyg3" in text.lower())


def test_an_amount_in_pico_bitcoin_and_a_final_cltv_are_read() -> None:
    invoice = bolt11_codec.decode(PICO)
    assert invoice.amount_msat == 967_878_534
    assert invoice.min_final_cltv == 10
    assert invoice.expiry_s == 604_800
    assert invoice.description is not None and invoice.description.startswith("Blockstream Store")


def test_a_hashed_description_is_its_hash() -> None:
    wanted = (
        b"One piece of chocolate cake, one icecream cone, one pickle, one slice of swiss cheese, "
        b"one slice of salami, one lollypop, one piece of cherry pie, one sausage, one cupcake, "
        b"and one slice of watermelon"
    )
    assert bolt11_codec.decode(HASHED).description_hash == sha256(wanted).hexdigest()


@pytest.mark.parametrize("text", BAD_VECTORS.values(), ids=BAD_VECTORS.keys())
def test_the_bad_examples_of_the_specification_are_refused(text: str) -> None:
    with pytest.raises(BadInvoice):
        bolt11_codec.decode(text)


@pytest.mark.parametrize(
    "network, prefix", [("regtest", "bcrt"), ("mainnet", "bc"), ("signet", "tbs")]
)
@pytest.mark.parametrize(
    "amount_msat", [1, 10, 999, 1000, 12_345, 100_000, 2_500_000_000, 100_000_000_000, None]
)
def test_what_is_signed_is_read_back(prefix: str, network: str, amount_msat: int | None) -> None:
    invoice = bolt11_codec.decode(_sign(prefix=prefix, amount_msat=amount_msat))
    assert invoice.network == network
    assert invoice.prefix == prefix
    assert invoice.amount_msat == amount_msat
    assert invoice.payee_pubkey == SPEC_PAYEE
    assert invoice.payment_hash == SPEC_HASH
    assert invoice.expiry_s == 600
    assert invoice.has_payment_secret
    assert invoice.min_final_cltv == 80


@settings(max_examples=40)
@given(
    amount_msat=st.integers(1, 10**14) | st.integers(1, 1000).map(lambda n: n * 1000),
    description=st.text(
        st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1, max_size=120
    ),
    expiry_s=st.integers(1, 10_000_000),
    created_at_s=st.integers(1_000_000_000, 4_000_000_000),
)
def test_the_bolt11_package_reads_what_we_sign(
    amount_msat: int, description: str, expiry_s: int, created_at_s: int
) -> None:
    key, payment_hash, secret = PrivateKey(), secrets.token_bytes(32), secrets.token_bytes(32)
    text = bolt11_codec.sign(
        key,
        prefix="bcrt",
        amount_msat=amount_msat,
        payment_hash=payment_hash,
        payment_secret=secret,
        created_at_s=created_at_s,
        expiry_s=expiry_s,
        description=description,
    )
    theirs, ours = bolt11.decode(text), bolt11_codec.decode(text)
    assert theirs.currency == ours.prefix == "bcrt"
    assert theirs.amount_msat == ours.amount_msat == amount_msat
    assert theirs.payment_hash == ours.payment_hash == payment_hash.hex()
    assert theirs.payment_secret == secret.hex()
    assert theirs.description == ours.description == description
    assert theirs.expiry == ours.expiry_s == expiry_s
    assert theirs.date == ours.created_at.timestamp() == created_at_s
    assert theirs.payee == ours.payee_pubkey == key.public_key.format().hex()
    assert theirs.min_final_cltv_expiry == ours.min_final_cltv == 80


def test_we_read_what_the_bolt11_package_signs() -> None:
    tags = bolt11.Tags.from_dict(
        {"payment_hash": SPEC_HASH, "payment_secret": "11" * 32, "description": "by the package"}
    )
    theirs = bolt11.Bolt11("bcrt", 1_700_000_000, tags, bolt11.MilliSatoshi(21_000))
    text = bolt11.encode(theirs, SPEC_KEY.to_hex())
    ours = bolt11_codec.decode(text)
    assert ours.amount_msat == 21_000
    assert ours.description == "by the package"
    assert ours.payee_pubkey == SPEC_PAYEE


def test_a_named_payee_must_have_signed() -> None:
    tags = bolt11.Tags.from_dict(
        {"payment_hash": SPEC_HASH, "payment_secret": "11" * 32, "description": "named"}
    )
    tags.add(bolt11.TagChar.payee, SPEC_PAYEE)
    theirs = bolt11.Bolt11("bcrt", 1_700_000_000, tags, bolt11.MilliSatoshi(21_000))
    signed_by_it = bolt11.encode(theirs, SPEC_KEY.to_hex(), keep_payee=True)
    assert bolt11_codec.decode(signed_by_it).payee_pubkey == SPEC_PAYEE
    signed_by_another = bolt11.encode(theirs, PrivateKey().to_hex(), keep_payee=True)
    with pytest.raises(BadInvoice, match="signature"):
        bolt11_codec.decode(signed_by_another)


def test_every_changed_character_is_noticed() -> None:
    text = _sign()
    for at in range(len(text)):
        changed = text[:at] + ("q" if text[at] != "q" else "p") + text[at + 1 :]
        with pytest.raises(BadInvoice):
            bolt11_codec.decode(changed)


@settings(max_examples=300)
@given(
    text=st.text(max_size=400)
    | st.text("qpzry9x8gf2tvdw0s3jn54khce6mua7l1", max_size=400).map("lnbcrt1".__add__)
    | st.just("ln" * 5000)
    | st.just("lnbc" + "9" * 6000 + "1qqqqqqq")
)
def test_strings_of_strangers_raise_nothing_else(text: str) -> None:
    with pytest.raises(BadInvoice):
        bolt11_codec.decode(text)


@settings(max_examples=200)
@given(
    groups=st.binary(min_size=0, max_size=600).map(lambda data: bytes(byte & 31 for byte in data)),
    amount=st.sampled_from(["", "1", "21000000", "99999999999999999999", "0", "01", "1p", "20p"]),
)
def test_valid_checksums_around_nonsense_raise_nothing_else(groups: bytes, amount: str) -> None:
    """The checksum keeps out accidents, not enemies: they can compute it too."""
    text = _with_checksum(f"lnbcrt{amount}", groups)
    try:
        invoice = bolt11_codec.decode(text)
    except BadInvoice:
        return
    assert invoice.network == "regtest"


def _with_checksum(human_readable: str, groups: bytes) -> str:
    expanded = bolt11_codec._expand(human_readable)
    checksum = bolt11_codec._polymod(expanded + groups + bytes(6)) ^ 1
    tail = bytes((checksum >> 5 * (5 - place)) & 31 for place in range(6))
    return human_readable + "1" + (groups + tail).translate(bolt11_codec._GROUP_TO_CHAR).decode()


def _signed_around(fields: bytes, amount: str = "10n") -> str:
    """An invoice with a valid signature over whatever fields."""
    human_readable = f"lnbcrt{amount}"
    signed = bytes(7) + fields
    message = human_readable.encode() + bolt11_codec._to_padded_bytes(signed)
    signature = bolt11_codec._from_bytes(SPEC_KEY.sign_recoverable(message))
    return _with_checksum(human_readable, signed + signature)


@pytest.mark.parametrize(
    "fields, complaint",
    [
        (b"", "no payment hash"),
        (b"\x01\x01\x13" + bytes(51), "no payment hash"),
        (b"\x01\x01\x14" + bytes(10), "cut short"),
        (b"\x01\x01", "cut short"),
        (b"\x01\x01\x14" + bytes(52) + b"\x0d\x00\x04" + b"\x1f" * 4, "UTF-8"),
        (b"\x01\x01\x14" + bytes(52) + b"\x0d\x00\x04" + bytes(4), "zero byte"),
        (b"\x01\x01\x14" + bytes(52) + b"\x06\x00\x10" + b"\x1f" * 16, "absurd"),
        (b"\x01\x01\x14" + bytes(52) + b"\x18\x1f\x1f" + b"\x1f" * 1023, "absurd"),
        (b"\x01\x01\x14" + bytes(52) + b"\x05\x00\x01" + b"\x04", "feature 2"),
        (b"\x01\x01\x14" + bytes(52) + b"\x13\x01\x15" + bytes(53), "signature"),
    ],
)
def test_signed_nonsense_is_refused(fields: bytes, complaint: str) -> None:
    with pytest.raises(BadInvoice, match=complaint):
        bolt11_codec.decode(_signed_around(fields))


def test_an_empty_expiry_field_is_zero_seconds_and_not_a_crash() -> None:
    fields = b"\x01\x01\x14" + bytes(52) + b"\x06\x00\x00"
    assert bolt11_codec.decode(_signed_around(fields)).expiry_s == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"amount_msat": 0},
        {"amount_msat": -1},
        {"amount_msat": bolt11_codec.MAX_AMOUNT_MSAT + 1},
        {"prefix": "xyz"},
        {"payment_hash": b"\x01" * 31},
        {"expiry_s": 0},
        {"created_at_s": -1},
        {"description": "x" * 640},
        {"description": None},
        {"description_hash": b"\x01" * 32},
        {"description": None, "description_hash": b"\x01" * 31},
    ],
)
def test_terms_no_invoice_can_hold_are_not_signed(changes: dict[str, object]) -> None:
    with pytest.raises(BadInvoice):
        _sign(**changes)


def test_the_shortest_amount_is_written() -> None:
    written = [
        _sign(amount_msat=amount_msat).partition("1p")[0]
        for amount_msat in (100_000_000_000, 250_000_000, 2_500_000, 100, 15)
    ]
    assert written[1:4] == ["lnbcrt2500u", "lnbcrt25u", "lnbcrt1n"]
    assert _sign(amount_msat=15).startswith("lnbcrt150p1")
    assert _sign(amount_msat=100_000_000_000).startswith("lnbcrt11")
