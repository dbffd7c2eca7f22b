"""Who gets which job: `match` alone, without a database."""

from __future__ import annotations

import dataclasses
from typing import Any

from router.job_queue import Candidate
from router.lanes import Edges, lane
from router.matching import match, overtaking_nobody
from router.standing import Standing
from router.workers import Fleet, Worker
from worker.protocol import ModelKind, ServedModel

SHORT = ServedModel(id="m", context_length=512)
LONG = ServedModel(id="m", context_length=8192)
EDGES = Edges().with_limits([SHORT, LONG])


def fleet_of(*workers: Worker) -> Fleet:
    fleet = Fleet()
    fleet.set_edges(EDGES)
    for worker in workers:
        fleet.add(worker)
    return fleet


def worker(name: str, *, models: list[ServedModel] | None = None, **facts: Any) -> Worker:
    given = {"slots": 1, "payable": True, "ln_url": None, "speeds": {}, "name": None} | facts
    return Worker(id=name, models=models or [LONG], **given)


def waiting(
    name: str,
    milli: int = 1000,
    seq: int = 1,
    *,
    tokens: int = 100,
    tried: tuple[str, ...] = (),
    prefix: int | None = None,
) -> Candidate:
    where = lane(EDGES, kind=ModelKind.TEXT, model="m", prompt_tokens=tokens, max_tokens=0)
    return Candidate(name, where, milli, seq, frozenset(tried), prefix)


def names(pairs: list[tuple[Candidate, Worker]]) -> list[tuple[str, str]]:
    return [(candidate.job_id, worker.id) for candidate, worker in pairs]


def test_jobs_are_given_out_in_the_order_of_the_queue_while_there_are_slots():
    fleet = fleet_of(worker("w", slots=2))
    queue = [waiting("dear", 3000), waiting("middle", 2000), waiting("cheap")]
    assert names(match(queue, fleet)) == [("dear", "w"), ("middle", "w")]


def test_nothing_waits_or_nobody_is_idle():
    assert match([], fleet_of(worker("w"))) == []
    busy = worker("w")
    busy.busy.add("another")
    assert match([waiting("a")], fleet_of(busy)) == []
    assert match([waiting("a")], fleet_of(worker("w", draining=True))) == []


def test_a_job_that_fits_no_idle_worker_does_not_hold_up_those_behind_it():
    fleet = fleet_of(worker("short", models=[SHORT]))
    queue = [waiting("long", 9000, tokens=5000), waiting("short", 1000)]
    assert names(match(queue, fleet)) == [("short", "short")]


def test_the_faster_and_the_more_reliable_worker_is_chosen_first():
    fast, slow = worker("fast", speeds={"m": 100.0}), worker("slow", speeds={"m": 10.0})
    assert names(match([waiting("a"), waiting("b")], fleet_of(slow, fast))) == [
        ("a", "fast"),
        ("b", "slow"),
    ]
    shaky = worker("shaky", speeds={"m": 12.0}, standing=Standing(0.7))
    assert names(match([waiting("a")], fleet_of(shaky, slow))) == [("a", "slow")]
    # Speed at another model says nothing about this one.
    other = worker("other", speeds={"x": 1000.0})
    quick = worker("quick", speeds={"m": 30.0})
    assert names(match([waiting("a")], fleet_of(other, quick))) == [("a", "quick")]


def test_of_two_equal_workers_the_one_with_less_to_do_is_chosen():
    loaded, free = worker("loaded", slots=4), worker("free", slots=4)
    loaded.busy.update({"x", "y"})
    assert names(match([waiting("a")], fleet_of(loaded, free))) == [("a", "free")]


def test_a_worker_that_had_the_job_is_last_in_line_for_it():
    fast, slow = worker("fast", speeds={"m": 100.0}), worker("slow", speeds={"m": 10.0})
    tried = [waiting("a", tried=("fast",)), waiting("b")]
    assert names(match(tried, fleet_of(fast, slow))) == [("a", "slow"), ("b", "fast")]
    # Nobody else could do it: then it has another try.
    assert names(match(tried[:1], fleet_of(fast))) == [("a", "fast")]
    short = worker("short", models=[SHORT])
    long_job = [waiting("a", tokens=5000, tried=("fast",))]
    assert names(match(long_job, fleet_of(fast, short))) == [("a", "fast")]


def test_a_job_waits_for_a_fresh_worker_that_is_busy_and_lets_others_pass():
    failed, fresh = worker("failed"), worker("fresh")
    fresh.busy.add("x")
    queue = [waiting("a", 2000, tried=("failed",)), waiting("b")]
    assert names(match(queue, fleet_of(failed, fresh))) == [("b", "failed")]


