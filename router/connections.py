"""The connections of uvicorn as a router needs them: patience that ends, and short ways for tokens.

Nearly all that passes is a token: a frame of a worker in, a part of a streamed body out. Each would
wake a task through a queue, and be handed down through the layers around the application; here both
are handed on at once (`router.api.short_ways`).
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import Callable
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.http11 import Request

from router.api.short_ways import FRAMES, LINE, FrameHandler

# Of a request without its body; credentials of several kilobytes fit many times over.
MAX_HEAD_BYTES = 64 << 10
# How long a client may leave a full buffer (64 KiB) unread. What it does not read stays in memory.
SLOW_READER_S = 60.0
# Who has sent so much at once may have sent more: thousands of tokens, and some milliseconds of work.
MUCH_BYTES = 64 << 10

log = logging.getLogger(__name__)


class PatientHttp(HttpToolsProtocol):
    """A connection that is not endlessly patient with its client.

    It refuses a head that does not end: the parser joins its pieces, and copies all of it for each.
    It cuts a client that does not read what it is sent.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_bytes = 0
        self._full: asyncio.TimerHandle | None = None
        self._unfinished: list[RequestResponseCycle] = []

    def pause_writing(self) -> None:
        super().pause_writing()
        self._full = self.loop.call_later(SLOW_READER_S, self._cut)

    def resume_writing(self) -> None:
        self._readable()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._readable()
        super().connection_lost(exc)
        # uvicorn tells only the request that came last, and those before it would go on for nobody.
        for cycle in self._unfinished:
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
                cast(dict[str, Any], cycle.scope)["extensions"][LINE].gone()

    def _readable(self) -> None:
        if self._full is not None:
            self._full.cancel()
            self._full = None

    def _cut(self) -> None:
        # Not closed: that would wait for the client to read the rest.
        log.info("client cut off: it has not read for %.0f s", SLOW_READER_S)
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        self._head_bytes += len(data)
        super().data_received(data)
        if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("The head of the request is too long.")

    def on_headers_complete(self) -> None:
        self._head_bytes = 0
        before = self.cycle
        super().on_headers_complete()
        if self.cycle is not before:
            self._unfinished = [one for one in self._unfinished if not one.response_complete]
            self._unfinished.append(self.cycle)
            scope = cast(dict[str, Any], self.cycle.scope)
            scope.setdefault("extensions", {})[LINE] = DirectConnection(self.cycle)
            self.cycle.transport = cast(asyncio.Transport, HeadWithBody(self.transport, self.loop))
            if scope["http_version"] == "1.0":
                # Now, rather than when it is made: uvicorn makes it, and the task that uses it.
                self.cycle.__class__ = UntilClosed
                self.cycle.waiting_for_100_continue = False

    def on_body(self, body: bytes) -> None:
        self._head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._head_bytes = 0
        super().on_message_complete()


class UntilClosed(RequestResponseCycle):
    """An answer to a client of HTTP/1.0, which knows no chunks and no `100 Continue`: a body whose
    length is not known before is whole when the connection is closed."""

    open_ended = False

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            names = {name.lower() for name, _ in message.get("headers", ())}
            if b"content-length" not in names:
                self.open_ended, self.chunked_encoding = True, False
        elif self.open_ended:
            self.expected_content_length = len(message.get("body", b""))
        await super().send(message)


class HeadWithBody:
    """A transport that sends the head of an answer together with what of its body comes at once.

    uvicorn writes them one after the other, and a write is a system call and a packet. A head that
    nothing follows goes out before the event loop turns to others.
    """

    __slots__ = ("_held", "_loop", "_transport", "_wrote")

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._held = b""
        self._wrote = False

    def write(self, data: bytes) -> None:
        if self._wrote:
            held, self._held = self._held, b""
            self._transport.write(held + data if held else data)
            return
        self._wrote = True
        self._held = data
        self._loop.call_soon(self._let_go)

    def _let_go(self) -> None:
        held, self._held = self._held, b""
        if held:
            self._transport.write(held)

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def close(self) -> None:
        self._let_go()
        self._transport.close()


class DirectConnection:
    """`router.api.short_ways.ClientLine` for one request and its answer.

    Referred to weakly, as the scope that has this is the request's: a cycle would stay in memory,
    with all that was asked, until Python's collector comes.
    """

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = weakref.ref(cycle)
        self._told: Callable[[], None] | None = None

    def on_gone(self, told: Callable[[], None] | None) -> None:
        self._told = told
        cycle = self._cycle()
        if cycle is None or cycle.disconnected:
            asyncio.get_running_loop().call_soon(self.gone)

    def gone(self) -> None:
        """The client has gone before the end of the answer."""
        told, self._told = self._told, None
        if told is not None:
            told()

    def ready(self) -> bool:
        cycle = self._cycle()
        return not (
            cycle is None
            or cycle.flow.write_paused
            or cycle.disconnected
            or cycle.response_complete
            or not cycle.chunked_encoding
            or cycle.transport.is_closing()
        )

    def write(self, body: bytes) -> None:
        if body and (cycle := self._cycle()) is not None:
            cycle.transport.write(b"%x\r\n%b\r\n" % (len(body), body))


class StraightFrames(WebSocketsSansIOProtocol):
    """A WebSocket whose text frames go to a handler as they are read: `short_ways.FrameSource`.

    Without one, and while earlier frames wait to be received, they wait as well.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._handler: FrameHandler | None = None
        self._broke: Exception | None = None
        self._extensions: dict[str, Any] = {}

    def handle_connect(self, event: Request) -> None:
        super().handle_connect(event)
        if not self.close_sent:
            self._extensions = cast(dict[str, Any], self.scope)["extensions"]
            self._extensions[FRAMES] = self

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        # What refers to itself would stay in memory until Python's collector comes.
        self._extensions.pop(FRAMES, None)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if len(data) >= MUCH_BYTES and not self.read_paused:
            # uvloop goes on reading from one that sends without end; now others have their turn.
            self.transport.pause_reading()
            self.loop.call_soon(self._read_on)

    def _read_on(self) -> None:
        if not self.read_paused and not self.transport.is_closing():
            self.transport.resume_reading()

    def hand_to(self, handler: FrameHandler | None) -> None:
        self._handler = handler

    def check(self) -> None:
        if self._broke is not None:
            raise self._broke

    def send_receive_event_to_app(self) -> None:
        frame = self._straight()
        if frame is None or self._handler is None:
            super().send_receive_event_to_app()
            return
        self.frames = []
        try:
            self._handler(frame)
        except Exception as error:
            # Whoever receives is woken, to find what has happened.
            self._handler, self._broke = None, error
            self.queue.put_nowait({"type": "websocket.receive", "text": ""})

    def _straight(self) -> str | None:
        """The frame that has been read, if it may go past those that receive."""
        if self.close_sent or self.curr_msg_data_type != "text" or not self.queue.empty():
            return None
        try:
            return b"".join(self.frames).decode()
        except UnicodeDecodeError:
            return None  # uvicorn closes the connection for it.
