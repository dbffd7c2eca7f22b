"""`satherd worker` and `satherd install-engine`."""

from __future__ import annotations

from collections.abc import Sequence

from cli.settings_flags import BadSettings, complain, read_settings
from worker import llama_install
from worker.main import serve
from worker.settings import WorkerSettings


def run(arguments: Sequence[str]) -> int:
    """`worker [FLAGS]` or `install-engine [FLAGS]`; returns the exit status."""
    if arguments[0] == "install-engine":
        return llama_install.main(arguments[1:])
    try:
        settings = read_settings(WorkerSettings, arguments[1:], prog="satherd worker")
    except BadSettings as error:
        return complain(error)
    return serve(settings)
