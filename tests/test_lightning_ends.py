"""A Lightning network ends with the last test that needs one, in whatever order the tests come."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest

from tests import conftest


class Item:
    """Equal to itself alone, as pytest's are."""

    def __init__(self, fixturenames: list[str], session: SimpleNamespace) -> None:
        self.fixturenames = fixturenames
        self.session = session


class Stopped:
    def __init__(self) -> None:
        self.times = 0

    def stop(self) -> None:
        self.times += 1


def stops(monkeypatch: pytest.MonkeyPatch, order: str) -> list[int]:
    """After each test but the last, how many times the network was stopped. L: a test that needs it."""
    network = Stopped()
    monkeypatch.setattr(conftest, "_networks", [network])
    session = SimpleNamespace()
    items: list[Any] = [Item(["lightning"] if kind == "L" else [], session) for kind in order]
    session.items = items
    seen: list[int] = []
    for item, later in itertools.pairwise(items):
        conftest.pytest_runtest_teardown(item, later)
        seen.append(network.times)
    return seen


def test_it_ends_before_a_test_that_does_not_need_it(monkeypatch: pytest.MonkeyPatch):
    assert stops(monkeypatch, "LL..") == [0, 1, 1]


def test_it_goes_on_for_one_that_comes_later(monkeypatch: pytest.MonkeyPatch):
    """As with pytest's --failed-first, where a test failed that does not need it."""
    assert stops(monkeypatch, "L.L.") == [0, 0, 1]
