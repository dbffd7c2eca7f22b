"""What a router says of its workers to others."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.router_rig import Rig


async def test_workers_that_come_and_go_do_not_keep_a_router_busy_with_saying_so(
    router: Rig, monkeypatch: pytest.MonkeyPatch
):
    """Where summing them up takes long, it is done the less often."""
    said = 0

    def slowly() -> None:
        nonlocal said
        said += 1
        time.sleep(0.02)

    monkeypatch.setattr(router.core.presence, "say", slowly)
    until = time.monotonic() + 0.9
    while time.monotonic() < until:
        router.core.fleet.on_change()
        await asyncio.sleep(0.005)
    assert 1 <= said <= 6
