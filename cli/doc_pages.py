"""Pages of docs/ that are made from the code: `python -m cli.doc_pages docs` writes them anew."""

from __future__ import annotations

import sys
from pathlib import Path

from cli.one_machine import UpSettings
from cli.settings_table import Row, rows
from router import job_states
from router.api.errors import RETRY_AFTER_S, STATUSES
from router.job_states import FINAL, MOVES
from router.settings import Settings
from worker.settings import WorkerSettings

MADE = "Made from the code by `python -m cli.doc_pages docs`; a test holds it against the code."

# What each state and each event mean; the moves themselves are in `router.job_states`.
STATE_WORDS = {
    "awaiting_payment": "An invoice was made for its quote, and is not paid yet.",
    "queued": "Paid: the fee lies in its escrow, and it waits in its lane.",
    "running": "A worker has it, under a lease that its router renews.",
    "succeeded": "Answered, or ended by length or by a stop string; charged for what was delivered.",
    "failed": "No worker could answer; charged for nothing, or for what had been shown.",
    "cancelled": "By its payer: free while it waited, charged as it stood while it ran.",
    "expired": "Not paid in time, or no worker came in the time it was given; nothing is charged.",
}
EVENT_WORDS = {
    "pay": "the invoice was settled in time",
    "claim": "a router gave it to an idle worker",
    "give_back": "its worker was lost before it showed anything; it keeps its place in the queue",
    "finish": "the worker has ended its answer",
    "fail": "its attempts are used up, or another try would end the same way",
    "cancel": "its payer does not want it any more",
    "expire": "its quote or its waiting time ran out",
}


def job_states_page() -> str:
    """docs/job_states.md."""
    states = [
        f"| `{state}` | {'yes' if state in FINAL else ''} | {STATE_WORDS[state]} |"
        for state in job_states.State
    ]
    events = [
        f"| `{event}` | {', '.join(f'`{state}`' for state in sorted(froms))} | `{to}` |"
        f" {EVENT_WORDS[event]} |"
        for event, (froms, to) in MOVES.items()
    ]
    parts = [
        "# The states of a job",
        f"{MADE}\nThe table is `MOVES` in `router/job_states.py`; what is not in it does not happen:"
        " every statement that\nmoves a job is guarded by it, and a late word of a lost attempt"
        " changes nothing.",
        f"```mermaid\n{job_states.as_mermaid()}\n```",
        "\n".join(["| state | final | meaning |", "| --- | --- | --- |", *states]),
        "\n".join(
            ["| event | may happen in | state after | when |", "| --- | --- | --- | --- |", *events]
        ),
        "The escrow of a job is divided in the transaction that ends it (docs/money.md), so there is"
        " no finished\njob that is not settled.",
    ]
    return "\n\n".join(parts) + "\n"


def errors_page() -> str:
    """docs/errors.md."""
    table = [
        f"| `{code}` | {status} | {RETRY_AFTER_S.get(code, '')} | {meaning} |"
        for code, (status, meaning) in STATUSES.items()
    ]
    parts = [
        "# Errors",
        f"{MADE}\nThe table is `STATUSES` in `router/api/errors.py`; it is also in `/openapi.json`, as"
        " `x-error-codes`.",
        'Our own doors answer `{"error": {"code", "message", …facts}}`. A `code` never changes its'
        " meaning; a message\nis for people and may. The doors of other dialects (OpenAI's, …) render"
        " the same codes in their own shape,\nwith the same status unless their clients expect"
        " another. A 503 and a 429 carry `Retry-After` in seconds.",
        "\n".join(
            ["| code | status | retry after, s | meaning |", "| --- | --- | --- | --- |", *table]
        ),
    ]
    return "\n\n".join(parts) + "\n"


def settings_page() -> str:
    """docs/settings.md."""
    router = rows(Settings)
    known = {row.name: row for row in router}
    up = [row for row in rows(UpSettings) if known.get(row.name) != row]
    parts = [
        "# Settings",
        f"{MADE}\n`satherd up`, `router` and `worker` show the same with `--help`. A setting comes from"
        " a flag (`--data-dir`),\nfrom the environment (`SATHERD_DATA_DIR`), or from a file `.env` in"
        " the working directory, in this order. A\nwrong value ends the start with exit status 78 and"
        " a line that names it.",
        "Amounts are in msat, times in seconds unless the name says otherwise, shares in parts per"
        " million (ppm).",
        "## The router",
        _markdown_table(router),
        "Those that an admin can change while it runs, for all routers on one database, are listed"
        " by\n`satherd admin settings show`; a value set there outranks the environment.",
        "## `satherd up`: the router's settings, but",
        _markdown_table(up),
        "`satherd up` sets `SATHERD_SIMULATED_URL`, `SATHERD_LNURL_ALLOW_PRIVATE` (simulated money"
        " only) and,\nwhere none is given, `SATHERD_ADMIN_TOKEN` (kept in the data directory's"
        " `admin_token`) by itself.",
        "## The worker",
        _markdown_table(rows(WorkerSettings)),
        "## Clients",
        "`satherd prompt`, `quote`, `balance`, `pay`, `admin` find the router by `--router-url`,"
        " else by\n`SATHERD_ROUTER_URL`, else by the `up.json` that `satherd up` keeps in its data"
        " directory while it runs,\nelse at `http://127.0.0.1:8000`. `SATHERD_KEY` is the prepaid"
        " key to pay with.",
    ]
    return "\n\n".join(parts) + "\n"


def _markdown_table(listed: list[Row]) -> str:
    lines = ["| setting | values | default | meaning |", "| --- | --- | --- | --- |"]
    for row in listed:
        default = f"`{row.default}`" if row.default else ""
        values = row.values.replace("|", "\\|")
        lines.append(f"| `{row.variable}` | {values} | {default} | {row.meaning} |")
    return "\n".join(lines)


PAGES = {
    "settings.md": settings_page,
    "job_states.md": job_states_page,
    "errors.md": errors_page,
}


def main(arguments: list[str]) -> int:
    """Write all pages into the folder that is named."""
    folder = Path(arguments[0] if arguments else "docs")
    for name, page in PAGES.items():
        (folder / name).write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
