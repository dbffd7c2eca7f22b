"""Calls over kept connections: whole answers, what each failure proves, and who gets a connection."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from billing.lightning import kept_http
from billing.lightning.kept_http import KeptHttp, NoAnswer, NotSent
from billing.lightning.node_http import trusting
from tests.router_rig import PATIENCE_S
from tests.test_node_http import certificate

OK = b"HTTP/1.1 200 OK\r\n"
PLAIN = OK + b"Content-Length: 2\r\n\r\nhi"
Turn = Callable[[asyncio.StreamWriter, int], Awaitable[None]]


class Server:
    """Answers request after request on each connection, by `turn(writer, number)`, until it closes."""

    def __init__(self, turn: Turn) -> None:
        self._turn = turn
        self.heads: list[str] = []
        self.connections = 0
        self.url = ""

    @asynccontextmanager
    async def running(self, *, tls: ssl.SSLContext | None = None) -> AsyncIterator[Server]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=tls)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with server:
            yield self
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while not writer.is_closing():
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                for line in head.lower().split("\r\n"):
                    if line.startswith("content-length:"):
                        await reader.readexactly(int(line.partition(":")[2]))
                self.heads.append(head)
                await self._turn(writer, len(self.heads))
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def serving(
    turn: Turn, *, most: int = 8, connect_timeout_s: float = PATIENCE_S
) -> AsyncIterator[tuple[Server, KeptHttp]]:
    async with Server(turn).running() as server:
        calls = KeptHttp(server.url, connect_timeout_s=connect_timeout_s, most=most)
        try:
            yield server, calls
        finally:
            await calls.aclose()


def saying(*parts: bytes, close: bool = False) -> Turn:
    async def turn(writer: asyncio.StreamWriter, number: int) -> None:
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0.005)
        if close:
            writer.close()

    return turn


async def ask(calls: KeptHttp, *, read_timeout_s: float = PATIENCE_S) -> tuple[int, bytes]:
    return await calls.request("POST", "/pay", body=b"{}", read_timeout_s=read_timeout_s)


@pytest.mark.parametrize(
    "turn",
    [
        saying(PLAIN),
        saying(*(bytes([byte]) for byte in PLAIN)),
        saying(OK + b"Transfer-Encoding: chunked\r\n\r\n1\r\nh\r\n", b"1\r\ni\r\n0\r\n\r\n"),
        saying(b"HTTP/1.1 100 Continue\r\n\r\n" + PLAIN),
        saying(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n", PLAIN),
        saying(OK + b"Connection: close\r\nContent-Length: 2\r\n\r\nhi", close=True),
        saying(OK + b"\r\nh", b"i", close=True),
        saying(b"HTTP/1.1 103 X\r\nContent-Length: 0\r\n\r\n" + OK + b"\r\nhi", close=True),
    ],
    ids=[
        "whole",
        "byte by byte",
        "chunked",
        "continue",
        "hints",
        "close",
        "to the end",
        "hints, to the end",
    ],
)
async def test_an_answer_is_whole_however_it_comes(turn: Turn) -> None:
    async with serving(turn) as (server, calls):
        for number in range(1, 4):
            assert await ask(calls) == (200, b"hi")
            assert len(server.heads) == number


@pytest.mark.parametrize(
    "turn",
    [
        saying(close=True),
        saying(b"HTTP/1.1 200 OK\r\nX-Half: ", close=True),
        saying(b"HTTP/1.1 200 OK\r\n", close=True),
        saying(OK + b"Content-Length: 3\r\n\r\nhi", close=True),
        saying(OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n", close=True),
        saying(b"HTTP/1.1 100 Continue\r\n\r\n", close=True),
        saying(b"220 mail.example ESMTP\r\n"),
        saying(OK + b"Content-Length: 2\r\nContent-Length: 5\r\n\r\nhi"),
        saying(OK + b"Content-Length: 3\r\n\r\nhi"),
        saying(),
    ],
    ids=[
        "nothing",
        "half a head",
        "a head without its end",
        "half a body",
        "half of the chunks",
        "interim only",
        "nonsense",
        "two lengths",
        "a body that stops",
        "silence",
    ],
)
async def test_what_is_not_whole_is_no_answer_and_is_not_asked_again(turn: Turn) -> None:
    async with serving(turn) as (server, calls):
        with pytest.raises(NoAnswer):
            await ask(calls, read_timeout_s=0.2)
        assert len(server.heads) == 1


def without_end(head: bytes, part: bytes) -> Turn:
    async def turn(writer: asyncio.StreamWriter, number: int) -> None:
        writer.write(head)
        while True:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0)

    return turn


@pytest.mark.parametrize(
    "turn, most",
    [
        (without_end(OK + b"\r\n", b"x" * 1000), "300000"),
        (without_end(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"), "300000"),
        (without_end(OK + b"Content-Length: 99999999999\r\n\r\n", b"x" * 1000), "300000"),
        (without_end(OK + b"X-Long: ", b"x" * 1000), "65536"),
        (without_end(OK, b"X-Many: x\r\n"), "65536"),
        (without_end(b"", b"HTTP/1.1 103 Early Hints\r\n\r\n"), "65536"),
    ],
    ids=["to the end", "chunks", "a length", "a header", "headers", "hints"],
)
async def test_an_answer_without_end_is_cut(
    turn: Turn, most: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_http, "MOST_ANSWER_BYTES", 300_000)
    async with serving(turn) as (_, calls):
        for _ in range(2):
            with pytest.raises(NoAnswer, match=f"^AnswerTooLong: over {most} bytes$"):
                await asyncio.wait_for(ask(calls), PATIENCE_S)


async def test_many_long_answers_at_once_are_not_all_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of which would be taken alone."""
    monkeypatch.setattr(kept_http, "MOST_BYTES_AT_ONCE", 2_500_000)
    release = asyncio.Event()

    async def turn(writer: asyncio.StreamWriter, number: int) -> None:
        writer.write(OK + b"Content-Length: 1000001\r\n\r\n" + b"x" * 1_000_000)
        await writer.drain()
        await release.wait()
        writer.write(b"x")

    async with serving(turn) as (_, calls):
        asking = [asyncio.create_task(ask(calls, read_timeout_s=PATIENCE_S)) for _ in range(4)]
        cut, kept = await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
        while len(kept) > 2:
            done, kept = await asyncio.wait(kept, return_when=asyncio.FIRST_COMPLETED)
            cut |= done
        for task in cut:
            assert "in all answers together" in str(task.exception())
        release.set()
        for task in kept:
            assert len((await task)[1]) == 1_000_001
        # And what they took is free again.
        assert len((await ask(calls, read_timeout_s=PATIENCE_S))[1]) == 1_000_001


