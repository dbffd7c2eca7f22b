"""What a router says of its workers to others."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from router.bus import Exchange
from tests.pair_rig import SECRET
from tests.reading import CHAT, until
from tests.router_rig import Rig, running_network, running_router


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


@pytest.mark.parametrize("bus", [True, False])
async def test_a_router_that_is_started_again_knows_at_once_what_others_can_serve(
    tmp_path: Path, database_url: str, bus: bool
):
    """Its first request is not refused for want of a worker that another router has."""
    first, again = Exchange(), Exchange()
    async with (
        running_network(tmp_path) as (network, url),
        running_router(
            tmp_path / "a", database_url, network, url, exchange=first, secret=SECRET
        ) as a,
        a.worker(),
    ):

        async def is_written() -> bool:
            rows = await a.query("select 1 from routers where workers::text like '%names%'")
            return bool(rows)

        key = await a.bearer()
        await until(is_written)
        for _ in range(3):
            async with running_router(
                tmp_path / "b",
                database_url,
                network,
                url,
                exchange=first if bus else again,
                secret=SECRET,
            ) as b:
                made = await b.http.post("/jobs", json=CHAT | {"kind": "chat"}, headers=key)
                assert made.status_code == 202, made.text
