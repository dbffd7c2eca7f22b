"""The admin API from the command line: where it is, with which token, and how answers are shown."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cli.router_location import data_dir, find_router_url

TIMEOUT_S = 30.0
# Ids must not be cut where the output goes to a file or another program.
PIPE_WIDTH = 240

stderr = Console(stderr=True, highlight=False)


def fail(words: str, status: int = 1) -> typer.Exit:
    """Say in one line what is wrong and what to do; raise what this returns."""
    stderr.print(f"error: {words}", markup=False, style="red", soft_wrap=True)
    return typer.Exit(status)


@dataclass(frozen=True, slots=True)
class Access:
    """How one command reaches the router, and whether it prints JSON.

    Nothing is looked for before it is needed: `--help` wants neither a router nor a token.
    """

    router_url: str | None
    token: str | None
    directory: Path | None
    as_json: bool

    def get(self, path: str, **parameters: Any) -> dict[str, Any]:
        """What is at `/admin{path}`. Ends the program with one line when it cannot be had."""
        given = {name: value for name, value in parameters.items() if value is not None}
        return self._ask("GET", path, params=given)

    def put(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return self._ask("PUT", path, json=body)

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        """A change; facts that are None are left out."""
        given = {name: value for name, value in body.items() if value is not None}
        return self._ask("POST", path, json=given)

    def delete(self, path: str) -> dict[str, Any]:
        return self._ask("DELETE", path)

    def show(self, answer: dict[str, Any], *parts: Table | Text | str) -> None:
        """The answer as JSON if that was asked for, else what a person wants to see of it."""
        if self.as_json:
            typer.echo(json.dumps(answer))
            return
        console = screen()
        for part in parts:
            console.print(plain(part) if isinstance(part, str) else part)

    def _ask(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        token = find_token(self.token, data_dir(self.directory))
        url = find_router_url(self.router_url, self.directory)
        try:
            reply = httpx.request(
                method,
                f"{url}/admin{path}",
                headers={"Authorization": f"Bearer {token}"},
                timeout=TIMEOUT_S,
                trust_env=False,
                **options,
            )
            answer = reply.json()
        except httpx.InvalidURL as error:
            raise fail(f"{url} is no router's URL: {error}", 2) from error
        except (httpx.HTTPError, ValueError) as error:
            raise fail(
                f"no router answers at {url}: start one with `satherd up`, or name it with"
                " --router-url"
            ) from error
        if reply.is_success and isinstance(answer, dict):
            return answer
        raise fail(_words(reply.status_code, answer))


def _words(status: int, answer: Any) -> str:
    error = answer.get("error") if isinstance(answer, dict) else None
    if not isinstance(error, dict):
        return f"this is no Satherd router, or an older one: it answered {status}"
    words = f"{error.get('message')} [{error.get('code')}]"
    if status == 401:
        words += "; give the router's SATHERD_ADMIN_TOKEN by --token, or --data-dir of `satherd up`"
    return words


def find_token(given: str | None, directory: Path) -> str:
    """`--token`, SATHERD_ADMIN_TOKEN, or the file that `satherd up` keeps in its data directory."""
    token = given or os.environ.get("SATHERD_ADMIN_TOKEN")
    if token:
        return token
    path = directory / "admin_token"
    try:
        return path.read_text().strip()
    except OSError as error:
        raise fail(
            "no admin token: give --token or SATHERD_ADMIN_TOKEN, or --data-dir of a `satherd up`"
            f" ({path}: {error.strerror})",
            2,
        ) from error


def screen() -> Console:
    """Standard output, wide enough for ids when nobody is watching."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PIPE_WIDTH)


def table(title: str | None, heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    """A table of plain values; None is shown as nothing, numbers stand right."""
    listed = [list(row) for row in rows]
    made = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for column, head in enumerate(heads):
        numbers = [row[column] for row in listed if row[column] is not None]
        right = bool(numbers) and all(isinstance(value, int | float) for value in numbers)
        made.add_column(head, justify="right" if right else "left", overflow="fold")
    for row in listed:
        made.add_row(*(plain("" if value is None else str(value)) for value in row))
    return made


def plain(text: str) -> Text:
    """A text as it is: strangers name workers and models, and their names may hold rich's markup, or
    codes that steer a terminal."""
    return Text("".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text))


def segment(text: str) -> str:
    """An id or a model's name as a part of a path."""
    return quote(text, safe="")
