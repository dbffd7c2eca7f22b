"""Bytes of tokens into text that may be shown: whole characters, and nothing of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """Feed it the bytes of each token; show what it returns.

    A character may be spread over tokens, and so may a stop string. What may still become part of
    either is held back. Of a stop string nothing is ever returned, nor what comes after it. How the
    bytes are cut into tokens makes no difference to the whole of what is returned.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = [stop for stop in stops if stop]
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped = False

    def feed(self, data: bytes) -> str:
        """The text that became certain by `data`. Nothing once `stopped`."""
        if self.stopped:
            return ""
        return self._pass(self._decoder.decode(data))

    def flush(self) -> str:
        """The rest, when no more bytes come. A character cut off becomes U+FFFD."""
        if self.stopped:
            return ""
        text = self._pass(self._decoder.decode(b"", final=True))
        if self.stopped:
            return text
        text += self._held
        self._held = ""
        return text

    def _pass(self, new: str) -> str:
        if not self._stops:
            return new
        self._held += new
        cut = self._first_stop()
        if cut is not None:
            self.stopped = True
            shown, self._held = self._held[:cut], ""
            return shown
        keep = max(self._tail_of_a_stop(stop) for stop in self._stops)
        split = len(self._held) - keep
        shown, self._held = self._held[:split], self._held[split:]
        return shown

    def _first_stop(self) -> int | None:
        """Where the stop string begins that is complete first; of two such, the longer one."""
        ends = [
            (found + len(stop), found)
            for stop in self._stops
            if (found := self._held.find(stop)) >= 0
        ]
        return min(ends)[1] if ends else None

    def _tail_of_a_stop(self, stop: str) -> int:
        """How many characters at the end of what is held may be the beginning of `stop`."""
        for length in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if self._held.endswith(stop[:length]):
                return length
        return 0
