"""`satherd up`: everything on one machine, until Ctrl-C."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import uvloop
from rich.console import Console

from cli.one_machine import Machine, UpSettings, one_machine
from cli.serving import START_ERRORS, stop_signal
from cli.settings_flags import BadSettings, complain, read_settings
from router.logs import set_up
from router.serve import spare_collector

stderr = Console(stderr=True, highlight=False)


def run(arguments: Sequence[str]) -> int:
    """Serve until SIGINT or SIGTERM; the exit status."""
    try:
        settings = read_settings(UpSettings, arguments[1:], prog="satherd up")
    except BadSettings as error:
        return complain(error)
    # Steps are for the eye; the log of everything goes to a file, and to the screen what is wrong.
    log_to_file(settings)
    try:
        uvloop.run(_up(settings))
    except START_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def log_to_file(settings: UpSettings) -> Path:
    """Send the router's log to `logs/router.log`; warnings also to the screen."""
    folder = settings.data_dir / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "router.log"
    set_up(settings.log_format, file=path, screen_level=logging.ERROR)
    return path


async def _up(settings: UpSettings) -> None:
    stop = stop_signal()
    starting = asyncio.ensure_future(stop.wait())
    async with one_machine(settings, say_step) as machine:
        spare_collector()
        introduce(machine, settings)
        print(f"ready: {machine.url}", flush=True)
        ended = asyncio.ensure_future(machine.children.next_end())
        await asyncio.wait({starting, ended}, return_when=asyncio.FIRST_COMPLETED)
        if ended.done():
            child = ended.result()
            stderr.print(f"[red]{child.name} has failed for good:[/red]")
            stderr.print("\n".join(child.tail), markup=False)
        ended.cancel()
        say_step("stopping: what runs is finished first")


def say_step(words: str) -> None:
    stderr.print(f"[dim]·[/dim] {words}")


def introduce(machine: Machine, settings: UpSettings) -> None:
    """What a person can do now."""
    served = sorted({model.id for worker in machine.core.fleet.all() for model in worker.models})
    lines = [
        "[bold]Satherd is up.[/bold]"
        + (
            " [yellow]Simulated money: nothing here is real.[/yellow]" if settings.simulated else ""
        ),
        f"  models       {', '.join(served) or 'none yet'}",
        '  ask          satherd prompt "Tell me a story about a brave rabbit."',
        f"  prices       {machine.url}/info        documentation  {machine.url}/docs",
        "  operate      satherd admin --help",
        f"  state, logs  {settings.data_dir}",
    ]
    stderr.print("\n".join(lines), soft_wrap=True)
