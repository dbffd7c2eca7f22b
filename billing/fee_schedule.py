"""Rates in force. Changes are appended, never edited: the last row about a model is what it costs.

A model without rows of its own, or whose last row says `removed`, has the default rates.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

from billing.errors import BadAmount
from billing.fees import Rates

FIRST_RATES = Rates(
    prompt_fee_msat=1000,
    input_msat_per_mtok=200_000,
    output_msat_per_mtok=600_000,
    image_fee_msat=50_000,
    training_msat_per_mtok=1_000_000,
)
# 21 million bitcoin in msat: no rate can sensibly reach it, and products stay within bigint.
_HIGHEST_MSAT = 2_100_000_000_000_000_000 // 1_000_000

_IN_FORCE = "select distinct on (model) * from fee_changes order by model nulls first, id desc"


@dataclass(frozen=True, slots=True)
class FeeChange:
    """One change, for the history. `model` None is the default; `rates` None means removed."""

    model: str | None
    rates: Rates | None
    changed_at: datetime
    changed_by: str


@dataclass(frozen=True, slots=True)
class FeeSchedule:
    """The rates in force at one moment."""

    default: Rates
    by_model: dict[str, Rates]

    def rates(self, model: str) -> Rates:
        return self.by_model.get(model, self.default)


async def load(connection: Any) -> FeeSchedule:
    """The rates in force now."""
    default, by_model = FIRST_RATES, {}
    for row in await connection.fetch(_IN_FORCE):
        if row["model"] is None:
            default = _rates(row)
        elif not row["removed"]:
            by_model[row["model"]] = _rates(row)
    return FeeSchedule(default, by_model)


async def change(connection: Any, *, model: str | None, rates: Rates, changed_by: str) -> None:
    """Append new rates of a model (None: the default). The next quote uses them."""
    for rate in fields(rates):
        value = getattr(rates, rate.name)
        if not 0 <= value <= _HIGHEST_MSAT:
            raise BadAmount(f"{rate.name} must lie between 0 and {_HIGHEST_MSAT}")
    await _append(connection, model, rates, False, changed_by)


async def remove(connection: Any, *, model: str, changed_by: str) -> bool:
    """Return a model to the default rates. False when it had none of its own."""
    schedule = await load(connection)
    if model not in schedule.by_model:
        return False
    await _append(connection, model, schedule.by_model[model], True, changed_by)
    return True


async def history(connection: Any, *, model: str | None, limit: int = 100) -> list[FeeChange]:
    """Changes of one model (None: the default), newest first."""
    rows = await connection.fetch(
        "select * from fee_changes where model is not distinct from $1 order by id desc limit $2",
        model,
        limit,
    )
    return [
        FeeChange(
            row["model"],
            None if row["removed"] else _rates(row),
            row["changed_at"],
            row["changed_by"],
        )
        for row in rows
    ]


async def _append(
    connection: Any, model: str | None, rates: Rates, removed: bool, changed_by: str
) -> None:
    names = [rate.name for rate in fields(rates)]
    await connection.execute(
        f"insert into fee_changes (model, removed, changed_by, {', '.join(names)})"
        " values ($1, $2, $3, $4, $5, $6, $7, $8)",
        model,
        removed,
        changed_by,
        *(getattr(rates, name) for name in names),
    )


def _rates(row: Any) -> Rates:
    return Rates(**{rate.name: row[rate.name] for rate in fields(Rates)})
