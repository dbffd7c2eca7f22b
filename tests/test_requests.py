"""What a request body may say, and that everything else is refused with the field at fault named."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.errors import BadRequest
from router.requests import Limits, Request, Terms, parse, request_hash, terms_from
from worker.protocol import ChatSpec, CompletionSpec, EmbeddingSpec, Kind

LIMITS = Limits()
HELLO = [{"role": "user", "content": "Hello"}]


def chat(**fields: Any) -> Request:
    return parse(Kind.CHAT, {"model": "m", "messages": HELLO, **fields}, LIMITS)


def completion(**fields: Any) -> Request:
    return parse(Kind.COMPLETION, {"model": "m", "prompt": "Hello", **fields}, LIMITS)


def embedding(**fields: Any) -> Request:
    return parse(Kind.EMBEDDING, {"model": "m", "input": "Hello", **fields}, LIMITS)


def param_of(refused: pytest.ExceptionInfo[BadRequest]) -> str | None:
    return refused.value.facts.get("param")


NOT_NUMBERS = (math.nan, math.inf, -math.inf, True, False, "5", "", [], {}, 1.5)


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens", "n"])
@pytest.mark.parametrize("value", [0, -1, -(10**30), 10**9, 1e29, *NOT_NUMBERS], ids=repr)
def test_a_count_that_is_no_positive_number_within_bounds_is_refused(name: str, value: Any):
    """E6-7, E2-20: negative, zero, huge, NaN."""
    with pytest.raises(BadRequest) as refused:
        chat(**{name: value})
    assert param_of(refused) == name


@pytest.mark.parametrize("name", ["max_fee_msat", "offer_msat"])
@pytest.mark.parametrize("value", [-1, 10**19, *NOT_NUMBERS], ids=repr)
def test_an_amount_that_is_no_whole_number_of_msat_is_refused(name: str, value: Any):
    with pytest.raises(BadRequest) as refused:
        chat(**{name: value})
    assert param_of(refused) == name


@pytest.mark.parametrize("value", [0, -1, 86_401, *NOT_NUMBERS], ids=repr)
def test_a_wait_outside_its_bounds_is_refused(value: Any):
    with pytest.raises(BadRequest) as refused:
        chat(max_wait_s=value)
    assert param_of(refused) == "max_wait_s"


@pytest.mark.parametrize(
    "value",
    [
        0,
        0.999,
        "0.5",
        -1,
        "-2",
        1000.001,
        1001,
        "1e3",
        "NaN",
        math.nan,
        math.inf,
        True,
        "",
        [],
        "x",
    ],
    ids=repr,
)
def test_a_multiplier_below_one_or_over_the_limit_or_no_number_is_refused(value: Any):
    with pytest.raises(BadRequest) as refused:
        chat(fee_multiplier=value)
    assert param_of(refused) == "fee_multiplier"


def test_a_multiplier_is_read_exactly():
    assert chat(fee_multiplier=1.1).terms.multiplier == Decimal("1.1")
    assert chat(fee_multiplier="1000").terms.multiplier == 1000
    assert chat(fee_multiplier=1).terms.multiplier == 1
    assert chat().terms.multiplier is None


def test_whole_floats_are_whole_numbers_as_javascript_writes_them():
    assert chat(max_tokens=64.0).max_tokens == 64
    assert len(chat(n=2.0).items) == 2


def test_the_newer_name_of_max_tokens_wins():
    assert chat(max_tokens=5, max_completion_tokens=7).max_tokens == 7
    assert chat(max_tokens=None).max_tokens is None


@pytest.mark.parametrize("biases", [{"x": 1}, {"-1": 1}, {"1.5": 1}, {"": 1}, {"²": 1}], ids=repr)
def test_biases_for_what_can_be_no_token_are_refused_before_they_cost_anything(biases: Any):
    with pytest.raises(BadRequest) as refused:
        chat(logit_bias=biases)
    assert param_of(refused) == "logit_bias"
    assert chat(logit_bias={"17": -100}).items[0].spec.sampling.logit_bias == {"17": -100}  # type: ignore[union-attr]


# --- models and copies ----------------------------------------------------------------------------


@pytest.mark.parametrize("model", [None, "", 5, True, ["m"], {"id": "m"}, "m" * 201], ids=repr)
def test_a_model_that_is_no_name_is_refused(model: Any):
    with pytest.raises(BadRequest) as refused:
        chat(model=model)
    assert param_of(refused) == "model"


@pytest.mark.parametrize(
    "models", [[], ["a", "b", "c", "d"], ["a", "a"], ["a", 5], "a", [""], {"a": 1}], ids=repr
)
def test_models_are_one_to_three_different_names(models: Any):
    with pytest.raises(BadRequest):
        chat(models=models)


def test_each_model_and_each_copy_is_a_job_of_its_own():
    asked = chat(models=["a", "b"], n=2)
    assert [item.spec.model for item in asked.items] == ["a", "a", "b", "b"]
    assert len(chat(n=128).items) == 128


def test_a_request_makes_no_more_jobs_than_the_limit():
    with pytest.raises(BadRequest):
        chat(models=["a", "b"], n=65)
    with pytest.raises(BadRequest):
        completion(prompt=["x"] * 129)
    with pytest.raises(BadRequest):
        completion(prompt=["x"] * 65, n=2)


def test_the_copies_of_a_seeded_request_draw_from_different_seeds():
    seeds = [item.spec.sampling.seed for item in chat(n=3, seed=7).items]  # type: ignore[union-attr]
    assert seeds == [7, 8, 9]
    for seed in (2**63 - 1, -(2**63)):
        drawn = [i.spec.sampling.seed for i in chat(n=3, seed=seed).items]  # type: ignore[union-attr]
        assert len(set(drawn)) == 3
        # They must be read back at the worker, which takes 64 bits.
        assert [ChatSpec.model_validate_json(i.spec.model_dump_json()) for i in chat(n=3).items]
        assert all(-(2**63) <= s < 2**63 for s in drawn if s is not None)


def test_embeddings_have_no_copies():
    assert len(embedding(n=3).items) == 1


# --- prompts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        "Hello",
        {},
        [None],
        ["Hello"],
        [{"content": "no role"}],
        [{"role": "wizard", "content": "x"}],
        [{"role": 5, "content": "x"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": [5]}],
        [{"role": "user", "content": {"text": "x"}}],
        [{"role": "user"}],
        [{"role": "user", "content": ""}],
        [{"role": "user", "content": []}],
        [{"role": "user", "content": [""]}],
        [{"role": "user", "content": [{"type": "text", "text": ""}]}],
    ],
    ids=repr,
)
def test_messages_that_say_nothing_or_are_none_are_refused(messages: Any):
    with pytest.raises(BadRequest) as refused:
        chat(messages=messages)
    assert param_of(refused) == "messages"


def test_an_empty_message_beside_one_that_says_something_is_fine():
    asked = chat(messages=[{"role": "system", "content": ""}, *HELLO])
    assert asked.items[0].prompt_tokens == 2
    image = {"type": "image_url", "image_url": {"url": "https://x.test/y.png"}}
    assert chat(messages=[{"role": "user", "content": [image]}]).items[0].prompt_tokens == 765


def test_a_long_prompt_is_not_stored_a_hundred_times_before_it_is_paid():
    """A picture has megabytes and counts 765 tokens."""
    picture = "data:image/png;base64," + "A" * 1_000_000
    messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": picture}}]}]
    assert len(chat(messages=messages, n=10).items) == 10
    with pytest.raises(BadRequest) as refused:
        chat(messages=messages, n=100)
    assert param_of(refused) == "n"
    assert len(chat(messages=HELLO, n=100).items) == 100


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest/meta-data"}},
        {"type": "image_url", "image_url": "https://127.0.0.1/x.png"},
        {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
        {"type": "video_url", "video_url": {"url": "https://router.internal:8443/"}},
        {"type": "image", "source": {"type": "url", "url": "https://localhost/x.png"}},
        {"type": "image_url", "image_url": [{"url": "https://user:secret@x.test/y.png"}]},
    ],
    ids=["metadata", "loopback", "file", "port", "source", "password"],
)
def test_a_message_makes_no_worker_fetch_what_is_not_public(part: Any):
    """Engines fetch the URLs in messages, from inside whatever network they are in."""
    with pytest.raises(BadRequest) as refused:
        chat(messages=[{"role": "user", "content": [{"type": "text", "text": "Look."}, part]}])
    assert param_of(refused) == "messages"


@pytest.mark.parametrize(
    "prompt", [None, "", [], [""], ["a", ""], [1, "a"], [-1], [2**31], 5, {}, [True]], ids=repr
)
def test_a_prompt_that_is_empty_or_neither_text_nor_tokens_is_refused(prompt: Any):
    with pytest.raises(BadRequest) as refused:
        completion(prompt=prompt)
    assert param_of(refused) == "prompt"


def test_several_prompts_are_several_jobs_in_their_order():
    asked = completion(prompt=["one", [1, 2, 3]], n=2)
    specs = [item.spec for item in asked.items]
    assert all(isinstance(spec, CompletionSpec) for spec in specs)
    assert [spec.prompt for spec in specs] == ["one", "one", [1, 2, 3], [1, 2, 3]]  # type: ignore[union-attr]
    assert [item.prompt_tokens for item in asked.items] == [1, 1, 3, 3]


def test_token_ids_alone_are_one_prompt():
    assert [i.spec.prompt for i in completion(prompt=[1, 2]).items] == [[1, 2]]  # type: ignore[union-attr]
    assert completion(prompt="x", echo=True).items[0].spec.echo is True  # type: ignore[union-attr]
    with pytest.raises(BadRequest) as refused:
        completion(prompt=[1, 2], echo=True)
    assert param_of(refused) == "echo"


@pytest.mark.parametrize(
    "given",
    [None, "", [], [""], [[]], 5, [1.5], ["a"] * 2049, [True], [-1]],
    ids=lambda v: repr(v)[:20],
)
def test_an_input_that_is_empty_or_too_long_is_refused(given: Any):
    with pytest.raises(BadRequest) as refused:
        embedding(input=given)
    assert param_of(refused) == "input"


def test_all_inputs_of_an_embedding_are_one_job():
    (item,) = embedding(input=["one", [5, 6]], encoding_format="base64").items
    assert isinstance(item.spec, EmbeddingSpec)
    assert item.spec.input == ["one", [5, 6]]
    assert item.prompt_tokens == 3
    assert embedding(encoding_format="base64").base64_embeddings
    assert not embedding(encoding_format="float").base64_embeddings
    with pytest.raises(BadRequest) as refused:
        embedding(encoding_format="hex")
    assert param_of(refused) == "encoding_format"


# --- the other fields -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stop",
    [5, True, {}, [5], ["a", None], ["x"] * 17, ["x" * 501], ["é" * 251]],
    ids=lambda v: repr(v)[:20],
)
def test_stops_of_the_wrong_type_number_or_length_are_refused(stop: Any):
    with pytest.raises(BadRequest) as refused:
        chat(stop=stop)
    assert param_of(refused) == "stop"


@pytest.mark.parametrize(
    "stop, kept", [(None, []), ("END", ["END"]), (["a", "", "b"], ["a", "b"]), ("", []), ([], [])]
)
def test_stops_are_a_text_or_a_list_and_empty_ones_stop_nothing(stop: Any, kept: list[str]):
    assert chat(stop=stop).items[0].spec.stop == kept  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "name, value",
    [
        ("temperature", -0.1),
        ("temperature", 6),
        ("temperature", "0.5"),
        ("temperature", True),
        ("temperature", math.nan),
        ("top_p", 1.1),
        ("top_k", -1),
        ("top_k", 1.5),
        ("presence_penalty", 3),
        ("frequency_penalty", -3),
        ("seed", "7"),
        ("seed", 2**63),
        ("seed", 1e29),
        ("logit_bias", {"5": "much"}),
        ("logit_bias", [1]),
        ("stream", "yes"),
        ("stream", 1),
        ("tools", "none"),
        ("tools", ["x"]),
        ("response_format", "json"),
    ],
)
def test_a_field_of_the_wrong_type_or_out_of_bounds_is_refused_by_name(name: str, value: Any):
    with pytest.raises(BadRequest) as refused:
        chat(**{name: value})
    assert param_of(refused) == name


def test_unknown_fields_are_ignored():
    asked = chat(user="me", metadata={"a": 1}, store=True, service_tier="auto", logprobs=False)
    assert asked.items[0].spec.model_dump().keys() == ChatSpec.model_fields.keys()


@pytest.mark.parametrize("body", [None, [], "x", 5, True])
def test_a_body_that_is_no_object_is_refused(body: Any):
    with pytest.raises(BadRequest):
        parse(Kind.CHAT, body, LIMITS)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "text", "type", "x"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)
FIELDS = [
    *("model", "models", "messages", "prompt", "input", "n", "max_tokens", "stop", "stream"),
    *("tools", "response_format", "suffix", "echo", "seed", "temperature", "offer_msat"),
    *("fee_multiplier", "stream_options", "encoding_format", "functions", "grammar"),
]


@settings(max_examples=300)
@given(st.sampled_from(Kind), st.dictionaries(st.sampled_from(FIELDS), JSON))
def test_whatever_json_comes_it_is_read_or_refused_and_nothing_else(
    kind: Kind, body: dict[str, Any]
):
    good = {"model": "m", "messages": HELLO, "prompt": "x", "input": "x"}
    try:
        asked = parse(kind, good | body, LIMITS)
    except BadRequest as refused:
        assert refused.message
        return
    assert asked.items and all(item.prompt_tokens >= 0 for item in asked.items)


# --- terms ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {"multiplier": "0.9"},
        {"multiplier": "NaN"},
        {"multiplier": "1001"},
        {"max_fee_msat": "-1"},
        {"max_fee_msat": "1e3"},
        {"max_fee_msat": "٣"},
        {"max_fee_msat": "9" * 30},
        {"max_wait_s": "0"},
        {"max_wait_s": "1.5"},
        {"max_wait_s": ""},
    ],
    ids=str,
)
def test_headers_with_terms_that_make_no_sense_are_refused(headers: dict[str, str]):
    with pytest.raises(BadRequest):
        terms_from(**headers, limits=LIMITS)  # type: ignore[arg-type]


def test_headers_outrank_the_body():
    headers = terms_from(multiplier="2", max_fee_msat="500", max_wait_s="9", limits=LIMITS)
    body = {"model": "m", "messages": HELLO, "fee_multiplier": "3", "max_fee_msat": 7}
    assert parse(Kind.CHAT, body, LIMITS, headers).terms == Terms(Decimal(2), None, 500, 9)
    total = {"model": "m", "messages": HELLO, "offer_msat": 99_999}
    assert parse(Kind.CHAT, total, LIMITS, headers).terms == Terms(Decimal(2), None, 500, 9)
    assert parse(Kind.CHAT, total, LIMITS).terms.offer_msat == 99_999


def test_a_total_and_a_multiplier_at_once_are_refused():
    with pytest.raises(BadRequest):
        chat(offer_msat=5000, fee_multiplier=2)


# --- the hash -------------------------------------------------------------------------------------


def test_the_same_request_has_the_same_hash_however_its_fields_are_ordered():
    one = {"model": "m", "messages": [{"role": "user", "content": "é"}], "max_tokens": 5}
    other = {"max_tokens": 5, "messages": [{"content": "é", "role": "user"}], "model": "m"}
    assert request_hash(Kind.CHAT, one) == request_hash(Kind.CHAT, other)


@pytest.mark.parametrize(
    "change",
    [{"max_tokens": 6}, {"model": "n"}, {"n": 2}, {"seed": 1}, {"stream": True}, {"user": "x"}],
    ids=str,
)
def test_another_request_has_another_hash(change: dict[str, Any]):
    body = {"model": "m", "messages": HELLO, "max_tokens": 5}
    assert request_hash(Kind.CHAT, body) != request_hash(Kind.CHAT, body | change)
    assert request_hash(Kind.CHAT, body) != request_hash(Kind.COMPLETION, body)
