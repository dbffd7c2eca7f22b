"""L402 tokens: minting, the challenge, verification (L4-1 to L4-7, pitfall E62)."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import traceback
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pymacaroons import Macaroon, Verifier
from pymacaroons.serializers.binary_serializer import BinarySerializer

from billing import l402, macaroon
from billing.errors import BadCredential
from billing.l402 import Admission, MasterSecrets, challenge, mint, parse_authorization, verify
from billing.l402_caveats import RequestFacts
from tests.l402_tools import (
    FACTS,
    INVOICE,
    NOW,
    PAYMENT_HASH,
    PREIMAGE,
    SECRETS,
    TOKEN_ID,
    header,
    refusal,
    token_with,
)

VECTORS = json.loads((Path(__file__).parent / "vectors" / "l402_tokens.json").read_text("utf-8"))


def oracle(token: str) -> Macaroon:
    """The same token as pymacaroons reads it."""
    return BinarySerializer().deserialize_raw(base64.b64decode(token))


def oracle_text(made: Macaroon) -> str:
    return base64.b64encode(BinarySerializer().serialize_raw(made)).decode()


def root_key_of(token: str) -> bytes:
    identifier = oracle(token).identifier_bytes or b""
    master = hashlib.sha256  # HMAC written out, so that the oracle shares no code with us
    block = SECRETS.current.ljust(64, b"\0")
    inner = master(bytes(x ^ 0x36 for x in block) + b"l402-root" + identifier).digest()
    return master(bytes(x ^ 0x5C for x in block) + inner).digest()


# Minting


@pytest.mark.parametrize("vector", VECTORS["tokens"], ids=lambda vector: vector["name"])
def test_a_token_is_byte_for_byte_that_of_the_vectors(vector):
    secrets = MasterSecrets(bytes.fromhex(vector["master"]))
    made = mint(
        secrets,
        payment_hash=vector["payment_hash"],
        token_id=vector["token_id"],
        caveats=vector["caveats"],
    )
    assert made == vector["token"]
    proven = verify(secrets, parse_authorization([f"L402 {made}:{vector['preimage']}"]))
    assert (proven.payment_hash, proven.token_id) == (vector["payment_hash"], vector["token_id"])
    assert [caveat.decode() for caveat in proven.caveats] == vector["caveats"]


@given(
    caveats=st.lists(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=60),
        max_size=macaroon.MAX_CAVEATS,
    )
)
@settings(max_examples=60)
def test_pymacaroons_reads_and_verifies_what_we_mint(caveats):
    made = token_with(*caveats)
    read = oracle(made)
    assert read.location == "l402"
    assert [caveat.caveat_id_bytes.decode() for caveat in read.caveats] == caveats
    verifier = Verifier()
    verifier.satisfy_general(lambda predicate: True)
    assert verifier.verify(read, root_key_of(made))


def test_a_caveat_that_a_holder_appends_with_another_library_is_honoured():
    read = oracle(token_with("services=llm:0", "llm_max_tokens=512"))
    read.add_first_party_caveat("llm_max_tokens=100")
    proven = verify(SECRETS, parse_authorization([header(oracle_text(read))]))
    few, many = (RequestFacts(now_unix_s=NOW, capability="chat", max_tokens=n) for n in (100, 101))
    assert proven.admit(few, settled=True) == Admission(PAYMENT_HASH, TOKEN_ID)
    with pytest.raises(BadCredential, match="insufficient"):
        proven.admit(many, settled=True)


def test_the_token_is_deterministic_and_bound_to_hash_and_id():
    assert token_with("services=llm:0") == token_with("services=llm:0")
    other_id = mint(SECRETS, payment_hash=PAYMENT_HASH, token_id="00" * 32, caveats=[])
    assert other_id != token_with()


@pytest.mark.parametrize(
    "payment_hash, token_id",
    [(PAYMENT_HASH.upper(), TOKEN_ID), (PAYMENT_HASH, "c4" * 31), ("", "")],
)
def test_ids_that_could_not_be_read_back_are_not_minted(payment_hash, token_id):
    with pytest.raises(ValueError):
        mint(SECRETS, payment_hash=payment_hash, token_id=token_id, caveats=[])


def test_limits_hold_when_minting_as_when_reading():
    assert verify(SECRETS, parse_authorization([header(token_with(*["a=1"] * 32))]))
    with pytest.raises(ValueError):
        token_with(*["a=1"] * 33)
    with pytest.raises(ValueError):
        token_with("a=" + "x" * 4096)
    read = oracle(token_with(*["a=1"] * 32))
    read.add_first_party_caveat("a=1")
    assert refusal(SECRETS, header(oracle_text(read))) == "malformed"
    read = oracle(token_with("services=llm:0"))
    read.add_first_party_caveat("a=" + "x" * 4000)
    assert refusal(SECRETS, header(oracle_text(read))) == "malformed"


def test_a_short_master_secret_is_refused_without_showing_it():
    with pytest.raises(ValueError) as caught:
        MasterSecrets(b"hunter2")
    assert "hunter2" not in str(caught.value)
    with pytest.raises(ValueError):
        MasterSecrets(bytes(32), previous=b"")


# The challenge, as the clients in the field read it


def test_the_challenge_is_exactly_the_form_that_every_client_reads():
    token = token_with("services=llm:0")
    assert challenge(token, INVOICE) == (
        f'L402 macaroon="{token}", invoice="{INVOICE}", version="0", token="{token}"'
    )


def test_apertures_client_reads_the_challenge():
    """One space, `macaroon` then `invoice`, standard base64, version 0 identifier."""
    value = challenge(token_with("services=llm:0"), INVOICE)
    match = re.search(r'(LSAT|L402) macaroon="(.*?)", invoice="(.*?)"', value)
    assert match is not None and match[3] == INVOICE
    identifier = macaroon.decode(base64.b64decode(match[2], validate=True)).identifier
    assert identifier[:2] == b"\0\0" and identifier[2:34].hex() == PAYMENT_HASH


def test_lnget_reads_the_challenge():
    """Case-insensitive, flexible spaces, the same order; macaroon v2 binary."""
    value = challenge(token_with("services=llm:0"), INVOICE)
    match = re.match(
        r'(?i)\s*(?:L402|LSAT)\s+macaroon\s*=\s*"([^"]+)"\s*,\s*invoice\s*=\s*"([^"]+)"', value
    )
    assert match is not None
    assert base64.b64decode(match[1], validate=True)[0] == 2


def test_albys_client_reads_the_challenge_under_either_name():
    value = challenge(token_with("services=llm:0"), INVOICE)
    assert value.startswith("L402")
    parameters = dict(re.findall(r'(\w+)=(?:"([^"]*)")', value))
    assert parameters["token"] == parameters["macaroon"] == token_with("services=llm:0")
    assert parameters["invoice"] == INVOICE and parameters["version"] == "0"


@pytest.mark.parametrize("invoice", ['ln"bc', "lnbc1\r\nSet-Cookie: a=b", "", "lnbc 1", "lnbc1é"])
def test_an_invoice_that_would_break_the_header_is_refused(invoice):
    with pytest.raises(ValueError):
        challenge(token_with(), invoice)


def test_a_token_that_would_break_the_header_is_refused():
    with pytest.raises(ValueError):
        challenge('AA", invoice="lnbc1evil', INVOICE)


# Verification


def test_a_wrong_preimage_is_told_from_a_forged_token():
    assert refusal(SECRETS, header(token_with(), preimage=bytes(32))) == "wrong_preimage"
    assert refusal(MasterSecrets(bytes(32)), header(token_with())) == "forged"
    assert not {"wrong_preimage", "forged"} & l402.BUY_AGAIN


def test_the_previous_master_secret_still_verifies_and_an_older_one_does_not():
    old = token_with()
    newer = MasterSecrets(b"n" * 32, previous=SECRETS.current)
    assert verify(newer, parse_authorization([header(old)])).token_id == TOKEN_ID
    assert token_with(secrets=newer) != old
    newest = MasterSecrets(b"m" * 32, previous=newer.current)
    assert refusal(newest, header(old)) == "forged"
    assert refusal(SECRETS, header(token_with(secrets=newer))) == "forged"


def test_every_flipped_bit_of_a_token_is_noticed():
    """Only the location is not authenticated, and nothing is decided by it."""
    data = base64.b64decode(token_with("services=llm:0", "llm_max_tokens=100"))
    location = range(3, 7)
    assert data[3:7] == b"l402"
    for at in range(len(data)):
        for bit in range(8):
            changed = bytearray(data)
            changed[at] ^= 1 << bit
            value = header(base64.b64encode(bytes(changed)).decode())
            if at in location:
                assert verify(SECRETS, parse_authorization([value])).payment_hash == PAYMENT_HASH
            else:
                assert refusal(SECRETS, value) in {"malformed", "forged", "wrong_preimage"}


def test_a_caveat_cannot_be_taken_off_or_moved():
    read = macaroon.decode(base64.b64decode(token_with("llm_max_tokens=1", "llm_model=a")))
    for caveats in [read.caveats[:1], read.caveats[1:], read.caveats[::-1], ()]:
        cut = macaroon.Macaroon(read.location, read.identifier, caveats, read.signature)
        token = base64.b64encode(macaroon.encode(cut)).decode()
        assert refusal(SECRETS, header(token)) == "forged"


def test_a_token_of_another_invoice_does_not_open_with_this_preimage():
    other_hash = hashlib.sha256(b"x" * 32).hexdigest()
    other = mint(SECRETS, payment_hash=other_hash, token_id=TOKEN_ID, caveats=[])
    assert refusal(SECRETS, header(other)) == "wrong_preimage"


def test_the_first_good_token_of_several_counts():
    other_hash = hashlib.sha256(b"x" * 32).hexdigest()
    other = mint(SECRETS, payment_hash=other_hash, token_id="00" * 32, caveats=[])
    assert verify(SECRETS, parse_authorization([header(f"{other},{token_with()}")])).token_id == (
        TOKEN_ID
    )


def test_nothing_is_admitted_before_our_own_record_says_settled():
    """E62: a preimage can be known before, and without, a payment."""
    proven = verify(SECRETS, parse_authorization([header(token_with("services=llm:0"))]))
    with pytest.raises(BadCredential, match="unpaid"):
        proven.admit(FACTS, settled=False)
    assert proven.admit(FACTS, settled=True) == Admission(PAYMENT_HASH, TOKEN_ID)


def test_neither_preimage_nor_token_shows_in_a_text_an_error_or_a_repr():
    token = token_with("services=llm:0", "llm_quote=q1")
    signature = base64.b64decode(token)[-32:]
    secrets = [token, token[:40], PREIMAGE.hex(), repr(PREIMAGE), repr(signature), signature.hex()]
    credentials = parse_authorization([header(token)])
    shown = [repr(credentials), str(credentials), repr(SECRETS), repr(verify(SECRETS, credentials))]
    failures = [header(token, preimage=b"\1" * 32), header(token[:-4]), header(token) + "0"]
    for value in failures:
        try:
            verify(SECRETS, parse_authorization([value]))
        except BadCredential as error:
            shown += ["".join(traceback.format_exception(error)), repr(error)]
    assert len(shown) == 4 + 2 * len(failures)
    shown += [repr(MasterSecrets(b"k" * 32))]
    for text in shown:
        assert not any(secret in text for secret in [*secrets, "kkkk", repr(SECRETS.current)])
