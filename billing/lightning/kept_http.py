"""HTTP/1.1 to one address over connections that are kept: what a call to a Lightning node needs.

    idle ── request ──▶ busy ── the whole answer ──▶ idle ── IDLE_S ──▶ closed
                          └── anything else ───────▶ closed

httpx does the same, and much else, in 0.7 to 1 ms of the router's time; each paid request makes such a
call. No retries, no redirects, no cookies, no proxies, no compression. What a server may have us keep
in memory is limited: for one answer, and for all that are on their way.
"""

from __future__ import annotations

import asyncio
import logging
import select
import socket
import ssl
from collections.abc import Mapping
from typing import Any, cast

import httptools
import httpx

from billing.lightning.bounded_answer import MOST_ANSWER_BYTES, TooLong
from billing.public_tls import public_tls

log = logging.getLogger(__name__)

# Less than a node keeps an idle connection, so that no request meets a closing one.
IDLE_S = 20.0
IDLE_MOST = 64
# Of an answer without its body, and of all bodies that are on their way together.
MOST_HEAD_BYTES = 64 << 10
MOST_BYTES_AT_ONCE = 4 * MOST_ANSWER_BYTES


class NotSent(Exception):
    """Nothing of the request has left: no connection, and none to be had."""


class NoAnswer(Exception):
    """The request has left, or begun to, and no whole answer came."""


class KeptHttp:
    """An address and the connections to it. `most` at a time; whoever wants another one waits."""

    def __init__(
        self,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        tls: ssl.SSLContext | None = None,
        connect_timeout_s: float,
        most: int,
    ) -> None:
        parsed = httpx.URL(url)
        self._secure = parsed.scheme == "https"
        self._host = parsed.raw_host.decode("ascii")
        self._port = parsed.port or (443 if self._secure else 80)
        self._prefix = parsed.path.rstrip("/")
        self._tls = (tls or public_tls()) if self._secure else None
        self._connect_timeout_s = connect_timeout_s
        self._room = asyncio.Semaphore(most)
        self._idle: list[_Connection] = []
        self._busy: set[_Connection] = set()
        self._taken = _Taken()
        lines = {"Host": parsed.netloc.decode("ascii"), "Accept": "*/*", **(headers or {})}
        self._head = "".join(f"{name}: {_one_line(value)}\r\n" for name, value in lines.items())

    async def request(
        self,
        method: str,
        path: str,
        *,
        body: bytes = b"",
        content_type: str = "application/json",
        read_timeout_s: float,
    ) -> tuple[int, bytes]:
        """Status and body of one answer. Raises NotSent, and NoAnswer, also when nothing more came for
        `read_timeout_s`, or too much came."""
        head = f"{method} {_one_line(self._prefix + path)} HTTP/1.1\r\n{self._head}"
        if body:
            head += f"Content-Type: {content_type}\r\n"
        if body or method not in ("GET", "DELETE"):
            head += f"Content-Length: {len(body)}\r\n"
        request = head.encode("latin-1") + b"\r\n" + body
        await self._wait_for_room()
        try:
            connection = self._take_idle() or await self._connect()
            self._busy.add(connection)
            try:
                status, answer = await connection.ask(request, read_timeout_s)
            finally:
                self._busy.discard(connection)
                self._keep(connection)
        finally:
            self._room.release()
        log.debug("%s %s%s: %d", method, self._host, path.partition("?")[0], status)
        return status, answer

    async def aclose(self) -> None:
        for connection in [*self._idle, *self._busy]:
            connection.abort()
        self._idle.clear()

    async def _wait_for_room(self) -> None:
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                await self._room.acquire()
        except TimeoutError:
            raise NotSent("PoolTimeout") from None

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        until = loop.time() + self._connect_timeout_s
        why: Exception | None = None
        try:
            async with asyncio.timeout_at(until):
                found = await loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
            addresses = list(dict.fromkeys(found))
            # Of several that a name has, one may swallow whatever is sent there: the others have their
            # share of the time.
            for left, address in zip(range(len(addresses), 0, -1), addresses, strict=True):
                now = loop.time()
                try:
                    async with asyncio.timeout_at(now + (until - now) / left):
                        return await self._connect_to(address[4][0])
                except OSError as error:  # TimeoutError is one
                    why = error
        except OSError as error:
            why = error
        if isinstance(why, TimeoutError):
            raise NotSent("ConnectTimeout") from None
        raise NotSent(f"ConnectError: {why}") from None

    async def _connect_to(self, address: str | int) -> _Connection:
        _, connection = await asyncio.get_running_loop().create_connection(
            lambda: _Connection(self._taken),
            str(address),
            self._port,
            ssl=self._tls,
            server_hostname=self._host if self._secure else None,
        )
        return connection

    def _take_idle(self) -> _Connection | None:
        """The one that was used last; the others may grow old."""
        while self._idle:
            connection = self._idle.pop()
            if connection.usable and connection.quiet_s < IDLE_S and not connection.was_closed():
                return connection
            connection.abort()
        return None

    def _keep(self, connection: _Connection) -> None:
        if connection.usable:
            self._idle.append(connection)
        else:
            connection.abort()
        while self._idle and (
            len(self._idle) > IDLE_MOST
            or not self._idle[0].usable
            or self._idle[0].quiet_s >= IDLE_S
        ):
            self._idle.pop(0).abort()


