"""Child processes: kept alive, logged, stopped in order, and never left behind."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import stat
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest

from cli import processes as module
from cli.processes import Child, Ended, Processes, RotatingFile

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def quick_back_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BACK_OFF_FIRST_S", 0.05)


@pytest.fixture
def shown() -> list[tuple[str, str]]:
    return []


@pytest.fixture
async def children(tmp_path: Path, shown: list[tuple[str, str]]) -> AsyncIterator[Processes]:
    async with Processes(tmp_path / "logs", show=lambda *line: shown.append(line)) as running:
        yield running


def sh(name: str, script: str, **rest: object) -> Child:
    return Child(name, ["sh", "-c", script], **rest)  # type: ignore[arg-type]


async def until(condition: Callable[[], object], timeout_s: float = 30) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def test_what_a_child_prints_is_shown_and_kept_in_its_own_log(
    children: Processes, shown: list[tuple[str, str]], tmp_path: Path
) -> None:
    await children.start(sh("speaker", "echo $GREETING; echo oh >&2; printf last", keep=False,
                            env={"GREETING": "good day"}))  # fmt: skip
    ended = await asyncio.wait_for(children.next_end(), 30)
    assert ended == Ended("speaker", 0, ("good day", "oh", "last"))
    assert shown == [("speaker", "good day"), ("speaker", "oh"), ("speaker", "last")]
    log = tmp_path / "logs" / "speaker.log"
    text = log.read_text()
    assert "good day\noh\nlast\n" in text
    assert "[satherd] speaker started (pid" in text
    assert "[satherd] speaker ended (exit status 0)" in text
    assert stat.S_IMODE(log.stat().st_mode) == 0o600


async def test_a_child_that_dies_is_started_again_each_time_a_little_later(
    children: Processes, shown: list[tuple[str, str]]
) -> None:
    await children.start(sh("fragile", "date +%s.%N; exit 1"))
    await until(lambda: len(shown) >= 4)
    assert children.restarts("fragile") >= 3
    times = [float(line) for _, line in shown]
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert pauses[0] >= 0.05
    assert pauses[1] >= 0.1
    assert pauses[2] >= 0.2


async def test_a_killed_child_comes_back(children: Processes) -> None:
    await children.start(sh("lasting", "echo up; exec sleep 300"))
    first = children.pid("lasting")
    assert first is not None
    os.kill(first, signal.SIGKILL)
    await until(lambda: children.pid("lasting") not in (None, first))
    assert children.restarts("lasting") == 1


@pytest.mark.parametrize("status", module.FINAL_STATUSES)
async def test_a_child_that_is_set_up_wrongly_is_told_of_and_not_tried_again(
    children: Processes, status: int
) -> None:
    await children.start(sh("wrong", f"echo no such model; exit {status}"))
    ended = await asyncio.wait_for(children.next_end(), 30)
    assert ended == Ended("wrong", status, ("no such model",))
    assert children.pid("wrong") is None
    assert children.restarts("wrong") == 0


async def test_a_program_that_is_not_there_is_an_error_at_once(children: Processes) -> None:
    with pytest.raises(FileNotFoundError, match="no-such-program"):
        await children.start(Child("missing", ["no-such-program-here"]))
    await children.start(sh("missing", "exec sleep 300"))
    assert children.pid("missing") is not None


async def test_stop_goes_in_reverse_order_and_waits_for_each(
    children: Processes, shown: list[tuple[str, str]]
) -> None:
    script = "trap 'sleep 0.2; echo bye; exit 0' TERM; echo up; while :; do sleep 0.02; done"
    for name in ("first", "second", "third"):
        await children.start(sh(name, script))
    await until(lambda: len(shown) == 3)
    pids = [children.pid(name) for name in ("first", "second", "third")]
    await children.stop()
    byes = [name for name, line in shown if line == "bye"]
    assert byes == ["third", "second", "first"]
    assert not any(alive(pid) for pid in pids if pid)
    await children.stop()


async def test_a_child_that_does_not_listen_is_killed_with_all_its_group(
    children: Processes, shown: list[tuple[str, str]]
) -> None:
    await children.start(
        sh("deaf", "trap '' TERM; sleep 300 & echo $!; while :; do sleep 1; done", grace_s=0.2)
    )
    await until(lambda: shown)
    child, grandchild = children.pid("deaf"), int(shown[0][1])
    assert child is not None and alive(grandchild)
    began = time.monotonic()
    await children.stop()
    assert 0.2 <= time.monotonic() - began < 30
    assert not alive(child)
    await until(lambda: not alive(grandchild))


async def test_stop_in_the_pause_before_a_restart_starts_nothing(
    children: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BACK_OFF_FIRST_S", 60)
    log = tmp_path / "logs" / "fragile.log"
    await children.start(sh("fragile", "exit 1"))
    await until(lambda: "starting it again" in log.read_text())
    await asyncio.wait_for(children.stop(), 30)
    assert log.read_text().count("started (pid") == 1


async def test_a_grandchild_that_keeps_the_output_open_does_not_hold_us_up(
    children: Processes, shown: list[tuple[str, str]]
) -> None:
    await children.start(sh("parent", "sleep 300 & echo $!", keep=False))
    ended = await asyncio.wait_for(children.next_end(), 30)
    assert ended.status == 0
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(shown[0][1]), signal.SIGKILL)


async def test_a_line_without_end_is_cut_and_a_lot_of_output_is_complete(
    children: Processes, shown: list[tuple[str, str]]
) -> None:
    length = 3 * module.LINE_LIMIT_BYTES
    await children.start(
        Child("talker", [sys.executable, "-c", f"print('x' * {length})"], keep=False)
    )
    await asyncio.wait_for(children.next_end(), 20)
    assert sum(len(line) for _, line in shown) == length
    assert max(len(line) for _, line in shown) <= 2 * module.LINE_LIMIT_BYTES


async def test_a_terminal_that_is_gone_does_not_stop_the_child(tmp_path: Path) -> None:
    def broken(_name: str, _line: str) -> None:
        raise BrokenPipeError

    async with Processes(tmp_path, show=broken) as children:
        await children.start(sh("speaker", "echo one; echo two", keep=False))
        ended = await asyncio.wait_for(children.next_end(), 30)
    assert ended.tail == ("one", "two")


# Runs one child, says its pid, and waits to be killed.
PARENT = """
import asyncio, sys
from pathlib import Path
import uvloop
from cli.processes import Child, Processes