async def test_a_connection_is_kept_and_used_again() -> None:
    async with serving(saying(PLAIN)) as (server, calls):
        for _ in range(5):
            await ask(calls)
        assert server.connections == 1
        await asyncio.gather(*(ask(calls) for _ in range(3)))
        assert server.connections == 3


async def test_a_connection_that_was_idle_for_long_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with serving(saying(PLAIN)) as (server, calls):
        await ask(calls)
        monkeypatch.setattr(kept_http, "IDLE_S", 0.0)
        await ask(calls)
        assert server.connections == 2


async def test_a_connection_that_was_closed_while_idle_is_not_used() -> None:
    async with serving(saying(PLAIN, close=True)) as (server, calls):
        for _ in range(3):
            assert await ask(calls) == (200, b"hi")
            async with asyncio.timeout(PATIENCE_S):
                while any(kept.usable for kept in calls._idle):
                    await asyncio.sleep(0.005)
        assert server.connections == 3 and len(server.heads) == 3


async def test_a_tls_connection_that_is_just_being_closed_is_not_used(tmp_path: Path) -> None:
    """For one turn of the loop it has no socket any more, and has not said so."""
    trusted, serving_tls = certificate(tmp_path, "ours")
    server = Server(saying(PLAIN, close=True))
    async with server.running(tls=serving_tls):
        url = server.url.replace("http://127.0.0.1", "https://localhost")
        calls = KeptHttp(url, tls=trusting(trusted), connect_timeout_s=2.0, most=1)
        assert await ask(calls) == (200, b"hi")
        (kept,) = calls._idle
        assert kept._transport is not None
        while kept.usable and kept._transport.get_extra_info("socket") is not None:
            await asyncio.sleep(0)
        assert kept.usable
        assert await ask(calls) == (200, b"hi")
        await calls.aclose()
    assert server.connections == 2


async def test_a_connection_that_answers_twice_is_not_used_again() -> None:
    async with serving(saying(PLAIN + PLAIN)) as (server, calls):
        for _ in range(2):
            assert await ask(calls) == (200, b"hi")
        assert server.connections == 2


