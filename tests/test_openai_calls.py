"""Jobs as requests to OpenAI-compatible servers, and what such servers answer."""

from __future__ import annotations

from typing import Any

import pytest

from router.openai_calls import BadAnswer, Piece, error_of, pictures, piece, request_for, vectors
from worker.protocol import (
    ChatSpec,
    CompletionSpec,
    EmbeddingSpec,
    FailureCode,
    FinishReason,
    ImageEditSpec,
    ImageSpec,
    JobSpec,
    Sampling,
    Usage,
)

CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("spec", "path", "body"),
    [
        (
            ChatSpec(
                model="m",
                messages=[{"role": "developer", "content": "Be brief."}],
                max_tokens=8,
                stop=["END"],
                sampling=Sampling(temperature=0.5, seed=1),
                stream=True,
            ),
            "/v1/chat/completions",
            {
                "messages": [{"role": "system", "content": "Be brief."}],
                "max_tokens": 8,
                "stop": ["END"],
                "temperature": 0.5,
                "seed": 1,
                "stream": True,
            },
        ),
        (
            CompletionSpec(model="m", prompt="Once", max_tokens=8, echo=True),
            "/v1/completions",
            {"prompt": "Once", "max_tokens": 8, "echo": True, "stream": False},
        ),
        (EmbeddingSpec(model="m", input=["a"]), "/v1/embeddings", {"input": "a"}),
        (EmbeddingSpec(model="m", input=["a", "b"]), "/v1/embeddings", {"input": ["a", "b"]}),
        (
            ImageSpec(model="m", prompt="p", width=512, height=256, steps=20),
            "/v1/images/generations",
            {
                "prompt": "p",
                "n": 1,
                "width": 512,
                "height": 256,
                "size": "512x256",
                "hyperparameters": {"steps": 20},
                "response_format": "b64_json",
            },
        ),
        (
            ImageEditSpec(
                model="m", prompt="p", image="https://e.example/a.png", response_format="url"
            ),
            "/v1/images/edits",
            {
                "prompt": "p",
                "n": 1,
                "image": "https://e.example/a.png",
                "response_format": "url",
            },
        ),
    ],
)
def test_a_job_as_a_request(spec: JobSpec, path: str, body: dict[str, Any]):
    """QB-P10, QB-P15, DG-3, DG-4: what the job leaves open is left open."""
    assert request_for(spec, "its-name") == (path, {"model": "its-name"} | body)


@pytest.mark.parametrize(
    ("choice", "found"),
    [
        ({"delta": {"role": "assistant"}}, Piece()),
        ({"delta": {"content": "a"}, "finish_reason": None}, Piece("a")),
        ({"delta": {}, "finish_reason": "length"}, Piece("", None, FinishReason.LENGTH)),
        (
            {"message": {"content": "a"}, "finish_reason": "stop"},
            Piece("a", None, FinishReason.STOP),
        ),
        ({"text": "a", "finish_reason": "eos"}, Piece("a", None, FinishReason.STOP)),
        # The end that QueenBee makes up (QB-R13).
        ({"finish_reason": "stop", "content": ""}, Piece("", None, FinishReason.STOP)),
        (
            {"message": {"content": None, "tool_calls": [CALL, CALL]}},
            Piece("", {"tool_calls": [{"index": 0} | CALL, {"index": 1} | CALL]}),
        ),
        (
            {"delta": {"tool_calls": [{"index": 3, "function": {"arguments": "{"}}]}},
            Piece("", {"tool_calls": [{"index": 3, "function": {"arguments": "{"}}]}),
        ),
    ],
)
def test_what_a_choice_says(choice: dict[str, Any], found: Piece):
    """QB-W5, QB-P13."""
    assert piece({"choices": [choice]}) == found


def test_counts_are_read_wherever_they_stand():
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    counted = Usage(prompt_tokens=3, completion_tokens=2)
    assert piece({"choices": [], "usage": usage}) == Piece(usage=counted)
    assert piece({"choices": [{"text": "a"}], "usage": usage}) == Piece("a", usage=counted)
    assert piece({"choices": [{"text": "a"}], "usage": {"prompt_tokens": "x"}}) == Piece("a")


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"choices": []},
        {"choices": ["a"]},
        {"choices": [{"delta": "a"}]},
        {"choices": [{"delta": {"content": 5}}]},
        {"choices": [{"delta": {"tool_calls": "x"}}]},
        {"choices": [{"message": {"tool_calls": [5]}}]},
    ],
)
def test_what_is_no_answer(answer: dict[str, Any]):
    with pytest.raises(BadAnswer):
        piece(answer)


@pytest.mark.parametrize(
    ("answer", "status", "code"),
    [
        ({"error": "busy"}, None, FailureCode.OVERLOADED),
        ({"error": "x", "error_type": "ValueError"}, None, FailureCode.ENGINE_ERROR),
        (
            {"error": {"message": "x", "code": "context_length_exceeded"}},
            400,
            FailureCode.PROMPT_TOO_LONG,
        ),
        (
            {"error": "Requested tokens (3000) exceed context window of 2048"},
            None,
            FailureCode.PROMPT_TOO_LONG,
        ),
        (
            {"error": {"message": "x", "type": "invalid_request_error"}},
            400,
            FailureCode.BAD_REQUEST,
        ),
        ({"error": {"message": "x"}}, 422, FailureCode.BAD_REQUEST),
        ({}, 500, FailureCode.ENGINE_ERROR),
        ({}, 503, FailureCode.OVERLOADED),
        ({"code": 1007, "message": "Model not found"}, 200, FailureCode.ENGINE_ERROR),
        ({"code": 0, "message": "success", "choices": []}, 200, None),
        ({"choices": []}, None, None),
        ({"error": None}, 200, None),
    ],
)
def test_an_error_in_any_shape_says_who_is_to_blame(
    answer: dict[str, Any], status: int | None, code: FailureCode | None
):
    """QB-P17, RC-3, DG-1, DG-11."""
    found = error_of(answer, status)
    assert (found.code if found else None) is code


@pytest.mark.parametrize(
    "data",
    [None, [{"embedding": [1.0]}], [{"embedding": ["a"], "index": 0}]],
)
def test_vectors_and_pictures_that_are_none(data: Any):
    with pytest.raises(BadAnswer):
        vectors({"data": data})
    with pytest.raises(BadAnswer):
        pictures({"data": data})
    with pytest.raises(BadAnswer):
        vectors({"data": [{"embedding": [float("nan")], "index": 0}]})
