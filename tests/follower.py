"""A reader of a job's events that goes on at another router where it was cut off."""

from __future__ import annotations

import json
from typing import Any

import httpx


class Refused(Exception):
    """A router did not show the events, or broke off with an error in words. `status` of the answer."""

    def __init__(self, status: int, what: str) -> None:
        super().__init__(f"{status} {what[:300]}")
        self.status = status


class Follower:
    """Takes every character as it comes: what is said twice, or not at all, is seen in `text`."""

    def __init__(self, link: dict[str, Any], headers: dict[str, str]) -> None:
        self.text = ""
        self.last_id: str | None = None
        self.done: dict[str, Any] | None = None
        self.states: list[tuple[str, int]] = []
        self._attempt = 0
        self._link = link
        self._headers = headers

    async def read(self, http: httpx.AsyncClient, *, at_least: int | None = None) -> None:
        """Until the end, or until so many characters have been read; or until the line breaks.

        Raises Refused.
        """
        headers = self._headers | ({"Last-Event-ID": self.last_id} if self.last_id else {})
        event_id: str | None = None
        try:
            async with http.stream("GET", self._link["events_url"], headers=headers) as reply:
                if reply.status_code != 200:
                    raise Refused(reply.status_code, (await reply.aread()).decode())
                async for line in reply.aiter_lines():
                    if line.startswith("id: "):
                        event_id = line.removeprefix("id: ")
                    elif line.startswith("data: "):
                        self._take(json.loads(line.removeprefix("data: ")))
                    elif not line:
                        self.last_id = event_id or self.last_id
                        if self.done or (at_least is not None and len(self.text) >= at_least):
                            return
        except httpx.HTTPError:
            return

    def _take(self, data: dict[str, Any]) -> None:
        if "error" in data:
            raise Refused(200, json.dumps(data))
        if isinstance(data["job"], dict):
            self.done = data["job"]
        elif "state" in data:
            self.states.append((data["state"], data["attempt"]))
            if data["attempt"] > self._attempt:
                # Another worker begins anew; nobody may have been told that the first one's counts.
                self._attempt, self.text = data["attempt"], ""
        else:
            self.text += data.get("text", "")

    @property
    def attempts(self) -> set[int]:
        """The attempts that it has read of; while a job waits for its first, there is none."""
        return {attempt for state, attempt in self.states if (state, attempt) != ("queued", 0)}

    @property
    def answer(self) -> str:
        """What is stored as the whole answer."""
        assert self.done is not None and self.done["state"] == "succeeded", self.done
        return self.done["result"]["choices"][0]["message"]["content"]
