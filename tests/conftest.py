"""Fixtures shared by all tests: one throw-away PostgreSQL, a fresh database for each test."""

from __future__ import annotations

import asyncio
import functools
import math
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import asyncpg
import httpx
import hypothesis
import pytest

from router import market
from router.database import Database, migrate
from router.embedded_postgres import throw_away_server
from tests.memory_folder import memory_folder
from tests.nats_tools import nats_if_any
from tests.pair_rig import running_pair
from tests.regtest.network import LightningNetwork
from tests.regtest.session import running_network
from tests.router_rig import Rig, running_rig

# A server that is running already, for whoever runs single tests all day.
SERVER = os.environ.get("SATHERD_TEST_POSTGRES")
TEMPLATE = f"satherd_template_{os.getpid()}"

# How fast a crowded machine draws and runs its examples is no test's business.
hypothesis.settings.register_profile(
    "crowded", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("crowded")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "real_node: needs a Lightning node of the operator's")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # Started in the background of a shell, which has Ctrl-C ignored: so would all that tests start.
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def certificates_are_read_once() -> Iterator[None]:
    """Each of httpx's clients reads the public authorities' certificates, which takes some 30 ms of
    CPU: more than all the rest that many tests do. They are not changed by anybody."""
    transports = httpx._transports.default  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transports, "create_ssl_context", functools.cache(httpx.create_ssl_context))
        yield


@pytest.fixture(scope="session", autouse=True)
def what_is_queued_here_is_seen_at_once() -> Iterator[None]:
    """A look at the queue that took long is used for a while, and on a crowded machine any may."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(market, "CHEAP_S", math.inf)
        yield


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """pytest's own, but in memory, and gone after the test. The simulated network alone flushes its
    file at every payment."""
    with memory_folder() as folder:
        yield folder


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """The URL of a PostgreSQL server's maintenance database, started for this run."""
    if SERVER:
        yield SERVER
        return
    with memory_folder() as folder, throw_away_server(folder) as url:
        yield url


def url_of(postgres_url: str, name: str) -> str:
    """The same server, another database: `postgresql://user@/NAME?host=…`."""
    head, _, query = postgres_url.partition("?")
    return f"{head.rpartition('/')[0]}/{name}" + (f"?{query}" if query else "")


@pytest.fixture(scope="session")
def template(postgres_url: str):
    """A migrated database that each test's own is copied from."""

    async def run(statement: str) -> None:
        connection = await asyncpg.connect(postgres_url)
        await connection.execute(statement)
        await connection.close()

    asyncio.run(run(f"create database {TEMPLATE}"))
    migrate(url_of(postgres_url, TEMPLATE))
    yield TEMPLATE
    asyncio.run(run(f"drop database {TEMPLATE} with (force)"))


_count = iter(range(1_000_000))


@pytest.fixture
async def database_url(postgres_url: str, template: str) -> AsyncIterator[str]:
    """A fresh migrated database, dropped after the test."""
    name = f"satherd_test_{os.getpid()}_{next(_count)}"
    server = await asyncpg.connect(postgres_url)
    await server.execute(f"create database {name} template {template} strategy file_copy")
    yield url_of(postgres_url, name)
    await server.execute(f"drop database {name} with (force)")
    await server.close()


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    opened = await Database.open(database_url, size=5)
    yield opened
    await opened.close()


@pytest.fixture
async def router(tmp_path: Path, database_url: str) -> AsyncIterator[Rig]:
    """A running router with the settings of `running_rig`."""
    async with running_rig(tmp_path, database_url) as rig:
        yield rig


@pytest.fixture
async def pair(tmp_path: Path, database_url: str) -> AsyncIterator[tuple[Rig, Rig]]:
    """Routers A and B over NATS; where there is none, over the bus within this process."""
    async with (
        nats_if_any(tmp_path) as line,
        running_pair(tmp_path, database_url, lines=(line, line)) as rigs,
    ):
        yield rigs


_networks: list[LightningNetwork] = []


def _on_lightning(item: pytest.Item) -> bool:
    return not {"lightning", "lightning_on_disk"}.isdisjoint(getattr(item, "fixturenames", ()))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """First what needs a Lightning network, so that there comes a time when nothing does."""
    items.sort(key=lambda item: not _on_lightning(item))


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """End the Lightning networks after their last test: idle, they take a quarter of a core."""
    if nextitem is None or _on_lightning(nextitem) or not _networks:
        return
    # Options put tests that failed, or are new, before all others; these need a network later.
    items = item.session.items
    if not any(_on_lightning(later) for later in items[items.index(item) + 1 :]):
        while _networks:
            _networks.pop().stop()


@pytest.fixture(scope="session")
def lightning() -> Iterator[LightningNetwork]:
    """A real Lightning network; its nodes write no files, and so are fast and must not be killed."""
    with memory_folder() as folder, running_network(folder) as network:
        _networks.append(network)
        yield network


@pytest.fixture(scope="session")
def lightning_on_disk() -> Iterator[LightningNetwork]:
    """Another, of which the router's node may be killed."""
    with memory_folder() as folder, running_network(folder, files=["router"]) as network:
        _networks.append(network)
        yield network
