"""Bodies that come as forms: OpenAI's clients send pictures so (RFC 7578)."""

from __future__ import annotations

import base64
from typing import Any

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException

from router.errors import BadRequest

MAX_FIELDS, MAX_FILES = 50, 4
# Fields that are numbers in JSON, and texts in a form.
_NUMBERS = ("n", "width", "height", "seed", "steps")


def is_form(request: Request) -> bool:
    return request.headers.get("content-type", "").lower().startswith("multipart/form-data")


async def read_form(request: Request) -> dict[str, Any]:
    """A form as the JSON body that says the same: files become data URLs. Raises BadRequest.

    `name[]` is how some clients write a list; a field that comes twice is one.
    """
    body: dict[str, Any] = {}
    try:
        async with request.form(max_files=MAX_FILES, max_fields=MAX_FIELDS) as form:
            for name, value in form.multi_items():
                read = await _data_url(value) if isinstance(value, UploadFile) else value
                name = name.removesuffix("[]")
                if name not in body:
                    body[name] = _number(read) if name in _NUMBERS else read
                else:
                    before = body[name]
                    body[name] = [*before, read] if isinstance(before, list) else [before, read]
    except (HTTPException, MultiPartException) as error:
        said = error.detail if isinstance(error, HTTPException) else error.message
        raise BadRequest(f"the form cannot be read: {said}") from None
    return body


def _number(value: str) -> Any:
    """A whole number where there is one; what is none is refused by whoever reads the field."""
    text = value.strip()
    digits = text.removeprefix("-")
    return int(text) if digits.isascii() and digits.isdigit() and len(digits) < 20 else value


async def _data_url(file: UploadFile) -> str:
    kind = (file.content_type or "").lower()
    if not kind.startswith("image/"):
        kind = "image/png"
    return f"data:{kind};base64,{base64.b64encode(await file.read()).decode()}"
