"""Who may have room for a job: thousands of workers, few of them looked at."""

from __future__ import annotations

from typing import Any

from router.dear_memory import DearMemory
from router.lanes import Edges
from router.matching import match
from router.workers import Fleet, Worker
from tests.test_matching import EDGES, LONG, SHORT, names, waiting, worker

MANY = 300


def _fleet(*workers: Worker) -> Fleet:
    fleet = Fleet()
    fleet.set_edges(EDGES)
    for one in workers:
        fleet.add(one)
    return fleet


def _ids(workers: list[Worker]) -> set[str]:
    return {one.id for one in workers}


def test_of_many_that_are_alike_only_some_are_looked_at():
    fleet = _fleet(*(worker(f"w{i}") for i in range(MANY)), worker("short", models=[SHORT]))
    few = fleet.idle(5)
    assert len(few) == 6 and "short" in _ids(few)
    assert len(fleet.idle()) == MANY + 1


def test_whoever_has_waited_longest_is_looked_at_first_and_nobody_is_forgotten():
    fleet = _fleet(*(worker(f"w{i}") for i in range(MANY)))
    seen: set[str] = set()
    while few := fleet.idle(7):
        assert seen.isdisjoint(_ids(few))
        seen |= _ids(few)
        for one in few:
            one.busy.add("a job")
    assert len(seen) == MANY and fleet.idle() == []
    last = fleet.get("w5")
    assert last is not None
    last.busy.discard("a job")
    assert _ids(fleet.idle(7)) == {"w5"}


def test_a_worker_whose_rest_is_over_is_found_when_all_are_gone_through():
    all_of_them = [worker(f"w{i}", resting=True) for i in range(MANY)]
    fleet = _fleet(*all_of_them)
    assert fleet.idle(5) == []
    all_of_them[7].resting = False
    fleet.look_for_room()
    assert _ids(fleet.idle(5)) == {"w7"}
    few = _fleet(one := worker("w", resting=True))
    assert few.idle(5) == []
    one.resting = False
    # A few are simply gone through.
    assert few.idle(5) == [one]


def test_workers_that_left_that_pull_or_that_have_moved_to_other_lanes_are_not_mixed_up():
    fleet = _fleet(gone := worker("gone"), worker("pulls", pulls=True), worker("stays"))
    fleet.remove(gone)
    gone.busy.discard("x")
    assert _ids(fleet.idle(5)) == {"stays"}
    fleet.set_edges(Edges().with_limits([SHORT, LONG]))
    assert _ids(fleet.idle(5)) == {"stays"}
    again = worker("stays", slots=2)
    fleet.add(again)
    assert fleet.idle(5) == [again]


def test_jobs_go_to_those_that_were_looked_at():
    fleet = _fleet(*(worker(f"w{i}") for i in range(MANY)))
    queue = [waiting(f"j{i}", seq=i) for i in range(8)]
    pairs = match(queue, fleet, 0, fleet.idle(4))
    assert [job for job, _ in names(pairs)] == ["j0", "j1", "j2", "j3"]


def test_only_what_was_dear_to_find_is_remembered():
    memory: DearMemory[int] = DearMemory()
    calls: list[Any] = []

    def cheap() -> int:
        calls.append("cheap")
        return len(calls)

    def dear() -> int:
        calls.append("dear")
        return sum(range(2_000_000))

    assert memory("a", cheap) != memory("a", cheap)
    assert memory("b", dear) == memory("b", dear)
    assert calls.count("dear") == 1
