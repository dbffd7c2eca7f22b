"""What every kind of worker session has in common, and who may ask for one.

    kind          how work reaches it                        module
    native        frames on a socket, several jobs at once   router.worker_sessions
    QueenBee      frames on a socket, one job at a time      router.queenbee_sessions
    pull          it asks for a job and brings the answer    router.pull_sessions
    HTTP          we call its server                         router.http_sessions

`router.worker_gate` keeps them all. Whatever the kind, a session owns the jobs that its worker holds:
it begins an attempt for each (`router.attempts.Attempts.begin`) and ends it, and `end` ends them all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from pydantic import ValidationError

from router.demands import ANYBODY, Traits, read_version
from router.job_records import Claimed
from router.queenbee_models import Offers
from router.workers import Worker
from worker.protocol import ModelKind, Refused, Registration, ServedModel


class Session(Protocol):
    """One connected worker, of whatever kind. None of these calls waits for anything."""

    worker: Worker
    closed: bool
    dropped_frames: int

    def assign(self, claimed: Claimed) -> None:
        """Give it a claimed job, whose id is in `worker.busy` already. If it is closed, or takes no
        such job, the attempt is begun and failed: a claimed job is never just forgotten."""
        ...

    def drain(self) -> None:
        """Give it no more jobs; it finishes what it holds."""
        ...

    def check_progress(self, *, first_token_s: float, stall_s: float) -> None:
        """Called once a second: fail what has stalled, cut off a worker that is gone."""
        ...

    def cut(self, reason: str, *, blame: str = "worker") -> None:
        """End it from our side: what it holds is given back or settled. Twice is harmless."""
        ...

    def end(
        self, outcome: str = ..., *, blame: str = "worker", error: str = "the connection was lost"
    ) -> None:
        """The worker is gone: the same, with nobody to tell. Twice is harmless."""
        ...


@dataclass(frozen=True, slots=True)
class Applicant:
    """Who wants to serve, in whatever dialect it said so.

    `identity` is what its earnings and its record belong to: a hash of a secret that it has shown, or
    of a public key whose signature was verified (`workers.hash_worker_key`, `workers.hash_identity`).
    None: it is known by its address alone. Several that name one address sit side by side, each on
    a seat with a record of its own. `holding`: the (job, attempt)s that it brings along, from before
    its line broke. `pulls`, `offers`, `traits` and `min_fees` are the worker's.

    One that pulls may have no way to name an address: what it earns is kept for it until it names
    one, and naming none changes nothing.
    """

    identity: bytes | None
    models: list[ServedModel]
    slots: int = 1
    name: str | None = None
    ln_url: str | None = None
    hardware: dict[str, Any] = field(default_factory=dict)
    holding: list[tuple[str, int]] = field(default_factory=list)
    pulls: bool = False
    min_fees: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    offers: Offers | None = None
    traits: Traits = ANYBODY


class RefusedWorker(Exception):
    """A registration that is not accepted; `answer` is the frame to send before closing."""

    def __init__(self, code: str, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.answer = Refused(code=code, message=message, retryable=retryable)


def bad_registration(error: ValidationError) -> RefusedWorker:
    """The first thing that is wrong with a registration."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return RefusedWorker("bad_registration", f"{where}: {first['msg']}")


def texts_of(applicant: Applicant) -> list[str]:
    """All texts of an applicant that go into the database."""
    names = [model.id for model in applicant.models]
    return [applicant.name or "", *names, *_strings(applicant.hardware)]


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    parts = [*value, *value.values()] if isinstance(value, dict) else value
    if not isinstance(parts, list):
        return []
    return [text for part in parts for text in _strings(part)]


# What QueenBee's clients call what our workers do (QB-P7).
_CAPABILITIES = {
    ModelKind.TEXT: "llama-infer",
    ModelKind.EMBEDDING: "llama-infer",
    ModelKind.IMAGE: "sdxl",
}


def native_traits(registration: Registration) -> Traits:
    """What a worker of ours is to somebody who filters as at QueenBee."""
    return Traits(
        version=read_version(registration.worker_version),
        capabilities=capabilities_of(registration.models),
    )


def capabilities_of(models: Iterable[ServedModel]) -> frozenset[str]:
    """In QueenBee's words what workers of these models can do."""
    return frozenset(_CAPABILITIES[m.kind] for m in models if m.kind in _CAPABILITIES)
