"""Pictures from a server that has OpenAI's `/images/generations` and `/images/edits`.

The picture itself is asked for (`b64_json`), also when the client would take a URL: where a server of
the worker's own keeps its pictures, nobody else can fetch them. A server that knows no
`response_format`, as OpenAI's newer ones, is asked again without it.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any

from pydantic import ValidationError

from worker.engines.remote import Server
from worker.errors import JobError
from worker.protocol import FailureCode, ImageEditSpec, ImageSpec, Picture


async def draw(server: Server, prefix: str, model: str, job: ImageSpec | ImageEditSpec) -> Picture:
    """The picture that a job asks for. Raises JobError."""
    fields = _fields(model, job)
    try:
        return await _asked(server, prefix, job, {**fields, "response_format": "b64_json"})
    except JobError as error:
        if error.code is not FailureCode.BAD_REQUEST:
            raise
    # Perhaps it was that field; if it is refused again, it was another.
    return await _asked(server, prefix, job, fields)


def _fields(model: str, job: ImageSpec | ImageEditSpec) -> dict[str, Any]:
    fields: dict[str, Any] = {"model": model, "prompt": job.prompt, "n": 1}
    if job.width and job.height:
        fields["size"] = f"{job.width}x{job.height}"
    for name in ("negative_prompt", "steps", "seed"):
        if (value := getattr(job, name)) is not None:
            fields[name] = value
    return fields


async def _asked(
    server: Server,
    prefix: str,
    job: ImageSpec | ImageEditSpec,
    fields: dict[str, Any],
) -> Picture:
    if isinstance(job, ImageEditSpec):
        answer = await _edit(server, f"{prefix}/images/edits", job, fields)
    else:
        answer = await server.post(f"{prefix}/images/generations", fields)
    entries = answer.get("data")
    if not isinstance(entries, list) or not entries:
        raise JobError(FailureCode.ENGINE_ERROR, "the server sent no picture")
    try:
        picture = Picture.model_validate(entries[0])
    except ValidationError as error:
        raise JobError(FailureCode.ENGINE_ERROR, "the server sent no picture") from error
    if picture.b64_json is not None:
        picture.url = None
    return picture


async def _edit(
    server: Server, path: str, job: ImageEditSpec, fields: dict[str, Any]
) -> dict[str, Any]:
    """As OpenAI's form when the picture came along, as JSON with its URL when it did not (DG-4)."""
    given = {"image": job.image} | ({"mask": job.mask} if job.mask else {})
    if not all(value.startswith("data:") for value in given.values()):
        return await server.post(path, {**fields, **given})
    files = {name: (f"{name}.png", *_content(value)) for name, value in given.items()}
    return await server.post_form(path, fields, files)


def _content(data_url: str) -> tuple[bytes, str]:
    head, _, text = data_url.partition(",")
    try:
        content = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise JobError(FailureCode.BAD_REQUEST, "the given picture is not base64") from error
    return content, head.removeprefix("data:").partition(";")[0] or "image/png"
