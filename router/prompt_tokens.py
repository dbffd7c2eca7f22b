"""How many prompt tokens a job is charged for: the public rule that needs no tokenizer. Pure.

`ceil(B / 4)`, where B counts the UTF-8 bytes of the text a model reads: string `content` and text
parts of `messages` (not `role`, `name`, `type`, ids or image URLs), `prompt`, `suffix`, each `input`,
and the compact JSON of `tools`, `functions`, `tool_calls`, `response_format` schemas and `grammar`;
a given token id counts 4 bytes; an image, also one that is to be edited, counts a fixed number of
tokens. Vectors:
tests/vectors/pricing.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

BYTES_PER_TOKEN = 4


def prompt_tokens(request: Mapping[str, Any], *, image_prompt_tokens: int) -> int:
    """Prompt tokens of a request body with OpenAI's field names; unknown fields count nothing."""
    # An image job's own picture; in other bodies `image` is a field that nobody knows.
    text_bytes, images = 0, int(request.get("kind") == "image_edit" and bool(request.get("image")))
    for message in request.get("messages") or ():
        more_bytes, more_images = _message(message)
        text_bytes += more_bytes
        images += more_images
    text_bytes += _prompt(request.get("prompt")) + _prompt(request.get("input"))
    if isinstance(request.get("suffix"), str):
        text_bytes += _utf8(request["suffix"])
    for name in ("tools", "functions"):
        if request.get(name):
            text_bytes += _json(request[name])
    text_bytes += _schema(request.get("response_format"))
    if request.get("grammar"):
        text_bytes += _json(request["grammar"])
    return -(-text_bytes // BYTES_PER_TOKEN) + images * image_prompt_tokens


def _message(message: Any) -> tuple[int, int]:
    if not isinstance(message, (dict, Mapping)):
        return 0, 0
    text_bytes, images = 0, 0
    content = message.get("content")
    if isinstance(content, str):
        text_bytes += _utf8(content)
    elif isinstance(content, list):
        for part in content:
            if isinstance(part, str):
                text_bytes += _utf8(part)
            elif isinstance(part, (dict, Mapping)):
                if isinstance(part.get("text"), str):
                    text_bytes += _utf8(part["text"])
                elif "image_url" in part or part.get("type") in ("image", "input_image"):
                    images += 1
    if message.get("tool_calls"):
        text_bytes += _json(message["tool_calls"])
    return text_bytes, images


def _prompt(value: Any) -> int:
    if isinstance(value, str):
        return _utf8(value)
    if isinstance(value, list):
        return sum(BYTES_PER_TOKEN if isinstance(item, int) else _prompt(item) for item in value)
    return 0


def _schema(response_format: Any) -> int:
    if not isinstance(response_format, Mapping):
        return 0
    described = response_format.get("json_schema")
    schema = described.get("schema") if isinstance(described, Mapping) else None
    schema = schema or response_format.get("schema")
    return _json(schema) if schema else 0


def _utf8(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def _json(value: Any) -> int:
    return _utf8(json.dumps(value, separators=(",", ":"), ensure_ascii=False))
