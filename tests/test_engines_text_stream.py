"""Text out of tokens: whole characters only, and nothing of a stop string."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.engines.text_stream import TextStream


def shown(pieces: list[bytes], stops: list[str]) -> tuple[str, bool]:
    stream = TextStream(stops)
    text = "".join(stream.feed(piece) for piece in pieces) + stream.flush()
    return text, stream.stopped


def test_a_character_spread_over_tokens_is_shown_when_it_is_whole():
    stream = TextStream()
    parts = [stream.feed(bytes([byte])) for byte in "é😀".encode()]
    assert parts == ["", "é", "", "", "", "😀"]


def test_a_character_cut_off_at_the_end_is_marked_and_not_lost():
    assert shown(["a😀".encode()[:-1]], []) == ("a\ufffd", False)


def test_bytes_that_are_no_utf8_are_marked():
    assert shown([b"a\xff", b"b"], []) == ("a\ufffdb", False)


@pytest.mark.parametrize(
    "pieces",
    [[b"one STOP two"], [b"one ST", b"OP two"], [b"one S", b"T", b"O", b"P"]],
    ids=["in one token", "over two", "over four"],
)
def test_nothing_of_a_stop_string_is_shown(pieces: list[bytes]):
    assert shown(pieces, ["STOP"]) == ("one ", True)


def test_what_only_looked_like_a_stop_string_is_shown_as_soon_as_that_is_known():
    stream = TextStream(["STOP"])
    assert stream.feed(b"a ST") == "a "
    assert stream.feed(b"E") == "STE"
    assert stream.feed(b"S") == ""
    assert stream.flush() == "S"
    assert not stream.stopped


def test_the_beginning_of_a_stop_string_inside_its_own_beginning_is_not_missed():
    assert shown([b"aa", b"a", b"b!"], ["aab"]) == ("a", True)


def test_of_two_stop_strings_the_one_complete_first_ends_the_text():
    assert shown([b"xabc"], ["abc", "b"]) == ("xa", True)
    assert shown([b"xab"], ["b", "ab"]) == ("x", True)


def test_nothing_is_shown_after_the_stop():
    stream = TextStream(["."])
    assert stream.feed(b"one. two") == "one"
    assert (stream.feed(b"three"), stream.flush()) == ("", "")


def test_an_empty_stop_string_stops_nothing():
    assert shown([b"abc"], [""]) == ("abc", False)


@given(
    text=st.text("ab😀é", max_size=40),
    stops=st.lists(st.text("ab😀é", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 160), max_size=20),
)
def test_how_the_bytes_are_cut_makes_no_difference(text: str, stops: list[str], cuts: list[int]):
    data = text.encode()
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    pieces = [data[start:end] for start, end in itertools.pairwise(edges)]
    one_by_one = [bytes([byte]) for byte in data]
    assert shown(pieces, stops) == shown([data], stops) == shown(one_by_one, stops)
    assert not any(stop in shown(pieces, stops)[0] for stop in stops)
