"""Ports for servers that are told theirs, and that keep it when they are started again."""

from __future__ import annotations

import contextlib
import os
import random
import socket

# Below those that the kernel gives to outgoing connections, of which tests make thousands: nobody
# takes it before it is used, or while its server is down.
_FIRST, _LAST = 15_000, 32_000
# Each of the processes that share the tests has ports of its own.
_SHARES = 16
_SHARE = int("".join(filter(str.isdigit, os.environ.get("PYTEST_XDIST_WORKER", "0"))))

_given: set[int] = set()


def free_port() -> int:
    """One that nobody listens at, and that this process has not given before."""
    while True:
        port = random.randrange(_FIRST + _SHARE % _SHARES, _LAST, _SHARES)
        if port in _given:
            continue
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            _given.add(port)
            return port
