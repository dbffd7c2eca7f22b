"""Questions that one router asks another, over a bus that promises nothing.

A question is sent again until it is answered or its time is over. The other router does what is asked
once, however often it hears it, and gives the same answer each time; so whoever asks again with a new
question after `NoAnswer` asks somebody who may have done it already.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from typing import Any

import orjson

from router.bus import MOST_BYTES
from router.relay import Relay

log = logging.getLogger(__name__)

AGAIN_S = 1.0
# How long an answer is kept for whoever has not heard it.
KEPT_S = 60.0

Answer = Callable[[list[Any]], Coroutine[Any, Any, Any]]


class NoAnswer(Exception):
    """The other router said nothing in time: it may have done what was asked, or not."""


class FarCalls:
    """Asks, and answers what `answer_with` knows. What is asked and answered is plain JSON."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._answers: dict[str, Answer] = {}
        self._asked: dict[str, asyncio.Future[Any]] = {}
        # What others have asked, with the answer as soon as there is one.
        self._heard: OrderedDict[tuple[str, str], tuple[float, asyncio.Task[Any]]] = OrderedDict()
        relay.listen("ask", self._on_ask)
        relay.listen("reply", self._on_reply)

    def answer_with(self, what: str, how: Answer) -> None:
        """`how` is given what the question brings; what it raises is logged, and answers nothing."""
        self._answers[what] = how

    async def stop(self) -> None:
        tasks = [task for _, task in self._heard.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def ask(self, router_id: str, what: str, *brings: Any, within_s: float) -> Any:
        """The other router's answer. Raises NoAnswer, at once while the bus is away."""
        if len(orjson.dumps(brings)) > MOST_BYTES:
            raise NoAnswer("too long to be sent to another router")
        question = secrets.token_hex(8)
        answered = self._asked[question] = asyncio.get_running_loop().create_future()
        until = time.monotonic() + within_s
        try:
            while (left_s := until - time.monotonic()) > 0 and self._relay.bus.up:
                self._relay.bus.send(router_id, ["ask", question, what, list(brings)])
                done, _ = await asyncio.wait([answered], timeout=min(AGAIN_S, left_s))
                if done:
                    return answered.result()
        finally:
            del self._asked[question]
        raise NoAnswer("the other router does not answer")

    def _on_ask(self, sender: str, question: str, what: str, brings: list[Any]) -> None:
        how = self._answers.get(what)
        if how is None:
            return  # A newer router may ask what we do not know.
        heard = self._heard.get((sender, question))
        if heard is None:
            self._forget()
            task = asyncio.get_running_loop().create_task(how(brings), name=f"answer-{what}")
            self._heard[sender, question] = time.monotonic(), task
            task.add_done_callback(lambda done: self._reply(sender, question, done))
        elif heard[1].done():
            self._reply(sender, question, heard[1])

    def _reply(self, to: str, question: str, task: asyncio.Task[Any]) -> None:
        if task.cancelled():
            return
        if (error := task.exception()) is not None:
            log.error("a question of another router failed", exc_info=error)
            return
        self._relay.bus.send(to, ["reply", question, task.result()])

    def _forget(self) -> None:
        old = time.monotonic() - KEPT_S
        while self._heard and (first := next(iter(self._heard.values())))[0] < old:
            if not first[1].done():
                return
            self._heard.popitem(last=False)

    def _on_reply(self, sender: str, question: str, answer: Any) -> None:
        asked = self._asked.get(question)
        if asked is not None and not asked.done():
            asked.set_result(answer)
