"""A running router: its web application, and the start and end of its parts (`router.joining`)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg
import httpx
from fastapi import FastAPI
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from billing.invoices import utc_now
from billing.lightning import LightningBackend, NodeInfo
from billing.lightning.connect import connect
from billing.one_network import network_of_books
from billing.public_tls import public_tls
from billing.reconciliation import joined_at
from router import (
    administration,
    receipts,
    worker_controls,
    workers,
)
from router.api import (
    admin,
    admin_checks,
    admin_money,
    admin_work,
    balance,
    balance_keys,
    decentralgpt,
    docs,
    gridrepublic,
    herder,
    horde_client,
    horde_status,
    horde_worker,
    horde_workers,
    info,
    jobs,
    kobold,
    kobold_worker,
    openai,
    operations,
    simulated,
    withdrawals,
    worker_socket,
)
from router.api import receipts as receipt_doors
from router.api import workers as worker_doors
from router.api.middleware import BodyLimit, Cors, PaymentReceipt
from router.api.shortcut import Shortcut
from router.api.unknown_paths import in_dialect, no_such_door
from router.bus import Exchange
from router.core import Core
from router.data_folder import Taken, alone_in
from router.database import Database, DatabaseUnavailable, migrate, patiently
from router.embedded_postgres import EmbeddedPostgres
from router.joining import join
from router.settings import Settings, backend_settings
from router.sole_router import IdTaken, wait_until_alone
from router.starting import reached_node

log = logging.getLogger(__name__)

SETTINGS_REFRESH_S = 2.0
# Our own PostgreSQL is started again when it dies, and may first have to recover.
OWN_PATIENCE_S, OTHERS_PATIENCE_S = 60.0, 5.0


class CannotStart(Exception):
    """The router cannot start as it is configured; the message says what to do."""


def create_app(
    settings: Settings, *, clock: Callable = utc_now, exchange: Exchange | None = None
) -> FastAPI:
    """The web application of one router; its parts start and stop with its lifespan.

    `exchange` joins it to other routers in this process, where no NATS server does.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with running_core(settings, clock=clock, exchange=exchange) as core:
            app.state.core = core
            app.state.drain = partial(drain, core)
            app.state.others = lambda: core.presence.others
            if settings.simulated:
                app.state.simulated_http = httpx.AsyncClient(
                    base_url=settings.simulated_url or "", trust_env=False, verify=public_tls()
                )
            yield
            if settings.simulated:
                await app.state.simulated_http.aclose()

    app = _App(
        settings.max_body_bytes,
        title="Satherd",
        version=info.software_version(),
        description="A Lightning-paid marketplace for LLM inference.",
        # It would look for tracers at each request, and hand them what exceptions say.
        telemetry={"tracing": False, "metrics": False, "logs": False},
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    doors = (
        info,
        jobs,
        receipt_doors,
        openai,
        herder,
        gridrepublic,
        decentralgpt,
        worker_socket,
        balance,
        balance_keys,
        withdrawals,
        docs,
        worker_doors,
        kobold,
        horde_client,
        horde_status,
        horde_worker,
        horde_workers,
        kobold_worker,
        admin,
        admin_money,
        admin_work,
        admin_checks,
        operations,
    )
    for door in doors:
        # Not `include_router`: it would make each of the routes anew, at the first request.
        app.router.routes.extend(door.router.routes)
    docs.describe(app)
    if settings.simulated:
        app.router.routes.extend(simulated.router.routes)
    app.add_exception_handler(HTTPException, no_such_door)
    return app


class _App(FastAPI):
    """The framework, behind what every request passes and a shortcut past it."""

    def __init__(self, max_body_bytes: int, **about: Any) -> None:
        super().__init__(**about)
        self._max_body_bytes = max_body_bytes

    def build_middleware_stack(self) -> ASGIApp:
        # Outside of the framework's own layers: each of them would wrap every token that is sent.
        shortcut = Shortcut(super().build_middleware_stack(), handlers=openai.HANDLERS)
        paid = PaymentReceipt(shortcut)
        return Cors(BodyLimit(paid, max_bytes=self._max_body_bytes, body_of=in_dialect))


@asynccontextmanager
async def running_core(
    settings: Settings, *, clock: Callable = utc_now, exchange: Exchange | None = None
) -> AsyncIterator[Core]:
    """All parts of a router, started in order and stopped in the reverse order."""
    if settings.nats_url and settings.secret is None:
        raise CannotStart(
            "set SATHERD_SECRET, the same at every router: SATHERD_NATS_URL joins it to others, whose"
            " credentials it must know (make one with: openssl rand -hex 32)"
        )
    async with AsyncExitStack() as stack:
        _hold_folder(settings.data_dir, stack)
        url = await _database_url(settings, stack)
        patience_s = OWN_PATIENCE_S if settings.database_url is None else OTHERS_PATIENCE_S
        database = await _open_database(url, patience_s)
        stack.push_async_callback(database.close)
        backend = connect(settings.lightning, **backend_settings(settings))
        stack.push_async_callback(backend.aclose)
        node = await _node(backend, settings)
        await _check_books(database, node, clock)
        core = join(settings, database, backend, node, clock, exchange)
        await _start(core, stack)
        log.info(
            "router started network=%s simulated=%s router=%s",
            node.network,
            node.simulated,
            core.router_id,
        )
        yield core
        await drain(core)


def _hold_folder(folder: Path, stack: AsyncExitStack) -> None:
    """Two routers of one name would take back each other's jobs, and not hear each other."""
    try:
        stack.enter_context(alone_in(folder, "router.lock"))
    except Taken as taken:
        raise CannotStart(
            f"a router (process {taken.process}) is at work in {folder}: each needs a data folder of"
            " its own (SATHERD_DATA_DIR, or --data-dir)"
        ) from None


async def _database_url(settings: Settings, stack: AsyncExitStack) -> str:
    if settings.database_url is not None:
        return settings.database_url.get_secret_value()
    postgres = EmbeddedPostgres(settings.data_dir / "postgres")
    await stack.enter_async_context(postgres)
    return postgres.url


async def _open_database(url: str, patience_s: float) -> Database:
    """Bring the tables up to date and open the pool. Raises CannotStart in one line."""

    async def opened() -> Database:
        await asyncio.to_thread(migrate, url)
        return await Database.open(url)

    try:
        return await patiently(opened, patience_s=patience_s)
    except (SQLAlchemyError, asyncpg.PostgresError, OSError) as error:
        words = str(error) or "it does not answer"
        raise CannotStart(f"no use of the database: {words.splitlines()[0]}") from error


async def _node(backend: LightningBackend, settings: Settings) -> NodeInfo:
    node = await reached_node(backend)
    if settings.lnurl_allow_private and node.network == "mainnet":
        raise CannotStart("SATHERD_LNURL_ALLOW_PRIVATE is for development, never for mainnet")
    if not node.simulated and not settings.admin_token.get_secret_value():
        raise CannotStart("set SATHERD_ADMIN_TOKEN: this router handles real money")
    return node


async def _check_books(database: Database, node: NodeInfo, clock: Callable) -> None:
    async with database.connection() as connection:
        other = await network_of_books(connection, node, now=clock())
    if other is not None:
        raise CannotStart(
            f"the books of this database are of {other}, and the Lightning node is on"
            f" {node.network}{' (simulated)' if node.simulated else ''}:"
            " use another database or data directory"
        )


async def _start(core: Core, stack: AsyncExitStack) -> None:
    await _be_the_only_one(core)
    await patiently(partial(_load, core), patience_s=OWN_PATIENCE_S)
    # Before the first request, which others' workers may serve.
    await patiently(core.presence.turn, patience_s=OWN_PATIENCE_S)
    for part in (
        core.writer,
        core.jobs.hub,
        core.relay.bus,
        core.presence,
        core.far_jobs,
        core.watcher,
        core.reconciler,
        core.dispatcher,
        core.maintenance,
        core.gate,
        core.projects,
        core.payouts,
        core.webhooks,
        core.checks,
    ):
        part.start()
        stack.push_async_callback(_stop, part.stop)
    stack.push_async_callback(core.relay.stop)
    stack.push_async_callback(core.far_calls.stop)
    stack.callback(core.announcer.stop)
    lost = await patiently(core.maintenance.take_back_own, patience_s=OWN_PATIENCE_S)
    await patiently(core.maintenance.cancel_abandoned, patience_s=OWN_PATIENCE_S)
    if lost:
        log.warning("%d jobs were running when this router last stopped", lost)
    refresh = asyncio.create_task(_refresh_for_ever(core), name="runtime-settings")
    stack.callback(refresh.cancel)


async def _stop(stop: Callable[[], Awaitable[None]]) -> None:
    """Stop a part; a database that is gone keeps none of the others from stopping."""
    try:
        await stop()
    except DatabaseUnavailable as error:
        log.warning("stopped without the database: %s", error)


async def _be_the_only_one(core: Core) -> None:
    folder = core.settings.data_dir
    alone = partial(wait_until_alone, core.database, core.router_id, core.presence.place)
    try:
        await patiently(alone, patience_s=OWN_PATIENCE_S)
    except IdTaken:
        raise CannotStart(
            f"another router runs with the id of this one, {core.router_id}: if {folder} is a copy of"
            f" its data folder, remove {folder / 'router_id'}, and this one gets an id of its own"
        ) from None


async def _load(core: Core) -> None:
    async with core.database.connection() as connection:
        core.models.known = await workers.known_models(connection)
        core.fleet.set_edges(await workers.load_edges(connection))
        await core.runtime.load(connection)
        await receipts.publish(connection, core.receipts.key)
        core.watcher.joined_at = await joined_at(connection, core.node.pubkey, now=core.clock())
    await _follow_rates(core)


async def _follow_rates(core: Core) -> None:
    """Rates have an effect on who takes what: workers may ask for more than some."""
    schedule = await core.quotes.fees.now()
    if core.asks.update(schedule, core.settings.commission_ppm, core.fleet.all()):
        core.market.touch()
        core.dispatcher.wake()


async def _refresh_for_ever(core: Core) -> None:
    """See what an admin has changed at another router."""
    while True:
        try:
            async with asyncio.timeout(SETTINGS_REFRESH_S):
                await core.relay.changed.wait()
            core.relay.changed.clear()
            core.quotes.fees.forget()
        except TimeoutError:
            pass
        try:
            async with core.database.connection() as connection:
                await core.runtime.load(connection)
            administration.apply_payout_settings(core)
            await _follow_rates(core)
            await worker_controls.follow(core)
        except Exception as error:
            log.warning("settings not refreshed: %r", error)


async def drain(core: Core) -> None:
    """Take nothing new; let what runs finish for a while; give back the rest. Twice is harmless.

    Where there are other routers, workers go to them: each as soon as it has nothing in hand, and in
    the end with what it has. A worker that knows no other is back here when this one is.
    """
    if core.draining:
        return
    log.info("router stops: no new work, what runs is finished")
    core.draining = True
    core.dispatcher.paused = True
    core.presence.leave()
    core.gate.drain_all()
    goes_on = core.presence.others > 0
    try:
        async with asyncio.timeout(core.settings.drain_s):
            while core.attempts.running or core.gate.awaits_any:
                if goes_on:
                    core.gate.let_idle_go()
                await asyncio.sleep(0.05)
    except TimeoutError:
        log.info("%d jobs still run: their workers may take them along", len(core.attempts.running))
    if goes_on:
        await core.gate.hand_over()
    if core.attempts.running:
        log.warning("%d jobs are given back unfinished", len(core.attempts.running))
    await core.gate.close_all()
