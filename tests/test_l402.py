"""L402 tokens, their challenge and their credentials (L4-1 to L4-7, pitfalls E55, E62 and E63)."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import traceback
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pymacaroons import Macaroon, Verifier
from pymacaroons.serializers.binary_serializer import BinarySerializer

from billing import l402, macaroon
from billing.errors import BadCredential
from billing.l402 import Admission, MasterSecrets, challenge, mint, parse_authorization, verify
from billing.l402_caveats import RequestFacts, check_caveats, write_caveats

VECTORS = json.loads((Path(__file__).parent / "vectors" / "l402_tokens.json").read_text("utf-8"))
SECRETS = MasterSecrets(bytes(range(32)))
PREIMAGE = bytes([7]) * 32
PAYMENT_HASH = hashlib.sha256(PREIMAGE).hexdigest()
TOKEN_ID = "c4" * 32
NOW = 1_800_000_000
FACTS = RequestFacts(now_unix_s=NOW, capability="chat")
INVOICE = "lnbcrt10u1pj" + "q" * 40


def token_with(*caveats: str, secrets: MasterSecrets = SECRETS) -> str:
    return mint(secrets, payment_hash=PAYMENT_HASH, token_id=TOKEN_ID, caveats=caveats)


def header(token: str, preimage: bytes = PREIMAGE, scheme: str = "L402") -> str:
    return f"{scheme} {token}:{preimage.hex()}"


def refusal(secrets: MasterSecrets, *values: str) -> str:
    with pytest.raises(BadCredential) as caught:
        verify(secrets, parse_authorization(values))
    return caught.value.reason


def oracle(token: str) -> Macaroon:
    """The same token as pymacaroons reads it."""
    return BinarySerializer().deserialize_raw(base64.b64decode(token))


def oracle_text(made: Macaroon) -> str:
    return base64.b64encode(BinarySerializer().serialize_raw(made)).decode()


def root_key_of(token: str) -> bytes:
    identifier = oracle(token).identifier_bytes
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
@settings(max_examples=60, deadline=None)
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


# Reading Authorization headers


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


def test_a_third_party_caveat_is_refused_since_nobody_could_discharge_it():
    identifier = bytes(66)
    data = b"\2\2\x42" + identifier + b"\0" + b"\1\1a\2\1b\4\1c\0" + b"\0\6\x20" + bytes(32)
    assert refusal(SECRETS, header(base64.b64encode(data).decode())) == "malformed"


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


# Caveats


def refused(caveats: list[str], facts: RequestFacts = FACTS) -> str | None:
    try:
        check_caveats([caveat.encode() for caveat in caveats], facts)
    except BadCredential as error:
        return error.reason
    return None


def facts(**changed) -> RequestFacts:
    return RequestFacts(**{"now_unix_s": NOW, "capability": "chat"} | changed)


DIGEST = "9a" * 32

WITHIN_AND_BEYOND = [
    ("llm_capabilities=chat,embeddings", facts(), facts(capability="withdraw")),
    (f"llm_valid_until={NOW}", facts(), facts(now_unix_s=NOW + 1)),
    ("llm_quote=q1", facts(quote_id="q1"), facts(quote_id="q2")),
    ("llm_model=a", facts(models=frozenset({"a"})), facts(models=frozenset({"a", "b"}))),
    ("llm_max_tokens=100", facts(max_tokens=100), facts(max_tokens=101)),
    ("llm_max_multiplier=2.5", facts(multiplier_milli=2500), facts(multiplier_milli=2501)),
    ("llm_budget_msat=9", facts(spend_msat=9), facts(spend_msat=10)),
    (
        f"llm_request_sha256={DIGEST.upper()}",
        facts(request_sha256=DIGEST),
        facts(request_sha256="00" * 32),
    ),
]


@pytest.mark.parametrize("caveat, within, beyond", WITHIN_AND_BEYOND)
def test_each_caveat_admits_what_is_within_it_and_refuses_what_is_beyond(caveat, within, beyond):
    assert refused([caveat], within) is None
    reason = refused([caveat], beyond)
    assert reason == ("expired" if "valid_until" in caveat else "insufficient")
    assert reason in l402.BUY_AGAIN


@pytest.mark.parametrize("caveat", [c for c, _, _ in WITHIN_AND_BEYOND if "valid" not in c][1:])
def test_a_fact_that_the_request_lacks_keeps_within_no_caveat(caveat):
    assert refused([caveat], facts(capability="withdraw")) == "insufficient"


def test_a_service_of_another_name_is_the_wrong_service():
    assert refused(["services=llm:0"]) is None
    assert refused(["services=other:0,llm:0"]) is None
    assert refused(["services=other:0"]) == "wrong_service"


@pytest.mark.parametrize(
    "first, stricter, weaker",
    [
        ("services=llm:1,b:0", "services=llm:0", "services=llm:1,c:0"),
        ("services=llm:0", "services=llm:0", "services=llm:1"),
        ("llm_capabilities=chat,embeddings", "llm_capabilities=chat", "llm_capabilities=chat,x"),
        (f"llm_valid_until={NOW + 9}", f"llm_valid_until={NOW}", f"llm_valid_until={NOW + 10}"),
        ("llm_quote=q", "llm_quote=q", "llm_quote=r"),
        ("llm_model=a", "llm_model=a", "llm_model=b"),
        ("llm_max_tokens=9", "llm_max_tokens=8", "llm_max_tokens=10"),
        ("llm_max_multiplier=2", "llm_max_multiplier=1.999", "llm_max_multiplier=2.001"),
        ("llm_budget_msat=9", "llm_budget_msat=9", "llm_budget_msat=10"),
        (
            f"llm_request_sha256={DIGEST}",
            f"llm_request_sha256={DIGEST}",
            "llm_request_sha256=" + "0" * 64,
        ),
    ],
)
def test_a_repeat_must_be_at_least_as_strict(first, stricter, weaker):
    everything = facts(
        quote_id="q",
        models=frozenset({"a"}),
        max_tokens=8,
        multiplier_milli=1000,
        spend_msat=1,
        request_sha256=DIGEST,
    )
    assert refused([first, stricter], everything) is None
    assert refused([first, "note=1", weaker], everything) == "malformed"


def test_the_strictest_of_several_repeats_decides():
    caveats = ["llm_max_tokens=9", "llm_max_tokens=7", "llm_max_tokens=7"]
    assert refused(caveats, facts(max_tokens=7)) is None
    assert refused(caveats, facts(max_tokens=8)) == "insufficient"
    assert refused([*caveats, "llm_max_tokens=8"], facts(max_tokens=1)) == "malformed"


@pytest.mark.parametrize(
    "caveat",
    [
        "llm_colour=red",  # E63: a restriction unknown to us must not be void in silence
        "llm_",
        "llm_max_tokens",
        "services",
        "services=",
        "services=llm",
        "services=llm:x",
        "services=llm:0,",
        "services=llm:0,llm:0",
        "llm_max_tokens=",
        "llm_max_tokens=-1",
        "llm_max_tokens=1e3",
        "llm_max_tokens=٣",
        "llm_max_tokens=1" + "0" * 30,
        "llm_max_multiplier=NaN",
        "llm_max_multiplier=Infinity",
        "llm_max_multiplier=1,5",
        "llm_capabilities=",
        "llm_capabilities=chat,,embeddings",
        "llm_request_sha256=" + "9" * 63,
        "llm_quote=",
        "llm_quote=a\nb",
        "llm_max_tokens =5",
        " llm_max_tokens=5",
        "LLM_MAX_TOKENS=5",
        "Services=llm:0",
    ],
)
def test_a_caveat_of_ours_that_cannot_be_read_is_refused(caveat):
    assert refused([caveat]) == "malformed"


@pytest.mark.parametrize(
    "caveat", ["", "time < 2030", "ip=1.2.3.4", "chat_valid_until=1", "preimage=00", "=", "ll_m=1"]
)
def test_caveats_of_others_are_skipped(caveat):
    """L4-6: unknown caveats are skipped."""
    assert refused([caveat]) is None


def test_a_caveat_that_is_no_text_is_skipped_unless_it_begins_like_ours():
    check_caveats([b"\xff\xfe=1"], FACTS)
    with pytest.raises(BadCredential):
        check_caveats([b"llm_\xff=1"], FACTS)


def test_what_we_write_we_read_back_and_it_restricts():
    written = write_caveats(
        capabilities=["chat", "embeddings"],
        valid_until_unix_s=NOW,
        quote_id="q1",
        model="repo/name:Q4_K_M",
        max_tokens=512,
        max_multiplier=Decimal("1E+1"),
        budget_msat=25_000,
        request_sha256=DIGEST,
    )
    assert written[0] == "services=llm:0" and len(written) == 9
    request = facts(
        quote_id="q1",
        models=frozenset({"repo/name:Q4_K_M"}),
        max_tokens=512,
        multiplier_milli=10_000,
        spend_msat=25_000,
        request_sha256=DIGEST,
    )
    assert refused(list(written), request) is None
    assert refused(list(written), facts()) == "insufficient"
    assert write_caveats() == ("services=llm:0",)


@pytest.mark.parametrize(
    "wrong",
    [
        {"capabilities": ["a,b"]},
        {"capabilities": []},
        {"quote_id": ""},
        {"model": "a\nb"},
        {"max_tokens": -1},
        {"max_multiplier": Decimal("NaN")},
        {"request_sha256": "xyz"},
    ],
)
def test_a_caveat_that_could_not_be_read_back_is_not_written(wrong):
    with pytest.raises(ValueError):
        write_caveats(**wrong)


@given(st.lists(st.binary(max_size=40), max_size=8))
def test_no_caveat_bytes_can_break_the_check(caveats):
    try:
        check_caveats(caveats, FACTS)
    except BadCredential as error:
        assert error.reason in {"malformed", "wrong_service", "expired", "insufficient"}


@given(st.lists(st.integers(0, 50), min_size=1, max_size=6), st.integers(0, 50))
def test_a_longer_chain_never_admits_more(limits, asked):
    """Whatever a holder appends, the token opens no request that it did not open before."""
    request = facts(max_tokens=asked)
    chain = [f"llm_max_tokens={limit}" for limit in limits]
    for shorter in range(len(chain)):
        if refused(chain[: shorter + 1], request) is None:
            assert refused(chain[:shorter], request) is None
