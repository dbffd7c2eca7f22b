"""Ports for servers that are told theirs, and that keep it when they are started again."""

from __future__ import annotations

import contextlib
import os
import random
import socket
from pathlib import Path

# Below those that the kernel mostly gives to outgoing connections, of which tests make thousands:
# nobody takes it before it is used, or while its server is down.
USUAL = range(15_000, 32_000)
# So few are soon used up.
FEW = 4_000
# Each of the processes that share the tests has ports of its own.
_SHARES = 16
_SHARE = int("".join(filter(str.isdigit, os.environ.get("PYTEST_XDIST_WORKER", "0"))))

_given: set[int] = set()


def outside(first: int, last: int) -> range:
    """Where to look when the kernel gives `first` to `last` away; anywhere, if it gives nearly all."""
    if last < USUAL.start or first >= USUAL.stop:
        return USUAL
    below, above = range(5_000, first), range(last + 1, 65_536)
    largest = max(below, above, key=len)
    return largest if len(largest) >= FEW else USUAL


def _here() -> range:
    with contextlib.suppress(OSError):
        said = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text()
        return outside(*map(int, said.split()))
    return USUAL


_PORTS = _here()


def free_port() -> int:
    """One that nobody listens at, and that this process has not given before."""
    while True:
        port = random.choice(_PORTS[_SHARE % _SHARES :: _SHARES])
        if port in _given:
            continue
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            _given.add(port)
            return port
