"""The GridRepublic door: jobs bought, polled, limited in time; what is refused, and how."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from router.errors import BadRequest
from router.gridrepublic_jobs import read_inputs, read_job
from tests.door_tools import balance_msat, busy_worker, until_state
from tests.router_rig import MODEL, PATIENCE_S, Rig

JOBS = "/remotejobs/v2/jobs"
QUESTION = "When does 1+1=10?"
JOB: dict[str, Any] = {
    "app": "gridrepublic:text-inference",
    "commandLine": json.dumps({"inputs": [QUESTION]}),
    "hours": 1,
    "tag": MODEL,
}


async def submit(
    router: Rig, headers: dict[str, str] | None = None, **changes: Any
) -> httpx.Response:
    return await router.http.post(JOBS, json=JOB | changes, headers=headers)


async def bought(router: Rig, headers: dict[str, str], **changes: Any) -> list[str]:
    reply = await submit(router, headers, **changes)
    assert reply.status_code == 200, reply.text
    assert reply.json()["success"] is True
    return reply.json()["ids"]


async def shown(router: Rig, *ids: str) -> dict[str, Any]:
    reply = await router.http.get(f"{JOBS}/{','.join(ids)}")
    assert reply.status_code == 200, reply.text
    assert reply.json()["success"] is True
    return reply.json()["jobs"]


async def until_status(router: Rig, door_id: str, status: str) -> dict[str, Any]:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            job = (await shown(router, door_id))[door_id]
            if job["vmStatus"] == status:
                return job
            await asyncio.sleep(0.05)


async def test_a_job_is_bought_and_its_log_grows_until_it_is_completed(router: Rig):
    """GR-1, GR-3, GR-5, GR-6: polling is streaming."""
    key = await router.bearer()
    async with router.worker() as worker:
        busy = await busy_worker(router, worker)
        (door_id,) = await bought(router, key)
        assert len(door_id) == 32 and int(door_id, 16)
        waiting = (await shown(router, door_id))[door_id]
        assert waiting["vmStatus"] == waiting["states"]["default"]["status"] == "pending"
        assert waiting["states"]["default"]["position"] == 1 and waiting["runtime"] == 0
        await worker.finish(busy)
        job = await worker.job()
        assert job["job"]["messages"] == [{"role": "user", "content": QUESTION}]
        running = await until_status(router, door_id, "running")
        assert running["states"]["default"]["log"] == ""
        await worker.say(job, "In binary", seq=0)
        async with asyncio.timeout(PATIENCE_S):
            while running["states"]["default"]["log"] != "In binary":
                running = (await shown(router, door_id))[door_id]
        await worker.say(job, ", of course.", seq=1)
        await worker.finish(job, tokens=2)
        done = await until_status(router, door_id, "completed")
    assert done.pop("created").endswith("+00:00") and isinstance(done.pop("runtime"), int)
    assert done == {
        "vmStatus": "completed",
        "states": {
            "default": {
                "status": "completed",
                "outputFiles": [],
                "log": "In binary, of course.",
                "commandLine": '{"inputs": ["When does 1+1=10?"]}',
                "app": "gridrepublic:text-inference",
            }
        },
        "copy": 0,
        "tag": MODEL,
    }
    assert (await router.books()).in_order


@pytest.mark.parametrize(
    "command_line",
    [
        "{'input': ['When does 1+1=10?'] }",  # The seed's own example, which is no JSON.
        '{"inputs":["When does 1+1=10?"]}',
        '{"input": "When does 1+1=10?"}',
        " {'inputs': ('When does 1+1=10?',)}",
    ],
)
def test_both_spellings_of_a_command_line_are_read(command_line: str):
    """GR-2: strict JSON first, then Python's quotes."""
    assert read_inputs(command_line) == (QUESTION,)


@pytest.mark.parametrize(
    "command_line",
    [
        None,
        7,
        {"inputs": ["a"]},
        "",
        "hello",
        "[]",
        "{}",
        '{"inputs": []}',
        '{"inputs": [""]}',
        '{"inputs": [7]}',
        '{"inputs": {"a": 1}}',
        "{'inputs': [__import__('os').getcwd()]}",
        "{'inputs': ['a' * 100]}",
        "{'inputs': ['a'], **{}}",
        "{[]: 1}",
        "(" * 100_000,
        "{'inputs': " + "[" * 5000 + "]" * 5000 + "}",
        "[" * 100_000 + "]" * 100_000,
        "{'inputs': ['" + "a" * 70_000 + "']}",
        "x" * (1 << 20) + "x",
        "{'inputs': ['a\0']",
    ],
)
def test_anything_else_is_no_command_line(command_line: Any):
    """GR-2, GR-3: nothing of it is ever run, and nothing of it can take the parser down."""
    with pytest.raises(BadRequest, match="Invalid input format"):
        read_inputs(command_line)


@pytest.mark.parametrize(
    ("hours", "seconds"), [(1, 3600), (None, 3600), (0.5, 1800), ("2", 7200), (24, 86_400)]
)
def test_hours_are_a_deadline(hours: Any, seconds: int):
    """GR-8; GR-3: it may be missing."""
    assert read_job(JOB | {"hours": hours}, most_s=86_400).run_limit_s == seconds


