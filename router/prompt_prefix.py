"""What a prompt begins with, as a number.

Agents send the same long instructions thousands of times, and conversations come back with what was
said before. A worker that has computed such a beginning need not do it again, so dispatch prefers one
that has met it, where that costs nobody his place.

The number is of text that belongs to a client: it stands in the job's row and is wiped with the prompt.
"""

from __future__ import annotations

import hashlib
from typing import Any

import orjson

from worker.protocol import ChatSpec, CompletionSpec

# Shorter beginnings are read again faster than a copy of them is found.
LEAST_BYTES = 64
# A completion has no parts; what agents have in common is at its beginning.
COMPLETION_BYTES = 512


def prefix_of(spec: Any) -> int | None:
    """A signed 64-bit number for the beginning of a JobSpec's prompt; None: too short to matter.

    Of a chat it is the first message, with the tools that a template writes beside it.
    """
    match spec:
        case ChatSpec():
            first = spec.messages[0] if spec.messages else {}
            beginning = orjson.dumps([first, spec.tools])
        case CompletionSpec(prompt=str(prompt)) if len(prompt) >= COMPLETION_BYTES:
            beginning = prompt[:COMPLETION_BYTES].encode()
        case _:
            return None
    if len(beginning) < LEAST_BYTES:
        return None
    return int.from_bytes(hashlib.blake2b(beginning, digest_size=8).digest(), signed=True)
