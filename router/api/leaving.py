"""Work for a client that may leave before it is done."""

from __future__ import annotations

import asyncio
from types import TracebackType

from starlette.types import Receive, Scope

from router.api.short_ways import ClientLine, client_line


class ClientGone(Exception):
    """The client has closed its connection; nobody reads the answer."""


class UnlessGone:
    """What is awaited within is cancelled as soon as the client leaves; then this raises ClientGone.

    Nothing else may receive of the request meanwhile. Where the server tells of the leave by itself
    nobody has to listen for it: a task for that would cost as much as pricing a job does.
    """

    __slots__ = ("_left", "_line", "_listening", "_receive", "_task")

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self._line: ClientLine | None = client_line(scope)
        self._receive = receive
        self._listening: asyncio.Task[None] | None = None
        self._left = False

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        if self._line is not None:
            self._line.on_gone(self._stop)
        else:
            self._listening = asyncio.create_task(_until_gone(self._receive))
            self._listening.add_done_callback(self._heard)

    def _heard(self, listening: asyncio.Task[None]) -> None:
        if not listening.cancelled():
            self._stop()

    def _stop(self) -> None:
        self._left = True
        self._task.cancel()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._line is not None:
            self._line.on_gone(None)
        if self._listening is not None:
            self._listening.remove_done_callback(self._heard)
            self._listening.cancel()
        # Somebody else may have cancelled the task as well: then that is what it ends by.
        if self._left and self._task.uncancel() == 0 and kind is asyncio.CancelledError:
            raise ClientGone from None


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
