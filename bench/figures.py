"""What every bench shares: its options, a table for people, JSON for comparisons, percentiles."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console
from rich.table import Table

Row = dict[str, Any]


@dataclass(slots=True)
class Report:
    """The figures of one bench. All rows have the same names; `notes` say how to read them."""

    title: str
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def show(self, console: Console) -> None:
        table = Table(title=self.title, title_justify="left")
        for name in self.rows[0] if self.rows else ():
            table.add_column(name, justify="right")
        for row in self.rows:
            table.add_row(*(_shown(value) for value in row.values()))
        console.print(table)
        for note in self.notes:
            console.print(f"  {note}", highlight=False)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.2f}" if abs(value) < 10 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else "-" if value is None else str(value)


@dataclass(frozen=True, slots=True)
class Options:
    """`seconds` is how long each row is measured; `full` adds what takes minutes."""

    seconds: float = 10.0
    quick: bool = False
    full: bool = False


Measure = Callable[[Options], Awaitable[Sequence[Report]]]


def percentile(values: Sequence[float], share: float) -> float | None:
    """The value that `share` of all values do not exceed; None of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else None


def milliseconds(seconds: float | None) -> float | None:
    """Seconds as milliseconds; None stays None."""
    return None if seconds is None else seconds * 1000


def machine() -> dict[str, Any]:
    """Where and when figures were made."""
    model = "unknown processor"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "processor": model,
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "python_step_ns": round(python_step_ns(), 1),
    }


class _Step:
    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number

    def plus(self, other: int) -> int:
        return self.number + other


def python_step_ns(steps: int = 200_000) -> float:
    """What a fixed bit of Python takes here now: an object, a call, an entry in a dictionary.

    A router's time goes by it. The same machine is faster on one day than on another, and the same
    version of Python by a third where it was built with optimizations.
    """
    best = float("inf")
    for _ in range(5):
        seen: dict[int, int] = {}
        began = time.perf_counter()
        for number in range(steps):
            seen[number & 1023] = _Step(number).plus(1)
        best = min(best, time.perf_counter() - began)
    return best / steps * 1e9


def arguments(description: str | None, given: Sequence[str] | None) -> tuple[Options, Path | None]:
    """The options of the command line, and the file for JSON."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, help="how long each row is measured")
    parser.add_argument("--quick", action="store_true", help="short runs, for a first look")
    parser.add_argument("--full", action="store_true", help="also what takes minutes")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    chosen = parser.parse_args(given)
    seconds = chosen.seconds or (4.0 if chosen.quick else 15.0)
    return Options(seconds, chosen.quick, chosen.full), chosen.json


def run(measure: Measure, description: str | None, given: Sequence[str] | None = None) -> int:
    """A bench as a command: measure, print, write JSON if asked. Returns the exit status."""
    options, json_path = arguments(description, given)
    reports = uvloop.run(_awaited(measure, options))
    console = Console(width=None if sys.stdout.isatty() else 160)
    facts = machine()
    console.print(", ".join(f"{k}={v}" for k, v in facts.items()), highlight=False)
    for report in reports:
        report.show(console)
    if json_path:
        body = {"machine": facts, "reports": [asdict(report) for report in reports]}
        json_path.write_text(json.dumps(body, indent=1) + "\n")
    return 0


async def _awaited(measure: Measure, options: Options) -> Sequence[Report]:
    return await measure(options)