async def main():
    children = Processes(Path(sys.argv[1]))
    await children.start(Child("lasting", ["sleep", "300"]))
    print(children.pid("lasting"), flush=True)
    await asyncio.Event().wait()

uvloop.run(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's parent death signal")
async def test_children_go_away_with_a_killed_parent(tmp_path: Path) -> None:
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PARENT, tmp_path, cwd=REPOSITORY, stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    child = int(await asyncio.wait_for(parent.stdout.readline(), 20))
    assert alive(child)
    parent.kill()
    await parent.wait()
    await until(lambda: not alive(child))


async def test_a_child_is_out_of_reach_of_the_terminals_ctrl_c(children: Processes) -> None:
    await children.start(sh("lasting", "exec sleep 300"))
    pid = children.pid("lasting")
    assert pid is not None
    assert os.getpgid(pid) == pid != os.getpgid(0)
    assert os.getsid(pid) == pid


def test_a_long_log_is_put_aside_and_the_oldest_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOG_LIMIT_BYTES", 10)
    path = tmp_path / "logs" / "a.log"
    file = RotatingFile(path)
    for word in (b"one\n", b"two\n", b"three\n", b"four\n", b"five\n", b"six-and-seven\n", b"8\n"):
        file.write(word)
    file.close()
    names = sorted(p.name for p in path.parent.iterdir())
    assert names == ["a.log", "a.log.1", "a.log.2"]
    assert path.read_bytes() == b"8\n"
    assert path.with_name("a.log.1").read_bytes() == b"six-and-seven\n"
    again = RotatingFile(path)
    again.write(b"9\n")
    again.close()
    assert path.read_bytes() == b"8\n9\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_loses_log_lines_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.log").symlink_to("/dev/full")
    file = RotatingFile(tmp_path / "a.log")
    file.write(b"one\n")
    file.write(b"two\n")
    file.close()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "No space left" in caplog.text


def test_a_log_that_cannot_be_put_aside_goes_on_when_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "LOG_LIMIT_BYTES", 1)
    for number in (1, 2):
        (tmp_path / f"a.log.{number}" / "in the way").mkdir(parents=True)
    file = RotatingFile(tmp_path / "a.log")
    file.write(b"one\n")
    file.write(b"two\n")
    file.write(b"three\n")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    monkeypatch.setattr(module, "LOG_LIMIT_BYTES", 100)
    file.write(b"four\n")
    file.close()
    assert (tmp_path / "a.log").read_bytes() == b"one\nfour\n"
