"""`satherd admin checks`: prompts that workers are checked with, and what came of it."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.admin_access import Access, segment, table

checks_app = typer.Typer(
    no_args_is_help=True,
    help="Jobs that check workers. `admin settings set check_every_s=300` has them bought.",
)


@checks_app.command("list")
def list_checks(context: typer.Context) -> None:
    """The prompts, what workers came to, and the cost."""
    access: Access = context.obj
    answer = access.get("/checks")
    prompts = [
        (p["id"], p["kind"], p["model"] or "any", p["prompt"][:60], p["answers"], p["mean_score"])
        for p in answer["prompts"]
    ]
    workers = [
        (w["id"], w["name"], w["checks"], w["mean_score"], w["quality"], w["held_until"] or "")
        for w in answer["workers"]
    ]
    every_s = answer["check_every_s"]
    access.show(
        answer,
        table("prompts", ("id", "kind", "model", "prompt", "answers", "mean score"), prompts),
        table("workers", ("id", "name", "checks", "mean score", "quality", "held until"), workers),
        f"one every {every_s} s" if every_s else "none are bought: check_every_s is 0",
        f"{answer['spent_in_a_day_msat']} of {answer['check_budget_msat']} msat spent in 24 hours",
    )


@checks_app.command("add")
def add_check(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="What is asked. Your own words, never a client's.")],
    expect: Annotated[
        list[str] | None,
        typer.Option(help="A text that a right answer contains; may be given several times."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Only of this model.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, max=4096, help="How long it may be.")] = 64,
) -> None:
    """Check with a known answer; without --expect, by comparing the answers of several workers."""
    access: Access = context.obj
    body = {"prompt": prompt, "expected": expect or None, "model": model, "max_tokens": max_tokens}
    answer = access.post("/checks", **body)
    access.show(answer, f"{answer['kind']} {answer['id']}")


@checks_app.command("remove")
def remove_check(
    context: typer.Context,
    check: Annotated[str, typer.Argument(metavar="ID", help="The id, as `list` shows it.")],
) -> None:
    """Take a prompt away; workers keep the quality that they came to."""
    access: Access = context.obj
    answer = access.delete(f"/checks/{segment(check)}")
    access.show(answer, "removed" if answer["removed"] else "there was none")
