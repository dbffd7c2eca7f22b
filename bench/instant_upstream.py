"""A model server that takes no time: OpenAI's chat answers, as fast as they are read.

    python -m bench.instant_upstream [--port P] [--step-s S]

What other gateways are put in front of. It prints `ready: URL`. An answer has as many tokens as
`max_tokens` says, each `bench.load.TOKEN` and a word; streamed, all answers advance by one token every
`--step-s`, as continuous batching does, or at once for 0. Written by hand, so that it does not bind.
"""

from __future__ import annotations

import argparse
import asyncio
from typing import Any, cast

import orjson
import uvloop

from bench.load import MODEL, TOKEN

_CHUNK = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"%s",'
    b'"choices":[{"index":0,"delta":%s,"finish_reason":%s}]}\n\n'
)
_SAID = orjson.dumps({"role": "assistant", "content": f"{TOKEN}token"})
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\n%s\r\n\r\n"
_MODELS = orjson.dumps({"object": "list", "data": [{"id": MODEL, "object": "model"}]})


class Steps:
    """The clock of all streamed answers."""

    def __init__(self, step_s: float) -> None:
        self.step_s = step_s
        self.active: dict[Upstream, int] = {}

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        next_at = loop.time()
        while True:
            next_at = max(next_at + self.step_s, loop.time())
            await asyncio.sleep(max(0.0, next_at - loop.time()))
            for answer in list(self.active):
                answer.step()


class Upstream(asyncio.Protocol):
    """One kept-alive connection; requests on it come one after the other."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._steps.active.pop(self, None)

    def data_received(self, data: bytes) -> None:
        self._received += data
        while True:
            head, gap, rest = self._received.partition(b"\r\n\r\n")
            if not gap:
                return
            length = _content_length(head)
            if len(rest) < length:
                return
            self._received = rest[length:]
            self._answer(head, rest[:length])

    def _answer(self, head: bytes, body: bytes) -> None:
        if not head.startswith(b"POST"):
            self._whole(_MODELS)
            return
        asked: dict[str, Any] = orjson.loads(body)
        tokens = asked.get("max_tokens") or 1
        if not asked.get("stream"):
            self._whole(_completion(tokens))
            return
        self._transport.write(_HEAD % (b"text/event-stream", b"Transfer-Encoding: chunked"))
        if self._steps.step_s:
            self._steps.active[self] = tokens
            return
        self._send(_CHUNK % (MODEL.encode(), _SAID, b"null") * tokens)
        self._end()

    def step(self) -> None:
        """One more token of the answer under way."""
        left = self._steps.active[self] = self._steps.active[self] - 1
        self._send(_CHUNK % (MODEL.encode(), _SAID, b"null"))
        if left <= 0:
            del self._steps.active[self]
            self._end()

    def _end(self) -> None:
        self._send(_CHUNK % (MODEL.encode(), b"{}", b'"stop"') + b"data: [DONE]\n\n")
        self._transport.write(b"0\r\n\r\n")

    def _send(self, chunk: bytes) -> None:
        self._transport.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))

    def _whole(self, body: bytes) -> None:
        length = b"Content-Length: %d" % len(body)
        self._transport.write(_HEAD % (b"application/json", length) + body)


def _content_length(head: bytes) -> int:
    at = head.lower().find(b"content-length:")
    return int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0


def _completion(tokens: int) -> bytes:
    message = {"role": "assistant", "content": f"{TOKEN}token" * tokens}
    return orjson.dumps(
        {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1,
            "model": MODEL,
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {
                "prompt_tokens": 500,
                "completion_tokens": tokens,
                "total_tokens": 500 + tokens,
            },
        }
    )


async def _serve(port: int, step_s: float) -> None:
    loop = asyncio.get_running_loop()
    steps = Steps(step_s)
    server = await loop.create_server(lambda: Upstream(steps), "127.0.0.1", port)
    print(f"ready: http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await steps.run() if step_s else await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description="An instant model server.")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--step-s", type=float, default=0.0)
    options = parser.parse_args()
    uvloop.run(_serve(options.port, options.step_s))


if __name__ == "__main__":
    main()
