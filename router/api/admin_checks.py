"""`/admin/checks`: what workers are checked with, and what came of it."""

from __future__ import annotations

from typing import Any

from fastapi import Request, Response

from router import administration, checks
from router.api.admin_access import admin_router
from router.api.answers import answer, core_of, read_object
from router.api.own_door import only, short_text, whole_number
from router.errors import BadRequest

router = admin_router()
PROMPT_MAX, EXPECTED_MAX, TOKENS_MAX = 20_000, 20, 4096


@router.get("/checks")
async def show_checks(request: Request) -> Response:
    """The prompts that workers are checked with, what each worker came to, and what it has cost."""
    core = core_of(request)
    async with core.database.connection() as connection:
        found = await checks.overview(connection, now=core.clock())
    settings = core.settings
    return answer(
        {
            **found,
            "check_every_s": settings.check_every_s,
            "check_budget_msat": settings.check_budget_msat,
            "failed_checks_hold_s": settings.failed_checks_hold_s,
            "simulated": core.node.simulated,
        }
    )


@router.post("/checks")
async def add_check(request: Request) -> Response:
    """A prompt of the operator's. With `expected`, texts that a right answer contains, it is a canary;
    without, it is bought twice, and answers are held against those of other workers."""
    core = core_of(request)
    body = await read_object(request)
    only(body, "prompt", "expected", "model", "max_tokens")
    prompt = short_text(body, "prompt", most=PROMPT_MAX)
    if prompt is None:
        raise BadRequest("prompt is needed", param="prompt")
    max_tokens = whole_number(body, "max_tokens", low=1, high=TOKENS_MAX, needed=False)
    async with administration.changing(core) as connection:
        added = await checks.add_prompt(
            connection,
            prompt=prompt,
            expected=_expected(body),
            model=short_text(body, "model", most=200),
            max_tokens=max_tokens or 64,
        )
        await administration.note(connection, "checks.add", added["id"], None, added)
    return answer(added, status=201)


@router.delete("/checks/{prompt_id}")
async def remove_check(request: Request, prompt_id: str) -> Response:
    """Take a prompt away with its results; workers keep what they came to."""
    async with administration.changing(core_of(request)) as connection:
        removed = await checks.remove_prompt(connection, prompt_id)
        await administration.note(connection, "checks.remove", prompt_id, removed, None)
    return answer({"id": prompt_id, "removed": removed is not None})


def _expected(body: dict[str, Any]) -> list[str] | None:
    given = body.get("expected")
    if given is None:
        return None
    if (
        not isinstance(given, list)
        or len(given) > EXPECTED_MAX
        or not all(isinstance(part, str) and "\0" not in part for part in given)
    ):
        raise BadRequest(f"expected is a list of at most {EXPECTED_MAX} texts", param="expected")
    return given
