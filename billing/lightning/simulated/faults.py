"""Scripted faults: what is to go wrong, for whom, and how often.

    kind         axis        on pay_invoice                        on any other operation
    delay        route       the HTLC travels `delay_s` longer     the answer comes later
    hang         route       the payee holds it until resolved     -
    fail         route       no route; FAILED at once              the node refuses
    fail_late    route       in flight for `delay_s`, then FAILED  -
    forget       record      made as usual, then its record is deleted: NOT_FOUND
    drop_before  connection  the connection breaks before the node acts
    drop_after   connection  the node acts, and the connection breaks before it answers

One call takes the oldest matching fault of each axis, so that they can be combined: `delay` with
`forget` and `drop_after` is a payment that goes on, of which nobody knows any more.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from billing.lightning.simulated.store import Transaction

FAULT_SCHEMA = """
CREATE TABLE IF NOT EXISTS fault (
    id INTEGER PRIMARY KEY,
    wallet TEXT NOT NULL,
    operation TEXT NOT NULL,
    kind TEXT NOT NULL,
    payee TEXT,
    delay_s REAL NOT NULL,
    times_left INTEGER NOT NULL CHECK (times_left > 0)
) STRICT;
"""

OPERATIONS = frozenset(
    {
        "node_info",
        "balance",
        "create_invoice",
        "lookup_invoice",
        "cancel_invoice",
        "settlements",
        "pay_invoice",
        "lookup_payment",
        "list_received",
        "list_sent",
    }
)


class FaultKind(StrEnum):
    DELAY = "delay"
    HANG = "hang"
    FAIL = "fail"
    FAIL_LATE = "fail_late"
    FORGET = "forget"
    DROP_BEFORE = "drop_before"
    DROP_AFTER = "drop_after"


_ROUTE = (FaultKind.DELAY, FaultKind.HANG, FaultKind.FAIL, FaultKind.FAIL_LATE)
_ONLY_WHEN_PAYING = (FaultKind.HANG, FaultKind.FAIL_LATE, FaultKind.FORGET)


@dataclass(frozen=True, slots=True)
class Fault:
    """The next `times` calls of `operation` by `wallet` (paying `payee`, if one is named) go wrong.

    Raises ValueError when the kind makes no sense for the operation.
    """

    kind: FaultKind
    operation: str = "pay_invoice"
    wallet: str = "router"
    payee: str | None = None
    delay_s: float = 1.0
    times: int = 1

    def __post_init__(self) -> None:
        if self.operation not in OPERATIONS:
            raise ValueError(f"no such operation: {self.operation}")
        if self.operation != "pay_invoice" and (self.kind in _ONLY_WHEN_PAYING or self.payee):
            raise ValueError(f"{self.kind} and `payee` are for pay_invoice")
        if not 0 <= self.delay_s <= 10_000_000 or not 1 <= self.times <= 1_000_000:
            raise ValueError("delay_s or times is out of range")


@dataclass(frozen=True, slots=True)
class Taken:
    """The faults that one call has drawn: at most one of each axis."""

    route: Fault | None = None
    forget: bool = False
    drop: FaultKind | None = None


NOTHING = Taken()


def script(transaction: Transaction, fault: Fault) -> None:
    transaction.run(
        "INSERT INTO fault (wallet, operation, kind, payee, delay_s, times_left)"
        " VALUES (?, ?, ?, ?, ?, ?)",
        fault.wallet,
        fault.operation,
        fault.kind.value,
        fault.payee,
        fault.delay_s,
        fault.times,
    )


def clear(transaction: Transaction) -> None:
    transaction.run("DELETE FROM fault")


def scripted(transaction: Transaction) -> list[Fault]:
    """What is still to come, oldest first."""
    return [
        Fault(
            kind=FaultKind(row["kind"]),
            operation=row["operation"],
            wallet=row["wallet"],
            payee=row["payee"],
            delay_s=row["delay_s"],
            times=row["times_left"],
        )
        for row in transaction.rows("SELECT * FROM fault ORDER BY id")
    ]


def take(transaction: Transaction, wallet: str, operation: str, payee: str | None) -> Taken:
    """Draw the faults of one call and count them as used."""
    route: Fault | None = None
    forget = False
    drop: FaultKind | None = None
    for row in transaction.rows(
        "SELECT * FROM fault WHERE wallet = ? AND operation = ?"
        " AND (payee IS NULL OR payee = ?) ORDER BY id",
        wallet,
        operation,
        payee,
    ):
        kind = FaultKind(row["kind"])
        if kind in _ROUTE and route is None:
            route = Fault(kind, operation, wallet, row["payee"], row["delay_s"])
        elif kind is FaultKind.FORGET and not forget:
            forget = True
        elif kind in (FaultKind.DROP_BEFORE, FaultKind.DROP_AFTER) and drop is None:
            drop = kind
        else:
            continue
        transaction.run("DELETE FROM fault WHERE id = ? AND times_left = 1", row["id"])
        transaction.run("UPDATE fault SET times_left = times_left - 1 WHERE id = ?", row["id"])
    return Taken(route, forget, drop)
