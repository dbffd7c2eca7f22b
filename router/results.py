"""The answer of one finished job in OpenAI's shape for its kind. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from worker.protocol import IMAGE_KINDS, Kind

OBJECTS = {Kind.CHAT: "chat.completion", Kind.COMPLETION: "text_completion"}
_ID_PREFIXES = {Kind.CHAT: "chatcmpl-", Kind.COMPLETION: "cmpl-"}


def answer_id(kind: Kind, job_id: str) -> str:
    """The `id` of an answer; it leads back to the job for whoever holds its token."""
    return _ID_PREFIXES.get(kind, "") + job_id


def result(
    kind: Kind,
    *,
    job_id: str,
    model: str,
    created_s: int,
    text: str,
    deltas: Iterable[dict[str, Any]],
    data: list[list[float]] | None,
    finish_reason: str | None,
    usage: dict[str, Any],
    images: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """`finish_reason` is OpenAI's, or null for an answer that was cut off."""
    if kind in IMAGE_KINDS:
        return {
            "created": created_s,
            "model": model,
            "data": list(images),
            "usage": image_usage(usage),
        }
    if kind is Kind.EMBEDDING:
        return {
            "object": "list",
            "model": model,
            "data": [
                {"object": "embedding", "index": i, "embedding": vector}
                for i, vector in enumerate(data or [])
            ],
            "usage": {
                "prompt_tokens": usage["prompt_tokens"],
                "total_tokens": usage["prompt_tokens"],
                "satherd": usage["satherd"],
            },
        }
    choice: dict[str, Any] = {"index": 0}
    if kind is Kind.CHAT:
        calls = merge_tool_calls(deltas)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": text if text or not calls else None,
        }
        if calls:
            message["tool_calls"] = calls
        choice["message"] = message
    else:
        choice["text"] = text
    choice |= {"logprobs": None, "finish_reason": finish_reason}
    return {
        "id": answer_id(kind, job_id),
        "object": OBJECTS[kind],
        "created": created_s,
        "model": model,
        "choices": [choice],
        "usage": usage,
    }


def image_usage(usage: dict[str, Any]) -> dict[str, Any]:
    """The `usage` of pictures: OpenAI names the same counts differently there."""
    return {
        "input_tokens": usage["prompt_tokens"],
        "output_tokens": usage["completion_tokens"],
        "total_tokens": usage["total_tokens"],
        "satherd": usage["satherd"],
    }


def merge_tool_calls(deltas: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tool calls put together from streamed deltas, by their index."""
    calls: dict[int, dict[str, Any]] = {}
    for delta in deltas:
        for part in delta.get("tool_calls") or ():
            call = calls.setdefault(
                part.get("index", len(calls)),
                {"id": None, "type": "function", "function": {"name": "", "arguments": ""}},
            )
            call["id"] = part.get("id") or call["id"]
            call["type"] = part.get("type") or call["type"]
            function = part.get("function") or {}
            call["function"]["name"] += function.get("name") or ""
            call["function"]["arguments"] += function.get("arguments") or ""
    return [calls[i] for i in sorted(calls)]
