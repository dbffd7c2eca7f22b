"""What a request for pictures asks for. Pure.

OpenAI's fields, DecentralGPT's `width` and `height` (DG-3, DG-4), QueenBee's `negative_prompt` and
`hyperparameters.steps` (QB-P15).
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from typing import Any

from billing.outside_url import BadOutsideUrl, OutsideRules, parse_outside_url
from router.errors import BadRequest
from router.request_fields import flag, integer
from worker.protocol import ImageEditSpec, ImageSpec

MAX_PROMPT_CHARACTERS = 32_000
LEAST_PIXELS, MOST_PIXELS = 16, 8192
DEFAULT_PIXELS = 1024

_SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", re.IGNORECASE)
_DATA_URL = re.compile(r"data:image/[a-z0-9.+-]{1,40};base64,", re.IGNORECASE)


def image_spec(body: Mapping[str, Any]) -> ImageSpec:
    """One picture of a prompt. Raises BadRequest."""
    width, height = _pixels(body)
    return ImageSpec(
        width=width or DEFAULT_PIXELS, height=height or DEFAULT_PIXELS, **_common(body)
    )


def edit_spec(body: Mapping[str, Any]) -> ImageEditSpec:
    """One picture made from another. Raises BadRequest."""
    width, height = _pixels(body)
    mask = body.get("mask")
    return ImageEditSpec(
        image=_given_picture(body.get("image"), "image"),
        mask=None if mask is None else _given_picture(mask, "mask"),
        width=width,
        height=height,
        **_common(body),
    )


def _common(body: Mapping[str, Any]) -> dict[str, Any]:
    if flag(body, "stream"):
        raise BadRequest("pictures are not streamed", param="stream")
    wanted = body.get("response_format")
    if wanted not in (None, "url", "b64_json"):
        raise BadRequest("response_format must be url or b64_json", param="response_format")
    prompt = _text(body, "prompt")
    if not prompt:
        raise BadRequest("prompt must be text, and not empty", param="prompt")
    more = body.get("hyperparameters")
    steps = more if isinstance(more, Mapping) else body
    return {
        "model": "",
        "prompt": prompt,
        "negative_prompt": _text(body, "negative_prompt"),
        "steps": integer(steps, "steps", low=1, high=1000),
        "seed": integer(body, "seed", low=-(2**63), high=2**63 - 1),
        "response_format": wanted,
    }


def _text(body: Mapping[str, Any], name: str) -> str | None:
    text = body.get(name)
    if text is None:
        return None
    if not isinstance(text, str) or len(text) > MAX_PROMPT_CHARACTERS:
        raise BadRequest(
            f"{name} must be text of at most {MAX_PROMPT_CHARACTERS} characters", param=name
        )
    return text


def _pixels(body: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Width and height, by their own fields or by `size`; None where the client leaves it open."""
    width = integer(body, "width", low=LEAST_PIXELS, high=MOST_PIXELS)
    height = integer(body, "height", low=LEAST_PIXELS, high=MOST_PIXELS)
    size = body.get("size")
    if size in (None, "", "auto"):
        return width, height
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    sides = (int(match[1]), int(match[2])) if match else (0, 0)
    if not all(LEAST_PIXELS <= side <= MOST_PIXELS for side in sides):
        raise BadRequest(
            f"size must be such as 1024x1024, each side {LEAST_PIXELS} to {MOST_PIXELS} pixels",
            param="size",
        )
    return width or sides[0], height or sides[1]


def _given_picture(value: Any, param: str) -> str:
    """An https URL of a public host, or a data URL. A worker may fetch it: nothing else goes out."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, Mapping):
        value = value.get("image_url") or value.get("url")
    if not isinstance(value, str) or not value:
        raise BadRequest(f"{param} must be one URL or data URL of a picture", param=param)
    start = _DATA_URL.match(value)
    if start is not None:
        _check_base64(value[start.end() :], param)
        return value
    try:
        return str(parse_outside_url(value, OutsideRules()))
    except BadOutsideUrl as error:
        raise BadRequest(f"{param}: {error}", param=param) from None


def check_picture_urls(part: Mapping[str, Any]) -> None:
    """The URLs in a part of a message are like those of pictures to edit, whatever the part is: engines
    fetch what they are told, from wherever the worker is. Raises BadRequest."""
    left: list[tuple[str, Any]] = list(part.items())
    while left:
        name, value = left.pop()
        if isinstance(value, Mapping):
            left.extend(value.items())
        elif isinstance(value, list):
            left.extend((name, inner) for inner in value)
        elif isinstance(value, str) and (name == "url" or name.endswith("_url")):
            _check_fetched(value)


def _check_fetched(url: str) -> None:
    if url[:5].lower() == "data:":
        return
    try:
        parse_outside_url(url, OutsideRules())
    except BadOutsideUrl as error:
        raise BadRequest(f"a URL in a message: {error}", param="messages") from None


def _check_base64(text: str, param: str) -> None:
    try:
        empty = not base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        empty = True
    if empty:
        raise BadRequest(f"{param}: the data URL holds no picture in base64", param=param)
