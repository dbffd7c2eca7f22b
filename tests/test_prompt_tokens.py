"""The public prompt token rule, against the published vectors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from router.prompt_tokens import prompt_tokens

VECTORS = json.loads((Path(__file__).parent / "vectors" / "pricing.json").read_text())


@pytest.mark.parametrize("vector", VECTORS["prompt_tokens"], ids=lambda v: v["name"])
def test_prompt_tokens_follow_the_published_rule(vector: dict):
    got = prompt_tokens(vector["request"], image_prompt_tokens=VECTORS["image_prompt_tokens"])
    assert got == vector["prompt_tokens"]
