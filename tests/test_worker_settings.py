"""Settings by environment, and the key that earnings belong to."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from worker.errors import EngineStartError
from worker.settings import EngineName, WorkerSettings, socket_url, worker_key


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch):
    for name in list(os.environ):
        if name.startswith("SATHERD_"):
            monkeypatch.delenv(name)


def settings(**fields: Any) -> WorkerSettings:
    return WorkerSettings(_env_file=None, **fields)  # pyright: ignore[reportCallIssue]


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch):
    for name, value in {
        "ROUTER_URL": "https://router.example",
        "LN_URL": "bob@example.org",
        "ENGINE": "echo",
        "SLOTS": "3",
        "MIN_FEES": '{"m": {"output_msat_per_mtok": 5}}',
    }.items():
        monkeypatch.setenv(f"SATHERD_{name}", value)
    found = settings()
    assert (found.router_url, found.ln_url) == ("https://router.example", "bob@example.org")
    assert (found.engine, found.slots) == (EngineName.ECHO, 3)
    assert found.min_fees == {"m": {"output_msat_per_mtok": 5}}


def test_without_any_setting_the_demo_model_is_served_and_the_machine_measured():
    found = settings()
    assert (found.engine, found.model) == (EngineName.LLAMA_CPP, None)
    assert (found.threads, found.slots) == (None, None)


@pytest.mark.parametrize(
    "fields",
    [
        {"slots": 0},
        {"engine": "gpt"},
        {"context": -1},
        {"threads": 0},
        {"worker_key": "short"},
        {"router_url": "router.example"},
        {"router_url": "ftp://router.example"},
        {"grace_s": float("nan")},
    ],
    ids=str,
)
def test_a_wrong_setting_is_refused(fields: dict[str, Any]):
    with pytest.raises(ValidationError):
        settings(**fields)


@pytest.mark.parametrize(
    ("url", "socket"),
    [
        ("http://127.0.0.1:8000", "ws://127.0.0.1:8000/worker"),
        ("https://router.example/", "wss://router.example/worker"),
        ("wss://router.example/worker", "wss://router.example/worker"),
        ("https://host/satherd", "wss://host/satherd/worker"),
    ],
)
def test_the_worker_door_is_found_at_any_form_of_the_routers_url(url: str, socket: str):
    assert socket_url(url) == socket


def test_the_key_is_made_once_and_only_its_owner_may_read_it(tmp_path: Path):
    found = settings(data_dir=tmp_path / "new" / "data")
    key = worker_key(found)
    assert len(bytes.fromhex(key)) == 32
    path = tmp_path / "new" / "data" / "worker.key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert worker_key(found) == key
    assert [entry.name for entry in path.parent.iterdir()] == ["worker.key"]


def test_two_data_dirs_have_two_keys(tmp_path: Path):
    keys = {worker_key(settings(data_dir=tmp_path / name)) for name in ("one", "two")}
    assert len(keys) == 2


def test_a_key_in_the_settings_makes_no_file_and_is_not_shown(tmp_path: Path):
    secret = "s" * 40
    found = settings(data_dir=tmp_path, worker_key=secret, engine_api_key="hidden")
    assert worker_key(found) == secret
    assert not list(tmp_path.iterdir())
    assert secret not in repr(found) and "hidden" not in repr(found)


def test_a_file_that_holds_no_key_is_not_overwritten(tmp_path: Path):
    (tmp_path / "worker.key").write_text("oops\n")
    with pytest.raises(EngineStartError, match="does not hold a worker key"):
        worker_key(settings(data_dir=tmp_path))
    assert (tmp_path / "worker.key").read_text() == "oops\n"


def test_a_data_dir_that_cannot_be_written_is_told(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(EngineStartError, match="worker key"):
        worker_key(settings(data_dir=tmp_path / "file" / "below"))
