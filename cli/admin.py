"""`satherd admin`: fees, settings, workers, jobs, payouts and books of a running router.

It speaks to the admin API (docs: `/docs`), so it works from anywhere that the router is reached
from. `--router-url`, `--token`, `--data-dir` and `--json` may stand anywhere on the line.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.admin_access import Access, fail, segment, table
from cli.admin_checks import checks_app
from cli.admin_money import ledger_app
from cli.admin_work import jobs_app, payouts_app, workers_app

RATES = (
    "prompt_fee_msat",
    "input_msat_per_mtok",
    "output_msat_per_mtok",
    "image_fee_msat",
    "training_msat_per_mtok",
)

root = typer.Typer(no_args_is_help=True, add_completion=False)
app = typer.Typer(no_args_is_help=True, help="Fees, settings, workers, jobs, payouts of a router.")
fees_app = typer.Typer(
    no_args_is_help=True, help="What prompts cost. The next quote uses a change."
)
settings_app = typer.Typer(no_args_is_help=True, help="Settings that change while a router runs.")
root.add_typer(app, name="admin")
app.add_typer(fees_app, name="fees")
app.add_typer(settings_app, name="settings")
app.add_typer(workers_app, name="workers")
app.add_typer(jobs_app, name="jobs")
app.add_typer(payouts_app, name="payouts")
app.add_typer(ledger_app, name="ledger")
app.add_typer(checks_app, name="checks")

_SHARED = {"--router-url": True, "--token": True, "--data-dir": True, "--json": False}


@root.callback()
def _satherd() -> None:
    """Satherd's operator commands."""


def run(arguments: Sequence[str]) -> int:
    """Run one of them; the exit status of a failure comes as SystemExit."""
    root(args=shared_first(arguments), prog_name="satherd")
    return 0


def shared_first(arguments: Sequence[str]) -> list[str]:
    """Put the options that all commands share behind `admin`, wherever they were given."""
    shared: list[str] = []
    rest: list[str] = []
    waiting = iter(arguments)
    for word in waiting:
        name = word.partition("=")[0]
        if name not in _SHARED:
            rest.append(word)
            continue
        shared.append(word)
        if _SHARED[name] and "=" not in word:
            shared += [value for value in [next(waiting, None)] if value is not None]
    return [*rest[:1], *shared, *rest[1:]]


@app.callback()
def admin(
    context: typer.Context,
    router_url: Annotated[
        str | None,
        typer.Option(help="The router; else SATHERD_ROUTER_URL, else the one of `satherd up`."),
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(help="The admin token; else SATHERD_ADMIN_TOKEN, else that of `satherd up`."),
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="The data directory of a `satherd up`.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the router's JSON answer.")
    ] = False,
) -> None:
    """Fees, settings, workers, jobs, payouts and books of a router.

    The options here may stand anywhere on the line.
    """
    context.obj = Access(router_url, token, data_dir, as_json)


@fees_app.command("show")
def show_fees(context: typer.Context) -> None:
    """The rates in force: the default, and the models that have their own."""
    access: Access = context.obj
    answer = access.get("/fees")
    rows = [("(default)", *(answer["default"][rate] for rate in RATES))]
    rows += [(m, *(fees[rate] for rate in RATES)) for m, fees in answer["models"].items()]
    access.show(answer, table(None, ("model", *RATES), rows))


@fees_app.command("set")
def set_fees(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help="A model; without one, the default.")] = None,
    prompt_fee_msat: Annotated[int | None, typer.Option(min=0, help="For each prompt.")] = None,
    input_msat_per_mtok: Annotated[
        int | None, typer.Option(min=0, help="For a million tokens of prompt.")
    ] = None,
    output_msat_per_mtok: Annotated[
        int | None, typer.Option(min=0, help="For a million tokens of answer.")
    ] = None,
    image_fee_msat: Annotated[
        int | None, typer.Option(min=0, help="For each image that is made.")
    ] = None,
    training_msat_per_mtok: Annotated[
        int | None, typer.Option(min=0, help="For a million tokens of training.")
    ] = None,
) -> None:
    """Change rates; those not named stay as they are. Quotes made before keep theirs."""
    access: Access = context.obj
    given = {
        "prompt_fee_msat": prompt_fee_msat,
        "input_msat_per_mtok": input_msat_per_mtok,
        "output_msat_per_mtok": output_msat_per_mtok,
        "image_fee_msat": image_fee_msat,
        "training_msat_per_mtok": training_msat_per_mtok,
    }
    changes = {rate: value for rate, value in given.items() if value is not None}
    if not changes:
        raise fail("name at least one rate, such as --output-msat-per-mtok 600000", 2)
    answer = access.put(f"/fees/{segment(model)}" if model else "/fees", changes)
    _show_rates(access, answer)


