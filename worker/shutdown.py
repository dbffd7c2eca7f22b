"""The wish to stop: once politely, twice at once."""

from __future__ import annotations

import asyncio
import signal

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Shutdown:
    """`asked` by the first signal, `hurried` by the second. Belongs to one event loop."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.hurried = asyncio.Event()

    def ask(self) -> None:
        """Stop when what runs has ended; called again: without waiting for it."""
        if self.asked.is_set():
            self.hurried.set()
        self.asked.set()

    def listen(self) -> None:
        """SIGINT and SIGTERM ask from now on. Only in the main thread."""
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self.ask)

    def unlisten(self) -> None:
        """Give the signals back."""
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.remove_signal_handler(number)
