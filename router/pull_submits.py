"""Answers of workers that poll, at whichever router they come: only one holds what is answered.

The id of a job that was handed out names the router that did so, in its last 48 bits. Another one
passes the answer on to it, and its word back. Where that cannot be had, the worker is told to try again
(503): nothing is lost by that, as the same answer of the same owner is taken once, and is told each
time what it was told first. A job whose router is lost has been taken back meanwhile.

What crosses is the hash of the owner's secret, never the secret.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from router.errors import RouterSilent
from router.far_calls import FarCalls, NoAnswer
from router.presence import Presence
from router.pull_sessions import (
    MOST_REMEMBERED,
    REMEMBERED_S,
    SETTLE_S,
    End,
    HandedOut,
    router_of,
    storable,
)

# Longer than the other router waits for the books.
WITHIN_S = SETTLE_S + 5.0
FIND_WITHIN_S = 5.0
_SILENT = "the router that gave this job does not answer; send the same again"


@dataclass(frozen=True, slots=True)
class Word:
    """What is said to an answer: what it earned, or why it is not taken.

    `earned_msat` None: not taken. Then `ended` says how the job ended before, None for an id that is
    not known, and `wrong_owner` that the secret is somebody else's.
    """

    earned_msat: int | None = None
    ended: End | None = None
    wrong_owner: bool = False

    def as_json(self) -> list[Any]:
        return [self.earned_msat, self.ended, self.wrong_owner]

    @classmethod
    def read(cls, said: list[Any]) -> Word:
        earned_msat, ended, wrong_owner = said
        return cls(earned_msat, End(ended) if ended is not None else None, wrong_owner)


@dataclass(slots=True)
class _Taken:
    """An answer that another router passed on: who hears our word is not sure."""

    at: float
    name: str
    fingerprint: bytes
    word: asyncio.Future[Word]


class PullSubmits:
    """Where the doors of workers that poll bring answers."""

    def __init__(
        self,
        handed_out: HandedOut,
        presence: Presence,
        calls: FarCalls,
        *,
        router_id: str,
    ) -> None:
        self._handed_out = handed_out
        self._presence = presence
        self._calls = calls
        self._router_id = router_id
        self._taken: OrderedDict[str, _Taken] = OrderedDict()
        calls.answer_with("pull-name", self._told_name)
        calls.answer_with("pull-submit", self._told_answer)

    async def name_of(self, given_id: str) -> tuple[str | None, End | None]:
        """The name of the worker that may bring an answer; without one, how the job ended.

        Raises RouterSilent.
        """
        router_id = self._router(given_id)
        if router_id is None:
            return self._name_here(given_id)
        if self._presence.is_lost(router_id):
            return None, End.ABORTED
        name, ended = await self._ask(router_id, "pull-name", given_id, within_s=FIND_WITHIN_S)
        return name, End(ended) if ended is not None else None

    async def submit(self, given_id: str, owner_hash: bytes, text: str | None) -> Word:
        """An answer, None: the worker says that it failed. Raises RouterSilent."""
        text = storable(text) if text is not None else None
        router_id = self._router(given_id)
        if router_id is None:
            return await self._submit_here(given_id, owner_hash, text)
        if self._presence.is_lost(router_id):
            return Word(ended=End.ABORTED)
        said = await self._ask(
            router_id, "pull-submit", given_id, owner_hash.hex(), text, within_s=WITHIN_S
        )
        return Word.read(said)

    def _router(self, given_id: str) -> str | None:
        """The other router that handed this out; None: this one, or nobody that we know."""
        return router_of(given_id, self._presence.others_known())

    async def _ask(self, router_id: str, what: str, *brings: Any, within_s: float) -> Any:
        try:
            return await self._calls.ask(router_id, what, *brings, within_s=within_s)
        except NoAnswer:
            raise RouterSilent(_SILENT) from None

    def _name_here(self, given_id: str) -> tuple[str | None, End | None]:
        held = self._handed_out.get(given_id)
        if held is not None:
            return held.session.offered.name, None
        taken = self._taken.get(given_id)
        if taken is not None:
            return taken.name, None
        return None, self._handed_out.ended(given_id)

    async def _submit_here(self, given_id: str, owner_hash: bytes, text: str | None) -> Word:
        held = self._handed_out.get(given_id)
        if held is None:
            taken = self._taken.get(given_id)
            if taken is not None and taken.fingerprint == _fingerprint(owner_hash, text):
                return await asyncio.shield(taken.word)
            return Word(ended=self._handed_out.ended(given_id))
        if held.session.owner_hash != owner_hash:
            return Word(wrong_owner=True)
        if text is None:
            earned_msat = 0 if held.session.faulted(held, "said so itself") else None
        else:
            earned_msat = await held.session.answered(held, text)
        if earned_msat is None:
            return Word(ended=self._handed_out.ended(given_id))
        return Word(earned_msat)

    # --- for other routers ---------------------------------------------------------------------

    async def _told_name(self, brings: list[Any]) -> list[Any]:
        return list(self._name_here(brings[0]))

    async def _told_answer(self, brings: list[Any]) -> list[Any]:
        given_id, owner_hash, text = brings[0], bytes.fromhex(brings[1]), brings[2]
        held = self._handed_out.get(given_id)
        if held is None or held.session.owner_hash != owner_hash:
            return (await self._submit_here(given_id, owner_hash, text)).as_json()
        word: asyncio.Future[Word] = asyncio.ensure_future(
            self._submit_here(given_id, owner_hash, text)
        )
        self._remember(given_id, held.session.offered.name, _fingerprint(owner_hash, text), word)
        return (await asyncio.shield(word)).as_json()

    def _remember(
        self, given_id: str, name: str, fingerprint: bytes, word: asyncio.Future[Word]
    ) -> None:
        now = time.monotonic()
        self._taken[given_id] = _Taken(now, name, fingerprint, word)
        while (
            len(self._taken) > MOST_REMEMBERED
            or next(iter(self._taken.values())).at < now - REMEMBERED_S
        ):
            self._taken.popitem(last=False)


def _fingerprint(owner_hash: bytes, text: str | None) -> bytes:
    said = b"" if text is None else b"\1" + text.encode()
    return hashlib.sha256(owner_hash + said).digest()
