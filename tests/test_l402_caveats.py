"""The restrictions a token carries (L4-6, pitfall E63)."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billing import l402
from billing.errors import BadCredential
from billing.l402_caveats import RequestFacts, check_caveats, write_caveats
from tests.l402_tools import FACTS, NOW


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
