"""Books of simulated money are never served with real money, nor the other way round."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from pathlib import Path

import pytest

from billing.lightning import NodeInfo
from billing.one_network import network_of_books
from router.app import CannotStart
from router.database import Database
from tests.router_rig import Rig, running_rig

NOW = datetime(2026, 1, 1, tzinfo=UTC)


async def test_the_first_network_is_that_of_the_books_for_good(
    router: Rig, database: Database
) -> None:
    """The rig's node is simulated, and it came first."""
    node: NodeInfo = router.core.node
    assert node.simulated
    real = dataclasses.replace(node, network="mainnet", simulated=False)
    same_name = dataclasses.replace(node, simulated=False)
    async with database.connection() as connection:
        for _ in range(2):
            assert await network_of_books(connection, node, now=NOW) is None
            assert await network_of_books(connection, real, now=NOW) == "regtest (simulated)"
            assert await network_of_books(connection, same_name, now=NOW) == "regtest (simulated)"


async def test_a_router_does_not_start_on_the_books_of_another_network(
    tmp_path: Path, database: Database, database_url: str
) -> None:
    async with database.connection() as connection:
        await connection.execute(
            "insert into billing_state (key, value, set_at) values ('network', 'mainnet', now())"
        )
    with pytest.raises(CannotStart, match=r"books of this database are of mainnet, and .* regtest"):
        async with running_rig(tmp_path, database_url):
            raise AssertionError("it has started")
