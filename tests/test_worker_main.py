"""A worker as a program of its own: real processes, real signals."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.worker_stand_ins import PATIENCE_S, RouterStandIn, router_stand_in, text_of
from worker import demo_model
from worker.protocol import ChatSpec, FailureCode, FinishReason, Sampling

ROOT = Path(__file__).parent.parent


@asynccontextmanager
async def worker_process(tmp_path: Path, **settings: str) -> AsyncIterator[Process]:
    environ = {key: value for key, value in os.environ.items() if not key.startswith("SATHERD_")}
    environ |= {f"SATHERD_{key.upper()}": value for key, value in settings.items()}
    environ |= {"SATHERD_DATA_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "worker.main",
        cwd=tmp_path,
        env=environ,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def ended(process: Process) -> tuple[int, str]:
    """Its exit code and what it said."""
    async with asyncio.timeout(2 * PATIENCE_S):
        out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, (out + err).decode()


def story(max_tokens: int) -> ChatSpec:
    messages = [{"role": "user", "content": "Tell me a story about a fox."}]
    sampling = Sampling(seed=1, logit_bias={"2": -100})
    return ChatSpec(
        model=demo_model.NAME, messages=messages, max_tokens=max_tokens, sampling=sampling
    )


@pytest.fixture
async def router() -> AsyncIterator[RouterStandIn]:
    async with router_stand_in() as router:
        yield router


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_lets_the_worker_finish_its_job_and_exit_with_0(
    router: RouterStandIn, tmp_path: Path, number: signal.Signals
):
    async with worker_process(tmp_path, router_url=router.url) as process:
        line = await router.next_line()
        await line.assign("job-1", story(200))
        frames = await line.frames_until("chunks")
        process.send_signal(number)
        frames += await line.frames_until("finished")
        assert frames[-1].finish_reason is FinishReason.LENGTH
        assert frames[-1].usage.completion_tokens == 200
        assert "fox" in text_of(frames, "job-1")
        code, said = await ended(process)
        assert code == 0
        # Secrets and prompts never reach a log line; nor does the answer.
        assert "fox" not in said and (tmp_path / "worker.key").read_text().strip() not in said


async def test_a_worker_without_grace_returns_its_job_and_exits_with_0(
    router: RouterStandIn, tmp_path: Path
):
    settings = {"router_url": router.url, "grace_s": "0", "engine": "echo", "echo_token_s": "0.05"}
    async with worker_process(tmp_path, **settings) as process:
        line = await router.next_line()
        job = story(5000).model_copy(update={"model": "echo"})
        await line.assign("job-1", job)
        await line.frames_until("chunks")
        process.terminate()
        failed = (await line.frames_until("failed"))[-1]
        assert (failed.code, failed.retryable) == (FailureCode.RETURNED, True)
        assert (await ended(process))[0] == 0


async def test_a_worker_stops_while_it_waits_for_a_router(tmp_path: Path):
    async with worker_process(tmp_path, router_url="http://127.0.0.1:9", engine="echo") as process:
        assert process.stderr is not None
        async with asyncio.timeout(PATIENCE_S):
            while b"trying again" not in await process.stderr.readline():
                pass
        process.terminate()
        assert (await ended(process))[0] == 0


async def test_a_refused_worker_says_why_and_exits_with_78(router: RouterStandIn, tmp_path: Path):
    router.answer = {
        "type": "refused",
        "code": "bad_ln_url",
        "message": "the address does not resolve",
    }
    async with worker_process(tmp_path, router_url=router.url, engine="echo") as process:
        code, said = await ended(process)
        assert code == 78
        assert "error: the router refused this worker (bad_ln_url)" in said
        assert "Traceback" not in said


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": "/nowhere/model.gguf"}, "there is no model file /nowhere/model.gguf"),
        ({"slots": "none"}, "SATHERD_SLOTS"),
        ({"worker_key": "secret-but-short"}, "SATHERD_WORKER_KEY"),
    ],
    ids=["no file", "no number", "short key"],
)
async def test_a_worker_that_cannot_start_says_why_and_exits_with_78(
    tmp_path: Path, settings: dict[str, str], words: str
):
    async with worker_process(tmp_path, **settings) as process:
        code, said = await ended(process)
        assert code == 78
        assert words in said
        assert "Traceback" not in said and "secret-but-short" not in said


async def test_a_worker_whose_server_is_not_there_exits_with_69_to_be_started_again(
    tmp_path: Path,
):
    settings = {"engine": "openai", "engine_url": "http://127.0.0.1:9"}
    async with worker_process(tmp_path, **settings) as process:
        code, said = await ended(process)
        assert code == 69
        assert "no server answers" in said and "Traceback" not in said


BASE_INSTALL = {
    "aiohappyeyeballs", "aiohttp", "aiosignal", "annotated_types", "attr", "attrs", "certifi", "dotenv",
    "frozenlist", "idna", "multidict", "propcache", "pydantic", "pydantic_core", "pydantic_settings",
    "typing_extensions", "typing_inspection", "uvloop", "websockets", "yarl",
}  # fmt: skip
# aiohttp takes these if they are there.
OPTIONAL = {"aiodns", "backports", "brotli", "brotlicffi", "pycares", "zlib_ng"}


async def test_a_worker_with_a_remote_engine_needs_the_base_install_only():
    """No native library, no router and no billing comes in with it."""
    code = (
        "import sys, worker.main, worker.engines.openai_server, worker.engines.koboldcpp\n"
        "print(*{name.partition('.')[0] for name, module in sys.modules.items()\n"
        "        if getattr(module, '__file__', None)})"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    loaded = {name for name in out.decode().split() if not name.startswith("_")}
    foreign = loaded - set(sys.stdlib_module_names) - BASE_INSTALL - OPTIONAL
    assert foreign == {"worker"}
