"""The rows that quotes, jobs and attempts are written from, and what a write answers. Pure data.

Nobody changes one. What is made for every job is not frozen all the same: Python makes it five times as
fast.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from router.job_states import Event, State


@dataclass(slots=True)
class NewJob:
    """A priced job. `spec` is the JSON of its JobSpec, `rates` of its Rates.

    A job that any of several models may serve waits in `lane` and in `more_lanes`, and has
    `choices` (`router.choices`). `prefix`: `router.prompt_prefix`.
    """

    id: str
    index: int
    kind: str
    model: str
    spec: str
    rates: str
    prompt_tokens: int
    max_tokens: int
    base_fee_msat: int
    offer_msat: int
    multiplier_milli: int
    lane: str
    more_lanes: tuple[str, ...] = ()
    choices: str | None = None
    webhook: str | None = None
    prefix: int | None = None
    run_limit_s: int | None = None

    @property
    def lanes(self) -> tuple[str, ...]:
        return self.lane, *self.more_lanes


@dataclass(slots=True)
class NewQuote:
    """A priced request. `request` is kept with it until its jobs exist."""

    id: str
    request_hash: bytes
    base_fee_msat: int
    offer_msat: int
    max_wait_s: int
    jobs: tuple[NewJob, ...]

    @property
    def characters(self) -> int:
        """How long the texts of its jobs are together, as they are stored."""
        return sum(len(job.spec) for job in self.jobs)


@dataclass(slots=True)
class Submission:
    """A request to be paid from a balance and queued now.

    `key_id` names the key only where it has a spending limit. `once` is (scope, key): the same pair
    with the same request is the same submission. `attached_to`: the router whose client takes the
    jobs along when it goes.
    """

    quote: NewQuote
    account_id: str
    key_id: str | None = None
    once: tuple[str, str] | None = None
    attached_to: str | None = None


@dataclass(slots=True)
class Claim:
    """`model`: which one will serve, of a job that has a choice."""

    job_id: str
    worker_id: str
    router_id: str
    commission_ppm: int
    lease_ends_at: datetime
    model: str | None = None


@dataclass(slots=True)
class Claimed:
    """A job that is now running on a worker, with all that is needed to settle it."""

    job_id: str
    attempt: int
    worker_id: str
    quote_id: str
    account_id: str
    kind: str
    model: str
    spec: str
    rates: str
    prompt_tokens: int
    max_tokens: int
    held_msat: int
    multiplier_milli: int
    commission_ppm: int
    queued_at: datetime
    started_at: datetime
    choices: str | None = None
    run_limit_s: int | None = None


@dataclass(frozen=True, slots=True)
class Seat:
    """A slot that is kept for a job while it is bought; `drains`: the lanes of that worker."""

    claim: Claim
    drains: frozenset[str]


class Bought(Protocol):
    """What is looked at of a job that is being bought."""

    @property
    def id(self) -> str: ...
    @property
    def multiplier_milli(self) -> int: ...
    @property
    def rates(self) -> str: ...
    @property
    def choices(self) -> str | None: ...
    @property
    def prefix(self) -> int | None: ...


Buy = Callable[[Sequence[Seat]], Awaitable[Sequence[Claimed]]]
StartBought = Callable[[Sequence[tuple[Bought, Sequence[str]]], Buy], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Submitted:
    """`repeated`: it had been submitted before, as `quote_id`. `started`: those of its jobs that have
    not had to wait, on the workers that had seats for them."""

    quote_id: str
    repeated: bool
    started: tuple[Claimed, ...] = ()


@dataclass(frozen=True, slots=True)
class Resumed:
    """A running job whose worker has come to another router, or back, and goes on with it."""

    claimed: Claimed
    shown: bool
    first_token_at: datetime | None


@dataclass(slots=True)
class Ending:
    """A job's last move. `attempt` None: whichever is current (a cancel, an expiry). `router_id`: not
    if it runs at another router, where its worker may have taken it; None: wherever it is.

    `charge_msat` is at most what is held; `payee` is the worker's id, None when it is not to be
    paid. `answer_hash` is for its receipt. `outcome`, `blame` and `error` go into the attempt's record.
    `claimed`: what the attempt was begun with, where that is known; it only makes the ending cheaper.
    """

    job_id: str
    event: Event
    end_reason: str
    attempt: int | None = None
    charge_msat: int = 0
    payee: str | None = None
    result: str | None = None
    usage: str | None = None
    answer_hash: bytes | None = None
    first_token_at: datetime | None = None
    outcome: str | None = None
    blame: str | None = None
    error: str | None = None
    tokens: int | None = None
    had_chunks: bool = False
    router_id: str | None = None
    claimed: Claimed | None = None


@dataclass(slots=True)
class Ended:
    """What the move did; None in place of this: the job was not in a state for it."""

    job_id: str
    state: State
    held_msat: int
    charged_msat: int
    refunded_msat: int
    ended_at: datetime


@dataclass(frozen=True, slots=True)
class GiveBack:
    """A running job whose worker is lost or returned it; it waits again, in its old place."""

    job_id: str
    attempt: int
    lane: str
    outcome: str
    blame: str
    error: str | None = None
    more_lanes: tuple[str, ...] = ()
    router_id: str | None = None
