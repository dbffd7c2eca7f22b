"""One network for a test session."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.regtest.network import LightningNetwork
from tests.regtest.programs import Programs, ToolMissing, installed


def programs_or_skip() -> Programs:
    """A missing tool fails in CI; on a developer's laptop it is a reason to skip."""
    try:
        return installed()
    except ToolMissing as missing:
        words = f"no real Lightning network: {missing}"
        if os.environ.get("CI") == "true":
            pytest.fail(words)
        pytest.skip(words)


@contextmanager
def running_network(folder: Path, *, files: Iterable[str] = ()) -> Iterator[LightningNetwork]:
    """Up, and stopped at the end whatever happens meanwhile."""
    network = LightningNetwork(folder, programs_or_skip(), files=files)
    try:
        asyncio.run(network.start())
        yield network
    finally:
        network.stop()