class _Taken:
    """The bytes of all answers that are on their way from one address."""

    def __init__(self) -> None:
        self.bytes = 0


class _Connection(asyncio.Protocol):
    """One connection, with at most one request under way."""

    def __init__(self, taken: _Taken) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None
        self._parser: Any = None
        # In one piece: a server may send a body in millions of parts.
        self._body = bytearray()
        self._taken = taken
        self._came_bytes = 0
        self._headed = self._measured = False
        self._heard_at = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self.usable = True

    @property
    def quiet_s(self) -> float:
        return self._loop.time() - self._heard_at

    def was_closed(self) -> bool:
        """Whether its end lies in the socket, and the loop has only not come to it yet."""
        assert self._transport is not None
        end: Any = self._transport.get_extra_info("socket")
        # A TLS connection that has lost its socket says so a turn of the loop later.
        if self._transport.is_closing() or end is None or end.fileno() < 0:
            return True
        look = select.poll()
        look.register(end.fileno(), select.POLLIN)
        return bool(look.poll(0))

    async def ask(self, request: bytes, read_timeout_s: float) -> tuple[int, bytes]:
        assert self._transport is not None and self._answer is None
        self._answer = self._loop.create_future()
        self._parser = httptools.HttpResponseParser(self)
        self._headed = self._measured = False
        # Not usable again before the answer is whole, whatever becomes of the caller.
        self.usable = False
        self._heard_at = self._loop.time()
        self._timer = self._loop.call_later(read_timeout_s, self._look_at_time, read_timeout_s)
        self._transport.write(request)
        try:
            return await self._answer
        finally:
            self._timer.cancel()
            self._answer = None
            self._taken.bytes -= self._came_bytes
            self._came_bytes = 0
            self._body = bytearray()

    def abort(self) -> None:
        self.usable = False
        if self._transport is not None:
            self._transport.abort()

    def _look_at_time(self, read_timeout_s: float) -> None:
        left_s = read_timeout_s - self.quiet_s
        if left_s <= 0:
            self._fail("ReadTimeout")
        else:
            self._timer = self._loop.call_later(left_s, self._look_at_time, read_timeout_s)

    def _fail(self, why: str) -> None:
        self.abort()
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(NoAnswer(why))

    def _finish(self, *, usable: bool) -> None:
        if self._answer is not None and not self._answer.done():
            self.usable = usable
            self._answer.set_result((self._parser.get_status_code(), bytes(self._body)))

    # What the transport says.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not asserted: uvloop's transports are none of asyncio's classes.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._heard_at = self._loop.time()
        if self._answer is None or self._answer.done():
            self.abort()  # nobody has asked for this
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(type(error).__name__)
        else:
            self._limit(len(data))

    def _limit(self, more_bytes: int) -> None:
        if self._answer is None or self._answer.done():
            return
        self._came_bytes += more_bytes
        self._taken.bytes += more_bytes
        most = MOST_ANSWER_BYTES if self._headed else MOST_HEAD_BYTES
        if self._came_bytes > most:
            self._fail(f"AnswerTooLong: {TooLong(most)}")
        elif self._taken.bytes > MOST_BYTES_AT_ONCE:
            self._fail(f"AnswerTooLong: {TooLong(MOST_BYTES_AT_ONCE)} in all answers together")

    def eof_received(self) -> None:
        # A body that says nothing of its length ends here.
        if self._headed and not self._measured:
            self._finish(usable=False)

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail("ReadError" if exc else "RemoteProtocolError")

    # What the parser says.

    def on_message_begin(self) -> None:
        if self._answer is None or self._answer.done():
            self.abort()  # a second answer, right behind the first
        self._measured = False  # of an interim answer it is said, too

    def on_header(self, name: bytes, value: bytes) -> None:
        self._measured |= name.lower() in (b"content-length", b"transfer-encoding")

    def on_headers_complete(self) -> None:
        # Before it there may be interim answers (100, 103).
        self._headed = self._parser.get_status_code() >= 200

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        if self._headed:
            self._finish(usable=self._parser.should_keep_alive())


def _one_line(text: str) -> str:
    if any(char in text for char in "\r\n\0"):
        raise ValueError("a line of a request holds a line break")
    return text
