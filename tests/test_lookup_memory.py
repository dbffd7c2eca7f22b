"""What strangers' look-ups have cost lately, in bounded memory."""

from __future__ import annotations

import pytest

from billing.lookup_memory import RecentCalls, RecentFailures


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_calls_are_counted_per_key_in_a_sliding_window(clock):
    calls = RecentCalls(most=2, window_s=60, clock=clock)
    assert calls.admit("a")
    clock.now = 30
    assert calls.admit("a")
    assert not calls.admit("a")
    assert calls.admit("b")
    clock.now = 60  # the first call has left the window, the second has not
    assert calls.admit("a")
    assert not calls.admit("a")


def test_a_refused_call_does_not_prolong_the_refusal(clock):
    calls = RecentCalls(most=1, window_s=60, clock=clock)
    assert calls.admit("a")
    for clock.now in range(1, 60):
        assert not calls.admit("a")
    clock.now = 60
    assert calls.admit("a")


def test_of_too_many_keys_the_one_longest_unused_is_forgotten(clock):
    calls = RecentCalls(most=1, window_s=60, clock=clock, keys_max=2)
    assert calls.admit("a") and calls.admit("b")
    assert not calls.admit("a")  # used again, so `b` is now the oldest
    assert calls.admit("c")
    assert not calls.admit("a")
    assert calls.admit("b")


def test_a_failure_is_kept_for_its_time(clock):
    failures: RecentFailures[str] = RecentFailures(clock=clock)
    assert failures.get("a") is None
    failures.remember("a", "broken", keep_s=300)
    clock.now = 299
    assert failures.get("a") == "broken"
    failures.remember("a", "still broken", keep_s=300)
    clock.now = 598
    assert failures.get("a") == "still broken"
    clock.now = 599
    assert failures.get("a") is None
    failures.remember("a", "again", keep_s=300)
    failures.forget("a")
    failures.forget("a")
    assert failures.get("a") is None


def test_of_too_many_failures_the_oldest_is_forgotten(clock):
    failures: RecentFailures[str] = RecentFailures(clock=clock, keys_max=2)
    for key in ("a", "b", "a", "c"):
        failures.remember(key, key.upper(), keep_s=300)
    assert (failures.get("a"), failures.get("b"), failures.get("c")) == ("A", None, "C")
