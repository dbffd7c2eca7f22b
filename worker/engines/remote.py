"""What engines in front of an HTTP server share: the client, its errors in our words, SSE lines."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx

from worker.errors import EngineAbsent, EngineStartError, JobError
from worker.protocol import FailureCode
from worker.settings import WorkerSettings

CONNECT_TIMEOUT_S = 10
ERROR_BODY_BYTES = 4096
BUSY_STATUSES = {429, 503}
BAD_REQUEST_STATUSES = {400, 413, 422}
TOO_LONG_WORDS = (
    "context_length_exceeded",
    "context length",
    "context size",
    "context window",
    "maximum context",
    "too many tokens",
    "prompt is too long",
    "prompt too long",
)


def open_client(settings: WorkerSettings, default_url: str) -> httpx.AsyncClient:
    """A client for the server that SATHERD_ENGINE_URL names. Raises EngineStartError."""
    url = (settings.engine_url or default_url).rstrip("/")
    if not url.startswith(("http://", "https://")):
        raise EngineStartError("SATHERD_ENGINE_URL must begin with http:// or https://")
    headers = {}
    if settings.engine_api_key is not None:
        headers["Authorization"] = f"Bearer {settings.engine_api_key.get_secret_value()}"
    return httpx.AsyncClient(
        base_url=url,
        headers=headers,
        timeout=httpx.Timeout(settings.engine_timeout_s, connect=CONNECT_TIMEOUT_S),
        # As many jobs as there are slots run at once; the pool must not be a second limit.
        limits=httpx.Limits(max_connections=None),
    )


async def discover(client: httpx.AsyncClient, path: str) -> Any:
    """JSON from a server that must be there for the worker to start. Raises EngineStartError."""
    try:
        answer = await client.get(path, timeout=CONNECT_TIMEOUT_S)
    except httpx.HTTPError as error:
        raise EngineAbsent(
            f"no server answers at {client.base_url} ({type(error).__name__}); "
            "SATHERD_ENGINE_URL names it"
        ) from error
    if answer.status_code in (401, 403):
        raise EngineStartError(
            f"the server at {client.base_url} wants a key: set SATHERD_ENGINE_API_KEY"
        )
    if answer.status_code != 200:
        kind = EngineAbsent if answer.status_code >= 500 else EngineStartError
        raise kind(f"{client.base_url}{path.lstrip('/')} answers with status {answer.status_code}")
    try:
        return answer.json()
    except ValueError as error:
        raise EngineStartError(f"{client.base_url}{path.lstrip('/')} is not JSON") from error


async def answers(client: httpx.AsyncClient, path: str) -> bool:
    """Whether the server is there and well enough to answer a question about itself."""
    try:
        answer = await client.get(path, timeout=CONNECT_TIMEOUT_S)
    except httpx.HTTPError:
        return False
    return answer.status_code == 200


async def check(answer: httpx.Response) -> None:
    """Raises the JobError that a refused request means."""
    if answer.status_code < 400:
        return
    text = await _error_text(answer)
    words = text.lower()
    status = answer.status_code
    if status in BAD_REQUEST_STATUSES:
        if any(sign in words for sign in TOO_LONG_WORDS):
            raise JobError(FailureCode.PROMPT_TOO_LONG, "the server says: prompt too long")
        # Not its words: servers like to quote the request.
        raise JobError(FailureCode.BAD_REQUEST, f"the server refused it with status {status}")
    if status in BUSY_STATUSES:
        raise JobError(FailureCode.OVERLOADED, f"the server is busy (status {status})")
    if status == 404:
        raise JobError(FailureCode.MODEL_NOT_SERVED, "the server does not know model or path")
    raise JobError(FailureCode.ENGINE_ERROR, f"the server answered with status {status}")


async def _error_text(answer: httpx.Response) -> str:
    body = b""
    async for part in answer.aiter_bytes():
        body += part
        if len(body) >= ERROR_BODY_BYTES:
            break
    return body[:ERROR_BODY_BYTES].decode("utf-8", "replace")


def lost(error: httpx.HTTPError) -> JobError:
    """The JobError for a server that could not be reached, or broke off."""
    return JobError(FailureCode.ENGINE_ERROR, f"lost the server: {type(error).__name__}")


async def sse_data(answer: httpx.Response) -> AsyncIterator[str]:
    """The `data` of each server-sent event (WHATWG HTML, section 9.2.6)."""
    lines: list[str] = []
    async for line in answer.aiter_lines():
        if not line:
            if lines:
                yield "\n".join(lines)
                lines = []
            continue
        name, _, value = line.partition(":")
        if name == "data":
            lines.append(value.removeprefix(" "))
    # A server that ends without the last empty line has still said it.
    if lines:
        yield "\n".join(lines)


def json_object(text: str) -> dict[str, Any]:
    """One JSON object. Raises JobError for anything else."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise JobError(FailureCode.ENGINE_ERROR, "the server sent what is not JSON") from error
    if not isinstance(value, dict):
        raise JobError(FailureCode.ENGINE_ERROR, "the server sent JSON of another shape")
    return value
