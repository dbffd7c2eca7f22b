"""Ids that polling doors hand out: secrets that open, cancel and raise the jobs they name."""

from __future__ import annotations

import uuid

import pytest

from router.door_ids import Door, as_uuid
from tests.door_tools import JOB
from tests.router_rig import Rig


async def made(router: Rig, n: int = 1) -> tuple[str, list[str]]:
    """Queue jobs that nobody serves: their quote and their ids."""
    async with router.worker():
        pass  # so that the model is known
    headers = await router.bearer() | {"X-Max-Wait-S": "600"}
    reply = await router.http.post("/jobs", json=JOB | {"n": n}, headers=headers)
    assert reply.status_code == 202, reply.text
    return reply.json()["quote_id"], [job["id"] for job in reply.json()["jobs"]]


async def test_an_id_opens_all_jobs_of_a_purchase_or_the_one_it_names(router: Rig):
    quote_id, jobs = await made(router, n=2)
    ids = router.core.door_ids
    whole, second = await ids.issue(Door.KOBOLD, quote_id, indexes=[None, 1])
    assert [row["id"] for row in await ids.jobs(as_uuid(whole), Door.KOBOLD)] == jobs
    assert [row["id"] for row in await ids.jobs(second)] == jobs[1:]
    assert await ids.jobs(whole, Door.HORDE) == []
    assert uuid.UUID(as_uuid(whole)).version == 4


async def test_it_is_stored_as_a_hash_and_the_same_for_the_same_purchase(router: Rig):
    quote_id, _ = await made(router)
    issue = router.core.door_ids.issue
    (first,) = await issue(Door.HORDE, quote_id, indexes=[None])
    assert [first] == await issue(Door.HORDE, quote_id, indexes=[None])
    (row,) = await router.query("select * from door_ids")
    assert first not in str(dict(row)) and as_uuid(first) not in str(dict(row))


@pytest.mark.parametrize(
    "nonsense", ["", "x", "0" * 32, "a3bb189e-8bf9-3888-9912-ace4e6543002", "a\0b", "é" * 32]
)
async def test_what_was_never_handed_out_opens_nothing(router: Rig, nonsense: str):
    assert await router.core.door_ids.jobs(nonsense) == []


async def test_it_opens_raises_and_cancels_the_job_at_our_own_door(router: Rig):
    quote_id, (job,) = await made(router)
    (door_id,) = await router.core.door_ids.issue(Door.HORDE, quote_id, indexes=[None])
    mine = {"Authorization": f"Bearer {as_uuid(door_id)}"}
    shown = await router.http.get(f"/jobs/{job}", headers=mine)
    assert shown.json()["id"] == job
    assert (await router.http.get(f"/jobs/{job}")).status_code == 401
    # In the place of the job's own id it does as well: clients of these doors know no other.
    bumped = await router.http.post(f"/jobs/{door_id}/bump", json={"fee_multiplier": 2})
    assert bumped.json()["multiplier"] == "2.000"
    gone = await router.http.delete(f"/jobs/{door_id}")
    assert (gone.json()["id"], gone.json()["state"]) == (job, "cancelled")
    assert (await router.books()).in_order


async def test_it_opens_no_job_of_another_purchase(router: Rig):
    quote_id, _ = await made(router)
    _, (other,) = await made(router)
    (door_id,) = await router.core.door_ids.issue(Door.HORDE, quote_id, indexes=[None])
    refused = await router.http.get(
        f"/jobs/{other}", headers={"Authorization": f"Bearer {door_id}"}
    )
    assert refused.status_code == 401


async def test_many_ids_are_looked_up_at_once_and_open_what_each_opens(router: Rig):
    """GR-5: a status may name 128."""
    quote_id, jobs = await made(router, n=2)
    ids = router.core.door_ids
    first, second = await ids.issue(Door.GRIDREPUBLIC, quote_id, indexes=[0, 1])
    (other,) = await ids.issue(Door.HORDE, quote_id, indexes=[None])
    asked = [second, first, as_uuid(first), other, "0" * 32, "x", "\0", ""]
    found = await ids.jobs_of_each(asked, Door.GRIDREPUBLIC)
    opened = {door_id: [row["id"] for row in rows] for door_id, rows in found.items()}
    assert opened == {second: jobs[1:], first: jobs[:1], as_uuid(first): jobs[:1]}
    assert await ids.jobs_of_each(["x"], Door.GRIDREPUBLIC) == {}
