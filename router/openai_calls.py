"""A job as a request to an OpenAI-compatible server, and what such a server answers. Pure.

For workers that are not of our own protocol: QueenBee's pass the request on to their llama server
(QB-P10), HTTP workers are such servers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from worker.protocol import (
    ChatSpec,
    CompletionSpec,
    Delta,
    EmbeddingSpec,
    FailureCode,
    FinishReason,
    ImageEditSpec,
    ImageSpec,
    JobSpec,
    Picture,
    Usage,
    is_deep,
)

_FINISH = {
    "length": FinishReason.LENGTH,
    "tool_calls": FinishReason.TOOL_CALLS,
    "function_call": FinishReason.TOOL_CALLS,
}
# How servers say that a prompt is longer than their context.
_TOO_LONG = ("context_length_exceeded", "context length", "context window", "exceed_context_size")


class BadAnswer(Exception):
    """An answer that is not as OpenAI's API has it."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer: text and other deltas, the end if it is one, and counts if there are."""

    text: str = ""
    delta: dict[str, Any] | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class ServerError:
    """An error that a server answered with."""

    code: FailureCode
    message: str


def request_for(spec: JobSpec, model: str) -> tuple[str, dict[str, Any]]:
    """The path (from `/v1` on) and the body for a job; what the job leaves open is left open."""
    if isinstance(spec, EmbeddingSpec):
        inputs = spec.input[0] if len(spec.input) == 1 else spec.input
        return "/v1/embeddings", {"model": model, "input": inputs}
    if isinstance(spec, ImageSpec | ImageEditSpec):
        return _image_request(spec, model)
    body: dict[str, Any] = {"model": model, "max_tokens": spec.max_tokens, "stream": spec.stream}
    if spec.stop:
        body["stop"] = spec.stop
    body |= spec.sampling.model_dump(exclude_none=True)
    match spec:
        case ChatSpec():
            extra = {"tools", "tool_choice", "response_format"}
            body["messages"] = [_message(message) for message in spec.messages]
            body |= spec.model_dump(include=extra, exclude_none=True)
            return "/v1/chat/completions", body
        case CompletionSpec():
            body |= spec.model_dump(include={"prompt", "suffix"}, exclude_none=True)
            return "/v1/completions", body | ({"echo": True} if spec.echo else {})


def _image_request(spec: ImageSpec | ImageEditSpec, model: str) -> tuple[str, dict[str, Any]]:
    """As OpenAI has it, with the fields that QueenBee's and DecentralGPT's servers read besides
    (QB-P15, DG-3, DG-4)."""
    plain = {"prompt", "negative_prompt", "width", "height", "seed", "image", "mask"}
    body = {"model": model, "n": 1} | spec.model_dump(include=plain, exclude_none=True)
    # Where a picture lies may be gone before it is fetched: asked for only by who wants that.
    body["response_format"] = spec.response_format or "b64_json"
    if spec.width and spec.height:
        body["size"] = f"{spec.width}x{spec.height}"
    if spec.steps is not None:
        body["hyperparameters"] = {"steps": spec.steps}
    edits = isinstance(spec, ImageEditSpec)
    return "/v1/images/edits" if edits else "/v1/images/generations", body


def _message(message: dict[str, Any]) -> dict[str, Any]:
    # Only OpenAI's own models know the newer word for it.
    return message | {"role": "system"} if message.get("role") == "developer" else message


def piece(answer: Mapping[str, Any]) -> Piece:
    """What a whole answer or an event of a stream says; ids, names and times are ours to give
    (QB-W5, QB-R16). Raises BadAnswer."""
    choices = answer.get("choices")
    usage = usage_of(answer.get("usage"))
    if choices == [] and usage is not None:
        # OpenAI's last event when the counts were asked for.
        return Piece(usage=usage)
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], Mapping):
        raise BadAnswer("no choices")
    choice = choices[0]
    said = choice.get("delta", choice.get("message"))
    if said is None:
        # A completion; or the end that QueenBee makes up, with its content beside it (QB-R13).
        said = {"content": choice.get("text", choice.get("content"))}
    if not isinstance(said, Mapping):
        raise BadAnswer("a malformed choice")
    text = said.get("content")
    if text is not None and not isinstance(text, str):
        raise BadAnswer("content that is no text")
    rest = {
        key: value
        for key, value in said.items()
        if key not in ("content", "role") and value not in (None, "", [])
    }
    if rest:
        _check_delta(rest)
    if "delta" not in choice and "tool_calls" in rest:
        # A whole message numbers its calls by their order.
        rest["tool_calls"] = [{"index": i} | call for i, call in enumerate(rest["tool_calls"])]
    ended = choice.get("finish_reason")
    reason = _FINISH.get(str(ended), FinishReason.STOP) if ended else None
    return Piece(text or "", rest or None, reason, usage)


def _check_delta(delta: dict[str, Any]) -> None:
    if is_deep(delta):
        raise BadAnswer("a delta that is nested too deeply")
    try:
        Delta.model_validate(delta, strict=True)
    except ValidationError:
        raise BadAnswer("a malformed delta") from None


def vectors(answer: Mapping[str, Any]) -> list[list[float]]:
    """The embeddings of an answer, in the order of the inputs. Raises BadAnswer."""
    try:
        entries = sorted(answer["data"], key=lambda entry: entry["index"])
        found = [[float(number) for number in entry["embedding"]] for entry in entries]
    except (KeyError, TypeError, ValueError):
        raise BadAnswer("no embeddings") from None
    if not all(math.isfinite(number) for vector in found for number in vector):
        raise BadAnswer("embeddings that are no numbers")
    return found


def pictures(answer: Mapping[str, Any]) -> list[Picture]:
    """The pictures of an answer. Raises BadAnswer."""
    data = answer.get("data")
    if not isinstance(data, list):
        raise BadAnswer("no pictures")
    try:
        return [Picture.model_validate(entry) for entry in data]
    except ValidationError:
        raise BadAnswer("a picture that is none") from None


def usage_of(value: Any) -> Usage | None:
    """A server's counts; None when there are none to read."""
    if not isinstance(value, Mapping):
        return None
    try:
        # Embeddings have no completion tokens.
        return Usage.model_validate({"completion_tokens": 0} | dict(value), strict=True)
    except ValidationError:
        return None


def error_of(answer: Mapping[str, Any], status: int | None = None) -> ServerError | None:
    """The error that an answer is, in either shape (QB-P17, RC-3); None: it is none.

    What lies in the request ends the job; all else is tried elsewhere.
    """
    error = answer.get("error")
    if not error:
        # DecentralGPT's envelope: all but 0 is a failure (DG-1, DG-11).
        code = answer.get("code")
        if (status is None or status < 400) and not (isinstance(code, int) and code != 0):
            return None
        error = {"message": answer.get("message")}
    facts = error if isinstance(error, Mapping) else {"message": error}
    message = str(facts.get("message") or f"HTTP status {status}")[:2000]
    about = f"{facts.get('code') or ''} {message}".lower()
    if any(sign in about for sign in _TOO_LONG):
        return ServerError(FailureCode.PROMPT_TOO_LONG, message)
    if message == "busy" or status in (429, 503):
        return ServerError(FailureCode.OVERLOADED, message)
    if facts.get("type") == "invalid_request_error" or status in (400, 422):
        return ServerError(FailureCode.BAD_REQUEST, message)
    return ServerError(FailureCode.ENGINE_ERROR, message)
