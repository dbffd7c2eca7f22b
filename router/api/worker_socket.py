"""`WS /worker`: the door of workers. One text frame registers, the rest is `router.worker_sessions`."""

from __future__ import annotations

import asyncio
import logging

import orjson
from fastapi import APIRouter, WebSocket, WebSocketDisconnect

from router.core import Core
from router.database import DatabaseUnavailable
from router.sessions import RefusedWorker
from router.worker_sessions import ProtocolViolation, WorkerSession

log = logging.getLogger(__name__)

router = APIRouter()
REGISTRATION_S = 20.0
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
    try:
        session = await _register(core, socket, connection)
        while True:
            session.on_frame(await _receive(socket))
    except WebSocketDisconnect:
        pass
    except RefusedWorker as refused:
        log.info("worker refused code=%s", refused.answer.code)
        await _say(connection, refused)
        await connection.close(LATER if refused.answer.retryable else POLICY, refused.answer.code)
    except ProtocolViolation as violation:
        log.warning("worker broke the protocol: %s", violation)
        await connection.close(POLICY, str(violation))
    except DatabaseUnavailable:
        await connection.close(LATER, "the database is away")
    finally:
        if session is not None:
            core.gate.leave(session)


async def _register(core: Core, socket: WebSocket, connection: Socket) -> WorkerSession:
    try:
        async with asyncio.timeout(REGISTRATION_S):
            raw = orjson.loads(await _receive(socket))
    except TimeoutError:
        raise ProtocolViolation("no registration came") from None
    except orjson.JSONDecodeError:
        raise RefusedWorker("bad_registration", "the registration is not JSON") from None
    return await core.gate.register(raw, connection)


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
