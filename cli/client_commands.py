"""`satherd prompt`, `quote`, `balance`, `pay`: hands over to the client's commands."""

from __future__ import annotations

from collections.abc import Sequence

from cli.prompting import app


def run(arguments: Sequence[str]) -> int:
    """Run one of them; the exit status comes as SystemExit from the command itself."""
    app(args=list(arguments), prog_name="satherd")
    return 0
