"""Makes docs/settings.md from the code: `python -m cli.settings_page > docs/settings.md`."""

from __future__ import annotations

from cli.one_machine import UpSettings
from cli.settings_table import Row, rows
from router.settings import Settings
from worker.settings import WorkerSettings


def as_markdown() -> str:
    """docs/settings.md."""
    router = rows(Settings)
    known = {row.name: row for row in router}
    up = [row for row in rows(UpSettings) if known.get(row.name) != row]
    parts = [
        "# Settings",
        "Made from the code by `python -m cli.settings_page`; `satherd router --help` shows the"
        " same.\nA setting comes from a flag (`--data-dir`), from the environment"
        " (`SATHERD_DATA_DIR`), or from a\nfile `.env` in the working directory, in this order."
        " A wrong value ends the start with exit status 78\nand a line that names it.",
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


if __name__ == "__main__":
    print(as_markdown(), end="")
