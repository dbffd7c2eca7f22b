"""Who may have room for a job, without looking at all workers each time.

Thousands of idle workers that are alike need not all be looked at for one job, and thousands of busy
ones not for the slot that has just become free. So those that may have room are kept in groups of their
like (same lanes, same asks), the one that has waited longest first, and found out of it when they are
looked at. A worker comes in when one of its jobs ends, and all are gone through once in a while
(`Dispatcher.POLL_S`), for whatever else has made room: a rest that is over, an owner's word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from router.workers import Worker


class Held(set[str]):
    """The jobs that a worker has, which tell when there is one less."""

    __slots__ = ("_on_room",)

    def __init__(self, jobs: Iterable[str], on_room: Callable[[], None]) -> None:
        super().__init__(jobs)
        self._on_room = on_room

    def discard(self, job_id: object) -> None:
        super().discard(job_id)
        self._on_room()

    def remove(self, job_id: str) -> None:
        super().remove(job_id)
        self._on_room()

    def clear(self) -> None:
        super().clear()
        self._on_room()


class Room:
    """Workers that are handed jobs and may have room, by group."""

    def __init__(self) -> None:
        self._groups: dict[Any, dict[str, Worker]] = {}

    def put(self, worker: Worker) -> None:
        """It may have room. Twice is harmless."""
        self._groups.setdefault(_alike(worker), {}).setdefault(worker.id, worker)

    def take(self, worker: Worker) -> None:
        """It is gone, or about to belong to another group."""
        key = _alike(worker)
        group = self._groups.get(key)
        if group is not None and group.get(worker.id) is worker:
            del group[worker.id]
            if not group:
                del self._groups[key]

    def idle(self, most_each: int) -> list[Worker]:
        """Workers with free slots, at most so many of each group, those first that waited longest."""
        found: list[Worker] = []
        for key, group in list(self._groups.items()):
            full, left = [], most_each
            for worker in group.values():
                if worker.free_slots <= 0:
                    full.append(worker.id)
                    continue
                found.append(worker)
                left -= 1
                if left == 0:
                    break
            for worker_id in full:
                del group[worker_id]
            if not group:
                del self._groups[key]
        return found


def _alike(worker: Worker) -> Any:
    if worker.offers is not None:
        return worker.id  # what it would take, only it can say
    asks = tuple(sorted((model, repr(ask)) for model, ask in worker.min_fees.items()))
    return worker.lanes, asks
