"""Folders in memory, for what would wait for a disk thousands of times in a run of the tests."""

from __future__ import annotations

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
    """An empty folder, removed at the end; on the disk where there is little room in memory."""
    roomy = _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free > _ROOM_BYTES
    with tempfile.TemporaryDirectory(
        prefix="satherd-", dir=_MEMORY if roomy else None, ignore_cleanup_errors=True
    ) as made:
        yield Path(made)
