"""What happens between asking for a price and the last token, as the caller sees it.

    Quoted -> InvoiceDue -> Paid -> StateChanged, Position … -> Text … -> Ended (one per job)

With a prepaid key InvoiceDue is missing. Reconnecting may stand anywhere after Paid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from client.answers import Invoice, Job, Purchase, Quote


@dataclass(frozen=True, slots=True)
class Quoted:
    quote: Quote


@dataclass(frozen=True, slots=True)
class InvoiceDue:
    """The invoice has been checked and goes to the wallet next."""

    invoice: Invoice


@dataclass(frozen=True, slots=True)
class Paid:
    """The wallet has paid, or the balance has; `purchase.credential` is worth keeping."""

    purchase: Purchase


@dataclass(frozen=True, slots=True)
class StateChanged:
    """`attempt` counts the tries at the job; `reason` is why it went back or ended."""

    job_id: str
    state: str
    attempt: int
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Position:
    """The place in the queue, 1 for the next job. Wait times are seconds, None when unknown."""

    job_id: str
    position: int
    wait_p50_s: float | None
    wait_p90_s: float | None
    multiplier_to_be_next: str | None
    servable: bool


@dataclass(frozen=True, slots=True)
class Text:
    """What to append to the job's answer. `delta` is OpenAI's, for what is not text."""

    job_id: str
    text: str
    delta: Mapping[str, Any] | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Restarted:
    """The job begins anew on another worker: text that was shown for it no longer counts."""

    job_id: str
    attempt: int


@dataclass(frozen=True, slots=True)
class Reconnecting:
    """The event stream broke; it is resumed after `wait_s` seconds, without loss."""

    failures: int
    wait_s: float


@dataclass(frozen=True, slots=True)
class Ended:
    """The job's last event: succeeded, failed, cancelled or expired."""

    job: Job


Event = (
    Quoted | InvoiceDue | Paid | StateChanged | Position | Text | Restarted | Reconnecting | Ended
)
