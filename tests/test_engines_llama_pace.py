"""How much of a prompt goes into a step beside writers, and how many threads compute it."""

from __future__ import annotations

import pytest

from worker.engines.llama_measuring import choose_slots, choose_threads, thread_options
from worker.engines.llama_pace import (
    LEAST_PROMPT_TOKENS,
    PROBE_EVERY_S,
    PROBE_SOON_S,
    PROBE_STEPS,
    PROMPT_STEP_S,
    UNKNOWN_PROMPT_TOKENS,
    PromptPace,
    ThreadPace,
)


def test_with_nobody_writing_a_prompt_gets_the_whole_batch():
    assert PromptPace(prompt_token_s=1.0).room(0, 512) == 512


def test_beside_writers_a_step_is_kept_short():
    pace = PromptPace(prompt_token_s=0.001)
    assert pace.room(3, 512) == int(PROMPT_STEP_S / 0.001)
    assert pace.room(3, 20) == 20


def test_a_prompt_always_gets_on():
    assert PromptPace(prompt_token_s=10.0).room(1, 512) == LEAST_PROMPT_TOKENS


def test_before_anything_is_known_it_is_careful():
    assert PromptPace().room(1, 512) == UNKNOWN_PROMPT_TOKENS


def test_a_slower_step_counts_at_once_and_a_faster_one_by_and_by():
    pace = PromptPace(prompt_token_s=0.001)
    pace.observe(0.4, prompt_tokens=100)
    assert pace.room(1, 512) == LEAST_PROMPT_TOKENS
    pace.observe(0.01, prompt_tokens=100)
    assert pace.room(1, 512) < int(PROMPT_STEP_S / 0.0001)
    for _ in range(30):
        pace.observe(0.01, prompt_tokens=100)
    assert pace.room(1, 512) == pytest.approx(PROMPT_STEP_S / 0.0001, rel=0.05)


class Machine:
    """Steps that take as long as a table says for each number of threads."""

    def __init__(self, pace: ThreadPace, **seconds: float) -> None:
        self.pace = pace
        self.seconds = {int(name.removeprefix("t")): value for name, value in seconds.items()}
        self.computed: list[int] = []

    def run(self, for_s: float, writers: int = 2) -> None:
        while for_s > 0:
            threads = self.pace.now
            self.computed.append(threads)
            self.pace.observe(self.seconds[threads], writers=writers)
            for_s -= self.seconds[threads]


def test_threads_that_wait_for_each_other_are_given_up():
    """On a busy machine all cores are several times slower than one (llama.cpp spins)."""
    machine = Machine(ThreadPace([1, 2], 2), t1=0.01, t2=0.03)
    machine.run(for_s=2 * PROBE_SOON_S)
    assert machine.pace.threads == 1


def test_a_machine_that_becomes_quiet_gets_its_threads_back():
    machine = Machine(ThreadPace([1, 2, 4], 1), t1=0.04, t2=0.02, t4=0.01)
    machine.run(for_s=4 * PROBE_EVERY_S)
    assert machine.pace.threads == 4


def test_trying_costs_little_where_nothing_is_better():
    machine = Machine(ThreadPace([1, 2], 2), t1=0.05, t2=0.03)
    machine.run(for_s=10 * PROBE_EVERY_S)
    assert machine.pace.threads == 2
    assert machine.computed.count(1) <= 12 * (PROBE_STEPS + 1)


def test_threads_that_are_set_stay():
    machine = Machine(ThreadPace([2], 2), t2=0.01)
    machine.run(for_s=3 * PROBE_EVERY_S)
    assert set(machine.computed) == {2}


def test_a_trial_is_broken_off_when_the_number_of_writers_changes():
    pace = ThreadPace([1, 2], 2)
    machine = Machine(pace, t1=0.01, t2=0.03)
    while pace.now == 2:
        machine.run(for_s=0.001)
    machine.run(for_s=0.001, writers=3)
    assert pace.now == 2


@pytest.mark.parametrize(
    ("cores", "options"), [(1, [1]), (2, [1, 2]), (4, [1, 2, 3, 4]), (16, [1, 8, 15, 16])]
)
def test_the_numbers_of_threads_that_are_tried(cores: int, options: list[int]):
    assert thread_options(cores) == options


@pytest.mark.parametrize(
    ("rates", "cores", "threads"),
    [
        ({1: 100.0, 2: 29.0}, 2, 1),  # busy (llama.md: 105 against 29)
        ({1: 127.0, 2: 175.0}, 2, 2),  # quiet
        ({1: 127.0, 2: 140.0}, 2, 1),  # all cores need a clear gain
        ({1: 10.0, 4: 38.0, 7: 60.0, 8: 61.0}, 8, 7),
        ({1: 10.0, 4: 38.0, 7: 39.0}, 8, 4),
        ({7: 60.0}, 8, 7),  # no time for more
    ],
)
def test_the_fewest_threads_that_are_about_as_fast_as_any(
    rates: dict[int, float], cores: int, threads: int
):
    assert choose_threads(rates, cores) == threads


@pytest.mark.parametrize(
    ("rates", "slots"),
    [
        # Measured with a model of 110M parameters: q4_0 gains nothing below eight …
        ({1: 251.0, 2: 241.0, 4: 261.0, 8: 276.0, 16: 355.0}, 1),
        # … and q8_0 nearly two times, before answers get too slow.
        ({1: 129.0, 2: 129.0, 4: 159.0, 8: 226.0, 16: 283.0}, 8),
        ({1: 100.0}, 1),
        ({1: 100.0, 2: 190.0, 4: 360.0, 8: 700.0, 16: 1300.0}, 16),  # a GPU
    ],
)
def test_the_fewest_slots_that_make_nearly_as_many_tokens(rates: dict[int, float], slots: int):
    assert choose_slots(rates) == slots
