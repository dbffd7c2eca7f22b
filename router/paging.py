"""Cursors of lists that are read newest first: the place of the last row that was shown."""

from __future__ import annotations

import base64
import binascii
from datetime import datetime

from router.errors import BadRequest

# Later than any row: the first page starts here.
START = (datetime.fromisoformat("9999-12-31T00:00:00+00:00"), "")


def write_cursor(at: datetime, row_id: str) -> str:
    """An opaque text for the place after a row."""
    text = f"{at.isoformat()} {row_id}"
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def read_cursor(cursor: str | None) -> tuple[datetime, str]:
    """The place to go on from; None is the start. Raises BadRequest."""
    if cursor is None:
        return START
    try:
        text = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode()
        at, _, row_id = text.partition(" ")
        moment = datetime.fromisoformat(at)
    except (ValueError, binascii.Error):
        raise BadRequest("this is not a cursor of this list", param="cursor") from None
    if moment.tzinfo is None or "\0" in row_id:
        raise BadRequest("this is not a cursor of this list", param="cursor")
    return moment, row_id