def test_a_worker_does_not_get_a_job_again_while_it_holds_the_attempt_before():
    holding = worker("w", slots=2)
    holding.busy.add("a")
    fleet = fleet_of(holding)
    assert match([waiting("a", tried=("w",))], fleet) == []
    assert names(match([waiting("a", tried=("w",)), waiting("b")], fleet)) == [("b", "w")]
    holding.busy.clear()
    assert names(match([waiting("a", tried=("w",))], fleet)) == [("a", "w")]


def test_a_prompt_goes_to_the_worker_that_has_met_its_beginning():
    slower, faster = worker("slower", speeds={"m": 9.0}), worker("faster", speeds={"m": 10.0})
    slower.remember(7)
    fleet = fleet_of(slower, faster)
    assert names(match([waiting("a", prefix=7)], fleet)) == [("a", "slower")]
    assert names(match([waiting("a", prefix=8)], fleet)) == [("a", "faster")]
    assert names(match([waiting("a")], fleet)) == [("a", "faster")]


def test_a_much_slower_worker_gains_nothing_by_what_it_has_met():
    slow, fast = worker("slow", speeds={"m": 1.0}), worker("fast", speeds={"m": 10.0})
    slow.remember(7)
    assert names(match([waiting("a", prefix=7)], fleet_of(slow, fast))) == [("a", "fast")]


def test_what_a_worker_has_met_never_costs_another_job_its_place():
    """The only worker that could also do the long job has met the beginning of the short one."""
    long, short = worker("long"), worker("short", models=[SHORT], speeds={"m": 21.0})
    long.remember(7)
    queue = [waiting("brief", 2000, prefix=7), waiting("lengthy", 1000, tokens=5000)]
    assert names(match(queue, fleet_of(long, short))) == [("brief", "short"), ("lengthy", "long")]
    assert names(match(queue[:1], fleet_of(long, short))) == [("brief", "long")]


def test_a_worker_is_taken_to_remember_as_much_as_its_slots_hold():
    few, many = worker("few"), worker("many", slots=4)
    for prefix in range(6):
        few.remember(prefix)
        many.remember(prefix)
    few.remember(4)
    few.remember(9)
    assert list(few.met) == [4, 9]
    assert list(many.met) == [2, 3, 4, 5]


# --- seats for jobs that are just being bought -----------------------------------------------------


def seats(queue: list[Candidate], *workers: Worker, left: list[str] | None = None) -> list[Any]:
    """What starts at once of jobs in the order of the queue, where those with choices are left out."""
    plain = [candidate for candidate in queue if candidate.choices is None]
    matched = {c.job_id: w for c, w in match(plain, fleet_of(*workers))}
    return names(overtaking_nobody(queue, matched, left or []))


def test_a_seat_is_kept_for_whoever_comes_next():
    queue = [waiting("dear", 3000), waiting("cheap")]
    assert seats(queue, worker("w", slots=2)) == [("dear", "w"), ("cheap", "w")]


def test_what_has_to_be_looked_at_is_not_overtaken_by_its_own_batch():
    choosing = dataclasses.replace(waiting("dear", 3000), choices="{}")
    elsewhere = dataclasses.replace(choosing, lane="text/1/1/other", more_lanes=(choosing.lane,))
    for first in (choosing, elsewhere):
        assert seats([first, waiting("cheap")], worker("w")) == []
        assert seats([waiting("dearer", 4000), first], worker("w")) == [("dearer", "w")]
    apart = dataclasses.replace(choosing, lane="text/1/1/other")
    assert seats([apart, waiting("cheap")], worker("w")) == [("cheap", "w")]


def test_what_was_left_in_the_queue_is_not_overtaken_nor_what_waits_behind_it():
    queue = [waiting("long", 3000, tokens=5000), waiting("short")]
    long, short = worker("long"), worker("short", models=[SHORT])
    assert seats(queue, long, short) == [("long", "long"), ("short", "short")]
    # Something is left that only the long one drains: so the dear job may have to wait, and might get
    # neither; the cheap one is in nobody's way on the short worker, which does not fit the dear one.
    assert seats(queue, long, short, left=[queue[0].lane]) == [("short", "short")]
    queue = [waiting("dear", 3000), waiting("cheap")]
    assert seats(queue, long, short, left=[waiting("l", tokens=5000).lane]) == []


def test_a_seat_that_may_be_lost_alone_is_not_overtaken():
    """The dear job loses its seat where something dearer waits for long workers only; the cheap one
    on the short worker, which the dear one would fit as well, must not go before it."""
    queue = [waiting("dear", 3000), waiting("cheap")]
    fast, short = worker("fast", speeds={"m": 99.0}), worker("short", models=[SHORT])
    assert seats(queue, fast, short) == [("dear", "fast")]
    # The other way round, what takes the dear one's seat takes the cheap one's, too.
    slow = worker("slow")
    quick = worker("quick", models=[SHORT], speeds={"m": 99.0})
    assert seats(queue, slow, quick) == [("dear", "quick"), ("cheap", "slow")]
