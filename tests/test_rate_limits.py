"""Counting what a client asks for in a minute."""

from __future__ import annotations

import pytest

from router.rate_limits import Windows


class Clock:
    def __init__(self, now_s: float = 6_000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


def test_so_many_a_minute_and_no_more():
    clock = Clock()
    windows = Windows(clock)
    assert [windows.hit("a", 3) for _ in range(3)] == [0, 0, 0]
    assert windows.hit("a", 3) > 0
    assert windows.hit("b", 3) == 0


@pytest.mark.parametrize("per_minute", [1, 2, 10])
@pytest.mark.parametrize("start_s", [0.0, 20.0, 59.0])
def test_who_comes_back_when_told_is_let_in_and_not_before(per_minute: int, start_s: float):
    clock = Clock(6_000.0 + start_s)
    windows = Windows(clock)
    while not (wait_s := windows.hit("a", per_minute)):
        pass
    clock.now_s += wait_s * 0.98 - 0.01
    assert windows.hit("a", per_minute) > 0
    clock.now_s += wait_s * 0.02 + 0.02
    assert windows.hit("a", per_minute) == 0


def test_a_burst_at_the_end_of_a_minute_still_counts_in_the_next():
    clock = Clock(6_059.0)
    windows = Windows(clock)
    for _ in range(10):
        assert windows.hit("a", 10) == 0
    clock.now_s = 6_061.0
    assert windows.hit("a", 10) > 0
    clock.now_s = 6_120.0
    assert windows.hit("a", 10) == 0


def test_an_even_stream_under_the_limit_is_never_refused():
    clock = Clock()
    windows = Windows(clock)
    for _ in range(600):
        assert windows.hit("a", 60) == 0
        clock.now_s += 1.05


def test_who_stays_away_is_forgotten():
    clock = Clock()
    windows = Windows(clock)
    for number in range(100):
        windows.hit(number, 10)
    clock.now_s += 180
    windows.hit("late", 10)
    assert len(windows) == 1
