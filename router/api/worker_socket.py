"""`WS /worker`: the door of workers. One text frame registers, the rest is the session's."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import orjson
from fastapi import APIRouter, WebSocket, WebSocketDisconnect

from router.api.short_ways import frame_source
from router.core import Core
from router.database import DatabaseUnavailable
from router.queenbee import is_queenbee
from router.sessions import RefusedWorker
from router.worker_sessions import ProtocolViolation

log = logging.getLogger(__name__)

router = APIRouter()
REGISTRATION_S = 20.0
# Frames with pictures are larger; what a worker says of itself is kept in its record.
REGISTRATION_BYTES = 1 << 20
QUEENBEE_PAUSE_S = 5.0
# RFC 6455 and the IANA registry: policy violation, internal error, try again later.
POLICY, INTERNAL, LATER = 1008, 1011, 1013


class Socket:
    """A FastAPI WebSocket as a session wants it."""

    def __init__(self, socket: WebSocket) -> None:
        self._socket = socket

    async def send_text(self, text: str) -> None:
        await self._socket.send_text(text)

    async def close(self, code: int, reason: str) -> None:
        try:
            await self._socket.close(code, reason[:120])
        except RuntimeError:
            log.debug("the socket was closed already")


@router.websocket("/worker")
async def worker(socket: WebSocket) -> None:
    """One worker, from its registration to the end of its connection."""
    core: Core = socket.app.state.core
    await socket.accept()
    connection = Socket(socket)
    session = None
    # A QueenBee worker would take a word of ours for a job (RC-5).
    silent = False
    try:
        raw = await _first_frame(socket)
        silent = is_queenbee(raw)
        session = await core.gate.register(raw, connection, peer=core.limiter.client(socket))
        await _hand_on(socket, session.on_frame)
    except WebSocketDisconnect:
        pass
    except RefusedWorker as refused:
        log.info("worker refused code=%s", refused.answer.code)
        if not silent:
            await _say(connection, refused)
        elif not core.draining:
            # It would be back at once (QB-P19).
            await asyncio.sleep(QUEENBEE_PAUSE_S)
        await connection.close(LATER if refused.answer.retryable else POLICY, refused.answer.code)
    except ProtocolViolation as violation:
        log.warning("worker broke the protocol: %s", violation)
        await connection.close(POLICY, str(violation))
    except DatabaseUnavailable:
        await connection.close(LATER, "the database is away")
    finally:
        if session is not None:
            core.gate.leave(session)


async def _hand_on(socket: WebSocket, handle: Callable[[str | bytes], None]) -> None:
    """Give all frames to a handler, until it raises or the connection ends."""
    source = frame_source(socket.scope)
    if source is None:
        while True:
            handle(await _receive(socket))
    source.hand_to(handle)
    try:
        while True:
            frame = await _receive(socket)
            source.check()
            handle(frame)
    finally:
        source.hand_to(None)


async def _first_frame(socket: WebSocket) -> Any:
    try:
        async with asyncio.timeout(REGISTRATION_S):
            frame = await _receive(socket)
        if len(frame) > REGISTRATION_BYTES:
            raise RefusedWorker("bad_registration", "the registration is too long")
        return orjson.loads(frame)
    except TimeoutError:
        raise ProtocolViolation("no registration came") from None
    except orjson.JSONDecodeError:
        raise RefusedWorker("bad_registration", "the registration is not JSON") from None


async def _receive(socket: WebSocket) -> str | bytes:
    message = await socket.receive()
    if message["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(message.get("code", 1006))
    return message.get("text") or message.get("bytes") or ""


async def _say(connection: Socket, refused: RefusedWorker) -> None:
    try:
        await connection.send_text(refused.answer.model_dump_json())
    except (RuntimeError, WebSocketDisconnect):
        log.debug("the worker went before it was told why")
