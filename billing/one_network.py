"""The books of one database are of one Lightning network, for good.

Balances that were paid with simulated money must never be paid out with real money. So the first
router that uses a database writes down which network its books are of, and no router with a node on
another one may use them.
"""

from __future__ import annotations

from typing import Any

from billing.lightning import NodeInfo

_KEY = "network"


async def said_by_books(connection: Any) -> str | None:
    """The network that the books are of, as `regtest (simulated)`; None before a router used them."""
    return await connection.fetchval("select value from billing_state where key = $1", _KEY)


async def network_of_books(connection: Any, node: NodeInfo, *, now: Any) -> str | None:
    """None when the books are of the node's network, as they are from the first call on.

    Otherwise the network that they are of. Safe to race for.
    """
    ours = node.network + (" (simulated)" if node.simulated else "")
    await connection.execute(
        "insert into billing_state (key, value, set_at) values ($1, $2, $3)"
        " on conflict (key) do nothing",
        _KEY,
        ours,
        now,
    )
    theirs = await said_by_books(connection)
    return None if theirs == ours else theirs
