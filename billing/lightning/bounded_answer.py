"""Reading a streamed answer within bounds, so that no server fills our memory.

Ask for it with `Accept-Encoding: identity`: it is read as it comes, and one that is compressed all the
same cannot be understood.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx

# The longest answer that is taken whole. A node's lists come in pages or by one payment.
MOST_ANSWER_BYTES = 32 << 20
# A settlement as a line takes a few kilobytes, with all its HTLCs and hops.
MOST_LINE_BYTES = 4 << 20
IDENTITY = {"Accept-Encoding": "identity"}


class TooLong(Exception):
    """More came than any answer has."""

    def __init__(self, most_bytes: int) -> None:
        super().__init__(f"over {most_bytes} bytes")


async def whole(response: httpx.Response) -> bytes:
    """All of an answer. Raises TooLong."""
    said = bytearray()
    async for part in response.aiter_raw():
        said += part
        if len(said) > MOST_ANSWER_BYTES:
            raise TooLong(MOST_ANSWER_BYTES)
    return bytes(said)


async def lines(response: httpx.Response) -> AsyncIterator[bytes]:
    """The lines of an answer that are not empty, as they come. Raises TooLong."""
    rest = bytearray()
    async for part in response.aiter_raw():
        rest += part
        if b"\n" in part:
            *ready, last = rest.split(b"\n")
            for line in ready:
                if stripped := line.strip():
                    yield bytes(stripped)
            rest = last
        if len(rest) > MOST_LINE_BYTES:
            raise TooLong(MOST_LINE_BYTES)
    if stripped := rest.strip():
        yield bytes(stripped)
