"""What prompts have in common at their beginning, and that it leaves with them."""

from __future__ import annotations

from typing import Any

from router.prompt_prefix import COMPLETION_BYTES, prefix_of
from tests.door_tools import post_job, until_state
from tests.router_rig import MODEL, Rig, ScriptedWorker
from worker.protocol import ChatSpec, CompletionSpec, EmbeddingSpec

RULES = "You judge the feeling of a text. Answer with one word. " * 4


def chat(*contents: str, tools: list[dict[str, Any]] | None = None) -> ChatSpec:
    roles = ["system", *["user", "assistant"] * len(contents)]
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    return ChatSpec(model="m", messages=messages, max_tokens=5, tools=tools)


def completion(prompt: str | list[int]) -> CompletionSpec:
    return CompletionSpec(model="m", prompt=prompt, max_tokens=5)


def test_the_same_instructions_with_another_question_begin_alike():
    assert prefix_of(chat(RULES, "I am glad.")) == prefix_of(chat(RULES, "I am sad."))
    assert prefix_of(chat(RULES, "I am glad.")) != prefix_of(chat("Other. " + RULES, "I am glad."))


def test_tools_are_a_part_of_the_beginning():
    tools = [{"type": "function", "function": {"name": "look"}}]
    assert prefix_of(chat(RULES, "Hi", tools=tools)) != prefix_of(chat(RULES, "Hi"))


def test_what_is_short_has_no_beginning():
    assert prefix_of(chat("Hi")) is None
    assert prefix_of(completion("Once upon a time")) is None
    assert prefix_of(completion([1] * 1000)) is None
    assert prefix_of(EmbeddingSpec(model="m", input=[RULES * 10])) is None


def test_completions_begin_alike_by_their_first_bytes():
    head = "x" * COMPLETION_BYTES
    assert prefix_of(completion(head + "a")) == prefix_of(completion(head + "b"))
    assert prefix_of(completion("y" + head)) != prefix_of(completion(head))


async def given_to(
    router: Rig, headers: dict[str, str], rules: str, *workers: ScriptedWorker
) -> str:
    """Buy an answer to a prompt with these instructions; the id of the worker that gave it."""
    messages = [{"role": "system", "content": rules}, {"role": "user", "content": "Hm."}]
    job = await post_job(router, headers, messages=messages)
    row = await until_state(router, job["id"], "running")
    [worker] = [worker for worker in workers if worker.id == row["worker_id"]]
    await worker.serve()
    await until_state(router, job["id"], "succeeded")
    return worker.id


async def test_an_agents_prompts_meet_the_same_worker_again(router: Rig):
    headers = await router.bearer()
    async with router.worker() as one, router.worker() as other:
        first = await given_to(router, headers, RULES, one, other)
        for worker in router.core.fleet.all():
            worker.speeds[MODEL] = 80.0 if worker.id == first else 100.0
        assert await given_to(router, headers, RULES, one, other) == first
        for worker in router.core.fleet.all():
            worker.speeds[MODEL] = 80.0 if worker.id == first else 100.0
        assert await given_to(router, headers, "Other. " + RULES, one, other) != first


async def test_it_is_wiped_with_the_prompt(router: Rig):
    headers = await router.bearer()
    async with router.worker() as worker:
        await given_to(router, headers, RULES, worker)
    assert len(await router.query("select 1 from jobs where prefix is not null")) == 1
    await router.query("update jobs set wipe_at = now() - interval '1 hour'")
    await router.core.maintenance.wipe()
    assert await router.query("select 1 from jobs where prefix is not null") == []
