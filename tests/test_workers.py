"""The fleet: what connected workers can take together."""

from __future__ import annotations

import gc

from router.lanes import Edges
from router.workers import Fleet, Worker
from worker.protocol import ServedModel


def connected(fleet: Fleet, name: str, *, context: int = 2048, answer: int = 512) -> Worker:
    served = ServedModel(id="m", context_length=context, max_tokens=answer)
    worker = Worker(
        id=name, name=None, models=[served], slots=1, payable=True, ln_url=None, speeds={}
    )
    fleet.set_edges(fleet.edges.with_limits([served]))
    fleet.add(worker)
    return worker


def test_workers_with_the_same_limits_share_their_lanes():
    fleet = Fleet()
    one, other = connected(fleet, "one"), connected(fleet, "other")
    assert one.lanes is other.lanes and one.lanes


def test_workers_with_other_limits_have_other_lanes():
    fleet = Fleet()
    small, large = connected(fleet, "small"), connected(fleet, "large", context=8192)
    assert small.lanes < large.lanes


def test_a_new_edge_gives_everybody_finer_lanes():
    fleet = Fleet()
    worker = connected(fleet, "one")
    before = worker.lanes
    connected(fleet, "other", context=1000, answer=100)
    assert before < worker.lanes


def test_lanes_are_forgotten_with_the_last_worker_that_drains_them():
    fleet = Fleet()
    fleet.set_edges(Edges())
    for number in range(10):
        fleet.remove(connected(fleet, "one", context=2048 + number))
    gc.collect()
    assert len(fleet._lanes) == 0
