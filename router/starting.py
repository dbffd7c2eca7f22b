"""What a router waits for at its start, beside the database (`router.database.patiently`)."""

from __future__ import annotations

import asyncio
import logging
import time

from billing.lightning import BackendUnavailable, LightningBackend, NodeInfo, OutcomeUnknown

log = logging.getLogger(__name__)

NODE_PATIENCE_S = 15.0


async def reached_node(backend: LightningBackend) -> NodeInfo:
    """What the node says of itself; it may be on its way up as we are. Raises BackendError."""
    until = time.monotonic() + NODE_PATIENCE_S
    while True:
        try:
            return await backend.node_info()
        except (BackendUnavailable, OutcomeUnknown) as error:
            if time.monotonic() > until:
                raise
            log.warning("waiting for the Lightning node: %s", error)
        await asyncio.sleep(0.5)
