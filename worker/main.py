"""A whole worker: key, engine, hardware, and one session after another until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import sys
import time
from collections.abc import Awaitable, Callable
from importlib.metadata import PackageNotFoundError, version

from pydantic import ValidationError

if sys.platform != "win32":
    import uvloop

from worker.connection import Connection, ConnectionLost
from worker.connection import connect as connect_websocket
from worker.engines import Engine, Progress, open_engine
from worker.errors import EXIT_CONFIG, EXIT_INTERRUPTED, EngineAway, WorkerError
from worker.hardware import survey
from worker.holding import Holding
from worker.protocol import Registered, Registration
from worker.session import Session
from worker.settings import WorkerSettings, socket_urls, worker_key
from worker.shutdown import Shutdown

log = logging.getLogger("worker")

FIRST_PAUSE_S = 0.5
STEADY_AFTER_S = 30
ABANDON_S = 5

Connect = Callable[[str], Awaitable[Connection]]


async def run_worker(
    settings: WorkerSettings,
    *,
    shutdown: Shutdown | None = None,
    progress: Progress | None = None,
    on_registered: Callable[[Registered], object] | None = None,
    connect: Connect = connect_websocket,
) -> None:
    """Serve until told to stop.

    Without `shutdown`, SIGINT and SIGTERM stop it. `progress` is told how the engine starts,
    `on_registered` of every registration. Raises EngineStartError, EngineDied, and
    RegistrationRefused when the router will never take this worker; each has an `exit_code`. A
    router that is away is waited for, and so is the server of a remote engine once it has served.
    """
    own = shutdown is None
    shutdown = shutdown or Shutdown()
    if own:
        shutdown.listen()
    try:
        key = worker_key(settings)
        engine = open_engine(settings)
        try:
            if not await _start(engine, shutdown, progress or log_progress):
                return
            registration = await _registration(settings, engine, key)
            await _serve(settings, engine, registration, shutdown, connect, on_registered)
        finally:
            await engine.aclose()
    finally:
        if own:
            shutdown.unlisten()


async def _start(engine: Engine, shutdown: Shutdown, progress: Progress) -> bool:
    """Start the engine; False when the worker was told to stop before that was done."""
    starting = asyncio.ensure_future(engine.start(progress))
    asked = asyncio.ensure_future(shutdown.asked.wait())
    try:
        await asyncio.wait((starting, asked), return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            return True
        return False
    finally:
        asked.cancel()
        starting.cancel()
        await asyncio.gather(asked, starting, return_exceptions=True)


async def _registration(settings: WorkerSettings, engine: Engine, key: str) -> Registration:
    hardware = await asyncio.to_thread(survey, settings.data_dir)
    return Registration(
        worker_key=key,
        name=settings.worker_name,
        ln_url=settings.ln_url,
        models=list(engine.models),
        slots=engine.slots,
        min_fees=settings.min_fees,
        worker_version=_version(),
        **dict(hardware),
    )


async def _serve(
    settings: WorkerSettings,
    engine: Engine,
    registration: Registration,
    shutdown: Shutdown,
    connect: Connect,
    on_registered: Callable[[Registered], object] | None,
) -> None:
    urls = socket_urls(settings.router_url)
    holding = Holding()
    failures = turn = 0
    try:
        while not shutdown.asked.is_set():
            began = time.monotonic()
            try:
                connection = await _connect(connect, urls[turn % len(urls)], shutdown)
                if connection is None:
                    return
                session = Session(
                    engine,
                    registration,
                    shutdown,
                    holding=holding,
                    grace_s=settings.grace_s,
                    on_registered=lambda answer: _welcome(answer, on_registered),
                )
                await session.run(connection)
            except EngineAway as error:
                log.warning("%s; serving again when it does", error)
                await holding.abandon(ABANDON_S)
                await _until_well(engine, shutdown, settings.reconnect_max_s)
            except ConnectionLost as error:
                if time.monotonic() - began > STEADY_AFTER_S:
                    failures = 0
                # Of several routers the next is tried at once; a pause follows a whole round.
                turn += 1
                failures += 1
                rounds, rest = divmod(failures, len(urls))
                pause_s = 0 if rest else backoff_s(rounds - 1, settings.reconnect_max_s)
                log.warning("no line to the router (%s); trying again in %.1f s", error, pause_s)
                await _pause(shutdown, pause_s)
    finally:
        await holding.abandon(ABANDON_S)


async def _until_well(engine: Engine, shutdown: Shutdown, most_s: float) -> None:
    """Returns when the engine can serve again, or the worker was told to stop."""
    failures = 0
    while not shutdown.asked.is_set() and not await engine.check():
        await _pause(shutdown, backoff_s(failures, most_s))
        failures += 1


async def _pause(shutdown: Shutdown, pause_s: float) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(shutdown.asked.wait(), pause_s)


async def _connect(connect: Connect, url: str, shutdown: Shutdown) -> Connection | None:
    """A new connection; None when the worker was told to stop first."""
    connecting = asyncio.ensure_future(connect(url))
    asked = asyncio.ensure_future(shutdown.asked.wait())
    try:
        await asyncio.wait((connecting, asked), return_when=asyncio.FIRST_COMPLETED)
        return connecting.result() if connecting.done() else None
    finally:
        asked.cancel()
        connecting.cancel()


def backoff_s(failures: int, most_s: float) -> float:
    """The pause before the next try, in seconds: doubling, up to `most_s`, half of it random.

    Random, so that a thousand workers of a router that restarts do not come back in one second.
    """
    longest = min(most_s, FIRST_PAUSE_S * 2 ** min(failures, 30))
    return longest * random.uniform(0.5, 1)


def _welcome(answer: Registered, on_registered: Callable[[Registered], object] | None) -> None:
    paid = f"paid at {answer.ln_url}" if answer.payable else "unpaid"
    log.info("registered as %s, %s", answer.worker_id, paid)
    if on_registered is not None:
        on_registered(answer)


def log_progress(fraction: float, words: str) -> None:
    """The default `progress`: one log line a call."""
    log.info("%3d %% %s", int(fraction * 100), words)


def _version() -> str | None:
    try:
        return version("satherd")
    except PackageNotFoundError:
        return None


def main() -> int:
    """Run a worker with the settings of the environment; the exit code."""
    try:
        settings = WorkerSettings()
    except ValidationError as error:
        for mistake in error.errors():
            field = "_".join(str(part) for part in mistake["loc"])
            print(f"SATHERD_{field.upper()}: {mistake['msg']}", file=sys.stderr)
        return EXIT_CONFIG
    return serve(settings)


def serve(settings: WorkerSettings) -> int:
    """A process that is this worker and nothing else; the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        if sys.platform == "win32":
            asyncio.run(run_worker(settings))
        else:
            uvloop.run(run_worker(settings))
    except WorkerError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
