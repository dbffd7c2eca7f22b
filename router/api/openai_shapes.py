"""OpenAI's shapes: answers put together from jobs, stream chunks, errors, model lists."""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from typing import Any

import orjson

from router.api.decentralgpt_shapes import envelope
from router.api.errors import Problem
from router.job_states import State
from router.job_views import Outcome, explain
from router.results import image_usage
from worker.protocol import IMAGE_KINDS, CompletionSpec, JobSpec, Kind

_TYPES = {
    401: "authentication_error",
    402: "insufficient_quota",
    403: "permission_error",
    429: "rate_limit_error",
}


def error_body(problem: Problem, extra: dict[str, Any] | None = None) -> dict[str, Any]:
    """`{"error": {message, type, param, code}}` with our facts beside them, and DecentralGPT's `code`
    and `message` (DG-11)."""
    kind = "server_error" if problem.status >= 500 else "invalid_request_error"
    facts = dict(problem.facts)
    return {
        "error": {
            "message": problem.message,
            "type": _TYPES.get(problem.status, kind),
            "param": facts.pop("param", None),
            "code": problem.code,
            **facts,
            **(extra or {}),
        },
        **(extra or {}),
        **envelope(problem),
    }


def job_problem(outcome: Outcome, job_id: str) -> Problem:
    """The error of a job that ended without an answer."""
    code = outcome.end_reason
    if code not in ("max_wait", "cancelled", "prompt_too_long", "bad_request", "timeout"):
        code = "cancelled" if outcome.state is State.CANCELLED else "job_failed"
    return Problem(
        code,
        explain(outcome),
        {
            "job": job_id,
            "end_reason": outcome.end_reason,
            "charged_msat": outcome.charged_msat,
            "refunded_msat": outcome.refunded_msat,
        },
    )


def failed_usage(outcome: Outcome, job_id: str) -> dict[str, Any]:
    """The `usage` of a choice that failed: what it cost and why, in a stream of several."""
    counts = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    said = outcome.usage or {**counts, "satherd": {}}
    facts = {
        "job": job_id,
        "fee_msat": outcome.charged_msat,
        "refund_msat": outcome.refunded_msat,
        "error": {"code": outcome.end_reason, "message": explain(outcome)},
    }
    return {**said, "satherd": {**said["satherd"], **facts}}


def echoed(spec: JobSpec) -> str:
    """What a completion repeats before its own text."""
    return spec.prompt if isinstance(spec, CompletionSpec) and isinstance(spec.prompt, str) else ""


def with_echoes(body: dict[str, Any], specs: Sequence[JobSpec]) -> dict[str, Any]:
    """A completion answer with the prompts before the texts."""
    choices = [
        {**choice, "text": echoed(specs[choice["index"]]) + choice["text"]}
        for choice in body["choices"]
    ]
    return {**body, "choices": choices}


def answered(outcome: Outcome) -> bool:
    """Whether a job brought a whole answer."""
    return outcome.state is State.SUCCEEDED and outcome.result is not None


def combined(kind: Kind, jobs: Sequence[tuple[str, Outcome]]) -> dict[str, Any]:
    """One answer from the jobs of a request; failed ones are listed in `usage.satherd`.

    Successful choices keep their indexes.
    """
    good = [(i, outcome) for i, (_, outcome) in enumerate(jobs) if answered(outcome)]
    first = dict(good[0][1].result or {})
    if len(jobs) == 1 or kind is Kind.EMBEDDING:
        return first
    if kind in IMAGE_KINDS:
        data = [picture for _, outcome in good for picture in (outcome.result or {})["data"]]
        return {**first, "data": data, "usage": image_usage(total_usage(jobs))}
    choices = []
    for index, outcome in good:
        for choice in (outcome.result or {})["choices"]:
            choices.append({**choice, "index": index})
    return {**first, "choices": choices, "usage": total_usage(jobs)}


