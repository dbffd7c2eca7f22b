"""Who waits, in memory: places and prices without counting rows.

A copy of the queue's order and of nothing else: for each set of lanes and each multiplier the `seq`s of
the jobs that wait there, eight bytes a job. It is read once from the queue and then follows the changes
that the database keeps (`router.job_queue`), so that all routers see the same order.

    group      all jobs that wait in the same lanes: mostly one lane, several for a job that any of
               several models may serve, so that nobody is counted twice
    step       the jobs of a group at one multiplier, in the order in which they came
    band       neighbouring multipliers together, 32 bands for each doubling: a place adds up bands,
               and single steps only within its own, however many multipliers clients have thought of
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

_BAND_BITS = 6


@dataclass(frozen=True, slots=True)
class Change:
    """Jobs that have come to wait, or wait no more, in all of `lanes` at one multiplier."""

    lanes: tuple[str, ...]
    multiplier_milli: int
    seqs: Sequence[int]
    added: bool


@dataclass(frozen=True, slots=True)
class Step:
    """How many jobs wait in a set of lanes at one multiplier."""

    lanes: tuple[str, ...]
    multiplier_milli: int
    jobs: int


class Drifted(Exception):
    """A change that does not fit what is in memory: the queue must be read anew."""


def band(multiplier_milli: int) -> int:
    """The band of a multiplier; never lower for a higher one. Pure."""
    over = max(0, multiplier_milli.bit_length() - _BAND_BITS)
    return (over << _BAND_BITS) + (multiplier_milli >> over)


@dataclass(slots=True)
class _Group:
    lanes: frozenset[str]
    jobs: int = 0
    steps: dict[int, array] = field(default_factory=dict)
    in_band: dict[int, int] = field(default_factory=dict)
    of_band: dict[int, set[int]] = field(default_factory=dict)

    def add(self, milli: int, seqs: Sequence[int]) -> None:
        step = self.steps.get(milli)
        if step is None:
            step = self.steps[milli] = array("q")
            self.of_band.setdefault(band(milli), set()).add(milli)
        if not step or step[-1] <= seqs[0]:
            step.extend(seqs)
        else:
            for seq in seqs:
                insort(step, seq)
        self.jobs += len(seqs)
        self.in_band[band(milli)] = self.in_band.get(band(milli), 0) + len(seqs)

    def remove(self, milli: int, seqs: Sequence[int]) -> None:
        step = self.steps.get(milli)
        if step is None:
            raise Drifted
        at = bisect_left(step, seqs[0])
        # Those that a claim takes mostly stand together, at the head.
        if step[at : at + len(seqs)] == array("q", seqs):
            del step[at : at + len(seqs)]
        else:
            for seq in seqs:
                at = bisect_left(step, seq)
                if at == len(step) or step[at] != seq:
                    raise Drifted
                del step[at]
        self.jobs -= len(seqs)
        number = band(milli)
        self.in_band[number] -= len(seqs)
        if not step:
            del self.steps[milli]
            self.of_band[number].discard(milli)
            if not self.of_band[number]:
                del self.of_band[number], self.in_band[number]

    def ahead(self, milli: int, seq: int | None) -> int:
        own = band(milli)
        count = sum(jobs for number, jobs in self.in_band.items() if number > own)
        for other in self.of_band.get(own, ()):
            if other > milli:
                count += len(self.steps[other])
        equal = self.steps.get(milli)
        if equal is not None:
            count += len(equal) if seq is None else bisect_left(equal, seq)
        return count


class QueueCounts:
    """The order of the whole queue. Reckoning costs by groups and bands, not by jobs."""

    def __init__(self) -> None:
        self._groups: dict[tuple[str, ...], _Group] = {}
        self.length = 0

    def apply(self, changes: Iterable[Change]) -> None:
        """Follow changes that became visible together, in any order. Raises Drifted."""
        gone = []
        for change in changes:
            if change.added:
                self._add(change)
            else:
                gone.append(change)
        # Last, since a job that came and went between two looks is among both.
        for change in gone:
            self._remove(change)

    def _add(self, change: Change) -> None:
        group = self._groups.get(change.lanes)
        if group is None:
            group = self._groups[change.lanes] = _Group(frozenset(change.lanes))
        group.add(change.multiplier_milli, change.seqs)
        self.length += len(change.seqs)

    def _remove(self, change: Change) -> None:
        group = self._groups.get(change.lanes)
        if group is None:
            raise Drifted
        group.remove(change.multiplier_milli, change.seqs)
        self.length -= len(change.seqs)
        if not group.jobs:
            del self._groups[change.lanes]

    def ahead(self, lanes: AbstractSet[str], multiplier_milli: int, seq: int | None = None) -> int:
        """How many jobs that wait in any of `lanes` come before one with this multiplier and seq.

        `seq` None: it comes last of its multiplier, as a new job does.
        """
        return sum(group.ahead(multiplier_milli, seq) for group in self._in(lanes))

    def jobs(self, lanes: AbstractSet[str]) -> int:
        """How many jobs wait in any of `lanes`."""
        return sum(group.jobs for group in self._in(lanes))

    def dearest(self, lanes: AbstractSet[str], most: int) -> list[tuple[int, int]]:
        """The highest multipliers in `lanes`, at most `most`, and the jobs at each."""
        groups = list(self._in(lanes))
        found: list[tuple[int, int]] = []
        for number in sorted(
            {number for group in groups for number in group.of_band}, reverse=True
        ):
            steps: dict[int, int] = defaultdict(int)
            for group in groups:
                for milli in group.of_band.get(number, ()):
                    steps[milli] += len(group.steps[milli])
            found += sorted(steps.items(), reverse=True)
            if len(found) >= most:
                break
        return found[:most]

    def steps(self) -> Iterator[Step]:
        """Every step there is; costs as much as there are."""
        for lanes, group in self._groups.items():
            for milli, step in group.steps.items():
                yield Step(lanes, milli, len(step))

    def in_lanes(self) -> Iterator[tuple[tuple[str, ...], int]]:
        """The jobs of each group: the lanes they wait in, and how many they are."""
        for lanes, group in self._groups.items():
            yield lanes, group.jobs

    def _in(self, lanes: AbstractSet[str]) -> Iterator[_Group]:
        for group in self._groups.values():
            if not group.lanes.isdisjoint(lanes):
                yield group
