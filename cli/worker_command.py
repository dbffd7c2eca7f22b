"""`satherd worker` and `satherd install-engine`."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Sequence

from cli.settings_flags import BadSettings, complain, read_settings
from worker import llama_install
from worker.errors import WorkerError
from worker.main import run_worker
from worker.settings import WorkerSettings


def run(arguments: Sequence[str]) -> int:
    """`worker [FLAGS]` or `install-engine [FLAGS]`; returns the exit status."""
    if arguments[0] == "install-engine":
        return llama_install.main(arguments[1:])
    try:
        settings = read_settings(WorkerSettings, arguments[1:], prog="satherd worker")
    except BadSettings as error:
        return complain(error)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    # One line for every request to a remote engine is too much, and its URL may hold a secret.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        asyncio.run(run_worker(settings))
    except WorkerError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0
