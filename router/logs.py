"""Structured logs: one line an event, `key=value` at its end or JSON, never a secret or a prompt.

Messages are written by us and carry ids and counts. Of an exception its kind and its path through the
code are kept, not its words: libraries quote in them what they were given, prompts and rows included.
A last filter blacks out whatever looks like a credential all the same.
"""

from __future__ import annotations

import asyncio
import logging
import re
import sys
import traceback
from collections.abc import Callable, Iterator, MutableMapping
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

import orjson
import structlog

_SECRETS = re.compile(
    r"sk-[A-Za-z0-9_-]{16,}"  # prepaid keys
    r"|jt-[0-9a-f]{20,}"  # job tokens
    r"|(?i:(?:L402|LSAT|Bearer|Basic)\s+)[A-Za-z0-9+/_=:.-]{8,}"
    r"|(?i:(?:preimage|macaroon|worker_key|admin_token|password)\W{1,4})[A-Za-z0-9+/_=-]{8,}"
)
# What each of them begins with: looking for these first is ten times cheaper, and lines are many.
_SIGNS = ("sk-", "jt-", "l402", "lsat", "bearer", "basic", "preimage", "macaroon", "worker_key")
_SIGNS += ("admin_token", "password")
HIDDEN = "[hidden]"
FILE_BYTES = 10_000_000


def hidden(text: str) -> str:
    """The text with whatever looks like a credential blacked out."""
    lower = text.lower()
    return _SECRETS.sub(HIDDEN, text) if any(sign in lower for sign in _SIGNS) else text


def hide_secrets(
    _logger: Any, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """A structlog processor that blacks out credentials in every text of an event."""
    for key, value in event.items():
        if isinstance(value, str):
            event[key] = hidden(value)
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
    screen.setFormatter(formatter(log_format, colors=sys.stderr.isatty()))
    handlers: list[logging.Handler] = [screen]
    if file is not None:
        kept = RotatingFileHandler(file, maxBytes=FILE_BYTES, backupCount=2)
        kept.setFormatter(formatter(log_format, colors=False))
        handlers.append(kept)
    root = logging.getLogger()
    root.handlers[:] = handlers
    root.setLevel(logging.INFO)
    # Where a line was written and by which thread is in none of them, and half of a line's cost.
    logging._srcfile = None  # type: ignore[attr-defined]
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    # Requests of our own HTTP clients name outside addresses with their queries.
    for noisy in ("httpx", "httpcore", "uvicorn", "alembic", "websockets"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("uvicorn.error").addFilter(is_no_cancellation)


def is_no_cancellation(record: logging.LogRecord) -> bool:
    """A filter against tracebacks of requests that are cut off because the router stops, which uvicorn
    takes for faults of the application."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


def formatter(log_format: str, *, colors: bool) -> logging.Formatter:
    """How a handler writes its lines; colours only where a person sits before them."""
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
    whole = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
    )
    if colors:
        return whole
    return PlainLines(whole, line=json_line if log_format == "json" else text_line)


class PlainLines(logging.Formatter):
    """The lines that structlog's renderers would write, for a fifth of the time.

    A line for each job is nearly all that a busy router writes. What is not plain, because it carries
    an exception, goes to the `whole` formatter.
    """

    def __init__(
        self, whole: logging.Formatter, line: Callable[[logging.LogRecord, str], str]
    ) -> None:
        super().__init__()
        self.whole = whole
        self._line = line

    def format(self, record: logging.LogRecord) -> str:
        if record.exc_info or record.stack_info:
            return self.whole.format(record)
        # Before it is put in JSON, whose quotes would hide a secret from us.
        return self._line(record, hidden(_one_line(record.getMessage())))


def _one_line(message: str) -> str:
    """Without line breaks and other characters that steer: names that strangers give themselves stand
    in some messages, and must not look like lines of ours."""
    return message if message.isprintable() else "".join(map(_visible, message))


def _visible(character: str) -> str:
    return character if character.isprintable() else ascii(character)[1:-1]


def text_line(record: logging.LogRecord, message: str) -> str:
    return f"{_time(record)} [{record.levelname.lower():<9}] {message} [{record.name}]"


def json_line(record: logging.LogRecord, message: str) -> str:
    event = {
        "event": message,
        "level": record.levelname.lower(),
        "logger": record.name,
        "timestamp": _time(record),
    }
    return orjson.dumps(event).decode()


def _time(record: logging.LogRecord) -> str:
    at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds")
    return at.removesuffix("+00:00") + "Z"
