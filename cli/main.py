"""The `satherd` command: a thin table of subcommands, each imported only when it is asked for.

A worker with a remote engine needs neither FastAPI nor PostgreSQL, so nothing of a router is
imported before a command of the router is named.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from rich.console import Console
from rich.table import Table

# command -> (module with `run(arguments) -> exit status`, what it does)
COMMANDS: dict[str, tuple[str, str]] = {
    "up": ("cli.up", "Everything on one machine: router, database, simulated Lightning, worker."),
    "demo": (
        "cli.demo",
        "The whole paid story once, as a client sees it; exit status 0 if it held.",
    ),
    "prompt": ("cli.client_commands", "Buy an answer; tokens appear as they come."),
    "quote": ("cli.client_commands", "What a prompt would cost, and its place in the queue."),
    "balance": ("cli.client_commands", "Prepaid keys: show, top up, further keys, withdraw."),
    "receipt": ("cli.receipt", "`receipt verify` checks what a router has signed about a job."),
    "pay": ("cli.client_commands", "Pay an invoice with simulated money; prints the preimage."),
    "router": ("cli.serving", "A router alone, for several machines."),
    "worker": ("cli.worker_command", "A worker that serves a model and earns."),
    "install-engine": ("cli.worker_command", "Build llama.cpp for this machine (once)."),
    "admin": ("cli.admin", "Fees, settings, workers, jobs, payouts of a router."),
    "ledger": ("cli.ledger", "`ledger check` proves the books of a router's database."),
    "lightning": ("cli.lightning", "`lightning check` says whether the Lightning node will do."),
    "migrate": ("cli.serving", "Bring the database's tables up to date."),
    "simulated-lightning": ("cli.serving", "A simulated Lightning network alone (no real money)."),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help", "help"):
        overview()
        return 0
    if given[0] in ("-V", "--version"):
        print(f"satherd {installed_version()}")
        return 0
    known = COMMANDS.get(given[0])
    if known is None:
        print(f"error: there is no command {given[0]!r}; see `satherd --help`", file=sys.stderr)
        return 2
    try:
        module = import_module(known[0])
    except ModuleNotFoundError as error:
        extra = "worker" if error.name == "llama_cpp" else "router"
        print(
            f"error: `satherd {given[0]}` needs {error.name}, which is not installed:"
            f" pip install 'satherd[{extra}]'",
            file=sys.stderr,
        )
        return 1
    return module.run(given)


def overview() -> None:
    """What there is, on standard output."""
    table = Table.grid(padding=(0, 2))
    for name, (_, words) in COMMANDS.items():
        table.add_row(f"  [bold]{name}[/bold]", words)
    console = Console(highlight=False)
    console.print("Satherd: a Lightning-paid marketplace for LLM inference.\n")
    console.print("usage: satherd COMMAND [OPTIONS]      satherd COMMAND --help\n", markup=False)
    console.print(table)
    console.print(
        "\nSettings come from flags, from SATHERD_… in the environment, or from a file .env;"
        "\n`satherd router --help` and `satherd worker --help` list them."
    )


def installed_version() -> str:
    try:
        return version("satherd")
    except PackageNotFoundError:
        return "0"


if __name__ == "__main__":
    sys.exit(main())
