"""`satherd up`: everything on one machine, until Ctrl-C."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
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
    try:
        # Steps are for the eye; the log of everything goes to a file, what is wrong to the screen.
        log_to_file(settings)
        return uvloop.run(_up(settings))
    except START_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def log_to_file(settings: UpSettings) -> Path:
    """Send the router's log to `logs/router.log`; warnings also to the screen."""
    folder = settings.data_dir / "logs"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / "router.log"
    set_up(settings.log_format, file=path, screen_level=logging.ERROR)
    return path


async def _up(settings: UpSettings) -> int:
    asked = asyncio.ensure_future(stop_signal().wait())
    async with AsyncExitStack() as stack:
        start = asyncio.ensure_future(stack.enter_async_context(one_machine(settings, say_step)))
        await asyncio.wait({start, asked}, return_when=asyncio.FIRST_COMPLETED)
        if not start.done():
            say_step("stopping before it was ready")
            start.cancel()
            await asyncio.gather(start, return_exceptions=True)
            return 0
        status = await _serve(start.result(), settings, asked)
    asked.cancel()
    return status


async def _serve(machine: Machine, settings: UpSettings, asked: asyncio.Future) -> int:
    """Until somebody asks for the end (0), or a child has failed for good (1)."""
    spare_collector()
    introduce(machine, settings)
    print(f"ready: {machine.url}", flush=True)
    ended = asyncio.ensure_future(machine.children.next_end())
    await asyncio.wait({asked, ended}, return_when=asyncio.FIRST_COMPLETED)
    failed = ended.done()
    if failed:
        child = ended.result()
        stderr.print(f"[red]{child.name} has failed for good:[/red]")
        stderr.print("\n".join(child.tail), markup=False)
    ended.cancel()
    say_step("stopping: what runs is finished first")
    return 1 if failed else 0


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
