"""Server-sent events from bytes, however they are cut. Pure; after the HTML standard, section 9.2.

    parser = EventParser()
    for event in parser.feed(data): ...

Comments are counted, not returned: they only keep the line open. An event that was not ended by an
empty line is dropped, as the standard asks: after a lost connection it comes again.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ServerEvent:
    """One event. `id` is the last id seen so far, "" when the stream has none."""

    event: str
    data: str
    id: str = ""

    def json(self) -> dict[str, Any]:
        """The data as an object. Raises ValueError when it is anything else."""
        value = json.loads(self.data)
        if not isinstance(value, dict):
            raise ValueError(f"an event's data is a JSON object, not {type(value).__name__}")
        return value


class EventParser:
    """Feed it bytes, take events. Lines end in LF, CRLF or CR; text is UTF-8.

    `retry_ms` is the reconnection time that the server asked for last, None when it did not.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._pending = ""
        self._at_start = True
        self._event = ""
        self._data: list[str] = []
        self.last_id = ""
        self.retry_ms: int | None = None
        self.comments = 0

    def feed(self, data: bytes) -> Iterator[ServerEvent]:
        """The events that these bytes complete."""
        text = self._pending + self._decoder.decode(data)
        if self._at_start and text:
            text = text.removeprefix("\ufeff")
            self._at_start = False
        # A CR at the end may be the first half of a CRLF; it is kept until more is known.
        held = "\r" if text.endswith("\r") else ""
        lines = text.removesuffix(held).replace("\r\n", "\n").replace("\r", "\n").split("\n")
        self._pending = lines.pop() + held
        for line in lines:
            if event := self._take(line):
                yield event

    def _take(self, line: str) -> ServerEvent | None:
        if not line:
            return self._dispatch()
        if line.startswith(":"):
            self.comments += 1
            return None
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "data":
            self._data.append(value)
        elif field == "event":
            self._event = value
        elif field == "id" and "\0" not in value:
            self.last_id = value
        elif field == "retry" and value.isascii() and value.isdigit():
            self.retry_ms = int(value)
        return None

    def _dispatch(self) -> ServerEvent | None:
        event, data = self._event or "message", self._data
        self._event, self._data = "", []
        return ServerEvent(event, "\n".join(data), self.last_id) if data else None
