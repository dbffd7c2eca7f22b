"""Log lines: one shape whatever writes them, and never a secret."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from router.logs import HIDDEN, PlainLines, formatter

SECRETS = [
    "sk-AbCdEfGhIjKlMnOpQrStUv",
    "jt-0123456789abcdef0123456789abcdef01234567",
    "Authorization: L402 AgEEbHNhdAJCAAD:0123456789abcdef",
    "lsat AgEEbHNhdAJCAAD",
    "BEARER some-token-of-somebody",
    "preimage=00112233445566778899aabbccddeeff",
    '"macaroon": "AgEEbHNhdAJCAAD"',
    "worker_key='0123456789abcdef'",
    "ADMIN_TOKEN: 0123456789abcdef",
    "Password=correct-horse",
]


ROOT = Path(__file__).parent.parent
CUT_OFF = """
import asyncio, logging
from router import logs
logs.set_up("text")
log = logging.getLogger("uvicorn.error")
log.error("first", exc_info=asyncio.CancelledError())
log.error("second", exc_info=ValueError())
log.error("third")
"""


def record(message: str, *args: object, **more: object) -> logging.LogRecord:
    made = logging.LogRecord("router.jobs", logging.INFO, "jobs.py", 1, message, args, None)
    made.__dict__.update(more)
    return made


@pytest.mark.parametrize("log_format", ["text", "json"])
@pytest.mark.parametrize("secret", SECRETS)
def test_a_secret_never_reaches_a_line(log_format: str, secret: str):
    line = formatter(log_format, colors=False).format(record("quoted: %s", secret))
    assert HIDDEN in line
    assert secret.split()[-1].split("=")[-1].strip("'\"") not in line


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_plain_lines_are_those_of_the_whole_formatter(log_format: str):
    plain = formatter(log_format, colors=False)
    assert isinstance(plain, PlainLines)
    made = record("job ended job=%s charged_msat=%d", "abc", 5)
    mine, theirs = plain.format(made), plain.whole.format(made)
    if log_format == "json":
        ours, whole = json.loads(mine), json.loads(theirs)
        assert ours.pop("timestamp")[:14] == whole.pop("timestamp")[:14]
        assert ours == whole
    else:
        assert mine.partition(" ")[2] == theirs.partition(" ")[2]
        assert mine[:14] == theirs[:14] and len(mine) == len(theirs)


def test_an_exception_goes_through_the_whole_formatter():
    words = " ".join(["words", "of", "a", "library"])
    try:
        raise ValueError(words)
    except ValueError:
        made = record("it failed", exc_info=sys.exc_info())
    line = formatter("text", colors=False).format(made)
    assert "it failed" in line and "ValueError" in line and words not in line


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_name_that_a_stranger_gave_makes_no_line_of_its_own(log_format: str):
    name = "m\n2026-01-01T00:00:00Z [info     ] payout paid \x1b[2J\u2028end"
    line = formatter(log_format, colors=False).format(record("worker registered models=%s", name))
    assert line.isprintable()
    assert "payout paid" in line and "end" in line


def test_a_request_that_is_cut_off_by_a_stop_is_no_fault():
    """uvicorn logs it as one of the application."""
    said = subprocess.run(
        [sys.executable, "-c", CUT_OFF], capture_output=True, text=True, check=True, cwd=ROOT
    ).stderr
    assert "CancelledError" not in said and "first" not in said
    assert "second" in said and "ValueError" in said and "third" in said
