"""The states of a job, and the one table of moves between them. Pure.

      quoted, invoice made            submitted from a balance
               │                                 │
               ▼              pay                ▼
       awaiting_payment ─────────────────────▶ queued ◀────────┐ give_back
               │                                 │ claim       │ (lost with nothing shown,
               │ expire, cancel                  ▼             │  fewer than 3 attempts)
               ▼                              running ─────────┘
       expired, cancelled                        │ finish, fail, cancel
                                                 ▼
                                  succeeded, failed, cancelled

The SQL guards, the tests of every event in every state, and docs/job_states.md all come from MOVES.
"""

from __future__ import annotations

from enum import StrEnum


class State(StrEnum):
    AWAITING_PAYMENT = "awaiting_payment"
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


class Event(StrEnum):
    PAY = "pay"
    CLAIM = "claim"
    GIVE_BACK = "give_back"
    FINISH = "finish"
    FAIL = "fail"
    CANCEL = "cancel"
    EXPIRE = "expire"


FINAL = frozenset({State.SUCCEEDED, State.FAILED, State.CANCELLED, State.EXPIRED})

# event -> (states it may happen in, state after)
MOVES: dict[Event, tuple[frozenset[State], State]] = {
    Event.PAY: (frozenset({State.AWAITING_PAYMENT}), State.QUEUED),
    Event.CLAIM: (frozenset({State.QUEUED}), State.RUNNING),
    Event.GIVE_BACK: (frozenset({State.RUNNING}), State.QUEUED),
    Event.FINISH: (frozenset({State.RUNNING}), State.SUCCEEDED),
    Event.FAIL: (frozenset({State.RUNNING}), State.FAILED),
    Event.CANCEL: (
        frozenset({State.AWAITING_PAYMENT, State.QUEUED, State.RUNNING}),
        State.CANCELLED,
    ),
    Event.EXPIRE: (frozenset({State.AWAITING_PAYMENT, State.QUEUED}), State.EXPIRED),
}


class IllegalMove(Exception):
    """A bug: the caller did not ask `may` or guard its statement."""


def may(event: Event, state: State) -> bool:
    """Whether `event` can happen to a job in `state`."""
    return state in MOVES[event][0]


def after(event: Event, state: State) -> State:
    """The state that `event` leads to. Raises IllegalMove where it cannot happen."""
    if not may(event, state):
        raise IllegalMove(f"{event} in {state}")
    return MOVES[event][1]


def before(event: Event) -> list[str]:
    """The states in which `event` may happen, for a guard `state = any($n)`."""
    return sorted(MOVES[event][0])


def as_mermaid() -> str:
    """The table as a Mermaid state diagram, for docs/job_states.md."""
    lines = [
        "stateDiagram-v2",
        "    [*] --> awaiting_payment: invoice",
        "    [*] --> queued: submit",
    ]
    for event, (froms, to) in MOVES.items():
        lines += [f"    {state} --> {to}: {event}" for state in sorted(froms)]
    lines += [f"    {state} --> [*]" for state in sorted(FINAL)]
    return "\n".join(lines)
