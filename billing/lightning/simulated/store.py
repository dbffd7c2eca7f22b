"""SQLite behind one thread, many acts to a commit.

Every act runs in a savepoint of its own: one that raises undoes only itself. Acts that arrive
while a commit is being flushed share the next one, so that a thousand invoices a second need not
a thousand flushes. An act's caller goes on only after its commit is on the disk.
"""

from __future__ import annotations

import asyncio
import queue
import sqlite3
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

_BATCH_MAX = 256


@dataclass(slots=True)
class Transaction:
    """What an act is given: the connection, and a list for what to tell others once committed."""

    connection: sqlite3.Connection
    notes: list[Any] = field(default_factory=list)

    def row(self, sql: str, *values: object) -> sqlite3.Row | None:
        return self.connection.execute(sql, values).fetchone()

    def rows(self, sql: str, *values: object) -> list[sqlite3.Row]:
        return self.connection.execute(sql, values).fetchall()

    def run(self, sql: str, *values: object) -> sqlite3.Cursor:
        return self.connection.execute(sql, values)


@dataclass(slots=True)
class _Waiting:
    act: Callable[[Transaction], Any]
    done: asyncio.Future[Any]
    result: Any = None
    error: BaseException | None = None
    notes: list[Any] = field(default_factory=list)


class Store:
    """The database at `path`, created with `schema` if it is new. `on_commit` is called in the
    event loop with the notes of each act, whether or not its caller still waits."""

    def __init__(self, path: Path, schema: str, on_commit: Callable[[list[Any]], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_commit = on_commit
        self._waiting: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._closed = False
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._connection.row_factory = sqlite3.Row
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = FULL")
        # In one transaction: a flush for each table would be felt at every start.
        self._connection.executescript(f"BEGIN; {schema} COMMIT;")
        self._thread = threading.Thread(target=self._work, name="simulated-lightning", daemon=True)
        self._thread.start()

    async def run(self, act: Callable[[Transaction], T]) -> T:
        """What `act` returns, once it is committed; what it raises, once it is undone. Cancelling
        the caller does not stop the act."""
        if self._closed:
            raise sqlite3.ProgrammingError("the simulated network is closed")
        waiting = _Waiting(act, self._loop.create_future())
        self._waiting.put(waiting)
        return await waiting.done

    async def aclose(self) -> None:
        """Finish what was asked, then close the file. Twice is harmless."""
        if self._closed:
            return
        self._closed = True
        self._waiting.put(None)
        await asyncio.to_thread(self._thread.join)
        self._connection.close()

    def _work(self) -> None:
        while (first := self._waiting.get()) is not None:
            batch, more = self._batch(first)
            try:
                self._commit(batch)
            except sqlite3.Error as error:
                # The disk is full or gone: nothing of this batch has happened.
                for waiting in batch:
                    waiting.error, waiting.notes = error, []
                if self._connection.in_transaction:
                    self._connection.rollback()
            self._loop.call_soon_threadsafe(self._tell, batch)
            if not more:
                return

    def _batch(self, first: _Waiting) -> tuple[list[_Waiting], bool]:
        batch = [first]
        while len(batch) < _BATCH_MAX:
            try:
                waiting = self._waiting.get_nowait()
            except queue.Empty:
                break
            if waiting is None:
                return batch, False
            batch.append(waiting)
        return batch, True

    def _commit(self, batch: list[_Waiting]) -> None:
        self._connection.execute("BEGIN IMMEDIATE")
        for waiting in batch:
            transaction = Transaction(self._connection)
            self._connection.execute("SAVEPOINT act")
            try:
                waiting.result = waiting.act(transaction)
                waiting.notes = transaction.notes
            except Exception as error:
                # Whatever it is, it is its caller's to see, and the others' work goes on.
                waiting.error = error
                self._connection.execute("ROLLBACK TO act")
            self._connection.execute("RELEASE act")
        self._connection.execute("COMMIT")

    def _tell(self, batch: list[_Waiting]) -> None:
        for waiting in batch:
            if waiting.notes:
                self._on_commit(waiting.notes)
            if waiting.done.done():
                continue
            if waiting.error is not None:
                waiting.done.set_exception(waiting.error)
            else:
                waiting.done.set_result(waiting.result)
