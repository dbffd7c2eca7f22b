"""DecentralGPT's clients at the paths that they share with OpenAI's."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from tests.door_tools import CHAT
from tests.router_rig import MODEL, Rig
from tests.test_openai_images import PAINTER, PIXEL, paint

PATH = "/v1/chat/completions"


async def ask(router: Rig, headers: dict[str, str], **changes: Any) -> httpx.Response:
    return await router.http.post(PATH, json=CHAT | changes, headers=headers)


async def test_an_answer_says_code_0_beside_what_openai_says(router: Rig):
    """DG-1."""
    key = await router.bearer()
    async with router.worker() as worker:
        reply, _ = await asyncio.gather(ask(router, key), worker.serve("Hello there."))
    body = reply.json()
    assert (body["code"], body["message"]) == (0, "success")
    assert body["model"] == MODEL and isinstance(body["created"], int)
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello there."}
    assert (choice["index"], choice["finish_reason"]) == (0, "stop")
    assert {"prompt_tokens", "completion_tokens", "total_tokens"} <= set(body["usage"])


async def test_a_stream_has_the_documented_first_and_last_chunk(router: Rig):
    """DG-2."""
    key = await router.bearer()
    async with router.worker() as worker:
        reply, _ = await asyncio.gather(ask(router, key, stream=True), worker.serve("Hello"))
    said = [line[6:] for line in reply.text.splitlines() if line.startswith("data: ")]
    assert said.pop() == "[DONE]"
    chunks = [json.loads(text) for text in said]
    assert all(c["object"] == "chat.completion.chunk" and c["model"] == MODEL for c in chunks)
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[1]["choices"] == [
        {"index": 0, "delta": {"content": "Hello"}, "logprobs": None, "finish_reason": None}
    ]
    last = chunks[-1]["choices"][0]
    assert (last["delta"], last["finish_reason"]) == ({"content": ""}, "stop")
    assert isinstance(last["stop_reason"], int) and chunks[-1]["usage"]["total_tokens"] > 0


@pytest.mark.parametrize("path", ["/v1/images/generations", "/v1/images/edits"])
async def test_pictures_say_code_0(router: Rig, path: str):
    """DG-3, DG-4."""
    key = await router.bearer()
    body = {
        "model": "painter",
        "image": "https://pictures.example/otter.png",
        "prompt": "A cute baby sea otter",
        "n": 1,
        "size": "1024x1024",
        "width": 1024,
        "height": 1024,
    }
    async with router.worker(models=PAINTER) as worker:
        asked = router.http.post(path, json=body, headers=key)
        reply, _ = await asyncio.gather(asked, paint(worker))
    said = reply.json()
    assert (said["code"], said["message"]) == (0, "success") and said["created"] > 0
    assert said["data"] == [{"b64_json": PIXEL, "url": None, "revised_prompt": None}]


async def test_the_list_of_models_satisfies_both(router: Rig):
    """DG-5."""
    async with router.worker(models=[*PAINTER, {"id": MODEL}]):
        said = (await router.http.get("/v1/models")).json()
    assert (said["object"], said["project"]) == ("list", "Satherd")
    by_id = {model["id"]: model for model in said["data"]}
    assert by_id[MODEL]["object"] == "model" and by_id[MODEL]["model"] == MODEL
    assert by_id[MODEL]["url"] == f"{router.url}/v1/chat/completions"
    assert by_id["painter"]["url"] == f"{router.url}/v1/images/generations"


@pytest.mark.parametrize(
    ("changes", "status", "number"),
    [
        ({"messages": []}, 400, 1001),
        ({"model": "nobody has it"}, 404, 1007),
        ({}, 402, 1010),
    ],
)
async def test_an_error_says_another_code_beside_openais_error(
    router: Rig, changes: dict[str, Any], status: int, number: int
):
    """DG-11."""
    async with router.worker():
        reply = await ask(router, {}, **changes)
    said = reply.json()
    assert (reply.status_code, said["code"]) == (status, number)
    assert said["message"] == said["error"]["message"]
