"""`satherd up` as a process: one `ready:` line, payments, a clean stop, and a second start."""

from __future__ import annotations

import hashlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

REPOSITORY = Path(__file__).parent.parent
READY_S = 60.0
# Drain (nothing runs), the worker's and the database's end.
STOP_S = 30.0

ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("SATHERD_")}


class Up:
    """A running `satherd up`."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "cli.main", "up"),
                *("--engine", "echo", "--port", "0", "--data-dir", str(folder), *flags),
            ],
            cwd=REPOSITORY,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.out: list[str] = []
        self.errors: list[str] = []
        self._lines: queue.Queue[str] = queue.Queue()
        self._readers = [
            threading.Thread(target=self._read, args=(self.process.stdout, self.out)),
            threading.Thread(target=self._read, args=(self.process.stderr, self.errors)),
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, pipe, lines: list[str]) -> None:
        for line in pipe:
            lines.append(line)
            if lines is self.out:
                self._lines.put(line)
        self._lines.put("")

    def ready(self) -> str:
        """The URL of the `ready:` line; it must be the first."""
        line = self._lines.get(timeout=READY_S)
        assert line.startswith("ready: http://127.0.0.1:"), (line, self.errors)
        return line.split()[1]

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """The exit status."""
        self.process.send_signal(number)
        return self.ended(STOP_S)

    def ended(self, timeout_s: float) -> int:
        status = self.process.wait(timeout_s)
        for reader in self._readers:
            reader.join(5)
        return status

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.ended(STOP_S)
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()


@contextmanager
def up(folder: Path, *flags: str) -> Iterator[Up]:
    started = Up(folder, *flags)
    try:
        yield started
    finally:
        started.kill()


def satherd(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Another terminal: the command finds the router by its data directory."""
    return subprocess.run(
        [sys.executable, "-m", "cli.main", *arguments],
        cwd=REPOSITORY,
        env=ENVIRONMENT | {"SATHERD_DATA_DIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def balance_of(folder: Path, key: str) -> dict:
    shown = satherd("balance", "show", "--key", key, folder=folder)
    assert shown.returncode == 0, shown.stderr
    return json.loads(shown.stdout)


@pytest.mark.timeout(240)
def test_up_sells_prompts_stops_cleanly_and_goes_on_with_the_same_books(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    with up(folder) as first:
        url = first.ready()
        assert httpx.get(f"{url}/info", trust_env=False).json()["simulated"] is True
        children = psutil.Process(first.process.pid).children(recursive=True)
        assert len(children) >= 3  # PostgreSQL, the simulated network, the worker
        for private in ("logs", "lightning", "worker"):  # wallets, and who asked for what when
            assert (folder / private).stat().st_mode & 0o077 == 0

        # An invoice is paid with simulated money, and its preimage is the proof.
        due = httpx.post(f"{url}/balance/topups", json={"amount_msat": 50_000}, trust_env=False)
        invoice = due.json()["invoice"]
        paid = satherd("pay", invoice, folder=folder)
        assert paid.returncode == 0, paid.stderr
        receipt = json.loads(paid.stdout)
        hashed = hashlib.sha256(bytes.fromhex(receipt["preimage"])).hexdigest()
        assert hashed == due.json()["payment_hash"]
        assert receipt["amount_msat"] == 50_000
        shown = httpx.get(
            f"{url}/balance/topups/{hashed}",
            headers={"Authorization": f"L402 {due.json()['l402_token']}:{receipt['preimage']}"},
            trust_env=False,
        )
        key = shown.json()["key"]

        asked = satherd("prompt", "Hello there", "--max-tokens", "4", "--key", key, folder=folder)
        assert asked.returncode == 0, asked.stderr
        assert asked.stdout.split() == ["Hello", "there", "Hello", "there"]
        # Without a key it pays a 402 by itself.
        alone = satherd("prompt", "Hi", "--max-tokens", "2", "--json", folder=folder)
        assert alone.returncode == 0, alone.stderr
        assert json.loads(alone.stdout)["paid_msat"] == 2000
        left = balance_of(folder, key)
        assert 0 < left["balance_msat"] < 50_000
        assert left["held_msat"] == 0

        # Beside a running router: the books can be read, and the folder is taken.
        checked = satherd("ledger", "check", "--json", folder=folder)
        assert checked.returncode == 0, checked.stderr
        assert json.loads(checked.stdout)["in_order"] is True
        taken = satherd("up", "--engine", "echo", "--port", "0", folder=folder)
        assert taken.returncode == 1
        assert taken.stdout == ""
        assert taken.stderr.rpartition("error: ")[2].count("\n") == 1
        assert f"(process {first.process.pid}) is at work in {folder}" in taken.stderr
        assert httpx.get(f"{url}/info", trust_env=False).status_code == 200

        began = time.monotonic()
        assert first.stop() == 0, first.errors
        assert time.monotonic() - began < STOP_S
        assert first.out == [f"ready: {url}\n"]
        assert not any(child.is_running() for child in children)
        assert not (folder / "up.json").exists()

    checked = satherd("ledger", "check", folder=folder)
    assert checked.returncode == 0, checked.stderr
    assert "The books are in order." in checked.stdout

    with up(folder) as second:
        second.ready()
        assert balance_of(folder, key) == left
        books = satherd("admin", "ledger", "--json", folder=folder)
        assert books.returncode == 0, books.stderr
        assert json.loads(books.stdout)["in_order"] is True
        assert second.stop(signal.SIGINT) == 0, second.errors


def test_up_that_is_stopped_before_it_is_ready_stops_at_once(tmp_path: Path) -> None:
    with up(tmp_path / "data") as starting:
        until = time.monotonic() + READY_S
        while not any("starting the router" in line for line in starting.errors):
            assert time.monotonic() < until, starting.errors
            time.sleep(0.05)
        children = psutil.Process(starting.process.pid).children(recursive=True)
        assert starting.stop() == 0, starting.errors
        assert starting.out == []
        assert "stopping before it was ready" in starting.errors[-1]
        # Whoever had not yet got to know of its end has a moment to do so.
        assert psutil.wait_procs(children, timeout=STOP_S)[1] == []


def test_up_on_a_busy_port_says_so_and_leaves_nothing_behind(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = satherd("up", "--engine", "echo", "--port", str(port), folder=tmp_path)
    assert ended.returncode == 1
    assert ended.stdout == ""
    error = ended.stderr.splitlines()[-1]
    assert error.startswith("error: ")
    assert str(port) in error and "in use" in error
    assert "Traceback" not in ended.stderr


def test_up_where_nothing_can_be_kept_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ended = satherd("up", folder=tmp_path / "file")
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: ") and "Not a directory" in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_up_with_a_worker_that_cannot_start_shows_why(tmp_path: Path) -> None:
    ended = satherd("up", "--engine", "steam", "--port", "0", folder=tmp_path)
    assert ended.returncode == 1
    assert "error: the worker ended:" in ended.stderr
    assert "SATHERD_ENGINE" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_router_whose_database_cannot_be_reached_says_so_in_one_line(tmp_path: Path) -> None:
    ended = satherd(
        *("router", "--port", "0", "--simulated-url", "http://127.0.0.1:1"),
        *("--database-url", f"postgresql://nobody@/x?host={tmp_path}"),
        folder=tmp_path,
    )
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in ended.stderr
