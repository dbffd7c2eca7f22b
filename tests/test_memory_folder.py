"""Where tests keep their files: in memory, if it is there, roomy and free to use."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import memory_folder
from tests.memory_folder import serves

ROOMY = SimpleNamespace(free=3 << 30)
CRAMPED = SimpleNamespace(free=64 << 20)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: ROOMY)
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_flag=0))
    return tmp_path


def test_a_roomy_place_serves(place: Path):
    assert serves(place)


def test_none_does_not(place: Path):
    assert not serves(place / "missing")


def test_that_of_a_container_is_too_small(place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: CRAMPED)
    assert not serves(place)


def test_one_in_which_no_program_may_run_does_not(place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_flag=os.ST_NOEXEC))
    assert not serves(place)


def test_one_that_somebody_else_writes_does_not(place: Path, monkeypatch: pytest.MonkeyPatch):
    # The superuser may write everywhere, so his rights say nothing here.
    monkeypatch.setattr(os, "access", lambda _, rights: not rights & os.W_OK)
    assert not serves(place)


def test_where_none_serves_files_lie_on_the_disk(place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory_folder, "_MEMORY", place / "missing")
    with memory_folder.memory_folder() as folder:
        assert folder.parent == Path(tempfile.gettempdir())
        (folder / "file").write_text("kept until the end")
    assert not folder.exists()
