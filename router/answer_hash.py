"""The hash of an answer, which its receipt is about: what a client has must lead to the same one. Pure.

text                  the UTF-8 bytes of the text
a text with calls     the text, a line feed, and the calls as JSON: sorted names, no spaces
vectors               each number as a 32-bit little-endian float, one vector after the other
images                the bytes of each image, or of its URL where it came as one
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
from collections.abc import Mapping
from typing import Any


def answer_hash(result: Mapping[str, Any]) -> bytes:
    """SHA-256 of the answer in a `result` in OpenAI's shape (of its first choice)."""
    return hashlib.sha256(_content(result)).digest()


def text_hash(text: str) -> bytes:
    """SHA-256 of an answer that is nothing but text."""
    return hashlib.sha256(text.encode()).digest()


def hashes_of(answer: Mapping[str, Any]) -> list[bytes]:
    """The hashes of all choices of an answer: one request may have bought several jobs."""
    choices = answer.get("choices")
    if not isinstance(choices, list):
        return [answer_hash(answer)]
    return [answer_hash({"choices": [choice]}) for choice in choices]


def _content(result: Mapping[str, Any]) -> bytes:
    if "choices" in result:
        choice = result["choices"][0]
        message = choice.get("message") or {"content": choice.get("text")}
        text = (message.get("content") or "").encode()
        calls = message.get("tool_calls")
        return text + b"\n" + _plain_json(calls) if calls else text
    return b"".join(map(_datum, result.get("data") or ()))


def _datum(datum: Mapping[str, Any]) -> bytes:
    vector = datum.get("embedding")
    if isinstance(vector, str):
        return base64.b64decode(vector)
    if vector is not None:
        return struct.pack(f"<{len(vector)}f", *vector)
    if datum.get("b64_json") is not None:
        return base64.b64decode(datum["b64_json"])
    return (datum.get("url") or "").encode()


def _plain_json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
