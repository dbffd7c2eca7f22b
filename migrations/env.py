"""Alembic's environment: async, against the URL that the caller configured."""

from __future__ import annotations

import asyncio
import os

from alembic import context
from sqlalchemy import Connection, pool, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlmodel import SQLModel

import billing.tables  # noqa: F401
import router.tables  # noqa: F401
from router.database import CONNECT_S, sqlalchemy_url

target_metadata = SQLModel.metadata


def _url() -> str:
    configured = context.config.get_main_option("sqlalchemy.url")
    return sqlalchemy_url(configured or os.environ["SATHERD_DATABASE_URL"])


# Routers that start together all come here: the others wait, and then find nothing left to do.
_LOCK = text("select pg_advisory_xact_lock(hashtextextended('migrations', 0))")


def _migrate(connection: Connection) -> None:
    context.configure(connection=connection, target_metadata=target_metadata, compare_type=True)
    with context.begin_transaction():
        connection.execute(_LOCK)
        context.run_migrations()


async def _migrate_online() -> None:
    engine = create_async_engine(
        _url(), poolclass=pool.NullPool, connect_args={"timeout": CONNECT_S}
    )
    async with engine.connect() as connection:
        await connection.run_sync(_migrate)
        await connection.commit()
    await engine.dispose()


if context.is_offline_mode():
    context.configure(url=_url(), target_metadata=target_metadata, literal_binds=True)
    with context.begin_transaction():
        context.run_migrations()
else:
    asyncio.run(_migrate_online())
