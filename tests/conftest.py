"""Fixtures shared by all tests: one throw-away PostgreSQL, a fresh database for each test."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator

import asyncpg
import pytest

from router.database import Database, migrate

SERVER = os.environ.get("SATHERD_TEST_POSTGRES", "")
TEMPLATE = f"satherd_template_{os.getpid()}"


@pytest.fixture(scope="session")
def postgres_url():
    """The URL of a PostgreSQL server's maintenance database, started for this run."""
    yield SERVER


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
