"""A reader that goes while it is let in leaves nothing behind."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from router import following
from router.database import DatabaseUnavailable
from tests.door_tools import post_job
from tests.router_rig import PATIENCE_S, Rig


@pytest.mark.parametrize("ends", [True, False], ids=["ended meanwhile", "runs on"])
@pytest.mark.parametrize("why", [DatabaseUnavailable("away"), asyncio.CancelledError()], ids=repr)
async def test_no_stream_is_left_of_a_job_whose_reader_has_gone(
    router: Rig, monkeypatch: pytest.MonkeyPatch, why: BaseException, ends: bool
):
    """The job ends after the first look and before the stream is opened: nobody would end that one."""
    jobs = router.core.jobs
    row = jobs.row
    looks = 0

    async def look(job_id: str) -> Any:
        nonlocal looks
        looks += 1
        if looks == 2:
            raise why
        found = await row(job_id)
        if ends:
            await worker.finish(job, tokens=1)
            async with asyncio.timeout(PATIENCE_S):
                while jobs.hub.get(job_id) is not None:
                    await asyncio.sleep(0.01)
        return found

    key = await router.bearer()
    async with router.worker() as worker:
        job_id = (await post_job(router, key))["id"]
        job = await worker.job()
        stream = jobs.hub.get(job_id)
        with monkeypatch.context() as patch:
            patch.setattr(jobs, "row", look)
            with pytest.raises(type(why)):
                await following._attach(jobs, job_id)
        assert jobs.hub.get(job_id) is (None if ends else stream)
        if not ends:
            await worker.finish(job, tokens=1)
