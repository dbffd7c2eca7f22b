"""`router.data_folder`: one process at a time. With real routers: tests/test_three_routers.py."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from router.data_folder import Taken, alone_in


def test_a_folder_is_held_by_one_and_free_after_it(tmp_path: Path):
    folder = tmp_path / "made"
    for _ in range(2):
        with alone_in(folder, "a.lock"), alone_in(folder, "b.lock"):
            with pytest.raises(Taken) as taken, alone_in(folder, "a.lock"):
                pass
            assert taken.value.process == str(os.getpid())


def test_where_nothing_can_be_locked_a_router_starts_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with alone_in(tmp_path, "a.lock"):
        pass