async def test_of_the_addresses_of_a_name_one_may_be_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """It refuses, or swallows what is sent there: the next one has time left."""
    loop = asyncio.get_running_loop()
    connect = loop.create_connection
    tried: list[str] = []

    async def resolve(host: str, port: int, **_: Any) -> list[Any]:
        assert host == "node.example"
        return [
            (0, 0, 0, "", (address, port)) for address in ("swallows", "127.0.0.2", "127.0.0.1")
        ]

    async def reach(made: Any, host: str, port: int, **options: Any) -> Any:
        tried.append(host)
        if host == "swallows":
            await asyncio.sleep(PATIENCE_S)
        return await connect(made, host, port, **options)

    async with Server(saying(PLAIN)).running() as server:
        url = server.url.replace("127.0.0.1", "node.example")
        calls = KeptHttp(url, connect_timeout_s=6.0, most=1)
        monkeypatch.setattr(loop, "getaddrinfo", resolve)
        monkeypatch.setattr(loop, "create_connection", reach)
        assert await ask(calls) == (200, b"hi")
        assert tried == ["swallows", "127.0.0.2", "127.0.0.1"]
        await calls.aclose()


async def test_an_answer_of_which_something_comes_now_and_then_is_waited_for() -> None:
    async def turn(writer: asyncio.StreamWriter, number: int) -> None:
        writer.write(OK + b"Content-Length: 6\r\n\r\n")
        for _ in range(6):
            await asyncio.sleep(0.5)
            writer.write(b"x")

    async with serving(turn) as (_, calls):
        assert await ask(calls, read_timeout_s=2.0) == (200, b"x" * 6)


async def test_the_answer_of_a_caller_who_has_gone_is_nobody_else_s() -> None:
    has_gone = asyncio.Event()

    async def turn(writer: asyncio.StreamWriter, number: int) -> None:
        if number == 1:
            await has_gone.wait()
        writer.write(OK + b"Content-Length: 1\r\n\r\n%d" % number)

    async with serving(turn) as (server, calls):
        gone = asyncio.create_task(ask(calls))
        while not server.heads:
            await asyncio.sleep(0.01)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        has_gone.set()
        assert await ask(calls) == (200, b"2")
        assert server.connections == 2


async def test_without_room_nothing_is_sent() -> None:
    async with serving(saying(), most=1, connect_timeout_s=0.3) as (server, calls):
        first = asyncio.create_task(ask(calls, read_timeout_s=3.0))
        while not server.heads:
            await asyncio.sleep(0.01)
        with pytest.raises(NotSent):
            await ask(calls)
        with pytest.raises(NoAnswer):
            await first
        assert len(server.heads) == 1
        # The place of one that failed is free again.
        with pytest.raises(NoAnswer):
            await ask(calls, read_timeout_s=0.1)


async def test_where_nobody_listens_nothing_is_sent() -> None:
    calls = KeptHttp("http://127.0.0.1:1", connect_timeout_s=1.0, most=1)
    for _ in range(2):
        with pytest.raises(NotSent):
            await ask(calls)


async def test_what_is_closed_meanwhile_has_no_answer() -> None:
    async with serving(saying()) as (server, calls):
        asked = asyncio.create_task(ask(calls))
        while not server.heads:
            await asyncio.sleep(0.01)
        await calls.aclose()
        with pytest.raises(NoAnswer):
            await asked


async def test_a_request_says_where_it_goes_and_with_what() -> None:
    async with Server(saying(PLAIN)).running() as server:
        calls = KeptHttp(server.url + "/lnd/", headers={"Rune": "r"}, connect_timeout_s=1.0, most=1)
        await calls.request("POST", "/pay", body=b"{}", read_timeout_s=1.0)
        await calls.request("GET", "/info?a=1", read_timeout_s=1.0)
        await calls.aclose()
        paid, asked = ({*head.strip().split("\r\n")} for head in server.heads)
        host = server.url.removeprefix("http://")
        both = {f"Host: {host}", "Accept: */*", "Rune: r"}
        body = {"Content-Type: application/json", "Content-Length: 2"}
        assert paid == {"POST /lnd/pay HTTP/1.1", *both, *body}
        assert asked == {"GET /lnd/info?a=1 HTTP/1.1", *both}


async def test_a_line_of_a_request_is_one_line() -> None:
    with pytest.raises(ValueError, match="line break"):
        KeptHttp("http://node", headers={"Rune": "a\r\nHost: b"}, connect_timeout_s=1.0, most=1)
    calls = KeptHttp("http://127.0.0.1:1", connect_timeout_s=1.0, most=1)
    with pytest.raises(ValueError, match="line break"):
        await calls.request("GET", "/a HTTP/1.1\r\nHost: b", read_timeout_s=1.0)
