"""Which router a command talks to: the one named, or the one that `satherd up` runs."""

from __future__ import annotations

import json
import os
from pathlib import Path

DEFAULT_URL = "http://127.0.0.1:8000"


def data_dir(given: Path | None = None) -> Path:
    """`--data-dir`, SATHERD_DATA_DIR, or the user's own."""
    return Path(given or os.environ.get("SATHERD_DATA_DIR") or Path.home() / ".satherd")


def find_router_url(given: str | None, directory: Path | None = None) -> str:
    """The first that is set: `given`, SATHERD_ROUTER_URL, `url` of `up.json`, the default.

    A worker's SATHERD_ROUTER_URL is a WebSocket address (`ws://host/worker`); its router is meant.
    """
    url = given or os.environ.get("SATHERD_ROUTER_URL") or _url_of_up(data_dir(directory))
    url = (url or DEFAULT_URL).rstrip("/")
    if url.startswith(("ws://", "wss://")):
        url = "http" + url.removeprefix("ws").removesuffix("/worker")
    return url


def simulated_url(directory: Path) -> str | None:
    """Where the simulated network of the `satherd up` in that directory listens; None: none runs."""
    return _said_by_up(directory, "lightning")


def _url_of_up(directory: Path) -> str | None:
    return _said_by_up(directory, "url")


def _said_by_up(directory: Path, name: str) -> str | None:
    try:
        running = json.loads((directory / "up.json").read_text())
    except (OSError, ValueError):
        # Not there, not ours to read, or half written by a router that is starting.
        return None
    url = running.get(name) if isinstance(running, dict) else None
    return url if isinstance(url, str) else None
