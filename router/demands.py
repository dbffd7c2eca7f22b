"""What a job demands of its worker beyond the model, and which workers meet it. Pure.

Few jobs demand anything, and what they do is rare: so it is a prefix of their lanes,
`@…:text/2048/512/model`, and they wait in lanes of their own, which only workers drain that meet it.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import orjson

from worker.protocol import (
    ChatSpec,
    CompletionSpec,
    Conditions,
    EmbeddingSpec,
    ImageEditSpec,
    JobSpec,
)

# A request of so many bytes may be too much for a worker whose library takes frames of 1 MiB (QB-P2);
# it grows a little on its way there.
LARGE_BYTES = 900_000
# A character is at most six bytes of JSON.
_SURELY_SMALL = LARGE_BYTES // 6

Version = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Demand:
    """What a worker must be (QB-R6). `worker`: its public id or its verified key, and no other."""

    min_version: Version | None = None
    capabilities: tuple[str, ...] = ()
    worker: str | None = None
    slug: str | None = None
    user_id: str | None = None
    large: bool = False

    def __bool__(self) -> bool:
        return self != NONE

    @property
    def prefix(self) -> str:
        """How the names of its lanes begin; empty for no demand."""
        if not self:
            return ""
        facts = {name: value for name in _FIELDS if (value := getattr(self, name))}
        text = orjson.dumps(facts, option=orjson.OPT_SORT_KEYS)
        return f"@{base64.urlsafe_b64encode(text).decode()}:"


_FIELDS = ("min_version", "capabilities", "worker", "slug", "user_id", "large")
NONE = Demand()


@dataclass(frozen=True, slots=True)
class Traits:
    """What a worker is, as far as anybody may demand it. `large`: whether it takes requests of any
    size. `user_id` is its own claim, and proves nothing."""

    version: Version | None = None
    capabilities: frozenset[str] = frozenset()
    names: frozenset[str] = frozenset()
    slug: str | None = None
    user_id: str | None = None
    large: bool = True

    def meet(self, demand: Demand) -> bool:
        if demand.min_version is not None and (
            self.version is None or self.version < demand.min_version
        ):
            return False
        return (
            self.capabilities.issuperset(demand.capabilities)
            and (demand.worker is None or demand.worker in self.names)
            and (demand.slug is None or demand.slug == self.slug)
            and (demand.user_id is None or demand.user_id == self.user_id)
            and (self.large or not demand.large)
        )


ANYBODY = Traits()


def of_lane(lane: str) -> Demand:
    """What the jobs of a lane demand."""
    return _read(lane.partition(":")[0][1:]) if lane.startswith("@") else NONE


def without(lane: str) -> str:
    """The lane that the jobs would wait in if they demanded nothing."""
    return lane.partition(":")[2] if lane.startswith("@") else lane


@lru_cache(maxsize=10_000)
def _read(text: str) -> Demand:
    facts: dict[str, Any] = orjson.loads(base64.urlsafe_b64decode(text))
    version, capabilities = facts.pop("min_version", None), facts.pop("capabilities", ())
    return Demand(
        min_version=tuple(version) if version else None, capabilities=tuple(capabilities), **facts
    )


def of_job(spec: str) -> Demand:
    """What a job demands, from its spec as it is stored."""
    conditions = conditions_of(spec)
    large = len(spec) > _SURELY_SMALL and len(spec.encode()) >= LARGE_BYTES
    return of_conditions(conditions, large=large)


def conditions_of(spec: str) -> Conditions | None:
    """A stored spec's conditions; None for the many that have none."""
    if '"conditions"' not in spec:
        return None
    # Also where a prompt speaks of them.
    found = orjson.loads(spec).get("conditions")
    return Conditions.model_validate(found) if found else None


def of_spec(spec: JobSpec) -> Demand:
    """The same, before it is stored."""
    large = False
    if _characters(spec) > _SURELY_SMALL:
        large = len(spec.model_dump_json(exclude_none=True).encode()) >= LARGE_BYTES
    return of_conditions(spec.conditions, large=large)


def of_conditions(conditions: Conditions | None, *, large: bool = False) -> Demand:
    """What conditions demand of a worker."""
    if conditions is None:
        return Demand(large=True) if large else NONE
    return Demand(
        min_version=read_version(conditions.min_version),
        capabilities=tuple(sorted(set(conditions.capabilities))),
        worker=conditions.worker,
        slug=conditions.slug,
        user_id=conditions.user_id,
        large=large,
    )


def read_version(text: str | None) -> Version | None:
    """`a.b.c` as numbers; None for anything else."""
    parts = (text or "").split(".")
    if not all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts):
        return None
    return tuple(map(int, parts))


def _characters(spec: JobSpec) -> int:
    """About how long a spec is; never much shorter than its texts."""
    match spec:
        case ChatSpec():
            return sum(_length(message.get("content")) for message in spec.messages)
        case CompletionSpec():
            return _length(spec.prompt) + _length(spec.suffix)
        case EmbeddingSpec():
            return sum(map(_length, spec.input))
        case ImageEditSpec():
            return _length(spec.image) + _length(spec.mask) + _length(spec.prompt)
        case _:
            return _length(spec.prompt)


def _length(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, list | tuple):
        return sum(_length(part) for part in _parts(value))
    if isinstance(value, dict):
        return sum(_length(part) for part in value.values())
    return 1


def _parts(value: Iterable[Any]) -> Iterable[Any]:
    # A list of token ids is as long as their digits.
    return (str(part) if isinstance(part, int) else part for part in value)