@fees_app.command("remove")
def remove_fees(
    context: typer.Context, model: Annotated[str, typer.Argument(help="The model.")]
) -> None:
    """Return a model to the default rates."""
    access: Access = context.obj
    _show_rates(access, access.delete(f"/fees/{segment(model)}"))


@fees_app.command("history")
def fee_history(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help="A model; without one, the default.")] = None,
) -> None:
    """Changes of rates, newest first. Nothing is ever edited."""
    access: Access = context.obj
    answer = access.get(f"/fees/{segment(model)}" if model else "/fees")
    rows = [
        (c["at"], c["who"], *((c["fees"] or {}).get(rate, "removed") for rate in RATES))
        for c in answer["history"]
    ]
    access.show(answer, table(None, ("at", "who", *RATES), rows))


def _show_rates(access: Access, answer: dict[str, Any]) -> None:
    row = (answer["model"] or "(default)", *(answer["fees"][rate] for rate in RATES))
    access.show(answer, table(None, ("model", *RATES), [row]))


@settings_app.command("show")
def show_settings(context: typer.Context) -> None:
    """What can be changed while the router runs, and within which bounds."""
    access: Access = context.obj
    _show_settings(access, access.get("/settings"))


@settings_app.command("set")
def set_settings(
    context: typer.Context,
    changes: Annotated[list[str], typer.Argument(metavar="NAME=VALUE…", help="Whole numbers.")],
) -> None:
    """Change settings: `commission_ppm=40000`. All of them or, when one is wrong, none."""
    access: Access = context.obj
    wanted: dict[str, int] = {}
    for change in changes:
        name, _, value = change.partition("=")
        try:
            wanted[name] = int(value)
        except ValueError as error:
            raise fail(f"{change!r} is not NAME=WHOLE NUMBER", 2) from error
    _show_settings(access, access.put("/settings", wanted))


def _show_settings(access: Access, answer: dict[str, Any]) -> None:
    rows = [(name, value, *answer["bounds"][name]) for name, value in answer["settings"].items()]
    access.show(answer, table(None, ("setting", "value", "least", "most"), rows))


@app.command()
def pause(
    context: typer.Context,
    message: Annotated[str | None, typer.Option(help="What clients are told.")] = None,
) -> None:
    """Make no new quotes. What is paid still runs."""
    access: Access = context.obj
    answer = access.post("/pause", message=message)
    access.show(answer, f"paused: {answer['paused']}")


@app.command()
def resume(context: typer.Context) -> None:
    """Make quotes again."""
    access: Access = context.obj
    access.show(access.post("/resume"), "quotes are made again")


@app.command()
def audit(
    context: typer.Context,
    limit: Annotated[int, typer.Option(min=1, max=100, help="How many.")] = 20,
) -> None:
    """What admins have changed, newest first."""
    access: Access = context.obj
    answer = access.get("/audit", limit=limit)
    rows = [
        (c["at"], c["who"], c["action"], c["subject"], *_what_changed(c["before"], c["after"]))
        for c in answer["changes"]
    ]
    access.show(answer, table(None, ("at", "who", "action", "subject", "before", "after"), rows))


def _what_changed(before: Any, after: Any) -> tuple[str | None, str | None]:
    """Both sides of a change without what is the same in both; `--json` shows all."""
    if isinstance(before, dict) and isinstance(after, dict):
        same = {name for name in before if name in after and before[name] == after[name]}
        before = {name: value for name, value in before.items() if name not in same}
        after = {name: value for name, value in after.items() if name not in same}
    return _short(before), _short(after)


def _short(value: Any) -> str | None:
    return None if value is None else json.dumps(value, separators=(",", ":"))
