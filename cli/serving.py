"""`satherd router`, `satherd migrate`, `satherd simulated-lightning`: single parts."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Sequence

import uvloop

from billing.errors import BillingError
from billing.lightning.simulated import __main__ as simulated_lightning
from cli.settings_flags import BadSettings, complain, read_settings
from router.app import CannotStart, create_app
from router.database import migrate
from router.embedded_postgres import EmbeddedPostgresError, reach
from router.logs import set_up
from router.serve import RouterServer, spare_collector
from router.settings import Settings

# What keeps a router from starting, in words for its operator.
START_ERRORS = (CannotStart, EmbeddedPostgresError, BillingError, OSError, ValueError)


def run(arguments: Sequence[str]) -> int:
    """Run the named part; returns the exit status."""
    command, rest = arguments[0], arguments[1:]
    if command == "simulated-lightning":
        return simulated_lightning.main(rest)
    try:
        settings = read_settings(Settings, rest, prog=f"satherd {command}")
    except BadSettings as error:
        return complain(error)
    set_up(settings.log_format)
    work = _migrate(settings) if command == "migrate" else serve(settings)
    try:
        uvloop.run(work)
    except START_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


async def serve(settings: Settings) -> None:
    """Run a router until SIGINT or SIGTERM."""
    stop = stop_signal()
    server = RouterServer(create_app(settings), host=settings.host, port=settings.port)
    await server.start()
    spare_collector()
    print(f"ready: {server.url}", flush=True)
    await stop.wait()
    await server.stop()


async def _migrate(settings: Settings) -> None:
    if settings.database_url is not None:
        await asyncio.to_thread(migrate, settings.database_url.get_secret_value())
    else:
        async with reach(settings.data_dir / "postgres") as url:
            await asyncio.to_thread(migrate, url)
    print("the tables are up to date")


def stop_signal() -> asyncio.Event:
    """Set by the first SIGINT or SIGTERM."""
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, asked.set)
    return asked
