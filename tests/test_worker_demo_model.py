"""The text that the demo model learns from: reproducible, well formed, and true to its tables."""

from __future__ import annotations

import hashlib
import json
from random import Random

from worker.demo_model.corpus import CAPITALS, KINDS, OPPOSITES, conversation

DIGEST = "1efd6cb34a9b68b5"


def test_equal_seeds_write_equal_text():
    """The digest pins the order of the draws: the corpus that the shipped model was trained on."""
    rng = Random(1)
    text = json.dumps([conversation(rng) for _ in range(500)])
    assert hashlib.sha256(text.encode()).hexdigest().startswith(DIGEST)


def test_conversations_alternate_and_end_with_an_answer():
    rng = Random(2)
    for _ in range(2000):
        messages = conversation(rng)
        roles = [message["role"] for message in messages]
        if roles[0] == "system":
            roles = roles[1:]
        assert roles == ["user", "assistant"] * (len(roles) // 2) and roles
        for message in messages:
            assert message["content"].strip()
            assert not any(mark in message["content"] for mark in ("{", "}", "<|", "  "))


def test_every_kind_of_turn_writes_a_question_and_an_answer():
    for kind, (weight, write) in KINDS.items():
        assert weight > 0
        turns = {write(Random(seed)) for seed in range(20)}
        assert len(turns) > 1, kind
        assert all(question and answer for question, answer in turns)


def test_facts_are_what_the_tables_say():
    for seed in range(200):
        _, answer = KINDS["capital"][1](Random(seed))
        [country] = [name for name in CAPITALS if f"{name}." in answer or f" {name} is" in answer]
        assert CAPITALS[country] in answer
        _, answer = KINDS["sum"][1](Random(seed))
        a, word, b, _, result = answer.rstrip(".").split()
        sums = {"plus": int(a) + int(b), "minus": int(a) - int(b), "times": int(a) * int(b)}
        assert sums[word] == int(result)
    assert all(OPPOSITES[OPPOSITES[word]] == word for word in OPPOSITES)
