"""A network namespace for a process, with lines to it that a test can cut: nothing is said to either
side, packets just go no further, as when a switch dies. Needs root."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest

_numbers = count(os.getpid() % 200)


class NetSpace:
    """A namespace with lines by name. Of each line, `here` and `there` are its ends' addresses."""

    def __init__(self) -> None:
        number = next(_numbers) % 250
        self.name = f"satherd-{os.getpid()}-{number}"
        self.inside = ["ip", "netns", "exec", self.name]
        self._prefix = f"10.213.{number}"
        self._lines: dict[str, int] = {}
        _ip("netns", "add", self.name)
        _ip("-n", self.name, "link", "set", "lo", "up")

    def add_line(self, line: str) -> tuple[str, str]:
        """A line from here into the namespace: the addresses here and there."""
        n = self._lines[line] = len(self._lines)
        here, there = f"{self._prefix}.{4 * n + 1}", f"{self._prefix}.{4 * n + 2}"
        device, peer = self._device(line), f"there{n}"
        _ip("link", "add", device, "type", "veth", "peer", "name", peer, "netns", self.name)
        _ip("addr", "add", f"{here}/30", "dev", device)
        _ip("link", "set", device, "up")
        _ip("-n", self.name, "addr", "add", f"{there}/30", "dev", peer)
        _ip("-n", self.name, "link", "set", peer, "up")
        return here, there

    def cut(self, line: str) -> None:
        _ip("link", "set", self._device(line), "down")

    def mend(self, line: str) -> None:
        _ip("link", "set", self._device(line), "up")

    def remove(self) -> None:
        """The lines go with the namespace, once nothing runs in it."""
        for line in self._lines:
            subprocess.run(["ip", "link", "del", self._device(line)], check=False)
        _ip("netns", "del", self.name)

    def _device(self, line: str) -> str:
        return f"s{os.getpid() % 1_000_000}n{self._lines[line]}{self._prefix.rpartition('.')[2]}"


@contextmanager
def net_space() -> Iterator[NetSpace]:
    """Skips where none can be made."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and `ip` (apt-get install iproute2)")
    _remove_left_over()
    try:
        space = NetSpace()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespace can be made here: {error.stderr.strip()}")
    try:
        yield space
    finally:
        space.remove()


def _remove_left_over() -> None:
    """Namespaces of runs that were killed; their lines go with them."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False)
    for line in listed.stdout.splitlines():
        owner = re.fullmatch(r"satherd-(\d+)-\d+", line.split(" ")[0])
        if owner is not None and not Path(f"/proc/{owner[1]}").exists():
            subprocess.run(["ip", "netns", "del", owner[0]], check=False)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