def total_usage(jobs: Sequence[tuple[str, Outcome]]) -> dict[str, Any]:
    """The sums of several jobs' usage."""
    usages = [outcome.usage for _, outcome in jobs if outcome.usage]
    total = {
        name: sum(usage[name] for usage in usages)
        for name in ("prompt_tokens", "completion_tokens", "total_tokens")
    }
    satherd: dict[str, Any] = {
        "jobs": [job_id for job_id, _ in jobs],
        "fee_msat": sum(outcome.charged_msat for _, outcome in jobs),
        "refund_msat": sum(outcome.refunded_msat for _, outcome in jobs),
        "workers": sorted({outcome.worker_id for _, outcome in jobs if outcome.worker_id}),
    }
    failed = [
        {"index": i, "job": job_id, "code": outcome.end_reason, "message": explain(outcome)}
        for i, (job_id, outcome) in enumerate(jobs)
        if not answered(outcome)
    ]
    if failed:
        satherd["failed"] = failed
    return {**total, "satherd": satherd}


def answer_headers(jobs: Sequence[tuple[str, Outcome]]) -> dict[str, str]:
    """The facts of a paid answer (§3.6)."""
    workers = [outcome.worker_id for _, outcome in jobs if outcome.worker_id]
    headers = {
        "X-Satherd-Job": ",".join(job_id for job_id, _ in jobs),
        "X-Satherd-Fee-Msat": str(sum(outcome.charged_msat for _, outcome in jobs)),
        "X-Satherd-Refund-Msat": str(sum(outcome.refunded_msat for _, outcome in jobs)),
    }
    return headers | ({"X-Satherd-Worker": ",".join(workers)} if workers else {})


def base64_vectors(result: dict[str, Any]) -> dict[str, Any]:
    """Embeddings as base64 of little-endian floats, as OpenAI's own clients ask (RC-2)."""
    return {
        **result,
        "data": [
            {
                **entry,
                "embedding": base64.b64encode(
                    struct.pack(f"<{len(entry['embedding'])}f", *entry["embedding"])
                ).decode(),
            }
            for entry in result["data"]
        ],
    }


class ChunkShape:
    """The chunks of one streamed choice; text chunks are made from a template, without a dict."""

    def __init__(
        self, kind: Kind, *, answer_id: str, model: str, created_s: int, index: int
    ) -> None:
        self._chat = kind is Kind.CHAT
        self._head = {
            "id": answer_id,
            "object": "chat.completion.chunk" if self._chat else "text_completion",
            "created": created_s,
            "model": model,
        }
        opening = orjson.dumps(self._head)[:-1] + b',"choices":[{"index":%d,' % index
        self._before = b"data: " + opening + (b'"delta":{"content":' if self._chat else b'"text":')
        self._after = (
            b"}" if self._chat else b""
        ) + b',"logprobs":null,"finish_reason":null}]}\n\n'
        self._index = index

    def first(self) -> bytes:
        """The opening chunk of a chat answer; nothing for completions."""
        if not self._chat:
            return b""
        return self._chunk({"delta": {"role": "assistant", "content": ""}}, None, None)

    def text(self, text: str) -> bytes:
        return self._before + orjson.dumps(text) + self._after

    def delta(self, delta: dict[str, Any]) -> bytes:
        return self._chunk({"delta": delta}, None, None)

    def last(self, finish_reason: str | None, usage: dict[str, Any] | None) -> bytes:
        """The chunk that carries `finish_reason`, and the usage with what was charged.

        Its empty `content`, and a `stop_reason` that is a number, are DecentralGPT's (DG-2); which
        token it was that ended the answer, no worker tells.
        """
        said = {"delta": {"content": ""}, "stop_reason": 0} if self._chat else {"text": ""}
        return self._chunk(said, finish_reason, usage)

    def usage(self, usage: dict[str, Any]) -> bytes:
        """The extra chunk of `stream_options.include_usage`: no choices, only usage."""
        return b"data: " + orjson.dumps({**self._head, "choices": [], "usage": usage}) + b"\n\n"

    def _chunk(
        self, said: dict[str, Any], finish_reason: str | None, usage: dict[str, Any] | None
    ) -> bytes:
        choice = {
            "index": self._index,
            **said,
            "logprobs": None,
            "finish_reason": finish_reason,
        }
        body: dict[str, Any] = {**self._head, "choices": [choice]}
        if usage is not None:
            body["usage"] = usage
        return b"data: " + orjson.dumps(body) + b"\n\n"
