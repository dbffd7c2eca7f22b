"""Structured logs: one line an event, `key=value` at its end or JSON, never a secret or a prompt.

Messages are written by us and carry ids and counts. Of an exception its kind and its path through the
code are kept, not its words: libraries quote in them what they were given, prompts and rows included.
A last filter blacks out whatever looks like a credential all the same.
"""

from __future__ import annotations

import logging
import re
import sys
import traceback
from collections.abc import Iterator, MutableMapping
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

import structlog

_SECRETS = re.compile(
    r"sk-[A-Za-z0-9_-]{16,}"  # prepaid keys
    r"|jt-[0-9a-f]{20,}"  # job tokens
    r"|(?i:(?:L402|LSAT|Bearer|Basic)\s+)[A-Za-z0-9+/_=:.-]{8,}"
    r"|(?i:(?:preimage|macaroon|worker_key|admin_token|password)\W{1,4})[A-Za-z0-9+/_=-]{8,}"
)
HIDDEN = "[hidden]"
FILE_BYTES = 10_000_000


def hide_secrets(
    _logger: Any, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """A structlog processor that blacks out credentials in every text of an event."""
    for key, value in event.items():
        if isinstance(value, str):
            event[key] = _SECRETS.sub(HIDDEN, value)
    return event


def exception_without_words(
    _logger: Any, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """A structlog processor that puts an exception into an event, but not what it says."""
    given = event.pop("exc_info", None)
    if given is True:
        given = sys.exc_info()
    error = given[1] if isinstance(given, tuple) else given
    if isinstance(error, BaseException):
        event["exception"] = "\n".join(_path_of(error))
    return event


def _path_of(error: BaseException) -> Iterator[str]:
    """Kind and frames of an exception and of what caused it, the first cause first."""
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if before is not None:
        yield from _path_of(before)
        yield "then"
    for inner in error.exceptions if isinstance(error, BaseExceptionGroup) else ():
        yield from _path_of(inner)
        yield "within"
    yield "".join(traceback.format_tb(error.__traceback__)).rstrip()
    named = f"{type(error).__module__}.{type(error).__qualname__}"
    # An errno and what PostgreSQL names a fault by are of our own making.
    facts = [
        (name, getattr(error, name, None)) for name in ("errno", "sqlstate", "constraint_name")
    ]
    yield " ".join([named, *(f"{name}={fact}" for name, fact in facts if fact)])


def set_up(log_format: str, *, file: Path | None = None, screen_level: int = logging.INFO) -> None:
    """Send all logs to standard error in one form, from `screen_level` on; to `file` everything.

    Call once, before anything is logged.
    """
    screen = logging.StreamHandler(sys.stderr)
    screen.setLevel(screen_level)
    screen.setFormatter(_formatter(log_format, colors=sys.stderr.isatty()))
    handlers: list[logging.Handler] = [screen]
    if file is not None:
        kept = RotatingFileHandler(file, maxBytes=FILE_BYTES, backupCount=2)
        kept.setFormatter(_formatter(log_format, colors=False))
        handlers.append(kept)
    root = logging.getLogger()
    root.handlers[:] = handlers
    root.setLevel(logging.INFO)
    # Requests of our own HTTP clients name outside addresses with their queries.
    for noisy in ("httpx", "httpcore", "uvicorn", "alembic", "websockets"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _formatter(log_format: str, *, colors: bool) -> logging.Formatter:
    shared: list[Any] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        exception_without_words,
        hide_secrets,
    ]
    renderer = (
        structlog.processors.JSONRenderer()
        if log_format == "json"
        else structlog.dev.ConsoleRenderer(colors=colors, pad_event_to=0)
    )
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
    )
