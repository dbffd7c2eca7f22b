"""Folders in memory, for what would wait for a disk thousands of times in a run of the tests."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MEMORY = Path("/dev/shm")
# All servers of a run take some 300 MB. A container has 64 MB here if nobody asked for more.
_ROOM_BYTES = 2 << 30


@contextmanager
def memory_folder() -> Iterator[Path]:
    """An empty folder, removed at the end; on the disk where memory is too small or may not be used."""
    with tempfile.TemporaryDirectory(
        prefix="satherd-",
        dir=_MEMORY if serves(_MEMORY) else None,
        ignore_cleanup_errors=True,
    ) as made:
        yield Path(made)


def serves(place: Path) -> bool:
    """Whether tests may keep their files in a folder: some of these are programs, and containers like
    to forbid those in shared memory."""
    return (
        os.access(place, os.W_OK | os.X_OK)
        and not os.statvfs(place).f_flag & os.ST_NOEXEC
        and shutil.disk_usage(place).free > _ROOM_BYTES
    )
