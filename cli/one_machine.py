"""Everything on one machine: PostgreSQL, the simulated Lightning network, a router, a worker.

The router runs in this process; PostgreSQL, the network and the worker are children that die with
it and are started again when they die. All state is in one data directory, so a later start goes on
where this one ended.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, SecretStr

from cli.processes import Child, Processes
from router.app import CannotStart, create_app
from router.core import Core
from router.data_folder import Taken, alone_in
from router.secret_files import kept
from router.serve import RouterServer
from router.settings import Settings

LIGHTNING_PORT = 9740
READY_S = 120.0
LEAVING_S, LEAVING_TRIES = 5.0, 25
WORKER_GRACE_S = 45.0

Say = Callable[[str], None]


class UpSettings(Settings):
    """The router's settings, and those of the one worker beside it."""

    payout_threshold_msat: int = Field(
        default=1000,
        ge=1000,
        description=Settings.model_fields["payout_threshold_msat"].description,
    )
    payout_interval_s: int = Field(
        default=60, ge=1, description=Settings.model_fields["payout_interval_s"].description
    )

    worker: bool = Field(default=True, description="Start a worker on this machine.")
    engine: str = Field(
        default="llama_cpp", description="The worker's engine, as in `satherd worker --engine`."
    )
    model: str | None = Field(
        default=None, description="A GGUF file; default: the small demo model."
    )
    slots: int | None = Field(default=None, ge=1, description="Jobs at once on the worker.")


@dataclass(slots=True)
class Machine:
    """A running one-machine Satherd. `ended` is set when a part has failed for good."""

    url: str
    core: Core
    children: Processes
    lightning_url: str
    admin_token: str


@asynccontextmanager
async def one_machine(settings: UpSettings, say: Say) -> AsyncIterator[Machine]:
    """Start all parts, yield when a paid prompt can be bought, stop them in the right order.

    `say` is told, in words for a person, how far the start is. Raises CannotStart.
    """
    _prepare(settings)
    loop_lines: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
    children = Processes(
        settings.data_dir / "logs", show=lambda name, line: loop_lines.put_nowait((name, line))
    )
    with _alone_in(settings.data_dir):
        async with children, _parts(settings, children, loop_lines, say) as machine:
            yield machine


@asynccontextmanager
async def _parts(
    settings: UpSettings,
    children: Processes,
    loop_lines: asyncio.Queue[tuple[str, str]],
    say: Say,
) -> AsyncIterator[Machine]:
    lightning_url = await _start_lightning(settings, children, loop_lines, say)
    settings.simulated_url = lightning_url
    say("starting the router and its PostgreSQL")
    server = RouterServer(create_app(settings), host=settings.host, port=settings.port)
    await server.start()
    core: Core = server.app.state.core
    try:
        if settings.worker:
            await _start_worker(settings, children, server.url, lightning_url)
            await _until_served(core, children, loop_lines, say)
        up_file = settings.data_dir / "up.json"
        up_file.write_text(json.dumps({"url": server.url, "lightning": lightning_url}))
        try:
            yield Machine(
                server.url,
                core,
                children,
                lightning_url,
                settings.admin_token.get_secret_value(),
            )
        finally:
            up_file.unlink(missing_ok=True)
    finally:
        await server.stop()


def _prepare(settings: UpSettings) -> None:
    settings.data_dir = settings.data_dir.absolute()
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    settings.lnurl_allow_private = settings.simulated
    if not settings.admin_token.get_secret_value():
        settings.admin_token = SecretStr(kept(settings.data_dir / "admin_token", 24))


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Hold the data directory for this process. Raises CannotStart where another one has it."""
    with ExitStack() as stack:
        try:
            stack.enter_context(alone_in(folder, "up.lock"))
        except Taken as taken:
            raise CannotStart(
                f"a Satherd (process {taken.process}) is at work in {folder}: stop it,"
                " or give --data-dir another folder"
            ) from None
        yield


async def _start_lightning(
    settings: UpSettings, children: Processes, lines: asyncio.Queue[tuple[str, str]], say: Say
) -> str:
    if not settings.simulated:
        return ""
    say("starting the simulated Lightning network (no real money)")
    folder = settings.data_dir / "lightning"
    port = await asyncio.to_thread(_free_port, folder)
    await children.start(
        Child(
            "lightning",
            [
                sys.executable,
                "-m",
                "billing.lightning.simulated",
                "--data-dir",
                str(folder),
                "--port",
                str(port),
            ],
        )
    )
    last = ""
    try:
        async with asyncio.timeout(READY_S):
            while True:
                name, line = await lines.get()
                if name == "lightning" and line.startswith("ready: "):
                    return line.split()[1]
                last = line
    except TimeoutError:
        raise CannotStart(f"the simulated network did not start: {last}") from None


def _free_port(folder: Path) -> int:
    """The port of the last time, since Lightning addresses name it, or a free one.

    After a crash of ours the network of the last time may need a moment to leave it.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    remembered = folder / "port"
    wanted = [LIGHTNING_PORT, 0]
    with suppress(OSError, ValueError):
        wanted = [int(remembered.read_text())] * LEAVING_TRIES + wanted
    for turn, port in enumerate(wanted):
        if turn and port == wanted[0]:
            time.sleep(LEAVING_S / LEAVING_TRIES)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)) as probe:
            found = probe.getsockname()[1]
            remembered.write_text(str(found))
            return found
    raise CannotStart("no free port on 127.0.0.1 for the simulated Lightning network")


async def _start_worker(
    settings: UpSettings, children: Processes, router_url: str, lightning_url: str
) -> None:
    environment = {
        "SATHERD_ROUTER_URL": router_url,
        "SATHERD_DATA_DIR": str(settings.data_dir / "worker"),
        "SATHERD_ENGINE": settings.engine,
    }
    if lightning_url:
        environment["SATHERD_LN_URL"] = f"worker@{lightning_url.removeprefix('http://')}"
    if settings.model:
        environment["SATHERD_MODEL"] = settings.model
    if settings.slots:
        environment["SATHERD_SLOTS"] = str(settings.slots)
    argv = [sys.executable, "-m", "worker.main"]
    await children.start(Child("worker", argv, env=environment, grace_s=WORKER_GRACE_S))


async def _until_served(
    core: Core, children: Processes, lines: asyncio.Queue[tuple[str, str]], say: Say
) -> None:
    """Wait for the worker's registration, showing what it says meanwhile."""
    say("starting the worker")
    progress = _Progress()
    ended = asyncio.ensure_future(children.next_end())
    try:
        async with asyncio.timeout(READY_S):
            while not core.fleet.all():
                with suppress(TimeoutError):
                    name, line = await asyncio.wait_for(lines.get(), 0.1)
                    if name == "worker" and (step := progress.next_step(line)):
                        say(f"worker: {step}")
                if ended.done():
                    raise CannotStart("the worker ended:\n" + "\n".join(ended.result().tail))
    except TimeoutError:
        raise CannotStart(f"no worker registered in {READY_S:.0f} s; see logs/worker.log") from None
    finally:
        ended.cancel()


class _Progress:
    """Thins out what a worker says of loading its model: every quarter is enough."""

    def __init__(self) -> None:
        self._shown = -25

    def next_step(self, line: str) -> str | None:
        found = re.search(r"(\d{1,3}) % (.*)", line)
        if found is None or int(found[1]) < self._shown + 25:
            return None
        self._shown = int(found[1])
        return f"{found[2]} {found[1]} %"
