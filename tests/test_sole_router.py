"""A copy of a router's data folder has its id: the copy does not start while the router lives."""

from __future__ import annotations

import asyncio
import shutil
import time
from pathlib import Path

import pytest

from router import sole_router
from router.app import CannotStart
from router.data_folder import place_of
from router.presence import STALE_S
from tests.pair_rig import SECRET
from tests.reading import PATIENCE_S, Reader
from tests.router_rig import Rig, running_network, running_router

SEEN = "update routers set place = 'elsewhere', seen_at = clock_timestamp() - make_interval(secs => {})"


def test_a_copy_lies_at_another_place(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "router_id").write_text("x")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert place_of(tmp_path / "a") == place_of(tmp_path / "a")
    assert place_of(tmp_path / "a") != place_of(tmp_path / "b")


async def test_a_copy_is_refused_and_takes_nothing_from_the_router(
    tmp_path: Path, database_url: str
):
    async with (
        running_network(tmp_path) as (network, url),
        running_router(tmp_path / "a", database_url, network, url, secret=SECRET) as a,
        a.worker() as worker,
    ):
        reader = Reader(a.http, await a.bearer())
        job = await worker.job()
        await worker.say(job, "before, ")
        await reader.until_shown("before, ")
        copy = tmp_path / "b" / "router"
        shutil.copytree(tmp_path / "a" / "router", copy)
        with pytest.raises(CannotStart, match="another router runs with the id") as refused:
            async with running_router(tmp_path / "b", database_url, network, url, secret=SECRET):
                pass
        assert str(copy / "router_id") in str(refused.value)
        await worker.say(job, "and after", seq=1)
        await reader.until_shown("before, and after")
        await worker.finish(job, tokens=4)
        await asyncio.wait_for(reader.task, PATIENCE_S)
        # As the message says.
        (copy / "router_id").unlink()
        async with running_router(tmp_path / "b", database_url, network, url, secret=SECRET) as b:
            assert b.core.router_id != a.core.router_id


@pytest.mark.parametrize(("ago_s", "least_s"), [(STALE_S - 1, 0.9), (STALE_S, 0.0)])
async def test_where_the_router_has_died_elsewhere_its_copy_takes_over(
    router: Rig, ago_s: float, least_s: float
):
    """Its machine is gone, and the volume is at another."""
    database = router.core.database
    await router.core.presence.stop()
    await router.core.presence.turn()
    began = time.monotonic()
    await router.query(SEEN.format(ago_s))
    await sole_router.wait_until_alone(database, router.core.router_id, "here")
    assert time.monotonic() - began >= least_s


async def test_of_two_that_both_think_the_other_dead_each_says_so(
    router: Rig, caplog: pytest.LogCaptureFixture
):
    presence = router.core.presence
    await presence.turn()
    assert "another process uses this router's id" not in caplog.text
    await router.query(SEEN.format(0))
    await presence.turn()
    assert "another process uses this router's id" in caplog.text