BAD: list[tuple[dict[str, Any], str]] = [
    ({"hours": 0}, "hours"),
    ({"hours": -1}, "hours"),
    ({"hours": 25}, "hours"),
    ({"hours": "soon"}, "hours"),
    ({"hours": True}, "hours"),
    ({"hours": "nan"}, "hours"),
    ({"hours": 1e306}, "hours"),
    ({"hours": "inf"}, "hours"),
    ({"hours": "inf"}, "hours"),
    ({"app": "gridrepublic:folding"}, "app"),
    ({"tag": None}, "tag"),
    ({"tag": ["a", "b", "c", "d"]}, "tag"),
    ({"tag": [MODEL, MODEL]}, "tag"),
    ({"commandLine": "{'inputs': 1}"}, "Invalid input format"),
    ({"commandLine": json.dumps({"inputs": ["a"] * 200})}, "at most 128 jobs"),
]


async def test_a_bad_submission_says_success_false_before_any_money_moves(router: Rig):
    key = await router.bearer()
    async with router.worker():
        for changes, word in BAD:
            reply = await submit(router, key, **changes)
            assert reply.status_code == 400, (changes, reply.text)
            assert reply.json()["success"] is False and word in reply.json()["error"], changes
    assert await balance_msat(router, key) == 1_000_000


async def test_several_inputs_and_models_are_as_many_ids(router: Rig):
    """GR-4, GR-7: one job for each input and each of up to three models."""
    key = await router.bearer()
    two = json.dumps({"inputs": ["one", "two"]})
    models = [{"id": name, "context_length": 2048} for name in ("a", "b")]
    async with router.worker(models=models, slots=4) as worker:
        ids = await bought(router, key, commandLine=two, tag=["a", "b"])
        assert len(set(ids)) == 4
        for _ in ids:
            job = await worker.job()
            text = f"{job['job']['model']} {job['job']['messages'][0]['content']}"
            await worker.say(job, text)
            await worker.finish(job, tokens=1)
        for door_id in ids:
            await until_status(router, door_id, "completed")
        jobs = await shown(router, *ids)
    logs = [jobs[door_id]["states"]["default"]["log"] for door_id in ids]
    assert logs == ["a one", "a two", "b one", "b two"]
    assert [jobs[door_id]["copy"] for door_id in ids] == [0, 1, 2, 3]
    assert [jobs[door_id]["tag"] for door_id in ids] == ["a", "a", "b", "b"]


async def test_without_a_key_there_is_an_invoice_and_the_ids_come_with_its_proof(router: Rig):
    async with router.worker() as worker:
        due = await submit(router)
        assert due.status_code == 402 and due.json()["success"] is False
        preimage = await router.pay(due.json()["invoice"])
        proof = {"Authorization": f"L402 {due.json()['l402_token']}:{preimage}"}
        await worker.serve("Paid for.")
        first, again = await bought(router, proof), await bought(router, proof)
        done = await until_status(router, first[0], "completed")
    assert first == again and done["states"]["default"]["log"] == "Paid for."


@pytest.mark.parametrize(
    ("headers", "status"), [({"Authorization": f"Bearer sk-{'x' * 22}"}, 401), (None, 402)]
)
async def test_a_bad_token_is_refused_in_this_dialect(router: Rig, headers: Any, status: int):
    async with router.worker():
        reply = await submit(router, headers)
    assert reply.status_code == status and reply.json()["success"] is False
    assert isinstance(reply.json()["error"], str)


async def test_unknown_ids_are_named_and_alone_are_an_error(router: Rig):
    key = await router.bearer()
    other = "0" * 32
    async with router.worker():
        (door_id,) = await bought(router, key)
        both = (await router.http.get(f"{JOBS}/{door_id},{other}")).json()
        alone = await router.http.get(f"{JOBS}/{other}")
        job_id = (await router.query("select id from jobs"))[0]["id"]
        by_its_own = await router.http.get(f"{JOBS}/{job_id}")
        too_many = await router.http.get(f"{JOBS}/{','.join(f'{i:032x}' for i in range(129))}")
    assert list(both["jobs"]) == [door_id] and both["unknown"] == [other]
    assert (alone.status_code, alone.json()["success"]) == (404, False)
    # What logs and receipts carry opens nothing (E3-36).
    assert by_its_own.status_code == 404
    assert too_many.status_code == 400


async def test_a_job_that_runs_for_longer_than_its_hours_is_aborted(router: Rig):
    """GR-8: a hard run limit; what was said until then is charged and kept."""
    key = await router.bearer()
    async with router.worker() as worker:
        (door_id,) = await bought(router, key, hours=1 / 3600)
        job = await worker.job()
        await worker.say(job, "So slow", tokens=2)
        stopped = await worker.receive()
        assert stopped["type"] == "cancel" and stopped["job_id"] == job["job_id"]
        aborted = await until_status(router, door_id, "aborted")
    row = await until_state(router, job["job_id"], "cancelled")
    assert row["end_reason"] == "run_limit" and row["charged_msat"] > 0
    assert aborted["states"]["default"]["log"] == "So slow"
    assert "time" in aborted["states"]["default"]["error"]
    assert (await router.books()).in_order


async def test_its_id_opens_and_cancels_the_job_at_our_own_door(router: Rig):
    key = await router.bearer()
    async with router.worker() as worker:
        await busy_worker(router, worker)
        (door_id,) = await bought(router, key)
        seen = (await router.http.get(f"/jobs/{door_id}")).json()
        gone = await router.http.delete(f"/jobs/{door_id}")
        aborted = await until_status(router, door_id, "aborted")
    assert seen["state"] == "queued" and gone.json()["state"] == "cancelled"
    assert aborted["states"]["default"]["log"] == ""
    assert await balance_msat(router, key) == 1_000_000
