"""Structured logs: one line an event, `key=value` at its end or JSON, never a secret or a prompt.

Messages are written by us and carry ids and counts. A last filter blacks out whatever looks like a
credential all the same, in case a library quotes a request.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog

_SECRETS = re.compile(
    r"sk-[A-Za-z0-9_-]{16,}"  # prepaid keys
    r"|jt-[0-9a-f]{20,}"  # job tokens
    r"|(?i:(?:L402|LSAT|Bearer|Basic)\s+)[A-Za-z0-9+/_=:.-]{8,}"
    r"|(?i:(?:preimage|macaroon|worker_key|admin_token|password)\W{1,4})[A-Za-z0-9+/_=-]{8,}"
)
HIDDEN = "[hidden]"


def hide_secrets(
    _logger: Any, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """A structlog processor that blacks out credentials in every text of an event."""
    for key, value in event.items():
        if isinstance(value, str):
            event[key] = _SECRETS.sub(HIDDEN, value)
    return event


def set_up(log_format: str, level: int = logging.INFO) -> None:
    """Send all logs to standard error in one form. Call once, before anything is logged."""
    shared: list[Any] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        hide_secrets,
    ]
    renderer = (
        structlog.processors.JSONRenderer()
        if log_format == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=0)
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    # Requests of our own HTTP clients name outside addresses with their queries.
    for noisy in ("httpx", "httpcore", "uvicorn.access", "alembic", "websockets"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
