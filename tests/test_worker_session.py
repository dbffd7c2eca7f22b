"""The worker's half of the protocol, against a router's end that is real but for its mind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.worker_stand_ins import (
    PATIENCE_S,
    Line,
    RouterStandIn,
    http_server,
    router_stand_in,
    text_of,
)
from worker.connection import ConnectionLost, connect
from worker.engines.echo import EchoEngine
from worker.errors import EngineDied, RegistrationRefused
from worker.main import backoff_s, run_worker
from worker.protocol import (
    ChatSpec,
    EmbeddingSpec,
    FailureCode,
    FinishReason,
    JobSpec,
    ModelKind,
)
from worker.settings import EchoFault, EngineName, WorkerSettings
from worker.shutdown import Shutdown


def settings_for(router: RouterStandIn, tmp_path: Path, **fields: Any) -> WorkerSettings:
    values: dict[str, Any] = {
        "router_url": router.url,
        "engine": EngineName.ECHO,
        "data_dir": tmp_path,
        "slots": 4,
        "reconnect_max_s": 0.05,
        "grace_s": 5,
        **fields,
    }
    return WorkerSettings(_env_file=None, **values)  # pyright: ignore[reportCallIssue]


@asynccontextmanager
async def working(
    router: RouterStandIn, tmp_path: Path, **fields: Any
) -> AsyncIterator[tuple[asyncio.Task[None], Shutdown]]:
    shutdown = Shutdown()
    running = asyncio.create_task(
        run_worker(settings_for(router, tmp_path, **fields), shutdown=shutdown)
    )
    try:
        yield running, shutdown
    finally:
        shutdown.ask()
        shutdown.ask()
        await asyncio.wait([running], timeout=PATIENCE_S)
        assert running.done()


def chat(words: str = "hello there world", max_tokens: int = 6, **fields: Any) -> JobSpec:
    messages = [{"role": "user", "content": words}]
    return ChatSpec(model="echo", messages=messages, max_tokens=max_tokens, **fields)


async def ready(line: Line, slots: int) -> None:
    frame = await line.frame()
    assert (frame.type, frame.slots_free) == ("ready", slots)


@pytest.fixture
async def router() -> AsyncIterator[RouterStandIn]:
    async with router_stand_in() as router:
        yield router


async def test_a_worker_registers_with_its_models_slots_key_and_hardware(
    router: RouterStandIn, tmp_path: Path
):
    async with working(router, tmp_path, ln_url="bob@example.org", worker_name="Bob"):
        line = await router.next_line()
        seen = line.registration
        assert [(model.id, model.kind) for model in seen.models] == [
            ("echo", ModelKind.TEXT),
            ("echo", ModelKind.EMBEDDING),
        ]
        assert (seen.slots, seen.ln_url, seen.name) == (4, "bob@example.org", "Bob")
        assert seen.cpu_count and seen.disk_space and seen.vram
        assert seen.worker_key == (tmp_path / "worker.key").read_text().strip()
        await ready(line, 4)


async def test_a_job_is_streamed_and_finished_with_its_counts(
    router: RouterStandIn, tmp_path: Path
):
    async with working(router, tmp_path, echo_token_s=0.001):
        line = await router.next_line()
        await line.assign("job-1", chat())
        frames = await line.frames_until("finished")
        assert text_of(frames, "job-1") == "hello there world hello there world "
        end = frames[-1]
        assert (end.job_id, end.attempt, end.finish_reason) == ("job-1", 1, FinishReason.LENGTH)
        assert (end.usage.prompt_tokens, end.usage.completion_tokens) == (3, 6)


async def test_jobs_up_to_the_slots_run_together_in_shared_frames(
    router: RouterStandIn, tmp_path: Path
):
    async with working(router, tmp_path, echo_token_s=0.02):
        line = await router.next_line()
        for number in range(4):
            await line.assign(f"job-{number}", chat(max_tokens=8))
        frames = []
        for _ in range(4):
            frames += await line.frames_until("finished")
        for number in range(4):
            assert len(text_of(frames, f"job-{number}").split()) == 8
        shared = [frame for frame in frames if frame.type == "chunks" and len(frame.items) == 4]
        assert shared


async def test_a_job_beyond_the_slots_is_given_back_at_once(router: RouterStandIn, tmp_path: Path):
    async with working(router, tmp_path, slots=1, echo_token_s=0.05):
        line = await router.next_line()
        await line.assign("job-1", chat(max_tokens=1000))
        await line.assign("job-2", chat())
        failed = (await line.frames_until("failed"))[-1]
        assert (failed.job_id, failed.code) == ("job-2", FailureCode.OVERLOADED)
        assert failed.retryable


async def test_slots_free_counts_what_runs(router: RouterStandIn, tmp_path: Path):
    async with working(router, tmp_path, slots=2, echo_fault=EchoFault.STALL, echo_fault_every=1):
        line = await router.next_line()
        await ready(line, 2)
        await line.assign("job-1", chat(max_tokens=4))
        await line.frames_until("chunks")
        await line.send(type="cancel", job_id="job-1", attempt=1)
        frames = await line.frames_until("ready")
        assert frames[-1].slots_free == 2


async def test_a_cancelled_job_finishes_as_cancelled_with_its_counts(
    router: RouterStandIn, tmp_path: Path
):
    async with working(router, tmp_path, echo_token_s=0.01):
        line = await router.next_line()
        await line.assign("job-1", chat(max_tokens=5000))
        frames = await line.frames_until("chunks")
        await line.send(type="cancel", job_id="job-1", attempt=1)
        frames += await line.frames_until("finished")
        end = frames[-1]
        assert end.finish_reason is FinishReason.CANCELLED
        assert 0 < end.usage.completion_tokens < 5000
        assert end.usage.completion_tokens == len(text_of(frames, "job-1").split())


async def test_a_cancel_of_another_attempt_changes_nothing(router: RouterStandIn, tmp_path: Path):
    async with working(router, tmp_path, echo_token_s=0.001):
        line = await router.next_line()
        await line.assign("job-1", chat(max_tokens=20), attempt=2)
        await line.send(type="cancel", job_id="job-1", attempt=1)
        end = (await line.frames_until("finished"))[-1]
        assert (end.attempt, end.finish_reason) == (2, FinishReason.LENGTH)


async def test_the_same_assignment_twice_runs_once(router: RouterStandIn, tmp_path: Path):
    async with working(router, tmp_path, echo_token_s=0.005):
        line = await router.next_line()
        await line.assign("job-1", chat(max_tokens=10))
        await line.assign("job-1", chat(max_tokens=10))
        frames = await line.frames_until("finished")
        await line.assign("job-2", chat(max_tokens=1))
        frames += await line.frames_until("finished", "job-2")
        ends = [frame.job_id for frame in frames if frame.type in ("finished", "failed")]
        assert ends == ["job-1", "job-2"]


@pytest.mark.parametrize(
    "job",
    [
        {"kind": "chat", "model": "another", "messages": [], "max_tokens": 1},
        {"kind": "embedding", "model": "another", "input": ["a"]},
    ],
)
async def test_a_model_that_is_not_served_here_is_refused(
    router: RouterStandIn, tmp_path: Path, job: dict[str, Any]
):
    async with working(router, tmp_path):
        line = await router.next_line()
        await line.send(type="assign", job_id="job-1", attempt=1, lease_s=60, job=job)
        failed = (await line.frames_until("failed"))[-1]
        assert failed.code is FailureCode.MODEL_NOT_SERVED


async def test_a_job_that_cannot_be_read_is_given_back_and_other_nonsense_ignored(
    router: RouterStandIn, tmp_path: Path
):
    async with working(router, tmp_path):
        line = await router.next_line()
        await line.socket.send("not JSON")
        await line.send(type="of a later version", anything=1)
        await line.send(type="registered", worker_id="x", payable=True)
        job = {"kind": "hologram", "model": "echo"}
        await line.send(type="assign", job_id="job-1", attempt=3, lease_s=60, job=job)
        failed = (await line.frames_until("failed"))[-1]
        assert (failed.job_id, failed.attempt) == ("job-1", 3)
        assert failed.code is FailureCode.BAD_REQUEST and not failed.retryable
        await line.assign("job-2", chat())
        await line.frames_until("finished", "job-2")


async def test_what_an_engine_refuses_reaches_the_router_with_its_code(
    router: RouterStandIn, tmp_path: Path
):
    async with working(router, tmp_path, context=16):
        line = await router.next_line()
        await line.assign("job-1", chat("word " * 20))
        failed = (await line.frames_until("failed"))[-1]
        assert failed.code is FailureCode.PROMPT_TOO_LONG and not failed.retryable


async def test_an_engine_that_fails_midway_has_said_what_it_had(
    router: RouterStandIn, tmp_path: Path
):
    async with working(router, tmp_path, echo_fault=EchoFault.FAIL_MIDWAY, echo_token_s=0.001):
        line = await router.next_line()
        await line.assign("job-1", chat(max_tokens=6))
        frames = await line.frames_until("failed")
        assert text_of(frames, "job-1") == "hello there world "
        assert frames[-1].code is FailureCode.ENGINE_ERROR and frames[-1].retryable


async def test_a_bug_in_an_engine_fails_the_job_and_not_the_worker(
    router: RouterStandIn,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    def broken(engine: EchoEngine, job: EmbeddingSpec) -> None:
        raise ZeroDivisionError(*job.input)

    monkeypatch.setattr(EchoEngine, "_embed", broken)
    async with working(router, tmp_path):
        line = await router.next_line()
        await line.assign("job-1", EmbeddingSpec(model="echo", input=["secret words"]))
        failed = (await line.frames_until("failed"))[-1]
        assert (failed.code, failed.message) == (FailureCode.ENGINE_ERROR, "ZeroDivisionError")
        await line.assign("job-2", chat())
        await line.frames_until("finished", "job-2")
    assert "ZeroDivisionError" in caplog.text and "in broken" in caplog.text
    assert "secret words" not in caplog.text


async def test_a_worker_told_to_stop_while_its_model_loads_stops(
    router: RouterStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    loading = asyncio.Event()

    async def load(engine: EchoEngine, progress: object) -> None:
        loading.set()
        await asyncio.sleep(3600)

    monkeypatch.setattr(EchoEngine, "start", load)
    async with working(router, tmp_path) as (running, shutdown):
        await asyncio.wait_for(loading.wait(), PATIENCE_S)
        shutdown.ask()
        await asyncio.wait_for(running, PATIENCE_S)
        assert not router.registrations


async def test_embeddings_come_back_in_the_finished_frame(router: RouterStandIn, tmp_path: Path):
    async with working(router, tmp_path):
        line = await router.next_line()
        await line.assign("job-1", EmbeddingSpec(model="echo", input=["a b", "c"]))
        end = (await line.frames_until("finished"))[-1]
        assert len(end.data) == 2 and end.data[0] != end.data[1]
        assert end.usage.prompt_tokens == 3


async def test_a_broken_line_is_mended_and_its_jobs_are_dropped(
    router: RouterStandIn, tmp_path: Path
):
    async with working(router, tmp_path, echo_token_s=0.01):
        first = await router.next_line()
        await first.assign("job-1", chat(max_tokens=5000))
        await first.frames_until("chunks")
        first.socket.transport.abort()
        second = await router.next_line()
        assert second.registration.worker_key == first.registration.worker_key
        await ready(second, 4)
        await second.assign("job-2", chat(max_tokens=3))
        frames = await second.frames_until("finished")
        assert {frame.job_id for frame in frames if frame.type == "finished"} == {"job-2"}
        assert not text_of(frames, "job-1")


async def test_after_a_broken_line_it_goes_on_with_what_the_router_still_wants(
    router: RouterStandIn, tmp_path: Path
):
    """It says everything again from chunk 0, what it said while there was no line as well."""
    async with working(router, tmp_path, echo_token_s=0.005):
        first = await router.next_line()
        for job_id in ("job-1", "job-2"):
            await first.assign(job_id, chat("a b c d e f", max_tokens=40))
        await first.frames_until("chunks")
        router.answer["resume"] = [{"job_id": "job-1", "attempt": 1}]
        first.socket.transport.abort()
        second = await router.next_line()
        assert sorted(held.job_id for held in second.registration.holding) == ["job-1", "job-2"]
        frames = await second.frames_until("finished")
        whole = await second_opinion(router, tmp_path, second)
        assert text_of(frames, "job-1") == whole
        assert not text_of(frames, "job-2")
        assert frames[-1].job_id == "job-1" and frames[-1].finish_reason is FinishReason.LENGTH


async def second_opinion(router: RouterStandIn, tmp_path: Path, line: Line) -> str:
    """What the echo engine says to the same job when nothing breaks."""
    await line.assign("job-3", chat("a b c d e f", max_tokens=40))
    return text_of(await line.frames_until("finished", "job-3"), "job-3")


async def test_an_end_that_the_router_may_not_have_heard_is_said_again(
    router: RouterStandIn, tmp_path: Path
):
    async with working(router, tmp_path):
        first = await router.next_line()
        await first.assign("job-1", chat(max_tokens=3))
        told = await first.frames_until("finished")
        router.answer["resume"] = [{"job_id": "job-1", "attempt": 1}]
        first.socket.transport.abort()
        second = await router.next_line()
        assert [held.job_id for held in second.registration.holding] == ["job-1"]
        again = await second.frames_until("finished")
        assert text_of(again, "job-1") == text_of(told, "job-1")


async def test_of_several_routers_the_next_is_tried_when_one_is_gone(tmp_path: Path):
    async with router_stand_in() as other:
        async with router_stand_in() as router:
            settings = settings_for(router, tmp_path, router_url=f"{router.url},{other.url}")
            shutdown = Shutdown()
            running = asyncio.create_task(run_worker(settings, shutdown=shutdown))
            await router.next_line()
        line = await other.next_line()
        await ready(line, 4)
        shutdown.ask()
        await asyncio.wait_for(running, PATIENCE_S)


async def test_a_router_that_is_not_there_yet_is_waited_for(tmp_path: Path):
    async with router_stand_in() as router:
        settings = settings_for(router, tmp_path)
    shutdown = Shutdown()
    running = asyncio.create_task(run_worker(settings, shutdown=shutdown))
    await asyncio.sleep(0.2)
    assert not running.done()
    shutdown.ask()
    await asyncio.wait_for(running, PATIENCE_S)


@pytest.mark.parametrize("path", ["", "/worker"])
async def test_what_answers_but_is_no_router_is_a_line_that_did_not_come_about(path: str):
    async with http_server() as url:
        with pytest.raises(ConnectionLost):
            await connect(url.replace("http", "ws") + path)


def test_pauses_double_up_to_the_longest_and_are_never_the_same_for_all():
    for failures, most in [(0, 0.5), (1, 1), (3, 4), (20, 30), (10_000, 30)]:
        pauses = {backoff_s(failures, 30) for _ in range(50)}
        assert all(most / 2 <= pause <= most for pause in pauses)
        assert len(pauses) > 10


async def test_a_refused_worker_gives_up_and_says_why(router: RouterStandIn, tmp_path: Path):
    router.answer = {
        "type": "refused",
        "code": "bad_ln_url",
        "message": "the address does not resolve",
        "retryable": False,
    }
    with pytest.raises(RegistrationRefused, match="does not resolve") as caught:
        await asyncio.wait_for(run_worker(settings_for(router, tmp_path)), PATIENCE_S)
    assert (caught.value.code, caught.value.exit_code) == ("bad_ln_url", 78)
    assert len(router.registrations) == 1


async def test_a_worker_refused_for_now_tries_again(router: RouterStandIn, tmp_path: Path):
    accepted = router.answer
    router.answer = {"type": "refused", "code": "full", "message": "later", "retryable": True}
    async with working(router, tmp_path):
        async with asyncio.timeout(PATIENCE_S):
            while len(router.registrations) < 3:
                await asyncio.sleep(0.01)
        router.answer = accepted
        await router.next_line()


async def test_a_draining_worker_finishes_what_it_holds_and_takes_no_more(
    router: RouterStandIn, tmp_path: Path
):
    async with working(router, tmp_path, echo_token_s=0.005):
        line = await router.next_line()
        await ready(line, 4)
        await line.assign("job-1", chat(max_tokens=20))
        await line.frames_until("chunks")
        await line.send(type="drain")
        await line.assign("job-2", chat())
        frames = await line.frames_until("finished")
        failed = [frame for frame in frames if frame.type == "failed"]
        assert [(f.job_id, f.code) for f in failed] == [("job-2", FailureCode.RETURNED)]
        assert frames[-1].job_id == "job-1"
        assert all(frame.slots_free == 0 for frame in frames if frame.type == "ready")


async def test_a_drained_worker_comes_back_fresh_when_the_router_hangs_up(
    router: RouterStandIn, tmp_path: Path
):
    async with working(router, tmp_path):
        line = await router.next_line()
        await ready(line, 4)
        await line.send(type="drain")
        await ready(line, 0)
        await line.socket.close()
        await ready(await router.next_line(), 4)


async def test_shutdown_finishes_what_runs_and_then_leaves(router: RouterStandIn, tmp_path: Path):
    async with working(router, tmp_path, echo_token_s=0.005) as (running, shutdown):
        line = await router.next_line()
        await line.assign("job-1", chat(max_tokens=30))
        frames = await line.frames_until("chunks")
        shutdown.ask()
        await line.assign("job-2", chat())
        frames += await line.frames_until("finished")
        assert len(text_of(frames, "job-1").split()) == 30
        await asyncio.wait_for(running, PATIENCE_S)
        await asyncio.wait_for(line.socket.wait_closed(), PATIENCE_S)
        assert line.socket.close_code == 1000


async def test_shutdown_returns_what_the_grace_time_does_not_suffice_for(
    router: RouterStandIn, tmp_path: Path
):
    async with working(router, tmp_path, echo_token_s=0.01, grace_s=0.1) as (running, shutdown):
        line = await router.next_line()
        await line.assign("job-1", chat(max_tokens=30_000))
        await line.frames_until("chunks")
        shutdown.ask()
        failed = (await line.frames_until("failed"))[-1]
        assert (failed.job_id, failed.code) == ("job-1", FailureCode.RETURNED)
        assert failed.retryable
        await asyncio.wait_for(running, PATIENCE_S)


async def test_asked_twice_a_worker_leaves_at_once(router: RouterStandIn, tmp_path: Path):
    async with working(router, tmp_path, echo_token_s=0.01, grace_s=3600) as (running, shutdown):
        line = await router.next_line()
        await line.assign("job-1", chat(max_tokens=30_000))
        await line.frames_until("chunks")
        shutdown.ask()
        shutdown.ask()
        assert (await line.frames_until("failed"))[-1].code is FailureCode.RETURNED
        await asyncio.wait_for(running, PATIENCE_S)


async def test_a_worker_whose_engine_has_gone_hangs_up_until_it_is_back(
    router: RouterStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """No worker is better than one that takes every job and fails it."""
    there = asyncio.Event()
    asked: list[bool] = []

    async def check(engine: EchoEngine) -> bool:
        asked.append(there.is_set())
        return there.is_set()

    monkeypatch.setattr(EchoEngine, "check", check)
    async with working(router, tmp_path, echo_fault=EchoFault.FAIL_BEFORE):
        line = await router.next_line()
        await line.assign("job-1", chat())
        assert (await line.frames_until("failed"))[-1].code is FailureCode.ENGINE_ERROR
        await asyncio.wait_for(line.socket.wait_closed(), PATIENCE_S)
        async with asyncio.timeout(PATIENCE_S):
            while len(asked) < 3:
                await asyncio.sleep(0.01)
        assert len(router.registrations) == 1
        there.set()
        await ready(await router.next_line(), 4)


async def test_one_failed_job_of_an_engine_that_is_well_changes_nothing(
    router: RouterStandIn, tmp_path: Path
):
    async with working(router, tmp_path, echo_fault=EchoFault.FAIL_BEFORE, echo_fault_every=2):
        line = await router.next_line()
        for number in range(4):
            await line.assign(f"job-{number}", chat())
            await line.frames_until("failed" if number % 2 else "finished")


async def test_a_worker_whose_engine_has_died_ends_to_be_started_again(
    router: RouterStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    async def check(engine: EchoEngine) -> bool:
        raise EngineDied("gone")

    monkeypatch.setattr(EchoEngine, "check", check)
    settings = settings_for(router, tmp_path, echo_fault=EchoFault.FAIL_BEFORE)
    running = asyncio.create_task(run_worker(settings, shutdown=Shutdown()))
    line = await router.next_line()
    await line.assign("job-1", chat())
    assert (await line.frames_until("failed"))[-1].retryable
    with pytest.raises(EngineDied) as caught:
        await asyncio.wait_for(running, PATIENCE_S)
    assert caught.value.exit_code == 70
