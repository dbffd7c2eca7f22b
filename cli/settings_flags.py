"""Settings from flags of the same name, over those of the environment and `.env`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TypeVar

from pydantic import ValidationError
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsError

from cli.settings_table import print_help

S = TypeVar("S", bound=BaseSettings)

WRONG_COMMAND_LINE = 2


class BadSettings(Exception):
    """The settings cannot be used; the message has a line for each mistake."""


def read_settings(shape: type[S], arguments: Sequence[str], *, prog: str) -> S:
    """Read settings; `--help` prints them all and exits. Raises BadSettings.

    A flag that there is not ends the program with exit status 2.
    """
    if "--help" in arguments or "-h" in arguments:
        print_help(shape, prog)
        raise SystemExit(0)
    try:
        source: CliSettingsSource[list[str]] = CliSettingsSource(
            shape,
            cli_parse_args=list(arguments),
            cli_prog_name=prog,
            cli_kebab_case=True,
            cli_hide_none_type=True,
            cli_avoid_json=True,
            cli_exit_on_error=False,
        )
    except SettingsError as error:
        words = str(error).removeprefix("error parsing CLI: ")
        print(f"error: {words}; see `{prog} --help`", file=sys.stderr)
        raise SystemExit(WRONG_COMMAND_LINE) from None
    try:
        return shape(_cli_settings_source=source)  # pyright: ignore[reportCallIssue]
    except ValidationError as error:
        lines = []
        for mistake in error.errors(include_url=False, include_input=False):
            name = "_".join(str(part) for part in mistake["loc"]).upper()
            words = mistake["msg"].removeprefix("Value error, ")
            lines.append(f"SATHERD_{name}: {words}" if name else words)
        raise BadSettings("\n".join(lines)) from None
    except SettingsError as error:
        raise BadSettings(str(error)) from None


def complain(error: Exception) -> int:
    """Say what is wrong with the settings; the exit status for it (sysexits.h, EX_CONFIG)."""
    for line in str(error).splitlines():
        print(f"error: {line}", file=sys.stderr)
    return 78
