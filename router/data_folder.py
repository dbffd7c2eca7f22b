"""A data folder is one process's: two in it would take each other for themselves.

A lock keeps a second process out. One in a copy of the folder, elsewhere, is told by where it lies.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)


class Taken(Exception):
    """Another process holds the folder. `process` is its number, or `?`."""

    def __init__(self, process: str) -> None:
        super().__init__(process)
        self.process = process


@contextmanager
def alone_in(folder: Path, lock: str) -> Iterator[None]:
    """Hold a file of the folder for this process, however it ends. Raises Taken."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / lock).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise Taken(file.read().strip() or "?") from None
        except OSError as error:
            # Some network file systems have no locks.
            log.warning("%s cannot be locked, going on: %s", file.name, error)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def place_of(folder: Path) -> str:
    """Names where a folder lies: another for each copy, and for each machine and start of it.

    The same place, and the lock: whoever had it before is no more.
    """
    about = folder.stat()
    try:
        machine = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        machine = platform.node()
    named = f"{machine}:{about.st_dev}:{about.st_ino}"
    return hashlib.sha256(named.encode()).hexdigest()[:32]
