"""Reading Authorization headers (L4-2, L4-3, pitfall E55)."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billing import l402, macaroon
from billing.errors import BadCredential
from billing.l402 import parse_authorization, verify
from tests.l402_tools import PAYMENT_HASH, PREIMAGE, SECRETS, TOKEN_ID, header, refusal, token_with


def spelled(token: str, spelling: str) -> str:
    return {
        "standard": token,
        "unpadded": token.rstrip("="),
        "url-safe": token.replace("+", "-").replace("/", "_"),
        "url-safe, unpadded": token.replace("+", "-").replace("/", "_").rstrip("="),
    }[spelling]


SPELLINGS = ["standard", "unpadded", "url-safe", "url-safe, unpadded"]


@pytest.mark.parametrize("scheme", ["L402", "l402", "LSAT", "lsat", "LsAt"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_scheme_and_base64_come_in_any_spelling(scheme, spelling):
    """L4-2, L4-3: case-insensitive, LSAT too; E55: not only lower case."""
    token = next(  # one whose base64 shows both alphabets and padding
        made
        for made in (token_with(f"n={n}") for n in range(1000))
        if "+" in made and "/" in made and made.endswith("=")
    )
    value = header(spelled(token, spelling), scheme=scheme)
    assert verify(SECRETS, parse_authorization([value])).payment_hash == PAYMENT_HASH


def test_the_preimage_may_be_upper_case():
    value = f"L402 {token_with()}:{PREIMAGE.hex().upper()}"
    assert verify(SECRETS, parse_authorization([value])).token_id == TOKEN_ID


OTHERS = ["Bearer sk-abcdef", "Basic dXNlcjpwYXNz", 'Digest username="a, L402 b:c", nc=1']


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("shape", ["before", "after", "joined before", "joined after", "both"])
def test_other_schemes_may_stand_beside_it_in_either_order(other, shape):
    """E55: aperture keeps only the last header, so a second scheme hides the credential."""
    ours = header(token_with())
    values = {
        "before": [other, ours],
        "after": [ours, other],
        "joined before": [f"{other}, {ours}"],
        "joined after": [f"{ours}, {other}"],
        "both": [f"{other},{ours},{other}"],
    }[shape]
    credentials = parse_authorization(values)
    assert len(credentials) == 1
    assert verify(SECRETS, credentials).payment_hash == PAYMENT_HASH


def test_apertures_client_sends_the_same_token_twice_and_it_counts_once():
    token = token_with()
    found = parse_authorization([header(token, scheme="LSAT"), header(token, scheme="L402")])
    assert len(found) == 1


def test_no_credential_is_an_empty_list_and_no_error():
    assert parse_authorization([]) == []
    assert parse_authorization(OTHERS) == []
    assert parse_authorization(["", " ", ",,", "Bearer L402", "L402token:x"]) == []


def test_one_readable_token_among_several_is_enough():
    foreign = base64.b64encode(b'{"another":"format"}').decode()
    value = f"L402 {foreign}, {token_with()} ,{foreign}:{PREIMAGE.hex()}"
    [credential] = parse_authorization([value])
    assert [token.token_id for token in credential.tokens] == [TOKEN_ID]


def test_more_tokens_than_a_few_are_refused():
    tokens = ",".join([token_with()] * (l402.MAX_TOKENS + 1))
    assert refusal(SECRETS, header(tokens)) == "malformed"
    assert parse_authorization([header(",".join([token_with()] * l402.MAX_TOKENS))])


def test_only_the_first_few_credentials_are_looked_at():
    """Each costs HMACs, and a header is cheap to write."""
    wrong = [header(token_with(f"n={n}"), preimage=bytes([n]) * 32) for n in range(1, 5)]
    assert len(parse_authorization([*wrong, header(token_with())])) == l402.MAX_CREDENTIALS
    assert refusal(SECRETS, *wrong, header(token_with())) == "wrong_preimage"
    assert verify(SECRETS, parse_authorization([*wrong[:3], header(token_with())]))


def test_a_broken_credential_beside_a_good_one_does_no_harm():
    good = header(token_with())
    for values in (["L402 broken", good], [good, "L402 broken"], [f"L402 broken, {good}"]):
        assert verify(SECRETS, parse_authorization(values)).token_id == TOKEN_ID


@pytest.mark.parametrize(
    "value",
    [
        "L402",
        "L402 ",
        "L402 :",
        f"L402 :{PREIMAGE.hex()}",
        f"L402 {token_with()}",
        f"L402 {token_with()}:",
        f"L402 {token_with()}:{PREIMAGE.hex()[:-1]}",
        f"L402 {token_with()}:{PREIMAGE.hex()}0",
        f"L402 {token_with()}:{PREIMAGE.hex()} more",
        f"L402 {token_with()}:{'٧' * 64}",
        f"L402 {token_with()}:{'zz' * 32}",
        f"L402 {token_with()[:-5]}:{PREIMAGE.hex()}",
        f"L402 {token_with()}====:{PREIMAGE.hex()}",
        f"L402 {token_with()}, Bearer sk:{PREIMAGE.hex()}",  # the preimage is another scheme's
        f"L402 !{token_with()}:{PREIMAGE.hex()}",
        f"L402 {'A' * 100_000}:{PREIMAGE.hex()}",
        f"L402 {base64.b64decode(token_with()).hex()}:{PREIMAGE.hex()}",
    ],
)
def test_a_credential_that_cannot_be_read_is_malformed(value):
    assert refusal(SECRETS, value) == "malformed"
    assert "malformed" not in l402.BUY_AGAIN


def raw(identifier: bytes, tail: bytes = b"") -> str:
    data = macaroon.encode(macaroon.Macaroon(b"l402", identifier, (), bytes(32))) + tail
    return base64.b64encode(data).decode()


@pytest.mark.parametrize(
    "token",
    [
        raw(bytes(65)),
        raw(bytes(67)),
        raw(b""),
        raw(b"\0\1" + bytes(64)),  # a version that does not exist yet
        raw(bytes(66), tail=b"\0"),  # bytes after the signature
        base64.b64encode(b"\2\2\xff\xff\xff\xff\x0f").decode(),  # a length beyond everything
        base64.b64encode(b"\2\2\x82\x00aa\0\0").decode(),  # a length in two bytes that fits one
        base64.b64encode(b"\1\2\3").decode(),  # another version of the format
        base64.b64encode(b'{"v":2}').decode(),  # its JSON form
    ],
)
def test_a_macaroon_that_is_not_our_kind_is_malformed(token):
    assert refusal(SECRETS, header(token)) == "malformed"


def test_a_length_in_more_bytes_than_it_needs_is_malformed():
    """Otherwise one token could be written in several ways."""
    data = base64.b64decode(token_with())
    assert data.count(b"\2\x42") == 1
    longer = base64.b64encode(data.replace(b"\2\x42", b"\2\xc2\0")).decode()
    assert refusal(SECRETS, header(longer)) == "malformed"


def test_a_third_party_caveat_is_refused_since_nobody_could_discharge_it():
    identifier = bytes(66)
    data = b"\2\2\x42" + identifier + b"\0" + b"\1\1a\2\1b\4\1c\0" + b"\0\6\x20" + bytes(32)
    assert refusal(SECRETS, header(base64.b64encode(data).decode())) == "malformed"


# Fuzz


@given(st.lists(st.text(max_size=200), max_size=4))
def test_no_header_text_can_do_worse_than_be_malformed(values):
    try:
        credentials = parse_authorization(values)
    except BadCredential as error:
        assert error.reason == "malformed"
    else:
        assert all(credential.tokens for credential in credentials)


@given(
    st.lists(
        st.sampled_from(["L402 ", "LSAT", ",", ":", '"', "\\", " ", "ab" * 32, "AgJC", "=", "\0"])
    )
)
def test_no_arrangement_of_the_grammars_pieces_can_either(pieces):
    try:
        parse_authorization(["".join(pieces)])
    except BadCredential as error:
        assert error.reason == "malformed"


@given(st.binary(max_size=300))
def test_no_bytes_can_pass_for_a_signed_token(data):
    for body in (data, b"\2\2\x42" + data):
        value = header(base64.b64encode(body).decode() or "A")
        assert refusal(SECRETS, value) in {"malformed", "wrong_preimage", "forged"}


@given(
    scheme=st.sampled_from(["L402", "lsat", "LSAT", "l402"]),
    spelling=st.sampled_from(SPELLINGS),
    gap=st.sampled_from([",", ", ", " , ", ",\t"]),
    before=st.lists(st.sampled_from(OTHERS), max_size=3),
    after=st.lists(st.sampled_from(OTHERS), max_size=3),
    joined=st.booleans(),
    companions=st.integers(0, 3),
)
def test_every_well_formed_arrangement_is_read(
    scheme, spelling, gap, before, after, joined, companions
):
    foreign = base64.b64encode(b"not ours").decode()
    tokens = gap.join([*[foreign] * companions, spelled(token_with("a=1"), spelling)])
    values = [*before, header(tokens, scheme=scheme), *after]
    credentials = parse_authorization([gap.join(values)] if joined else values)
    assert verify(SECRETS, credentials).token_id == TOKEN_ID
