"""Settings as a table, with what each means: for `--help`, and for docs/settings.md."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import SecretStr
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings
from rich.console import Console
from rich.markup import escape
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Row:
    """One setting. `values` is what may be given, `default` what counts where nothing is."""

    name: str
    values: str
    default: str
    meaning: str

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return "SATHERD_" + self.name.upper()


def rows(shape: type[BaseSettings]) -> list[Row]:
    """The settings of a shape, in its order."""
    return [
        Row(name, _values(field.annotation), _default(field), field.description or "")
        for name, field in shape.model_fields.items()
    ]


def print_help(shape: type[BaseSettings], prog: str) -> None:
    """What `--help` shows of a command that is told by settings."""
    console = Console(highlight=False)
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column()
    for row in rows(shape):
        default = f" [dim](default: {escape(row.default)})[/dim]" if row.default else ""
        table.add_row(
            f"  [bold]{row.flag}[/bold]",
            f"[dim]{escape(row.values)}[/dim] {escape(row.meaning)}{default}",
        )
    table.add_row("  [bold]--help[/bold]", "Show this and exit.")
    console.print(f"usage: {prog} [FLAGS]\n", markup=False)
    console.print(f"{(shape.__doc__ or '').splitlines()[0]}\n", markup=False)
    console.print(table)
    console.print(
        "\nEach flag is also a variable, in the environment or in a file .env: --data-dir is"
        " SATHERD_DATA_DIR."
    )


def _values(annotation: Any) -> str:
    if get_origin(annotation) in (Union, UnionType):
        shown = [_values(part) for part in get_args(annotation) if part is not type(None)]
        return "|".join(shown)
    if get_origin(annotation) is Literal:
        return "|".join(str(value) for value in get_args(annotation))
    if isinstance(annotation, type) and issubclass(annotation, StrEnum):
        return "|".join(member.value for member in annotation)
    if annotation is bool:
        return "true|false"
    names = {int: "NUMBER", float: "NUMBER", str: "TEXT", SecretStr: "SECRET"}
    return names.get(annotation, "JSON" if get_origin(annotation) is dict else "PATH")


def _default(field: FieldInfo) -> str:
    """What a reader should know of it; what is worked out at the start is in the meaning."""
    if field.default_factory is not None:
        return "~/.satherd" if _values(field.annotation) == "PATH" else ""
    value = field.default
    if value is None or value == "" or isinstance(value, SecretStr):
        return ""
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)
